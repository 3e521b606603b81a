"""The plots of the results folder are made from its JSON files alone."""

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest

from reverie.evaluation import results

pytest.importorskip('matplotlib')
SCRIPT = pathlib.Path(__file__).parents[2] / 'results' / 'plot.py'


@pytest.fixture(scope='module')
def plot():
    spec = importlib.util.spec_from_file_location('results_plot', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(folder, game, own, preset='dreamer4', env_frames=1, curve=None, **more):
    record = results.record(
        preset=preset,
        env=f'minatar/{game}',
        command='reverie train',
        seeds=[0, 1],
        seconds=1.0,
        env_frames=env_frames,
        gradient_steps={},
        reference=10.0,
        scores={'random': [0.0, 0.0], 'imagination': own, **more},
        curve=curve,
    )
    results.save(folder / preset / f'minatar_{game}.json', record)


def test_a_preset_gets_its_plots_and_the_iqm_over_games_and_seeds(plot, tmp_path, capsys):
    save(tmp_path, 'breakout', [[1.0, 3.0], [4.0, 4.0]])  # runs 0.2 and 0.4
    save(tmp_path, 'freeway', [[6.0, 6.0], [100.0, 100.0]])  # runs 0.6 and 10
    assert plot.main(tmp_path, []) == 0
    assert '0.500' in capsys.readouterr().out  # of four runs the middle two: (0.4 + 0.6) / 2
    for name in ('scores.svg', 'aggregate.svg'):
        text = (tmp_path / 'dreamer4' / name).read_text()
        assert text.startswith('<?xml') and 'Imagination RL' in text
    assert 't over 2 seeds' in (tmp_path / 'dreamer4' / 'scores.svg').read_text()
    assert 't over 2 seeds in each of 2 games' in text
    assert not (tmp_path / 'dreamer4' / 'curves.svg').exists()
    assert not (tmp_path / 'dreamer4' / 'differences.svg').exists()
    rows = {row[0]: row for row in plot.aggregate(plot.read(tmp_path / 'dreamer4'))}
    np.testing.assert_allclose(rows['random'][1], 0.0)


def test_read_outs_that_share_world_models_get_a_plot_and_a_table_of_their_differences(
    plot, tmp_path, capsys
):
    save(tmp_path, 'breakout', [[5.0], [6.0], [7.0]], wm_bc=[[3.0], [5.0], [4.0]])  # 2, 1, 3
    assert plot.main(tmp_path, []) == 0
    assert (
        '| Imagination RL minus WM + BC | 2.00 | -0.48 to 4.48 |  |  | t over 3 seeds |'
        in capsys.readouterr().out
    )
    text = (tmp_path / 'dreamer4' / 'differences.svg').read_text()
    assert 'Imagination RL minus WM + BC, sampled' in text and 't over 3 seeds' in text


def test_figures_are_those_of_the_returns_and_are_written_back_only_when_asked(plot, tmp_path):
    save(tmp_path, 'breakout', [[5.0], [6.0], [7.0]])
    path = tmp_path / 'dreamer4' / 'minatar_breakout.json'
    right = path.read_text()
    stale = json.loads(right)
    stale['score']['imagination']['ci95'] = [5.0, 7.0]
    path.write_text(json.dumps(stale))
    assert (
        plot.read(tmp_path / 'dreamer4') == [json.loads(right)]
        and json.loads(path.read_text()) == stale
    )
    assert plot.main(tmp_path, [], write=True) == 0
    assert path.read_text() == right


def test_two_presets_come_into_one_plot_of_the_games_they_share(plot, tmp_path):
    for preset, game, own in (
        ('a', 'breakout', [[1.0]]),
        ('b', 'breakout', [[2.0]]),
        ('b', 'freeway', [[9.0]]),
    ):
        save(tmp_path, game, own, preset)
    assert plot.main(tmp_path, ['a', 'b']) == 0
    text = (tmp_path / 'a_b.svg').read_text()
    assert 'a: 1.00' in text and 'b: 2.00' in text and 'freeway' not in text


def test_curves_stand_beside_the_ppo_and_what_others_published_for_as_many_frames(
    plot, tmp_path, monkeypatch
):
    shutil.copy(SCRIPT.with_name('published.json'), tmp_path)
    monkeypatch.setattr(plot, 'FOLDER', tmp_path)
    (tmp_path / 'ppo').mkdir()
    ppo = {'curve': {'env_frames': [1e6, 1e7], 'return_per_seed': [[20.0, 42.0], [10.0, 44.0]]}}
    (tmp_path / 'ppo' / 'minatar_breakout-minatar-default-10m.json').write_text(json.dumps(ppo))
    curve = dict(
        env_frames=[5e5, 1e6], seconds=[1.0, 2.0], return_per_seed=[[1.0, 8.0], [2.0, 9.0]]
    )
    for preset in 'ab':
        save(tmp_path, 'breakout', [[8.0], [9.0]], preset, env_frames=1_000_000, curve=curve)
    assert plot.main(tmp_path, ['a', 'b']) == 0
    for path in (tmp_path / 'a' / 'curves.svg', tmp_path / 'a_b.svg'):
        text = path.read_text()
        assert (
            'DQN' in text and 'Dreamer V2' in text and 'PPO, protocol minatar, 10.0M: 43.0' in text
        )
        assert 'AC(0.8)' not in text  # known after 5M frames only


def test_a_preset_without_results_is_refused(plot, tmp_path, capsys):
    assert plot.main(tmp_path, ['dreamer9']) == 2
    assert 'no results in' in capsys.readouterr().err
