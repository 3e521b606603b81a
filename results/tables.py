"""The tables of README.md and docs/RESULTS.md, from the JSON files of this folder.

    python results/tables.py [--check]

fills what stands between `<!-- results:NAME KIND -->` and `<!-- /results -->`: KIND is one of
KINDS, NAME that of the file `NAME.json`, or for kinds that take several files a pattern as
`dreamer_v3_small/*`. With --check nothing is written, and the exit code is 1 if something would
change.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from reverie.evaluation import statistics, tables

FOLDER = pathlib.Path(__file__).resolve().parent
PAGES = ('README.md', 'docs/RESULTS.md')
MARKED = re.compile(r'<!-- results:(\S+) (\S+) -->\n(.*?)<!-- /results -->', re.DOTALL)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text in the first column, numbers in the others."""
    lines = [f'| {" | ".join(cells)} |' for cells in (heads, *rows)]
    return '\n'.join([lines[0], '|---|' + '---:|' * (len(heads) - 1), *lines[1:]]) + '\n'


def source(*records: dict) -> str:
    """Where the figures of every file come from."""
    lines = []
    for r in records:
        seeds = f'seeds {", ".join(map(str, r["seeds"]))}, ' if 'seeds' in r else ''
        spent = f', {r["seconds"]:,.0f} s of training' if 'gradient_steps' in r else ''
        lines.append(
            f'* `{r["command"]}`: {seeds}{r["date"]}, {r["device"]}, commit `{r["commit"][:12]}`{spent}\n'
        )
    return ''.join(lines)


def scores(record: dict) -> str:
    own = 'imagination' if 'imagination' in record['score'] else 'agent'
    names = {own: f'**{tables.NAMES[own]}**'}
    if record.get('ppo_frames'):
        names['ppo'] = f'PPO that made the data ({record["ppo_frames"]:,} frames)'
    return tables.markdown(tables.score_rows(record), names=names)


def differences(record: dict) -> str:
    return tables.markdown(tables.difference_rows(record), 'difference, paired per seed')


def seeds(record: dict) -> str:
    """Mean return of every run."""
    rows = []
    for row in tables.score_rows(record):
        for mode, figure in (('sampled', row.sampled), ('greedy', row.greedy)):
            if figure and row.key not in (*statistics.UNTRAINED, 'ppo'):
                rows.append(
                    [
                        f'{row.name}, {mode}',
                        *(tables.number(np.mean(run)) for run in figure['per_seed']),
                    ]
                )
    return table(['mean return of', *(f'seed {seed}' for seed in record['seeds'])], rows)


def imagination(*records: dict) -> str:
    """Dreamer 4 in every file's game: read-outs as 'sampled / greedy', and what imagination adds to
    its own clone.
    """
    keys = ('random', 'data', 'bc', 'wm_bc', 'imagination')
    both = lambda row: ' / '.join(
        tables.number(figure['mean']) for figure in (row.sampled, row.greedy) if figure
    )
    rows = []
    for r in records:
        found = {row.key: row for row in tables.score_rows(r)}
        gain = {row.key: row for row in tables.difference_rows(r)}['imagination - wm_bc']
        gains = [
            f'{tables.number(x["mean"])} ({tables.bounds(x)})' for x in (gain.sampled, gain.greedy)
        ]
        rows.append([r['env'], *(both(found[key]) for key in keys), *gains, str(gain.sampled['n'])])
    heads = (
        'game',
        *(tables.NAMES[key] for key in keys),
        f'{gain.name}, sampled',
        'greedy',
        'seeds',
    )
    return table(heads, rows)


def trust(*records: dict) -> str:
    """Tables of what the world models of every file keep: cells of each channel, and the heads on
    recorded frames.
    """
    mean = lambda x: '' if x['mean'] is None else f'{x["mean"]:.2f}'
    cells, heads = [], []
    for r in records:
        for channel in r['trust']['channels']:
            kept = [channel['tokenizer'][name] for name in ('recall', 'precision')]
            kept += [step['recall'] for step in channel['dream']]
            cells.append([f'{r["env"]}, {channel["name"]}', *map(mean, kept)])
        for name in ('reward', 'end'):
            seen, dreamt = r['trust'][name]['recorded'], r['trust'][name]['dream'][-1]
            said = [f'{seen[key]["mean"]:.4f}' for key in ('said', 'true')]
            heads.append([f'{r["env"]}, {name}', *said, mean(seen['ap']), mean(dreamt['ap'])])
    steps = [
        f'dream, step {a}' if a == b else f'steps {a} to {b}'
        for a, b in records[0]['trust']['steps']
    ]
    names = (
        'heads on recorded frames',
        'said',
        'true',
        'average precision',
        f'of dreams, {steps[-1]}',
    )
    return f'{table(("recall of cells", "tokenizer", "its precision", *steps), cells)}\n{table(names, heads)}'


