"""Provenance in a report: the runs it was taken from, the command and the configuration."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from reverie.report.html import cell, escape, missing, row, table
from reverie.report.run import RunFiles
from reverie.text import duration


def section(run: RunFiles) -> str:
    """The command, the whole configuration and the versions, to do it again."""
    command = run.scores.get('command', run.config.get('command'))
    versions = run.scores.get('versions', run.config.get('versions')) or {}
    commit = run.scores.get('commit', run.config.get('commit'))
    text = str(versions)
    if isinstance(versions, dict):
        text = ', '.join(f'{k} {v}' for k, v in versions.items())
    out = ['<section><h2>Command and configuration</h2>']
    out.append(
        f'<pre>{escape(str(command))}</pre>' if command else missing(run, 'config.json', 'command')
    )
    out.append(f'<p class="note">Commit {escape(str(commit))}. {escape(text)}</p>')
    config = json.dumps(run.config.get('config', run.config), indent=2, ensure_ascii=False)
    out.append(
        f'<details><summary>The whole configuration</summary><pre>{escape(config)}</pre></details>'
    )
    return ''.join([*out, '</section>'])


def origin(run: RunFiles) -> str:
    """The runs that this one took phases or weights from, back to the first; empty without any."""
    rows = []
    record = run.config.get('from')
    while isinstance(record, dict):
        rows.append(row(map(cell, _origin_row(record, record.get('of') or {}))))
        record = record.get('from')
    if not rows:
        return ''
    note = 'What was not taken began fresh, with a seed of its own. '
    note += 'The topmost run is the one this run took from.'
    heads = ('Run', 'Taken', 'Seeds', 'Preset', 'Environment', 'Dataset', 'Commit', 'Trained for')
    title = '<section><h2>Where it comes from</h2>'
    return f'{title}<p class="note">{note}</p>{table(heads, rows)}</section>'


def _origin_row(record: Mapping[str, Any], of: Mapping[str, Any]) -> list[str]:
    phases = [*record.get('phases', ())]
    phases += [f'{name}, trained on' for name in record.get('extended', ())]
    groups = ', '.join(record.get('groups', ()))
    known: Callable[[str], str] = lambda name: str(of.get(name, '–'))
    return [
        pathlib.PurePath(str(record.get('run'))).name,
        f'{", ".join(phases)} ({groups})' if phases else groups,
        ' '.join(map(str, record.get('seeds', ()))),
        known('preset'),
        known('env'),
        known('dataset')[:12],
        known('commit')[:12],
        duration(record.get('seconds')),
    ]
