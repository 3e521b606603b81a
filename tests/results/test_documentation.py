"""The tables and plots of the documentation are those of the results files."""

import importlib.util
import json
import pathlib
import re
import shutil
import sys

import pytest

pytest.importorskip('matplotlib')
RESULTS = pathlib.Path(__file__).parents[2] / 'results'


def script(name):
    spec = importlib.util.spec_from_file_location(f'results_{name}', RESULTS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def tables():
    return script('tables')


def test_making_the_tables_again_changes_nothing(tables, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['tables.py', '--check'])
    assert tables.main() == 0, capsys.readouterr().out
    assert all((RESULTS.parent / page).read_text().count('<!-- results:') for page in tables.PAGES)


def test_plots_are_made_from_the_results_files_as_they_are(tmp_path):
    """The data of plots are compared, not the bytes, which depend on Matplotlib and its fonts."""
    shutil.copytree(
        RESULTS, tmp_path / 'results', ignore=shutil.ignore_patterns('*.svg', '*.py', '__pycache__')
    )
    assert script('plot').main(tmp_path / 'results', []) == 0
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob('*.svg')}
    kept = {path.relative_to(RESULTS.parent): path.read_text() for path in RESULTS.rglob('*.svg')}
    assert set(made) == set(kept)
    data = lambda text: re.search(r'<dc:source>\s*(sha256:\w{64})\s*</dc:source>', text)[1]
    assert {path: data(text) for path, text in made.items()} == {
        path: data(text) for path, text in kept.items()
    }


def page(tmp_path, tables, record, kind, name='a/b', inside=''):
    path = tmp_path / f'{name}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))
    return tables.fill(
        f'text\n<!-- results:{name} {kind} -->\n{inside}<!-- /results -->\nmore\n', tmp_path
    )


def test_only_what_stands_between_the_markers_is_made(tables, tmp_path):
    record = {
        'games': {'pong': {'reverie': {'steps_per_s': 1234567}, 'gymnax': {'steps_per_s': 89012}}}
    }
    filled = page(tmp_path, tables, record, 'games', inside='old\n')
    lines = ['| steps/s | reverie | gymnax |', '|---|---:|---:|', '| pong | 1,235,000 | 89,000 |']
    assert filled.splitlines() == [
        'text', '<!-- results:a/b games -->', *lines, '<!-- /results -->', 'more'
    ]  # fmt: skip
    assert tables.fill(filled, tmp_path) == filled


def test_the_source_is_named_with_seeds_and_commit(tables, tmp_path):
    record = dict(
        command='reverie train x',
        seeds=[3, 4],
        date='2026-01-02',
        device='CPU, 2 cores',
        commit='a' * 40,
    )
    said = page(
        tmp_path, tables, record | dict(gradient_steps={'online': 5}, seconds=1234.5), 'source'
    )
    expected = '* `reverie train x`: seeds 3, 4, 2026-01-02, CPU, 2 cores, commit `aaaaaaaaaaaa`, 1,234 s of training'
    assert said.splitlines()[2] == expected


@pytest.mark.parametrize('text', [
    '<!-- results:a/b tables -->\n<!-- /results -->', '<!-- results:a/c games -->\n<!-- /results -->',
    '<!-- results:a/b games -->\n', '<!-- results:a/b -->\n<!-- /results -->',
])  # fmt: skip
def test_markers_that_cannot_be_filled_are_refused(tables, tmp_path, text):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'b.json').write_text('{"games": {}}')
    with pytest.raises(ValueError, match='results:'):
        tables.fill(text, tmp_path)


def test_an_ablation_is_named_by_what_was_changed(tables, tmp_path):
    cells = lambda recall: {'recall': {'per_seed': recall}, 'precision': {'per_seed': [1.0, 0.98]}}
    channel = lambda a, b: {'tokenizer': cells(a), 'dream': [cells(b)]}
    record = {
        'env': 'minatar/pong',
        'seeds': [0, 1],
        'command': 'reverie train x --config.no-policy --config.mixed-steps --config.a.b 0.5 --seeds 2',
        'trust': {
            'steps': [[9, 16]],
            'channels': [channel([0.9, 0.94], [0.4, 0.6]), channel([1.0, 1.0], [0.6, 0.6])],
        },
    }
    row = page(tmp_path, tables, record, 'ablation').splitlines()[4].split(' | ')
    assert row[0] == '| minatar/pong: mixed-steps, a.b 0.5' and row[-1] == '2 |'
    assert [cell.split()[0] for cell in row[1:4]] == ['0.920', '0.990', '0.550']
    assert '(0.666 to 1.174)' in row[1]  # t of two values: half-width 12.706 * 0.02


def test_a_label_curve_says_shares_worth_and_steering(tables, tmp_path):
    figure = {'mean': 20.5, 'ci95': None, 'normalised': {'mean': 0.85}}
    models = [
        {
            'name': name,
            'labelled_frames': 1200,
            'psnr': figure,
            'true - shuffled': {'psnr': {'mean': 1.5, 'ci95': [1.0, 2.0]}},
            'steering': {'turn': {'mean': 0.75}},
        }
        for name in ('0.1', 'files')
    ]
    lines = page(tmp_path, tables, {'models': models}, 'labels').splitlines()
    cells = '1,200 | 20.50, 85% | +1.50 (1.00 to 2.00) | turn 75%'
    assert lines[4:6] == [f'| 10% | {cells} |', f'| the named files | {cells} |']


def test_dreams_of_recordings_stand_beside_what_their_actions_are_worth(tables, tmp_path):
    at = lambda mean, ci95=None: {'psnr': {'mean': mean, 'ci95': ci95}}
    found = {
        'contexts': 64,
        'tokenizer': {'psnr': 28.456},
        'true': at(20.4),
        'held': at(19.3),
        'differences': {'true - held': at(1.05, [0.57, 1.61])},
    }
    lines = page(tmp_path, tables, {'recordings': [found]}, 'recordings').splitlines()
    assert lines[2] == '| 64 contexts | PSNR |'
    assert lines[4:7] == [
        '| Encoded and decoded | 28.46 |',
        '| Dream under the true actions | 20.40 |',
        '| The last frame held still | 19.30 |',
    ]
    assert lines[10] == '| true - held | +1.05 (0.57 to 1.61) |'


def test_a_compiled_program_stands_beside_the_one_before(tables, tmp_path):
    program = {'launches': 4830, 'copies': 84, 'peak_bytes': 2**30, 'compile_seconds': 64.8}
    record = {'programs': {'a': program, 'new': program}}
    record['before'] = {'programs': {'a': program | {'launches': 11209}}}
    lines = page(tmp_path, tables, record, 'compiled').splitlines()
    assert lines[4] == '| a | 11,209 / 4,830 | 84 / 84 | 1.00 / 1.00 | 65 |'
    assert lines[5] == '| new | 4,830 | 84 | 1.00 | 65 |'
