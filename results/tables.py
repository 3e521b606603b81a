"""Tables of README.md and docs/RESULTS.md, from the JSON files of this folder.

    python results/tables.py [--check]

fills the text between `<!-- results:NAME KIND -->` and `<!-- /results -->`: KIND is one of KINDS,
NAME that of the file `NAME.json`, or for kinds that take several files a pattern as
`dreamer_v3_small/*`. With --check nothing is written, and the exit code is 1 if something would
change.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reverie.evaluation import statistics, tables
from reverie.evaluation.statistics import of_runs
from reverie.evaluation.trust import of_ceiling
from reverie.report.recordings import METRICS, ROWS, mean

FOLDER = pathlib.Path(__file__).resolve().parent
PAGES = ('README.md', 'docs/RESULTS.md')
MARKED = re.compile(r'<!-- results:(\S+) (\S+) -->\n(.*?)<!-- /results -->', re.DOTALL)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table with text in the first column, numbers in the others."""
    lines = [f'| {" | ".join(cells)} |' for cells in (heads, *rows)]
    return '\n'.join([lines[0], '|---|' + '---:|' * (len(heads) - 1), *lines[1:]]) + '\n'


def source(*records: Mapping[str, Any]) -> str:
    """Command, seeds, date, device and commit of every file."""
    lines = []
    for r in records:
        seeds = f'seeds {", ".join(map(str, r["seeds"]))}, ' if 'seeds' in r else ''
        spent = f', {r["seconds"]:,.0f} s of training' if 'gradient_steps' in r else ''
        made = f'{r["date"]}, {r["device"]}, commit `{r["commit"][:12]}`'
        lines.append(f'* `{r["command"]}`: {seeds}{made}{spent}\n')
    return ''.join(lines)


def scores(record: Mapping[str, Any]) -> str:
    own = 'imagination' if 'imagination' in record['score'] else 'agent'
    names = {own: f'**{tables.NAMES[own]}**'}
    if record.get('ppo_frames'):
        names['ppo'] = f'PPO that made the data ({record["ppo_frames"]:,} frames)'
    return tables.markdown(tables.score_rows(record), names=names)


def differences(record: Mapping[str, Any]) -> str:
    return tables.markdown(tables.difference_rows(record), 'difference, paired per seed')


def seeds(record: Mapping[str, Any]) -> str:
    """Mean return of every run."""
    rows = []
    for row in tables.score_rows(record):
        for mode, figure in (('sampled', row.sampled), ('greedy', row.greedy)):
            if figure and row.key not in (*statistics.UNTRAINED, 'ppo'):
                means = [tables.number(np.mean(run)) for run in figure['per_seed']]
                rows.append([f'{row.name}, {mode}', *means])
    return table(['mean return of', *(f'seed {seed}' for seed in record['seeds'])], rows)


def imagination(*records: Mapping[str, Any]) -> str:
    """Scores of Dreamer 4 in every file's game, read-outs as 'sampled / greedy', and the gain of
    imagination over its own clone.
    """
    keys = ('random', 'data', 'bc', 'wm_bc', 'imagination')

    def both(row: Any) -> str:
        figures = [figure for figure in (row.sampled, row.greedy) if figure]
        return ' / '.join(tables.number(figure['mean']) for figure in figures)

    def bounded(figure: Mapping[str, Any] | None) -> str:
        return f'{tables.number(figure["mean"])} ({tables.bounds(figure)})' if figure else ''

    rows = []
    for r in records:
        found = {row.key: row for row in tables.score_rows(r)}
        gain = {row.key: row for row in tables.difference_rows(r)}['imagination - wm_bc']
        gains = [bounded(gain.sampled), bounded(gain.greedy)]
        rows.append([r['env'], *(both(found[key]) for key in keys), *gains, str(gain.sampled['n'])])
    names = [tables.NAMES[key] for key in keys]
    return table(['game', *names, f'{gain.name}, sampled', 'greedy', 'seeds'], rows)


def trust(*records: Mapping[str, Any]) -> str:
    """Tables of the fidelity of every file's world models: cells of each channel, and the heads on
    recorded frames.
    """

    def mean(figure: Mapping[str, Any]) -> str:
        return '' if figure['mean'] is None else f'{figure["mean"]:.2f}'

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
    first = table(['recall of cells', 'tokenizer', 'its precision', *steps], cells)
    names = ['heads on recorded frames', 'said', 'true', 'average precision']
    return f'{first}\n{table([*names, f"of dreams, {steps[-1]}"], heads)}'


