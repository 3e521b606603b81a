"""The curve over label fractions: every model once, on one tokenizer, measured on what is held out."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from reverie.commands.collect.dataset import write_dataset
from reverie.data import Episodes

SCRIPT = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'labels.py'


@pytest.fixture(scope='module')
def labels():
    spec = importlib.util.spec_from_file_location('benchmarks_labels', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def dreams(psnr):
    """The numbers of one seed, as `recordings.measure` has them."""
    likeness = {name: {'psnr': {'mean': psnr[name]}} for name in ('true', 'none')}
    worth = psnr['true'] - psnr['shuffled']
    return likeness | {'differences': {'true - shuffled': {'psnr': {'mean': worth}}}}


def test_figures_are_put_between_none_and_all_of_the_labels(labels):
    seeds = {
        '0': [dict(true=7.0, none=20.0, shuffled=7.0), dict(true=3.0, none=22.0, shuffled=3.0)],
        '0.1': [
            dict(true=24.0, none=20.0, shuffled=21.0),
            dict(true=26.0, none=22.0, shuffled=24.0),
        ],
        '1': [dict(true=30.0, none=20.0, shuffled=21.0), dict(true=32.0, none=22.0, shuffled=24.0)],
    }
    each = {
        labels.Arm(name, ()): {'recordings': [dreams(psnr) for psnr in found]}
        for name, found in seeds.items()
    }
    rows = {row['name']: row for row in labels.figures(each)}
    assert rows['0']['psnr']['mean'] == 21 and rows['0']['dreams_under'] == 'none'
    scaled = {name: row['psnr']['normalised']['mean'] for name, row in rows.items()}
    assert scaled == pytest.approx({'0': 0.0, '0.1': 0.4, '1': 1.0})
    worth = rows['0.1']['true - shuffled']['psnr']
    # t of two values: mean 2.5, half-width 12.706 * 0.5 / sqrt(2) * sqrt(2)
    assert worth['per_seed'] == [3.0, 2.0] and worth['ci95'] == pytest.approx(
        [-3.853, 8.853], abs=1e-3
    )


@pytest.mark.whole
def test_one_command_trains_measures_and_repeats_nothing(labels, tmp_path, capsys):
    data = tmp_path / 'data'
    write_dataset(data, 'minatar/breakout', 'random', 3000, episodes=2, holdout=0.25)
    episodes = Episodes(data)
    assert len(episodes.held_out) == len(episodes) // 4
    words = ['--data', str(data), '--preset', 'dreamer4_debug', '--fractions', '0', '1']
    words += ['--seeds', '2', '--steps', 'dynamics=2', '--out', str(tmp_path / 'runs')]
    words += ['--results', str(tmp_path / 'r.json')]
    assert labels.main(words) == 0
    first = json.loads((tmp_path / 'r.json').read_text())
    none, every = first['models']
    assert none['labelled_frames'] == 0 and every['labelled_frames'] == every['frames']
    assert every['frames'] == sum(map(len, episodes.only('train').records()))
    assert every['psnr']['n'] == 2 and np.isfinite(every['psnr']['mean'])
    assert every['recordings'][0]['held_out'] and 'lpips' not in every
    assert f'--from {tmp_path}/runs/tokenizer:tokenizer' in every['command']
    encoders = [
        json.loads((tmp_path / 'runs' / name / 'config.json').read_text())['from']['phases']
        for name in ('0', '1')
    ]
    assert all(list(phases) == ['tokenizer'] for phases in encoders)
    capsys.readouterr()
    assert labels.main(words) == 0
    assert 'labels: reverie train' not in capsys.readouterr().out
    again = json.loads((tmp_path / 'r.json').read_text())
    assert again['models'] == first['models']


def test_what_cannot_be_measured_is_refused_in_a_line(labels, tmp_path, capsys):
    write_dataset(tmp_path / 'data', 'minatar/breakout', 'random', 100, episodes=2)
    words = ['--data', str(tmp_path / 'data'), '--results', str(tmp_path / 'r.json')]
    assert labels.main(words) != 0
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'expected recordings that are held out' in said
