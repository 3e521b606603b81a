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