def ranking(*records: Mapping[str, Any]) -> str:
    """Whether dreams rank policies as the game does, and what they keep of what the game keeps; a
    row for each file.
    """
    rows = []
    for r in records:
        found, spans = r['trust']['ranking'], range(len(r['trust']['steps']))
        correlation, seeds = found['correlation'], len(r['seeds'])
        low, high = correlation['ci95'] or (found['low']['mean'], found['high']['mean'])
        over = f'{seeds} world models' if seeds > 1 else f'{found["starts"]} starts'
        shares = [[of_ceiling(c, i) for c in r['trust']['channels']] for i in spans]
        least = [min(share for share in each if share is not None) for each in shares]
        places = ', '.join(f'{place:.0f}' for place in found['place']['per_seed'])
        cells = [r['env'], str(len(found['policies'])), f'{correlation["mean"]:.2f}']
        cells += [f'{low:.2f} to {high:.2f} over {over}', places]
        rows.append([*cells, *(f'{share:.2f}' for share in least)])
    steps = [f'steps {a} to {b}' if a < b else f'step {a}' for a, b in records[0]['trust']['steps']]
    heads = [
        'game',
        'policies',
        'rank correlation',
        '95% interval',
        'place of the best dreamed one',
    ]
    return table([*heads, *(f'least recall over that of the game, {step}' for step in steps)], rows)


def policies(record: Mapping[str, Any]) -> str:
    """Return of each policy in the game and in the dream, best first; means over seeds."""
    found = sorted(
        record['trust']['ranking']['policies'], key=lambda policy: -policy['real']['mean']
    )
    rows = [
        [p['name'], *(f'{p[which]["mean"]:.2f}' for which in ('real', 'dreamed'))] for p in found
    ]
    return table(['policy', 'in the game', 'in the dream'], rows)