def agents(*records: dict) -> str:
    """The agent of every file, beside random play."""
    rows = []
    for record in records:
        found = {row.key: row for row in tables.score_rows(record)}
        agent, random = (
            found.get('agent') or found['ppo'],
            tables.number(found['random'].sampled['mean']),
        )
        rows.append(
            agent._replace(name=f'`{record["preset"]}`, {record["env"]} (random play: {random})')
        )
    return tables.markdown(rows, 'agent')


def phases(record: dict) -> str:
    rows = [[name, f'{phase["frames_per_s"]:,.0f}'] for name, phase in record['phases'].items()]
    shape, ratio = record['imagination']['shape'], record['imagination']['ratio']
    rows.append(
        [
            f'imagining with the cache, against recomputing {shape["context"]} frames',
            f'{ratio:.1f} times',
        ]
    )
    return table(['phase', 'frames/s'], rows)


def games(record: dict) -> str:
    rows = []
    for game, row in record['games'].items():
        rows.append(
            [
                game,
                *(
                    f'{round(row[who]["steps_per_s"], -3):,}'
                    for who in ('reverie', 'gymnax')
                    if who in row
                ),
            ]
        )
    return table(['steps/s', 'reverie', 'gymnax'], rows)


def play(record: dict) -> str:
    delay, memory = record['key_to_frame_ms'], record['memory']
    every, rss = memory['every_frames'], memory['rss_mb']
    rows = [
        [
            f'frames/s over {record["seconds"]:.0f} s ({record["pace"]} asked for)',
            f'{record["fps"]:.1f}',
        ],
        ['key to frame, p50', f'{delay["p50"]:.1f} ms'],
        ['key to frame, p95', f'{delay["p95"]:.1f} ms'],
        [f'key to frame, longest of {delay["keys"]}', f'{delay["max"]:.0f} ms'],
        ['frames/s at the highest pace', f'{memory["fps"]:.0f}'],
        [f'resident memory after {every:,} frames', f'{rss[0]:,.1f} MB'],
        [f'resident memory after {every * len(rss):,} frames', f'{rss[-1]:,.1f} MB'],
    ]
    return table(['', ''], rows)


KINDS: dict[str, Callable[[Any], str]] = {
    f.__name__: f
    for f in (source, scores, differences, seeds, imagination, trust, agents, phases, games, play)
}


def fill(text: str, folder: pathlib.Path) -> str:
    """A page with its tables made from the files of `folder`.

    Raises ValueError for a marker that cannot be filled.
    """

    def made(match: re.Match) -> str:
        name, kind, _ = match.groups()
        paths = sorted(folder.glob(f'{name}.json'))
        if kind not in KINDS or not paths:
            raise ValueError(
                f'{match[0].splitlines()[0]}: expected files of results/ and one of {", ".join(KINDS)}'
            )
        made = KINDS[kind](*(json.loads(path.read_text()) for path in paths))
        return f'<!-- results:{name} {kind} -->\n{made}<!-- /results -->'

    if text.count('<!-- results:') != len(MARKED.findall(text)):
        raise ValueError(
            'expected <!-- results:NAME KIND --> and <!-- /results --> on lines of their own, in pairs'
        )
    return MARKED.sub(made, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--check', action='store_true', help='write nothing; exit code 1 if something would change'
    )
    check, changed = parser.parse_args().check, []
    for path in (FOLDER.parent / page for page in PAGES):
        old = path.read_text()
        new = fill(old, FOLDER)
        if new != old:
            changed.append(path.name)
            if not check:
                path.write_text(new)
    if changed:
        print(
            f'{"differ from results/*.json, run make docs" if check else "wrote"}: {", ".join(changed)}'
        )
    return 1 if check and changed else 0


if __name__ == '__main__':
    sys.exit(main())
