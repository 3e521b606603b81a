"""The model that comes with the package: packed, unpacked, and found by the name `demo`."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.agents import registry
from reverie.commands import packaged
from reverie.commands.collect.dataset import write_dataset
from reverie.commands.experiment import Recorded, describe, load
from reverie.commands.play.setup import check_params
from reverie.io import write_json
from reverie.training import checkpoint
from reverie.types import UserError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'breakout'
    write_dataset(path, 'minatar/breakout', 'random', 2000, episodes=2)
    return path


def write(folder: pathlib.Path, data: pathlib.Path, seeds: int = 1, complete: bool = True):
    """A run folder as training leaves it, with fresh weights."""
    experiment = Recorded(
        'dreamer4_debug',
        registry.get('dreamer4_debug'),
        'minatar/breakout',
        seeds=seeds,
        data=(data,),
    )
    agent = experiment.agent
    keys = jax.random.split(jax.random.key(0), seeds)
    params = jax.tree.map(lambda *x: jnp.stack(x), *map(agent.init, keys))
    phases = {phase.name: {'steps': phase.steps} for phase in agent.phases}
    config = {'seed': 0, 'seeds': seeds, 'phases': phases, **experiment.describe()}
    folder.mkdir(parents=True)
    write_json(folder / 'config.json', config)
    write_json(folder / 'scores.json', {'preset': 'dreamer4_debug', 'score': {}})
    meta = dict(
        phase='imagine', phase_index=3, step=4, complete=complete, gradient_steps=16, env_frames=0,
        seconds=1.0, seeds=seeds, config=config, source={'key': 1},
    )  # fmt: skip
    checkpoint.save(folder / 'checkpoints', 16, params, None, meta)
    return params


def test_what_is_unpacked_is_the_run_in_half_precision_with_episodes_to_begin_from(data, tmp_path):
    params = write(tmp_path / 'run', data)
    packaged.pack(tmp_path / 'run', tmp_path / 'packed')
    folder = packaged.unpack(tmp_path / 'packed', tmp_path / 'cache')
    experiment, found = load(folder)
    assert isinstance(experiment, Recorded) and experiment.has_data
    assert 10 <= len(experiment.episodes) <= packaged.EPISODES
    assert experiment.data[0].parent == folder.parent  # and not where the run had it
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)
    assert str(tmp_path) not in (tmp_path / 'packed' / 'run.json').read_text()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    assert packaged.unpack(tmp_path / 'packed', tmp_path / 'cache') == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_another_model_is_unpacked_beside_the_first(data, tmp_path):
    write(tmp_path / 'run', data)
    packaged.pack(tmp_path / 'run', tmp_path / 'packed')
    first = packaged.unpack(tmp_path / 'packed', tmp_path / 'cache')
    saved = json.loads((tmp_path / 'packed' / 'run.json').read_text())
    write_json(tmp_path / 'packed' / 'run.json', saved | {'scores': {'score': {'new': 1}}})
    second = packaged.unpack(tmp_path / 'packed', tmp_path / 'cache')
    assert first != second and first.exists()
    assert json.loads((second / 'scores.json').read_text()) == {'score': {'new': 1}}
    assert sorted(p.name for p in (tmp_path / 'cache').iterdir()) == sorted(
        p.parent.name for p in (first, second)
    )


def test_runs_that_are_no_demo_and_a_broken_package_are_refused_in_one_line(data, tmp_path):
    write(tmp_path / 'two', data, seeds=2)
    with pytest.raises(UserError, match='one seed on one dataset'):
        packaged.pack(tmp_path / 'two', tmp_path / 'packed')
    write(tmp_path / 'begun', data, complete=False)
    with pytest.raises(UserError, match='in the middle of phase imagine; expected a finished run'):
        packaged.pack(tmp_path / 'begun', tmp_path / 'packed')
    with pytest.raises(UserError, match='half precision'):
        packaged._half(np.array([1e5], np.float32))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=r'weights\.npz, run\.json missing'):
        packaged.unpack(tmp_path / 'empty', tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


def test_the_name_demo_is_the_package_s_model_unless_a_run_is_called_so(
    data, tmp_path, monkeypatch
):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    assert packaged.run_folder('runs/demo') == pathlib.Path('runs/demo')
    folder = packaged.run_folder('demo')
    assert folder.is_relative_to(tmp_path / 'cache' / 'reverie')
    experiment, params = load(folder)
    one = jax.tree.map(lambda x: x[0], params)
    check_params(experiment.agent, one, 'demo')
    size = sum(path.stat().st_size for path in packaged.home().rglob('*') if path.is_file())
    assert size <= 5_000_000
    scores = json.loads((folder / 'scores.json').read_text())['score']
    assert scores['imagination']['mean'] > 3 * scores['random']['mean']
    write(tmp_path / 'demo', data)
    assert packaged.run_folder('demo') == pathlib.Path('demo')
    assert describe(packaged.run_folder('demo')).preset == 'dreamer4_debug'