def ablation(*records: Mapping[str, Any]) -> str:
    """Cells that every file's tokenizer keeps, the least of all channels, and the mean recall of its
    dreams over channels; by what was changed.
    """
    rows = []
    for r in records:
        options = re.findall(r'--config\.(?!no-policy)(\S+(?: [\d.e-]+)?)(?= |$)', r['command'])
        channels = r['trust']['channels']

        def each(cells: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
            found = [cell[name]['per_seed'] for cell in cells]
            return np.array([x for x in found if None not in x])  # [channels, seeds]

        kept = [channel['tokenizer'] for channel in channels]
        least = [of_runs(each(kept, name).min(0)) for name in ('recall', 'precision')]
        dreams = zip(*(channel['dream'] for channel in channels), strict=True)
        recalls = [of_runs(each(step, 'recall').mean(0)) for step in dreams]
        cells = [f'{x["mean"]:.3f}{between(x)}' for x in (*least, *recalls)]
        rows.append(
            [f'{r["env"]}: {", ".join(options) or "as it is"}', *cells, str(len(r['seeds']))]
        )
    steps = [f'{a}' if a == b else f'{a} to {b}' for a, b in records[0]['trust']['steps']]
    heads = ['least recall', 'least precision', *(f'dream, {step}' for step in steps), 'seeds']
    return table(['what was changed', *heads], rows)


def between(figure: Mapping[str, Any], digits: int = 3) -> str:
    """' (0.97 to 0.99)', the interval over seeds; '' of one."""
    if figure['ci95'] is None:
        return ''
    low, high = figure['ci95']
    return f' ({low:.{digits}f} to {high:.{digits}f})'


def labels(record: Mapping[str, Any]) -> str:
    """Likeness of dreams to held-out recordings, by the labels that the model knew."""
    metrics = [m for m in ('psnr', 'ssim', 'lpips') if m in record['models'][0]]
    rows = []
    for model in record['models']:
        name = 'the named files' if model['name'] == 'files' else f'{float(model["name"]):.0%}'
        cells = [f'{model["labelled_frames"]:,}']
        for metric in metrics:
            figure, digits = model[metric], 2 if metric == 'psnr' else 3
            scaled = figure.get('normalised')
            share = f', {scaled["mean"]:.0%}' if scaled else ''
            cells.append(f'{figure["mean"]:.{digits}f}{between(figure, digits)}{share}')
        worth = model['true - shuffled']['psnr']
        cells.append(f'{worth["mean"]:+.2f}{between(worth, 2)}')
        turned = model.get('steering', {})
        cells.append(', '.join(f'{part} {x["mean"]:.0%}' for part, x in turned.items()))
        rows.append([name, *cells])
    names = [metric.upper() for metric in metrics]
    return table(['labels', 'frames', *names, 'true minus shuffled, dB', 'camera follows'], rows)


def recordings(record: Mapping[str, Any]) -> str:
    """Likeness of dreams to held-out recordings, and of the first seed what actions are worth."""
    seeds = record['recordings']
    metrics = {m: digits for m, (_, digits) in METRICS.items() if m in seeds[0]['tokenizer']}
    rows = [
        [words, *(f'{mean(seeds, name, m):.{digits}f}' for m, digits in metrics.items())]
        for name, words in ROWS.items()
        if name in seeds[0]
    ]
    likeness = table([f'{seeds[0]["contexts"]} contexts', *map(str.upper, metrics)], rows)
    rows = []
    for name, each in seeds[0]['differences'].items():
        cells = (
            f'{each[m]["mean"]:+.{digits}f}{between(each[m], digits)}'
            for m, digits in metrics.items()
        )
        rows.append([name, *cells])
    return likeness + '\n' + table(['difference', *map(str.upper, metrics)], rows)


def compiled(record: Mapping[str, Any]) -> str:
    """Launches and memory of compiled programs, beside those of an older version."""
    before = record.get('before', {'programs': {}})['programs']
    rows = []
    for name, program in record['programs'].items():
        cells = []
        for key, unit, digits in (('launches', 1, 0), ('copies', 1, 0), ('peak_bytes', 2**30, 2)):
            old = f'{before[name][key] / unit:,.{digits}f} / ' if name in before else ''
            cells.append(f'{old}{program[key] / unit:,.{digits}f}')
        rows.append([name, *cells, f'{program["compile_seconds"]:.0f}'])
    return table(
        ['program, before / now', 'launches', 'copies', 'peak, GiB', 'compiled in, s'], rows
    )


def agents(*records: Mapping[str, Any]) -> str:
    """Scores of the agent of every file, beside random play."""
    rows = []
    for record in records:
        found = {row.key: row for row in tables.score_rows(record)}
        agent = found.get('agent') or found['ppo']
        random = tables.number(found['random'].sampled['mean'])
        name = f'`{record["preset"]}`, {record["env"]} (random play: {random})'
        rows.append(agent._replace(name=name))
    return tables.markdown(rows, 'agent')


def phases(record: Mapping[str, Any]) -> str:
    rows = [[name, f'{phase["frames_per_s"]:,.0f}'] for name, phase in record['phases'].items()]
    shape, ratio = record['imagination']['shape'], record['imagination']['ratio']
    against = f'imagining with the cache, against recomputing {shape["context"]} frames'
    rows.append([against, f'{ratio:.1f} times'])
    return table(['phase', 'frames/s'], rows)


def games(record: Mapping[str, Any]) -> str:
    rows = []
    for game, row in record['games'].items():
        measured = [row[who]['steps_per_s'] for who in ('reverie', 'gymnax') if who in row]
        rows.append([game, *(f'{round(rate, -3):,}' for rate in measured)])
    return table(['steps/s', 'reverie', 'gymnax'], rows)


def play(record: Mapping[str, Any]) -> str:
    delay, memory = record['key_to_frame_ms'], record['memory']
    every, rss = memory['every_frames'], memory['rss_mb']
    over = f'frames/s over {record["seconds"]:.0f} s ({record["pace"]} asked for)'
    rows = [
        [over, f'{record["fps"]:.1f}'],
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
    for f in (
        source,
        scores,
        differences,
        seeds,
        imagination,
        trust,
        ranking,
        policies,
        ablation,
        labels,
        recordings,
        compiled,
        agents,
        phases,
        games,
        play,
    )
}


def fill(text: str, folder: pathlib.Path) -> str:
    """Fill the tables of a page from the files of `folder`.

    Raises ValueError for a marker that cannot be filled.
    """

    def made(match: re.Match[str]) -> str:
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
        did = 'differ from results/*.json, run make docs' if check else 'wrote'
        print(f'{did}: {", ".join(changed)}')
    return 1 if check and changed else 0


if __name__ == '__main__':
    sys.exit(main())
