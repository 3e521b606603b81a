"""Commands of runs on several datasets: what `--data`, `--weights` and `--task` take and refuse."""

import dataclasses
import json

import numpy as np
import pytest

import reverie
from reverie.agents import registry
from reverie.commands.experiment import Recorded, describe, tasks
from reverie.commands.play.setup import resolve_play
from reverie.commands.train import experiment_of, parse_train
from reverie.data import Episodes, Mixture
from reverie.types import UserError
from tests.probes import Ends, left, record, right


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data')
    record(path / 'a', left(), 'go left', 4, 20)
    record(path / 'b', right(), 'go right', 4, 20)
    return path / 'a', path / 'b'


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    """A run on both, saved before it has learnt anything."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    experiment = recorded(data)
    folder.mkdir()
    about = json.loads(json.dumps(experiment.describe() | {'seed': 0, 'seeds': 1}))
    (folder / 'config.json').write_text(json.dumps(about))
    return folder


def recorded(data, **how):
    return Recorded(
        'dreamer4_debug', registry.get('dreamer4_debug'), 'tests.probes:left', data=data, **how
    )


def test_train_takes_several_datasets_with_weights_in_one_budget(data):
    both = ('--data', str(data[0]), '--data', str(data[1]), '--weights', '1', '3')
    args = parse_train('dreamer4_debug', *both, '--memory-gb', '1e-6')
    experiment = experiment_of(args, 'dreamer4_debug')
    assert experiment.env_name == 'tests.probes:left'
    assert experiment.spec.tasks == ('go left', 'go right')
    source = experiment.source
    assert isinstance(source, Mixture)
    assert [type(part).__name__ for part in source.parts] == ['Streaming', 'Streaming']
    np.testing.assert_array_equal(source.weights, [0.25, 0.75])
    with pytest.raises(UserError, match='--memory-gb 0: expected a positive'):
        experiment_of(parse_train('dreamer4_debug', *both, '--memory-gb', '0'), 'dreamer4_debug')
    with pytest.raises(UserError, match='weights 1: expected 2 positive numbers'):
        experiment_of(parse_train('dreamer4_debug', *both[:-1]), 'dreamer4_debug')


def test_the_library_takes_one_dataset_or_several(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Recorded, 'train', lambda self, folder, init: {})
    both = reverie.train('dreamer4_debug', folder=tmp_path, data=data, weights=(1.0, 3.0))
    assert both.experiment.data == data and both.experiment.weights == (1, 3)
    assert both.experiment.env_name == 'tests.probes:left' and both.experiment.spec.tasks
    one = reverie.train('dreamer4_debug', folder=tmp_path, data=str(data[1]))
    assert one.experiment.data == data[1:] and one.experiment.env_name == 'tests.probes:right'


def test_a_run_on_several_datasets_is_read_back(run, data):
    again = describe(run)
    assert again.data == data and again.weights == (1.0, 1.0)
    assert again.spec.tasks == ('go left', 'go right') and again.task_name == 'go left'
    assert describe(run, data[::-1]).episodes.path == data[0]  # tasks go by their names
    with pytest.raises(UserError, match='expected 2, as'):
        describe(run, data[:1])


def test_a_run_on_one_dataset_keeps_its_entry_data_and_has_no_task(data):
    facts = recorded(data[:1]).facts
    assert facts['data'] == str(data[0]) and not {'tasks', 'weights'} & set(facts)
    assert facts['dataset'] == Episodes(data[0]).fingerprint
    experiment = recorded(data[:1])
    assert experiment.told() == (experiment,) and experiment.told('go left') == (experiment,)
    assert experiment.task_name is None and experiment.spec.tasks == ()


def test_tasks_are_told_by_name_and_near_names_are_suggested(run):
    first, second = describe(run).told()
    assert (first.env_name, second.env_name) == ('tests.probes:left', 'tests.probes:right')
    assert second.game.env == Ends(1) and second.agent.task == 1
    assert second.episodes.task == 'go right'
    assert first.told('go right')[0].task == 1 and second.told('go left')[0].task == 0
    with pytest.raises(UserError, match="'go rigth': no task of the run; did you mean go right"):
        first.told('go rigth')
    with pytest.raises(UserError, match=r"'swim': .*, expected one of go left, go right"):
        first.told('swim')


def test_tasks_are_known_without_the_data(run, tmp_path):
    config = json.loads((run / 'config.json').read_text())
    gone = {'data': [str(tmp_path / 'x'), str(tmp_path / 'y')]}
    (tmp_path / 'config.json').write_text(json.dumps(config | gone))
    second = describe(tmp_path).told('go right')[0]
    assert not second.has_data and second.game.env == Ends(1) and second.spec.tasks


def test_play_takes_a_task(run):
    assert resolve_play(str(run), None, {}, 0).agent.task == 0
    setup = resolve_play(str(run), None, {}, 0, task='go right')
    assert setup.agent.task == 1 and setup.title.endswith('tests.probes:right, task go right')
    with pytest.raises(UserError, match='a preset has no tasks'):
        resolve_play('dreamer4_debug', None, {}, 0, task='go right')


def test_the_files_of_further_tasks_lie_beside_those_of_the_first(tmp_path):
    known = [tasks.Task(name, 'e', {}) for name in ('a', 'b/c', 'b c')]
    files = [tasks.file_of(tmp_path / 'scores.json', known, i).name for i in range(3)]
    assert files == ['scores.json', 'scores-b_c.json', 'scores-b_c-2.json']


def test_a_task_whose_game_is_another_than_its_dataset_is_refused_before_training(data, tmp_path):
    class Other(Ends):
        @property
        def spec(self):
            return dataclasses.replace(super().spec, name='minatar/breakout')

    experiment = recorded((data[0], record(tmp_path / 'other', Other(), 'break out', 4, 20)))
    with pytest.raises(UserError, match=r'shape \[4, 4, 1\], expected \[10, 10, 4\]') as found:
        experiment.train(tmp_path / 'run')
    assert '\n' not in str(found.value) and not (tmp_path / 'run').exists()
