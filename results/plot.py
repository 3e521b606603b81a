"""Plots of the results, from the JSON files of this folder alone.

    python results/plot.py [--recompute] [PRESET ...]

writes, per preset, `results/<preset>/scores.svg` (returns of every read-out in every game),
`differences.svg` (of read-outs that share world models, paired per seed), `aggregate.svg`
(interquartile mean of the normalised scores over games and seeds) and, where runs were scored while
they trained, `curves.svg`; and prints the aggregate and the differences. Every figure has its 95%
interval, which says its kind and n, and a dot per seed. Several presets also come into one plot,
`results/<preset>_<preset>.svg`: curves of the games they share, and their final scores with
intervals.
Curves are drawn beside published scores (`published.json`) and our PPO
(`ppo/<env>-minatar-default-10m.json`, where `benchmarks/ppo.py` has left one). Figures are always
those of the returns in a file; --recompute also writes them back.
"""

import hashlib
import json
import pathlib
import sys
from typing import Any, TypeAlias

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from reverie.evaluation import results, tables
from reverie.evaluation.statistics import (
    UNTRAINED,
    Interval,
    figure_interval,
    interval,
    iqm,
    normalised,
    recompute,
    stratified_interval,
)
from reverie.evaluation.tables import NAMES

Record: TypeAlias = dict[str, Any]

FOLDER = pathlib.Path(__file__).resolve().parent
UNPLOTTED = ('ablation', 'bench', 'doom', 'labels', 'ppo')  # folders without plots of their own
ACCENT, SOFT, PLAIN, INK = '#0b6a8f', '#9cc6d8', '#b4b8be', '#1c1e21'
COLOURS = {'imagination': ACCENT, 'agent': ACCENT, 'wm_bc': SOFT, 'bc': SOFT}
STYLE: Any = {
    'svg.hashsalt': 'reverie',
    'svg.fonttype': 'none',
    'font.family': 'sans-serif',
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': '#8a8f96',
    'axes.titlesize': 10,
}


def read(preset: pathlib.Path, write: bool = False) -> list[Record]:
    """Read the records of a preset, one per environment, by name, with figures recomputed from the
    returns.
    """
    found = {path: json.loads(path.read_text()) for path in sorted(preset.glob('*.json'))}
    records = {path: recompute(record) for path, record in found.items() if record.get('score')}
    for path, record in records.items():
        if write and record != found[path]:
            results.save(path, record)
            print(f'recomputed {path}')
    return list(records.values())


def measured(record: Record) -> list[str]:
    return [row.key for row in tables.score_rows(record) if row.key in NAMES]


def bars(axis: Axes, rows: list[tuple[str, str, float, Interval | None, list[float]]]) -> None:
    """Draw horizontal bars (colour, name, value, interval, dots), the first on top, labelled with
    name and kind of interval.
    """
    dot: Any = dict(color='white', markeredgecolor=INK, markeredgewidth=0.7, markersize=3)
    for i, (colour, _, value, ci, dots) in enumerate(rows):
        axis.barh(i, value, height=0.66, color=colour)
        if ci:
            axis.plot([ci.low, ci.high], [i, i], color=INK, linewidth=1.2, marker='|', markersize=6)
        axis.plot(dots, [i] * len(dots), 'o', **dot)
    labels = [f'{name}\n{ci.label if ci else "n = 1"}' for _, name, _, ci, _ in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7.5)
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.xaxis.grid(True, color='#e3e3de', linewidth=0.8)
    axis.set_axisbelow(True)


def digest(records: list[Record]) -> str:
    """Checksum of the inputs of a plot: its records to six digits, the files of others beside them,
    and this file.
    """
    beside = [FOLDER / 'published.json', *sorted(FOLDER.glob('bench/ppo_*.json'))]
    text = json.dumps(records, sort_keys=True)
    rounded = json.loads(text, parse_float=lambda x: f'{float(x):.6g}')
    parts = [rounded, *(path.read_text() for path in (pathlib.Path(__file__), *beside))]
    return f'sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}'


def save(figure: Figure, path: pathlib.Path, records: list[Record]) -> None:
    """Write a figure with its sources below it."""
    sources = sorted({f'{r["device"]}, {r["date"]}' for r in records})
    note = '; '.join(['95% intervals', *sources])
    figure.supxlabel(note, x=0.995, ha='right', fontsize=6.5, color='#62676f')
    figure.savefig(path, metadata={'Date': None, 'Source': digest(records)})
    plt.close(figure)
    inside = path.is_relative_to(FOLDER.parent)
    print(f'wrote {path.relative_to(FOLDER.parent) if inside else path}')


def panels(titles: list[str], width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Make one panel of this size in inches for each title, three side by side."""
    columns = min(3, len(titles))
    down = -(-len(titles) // columns)
    size = (width * columns, height * down)
    figure, axes = plt.subplots(down, columns, figsize=size, squeeze=False, layout='constrained')
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title, loc='left')
    return figure, list(axes.flat[: len(titles)])


def bar_panels(records: list[Record], rows: int) -> tuple[Figure, list[Axes]]:
    """Make one panel of so many bars for each record."""
    return panels([record['env'] for record in records], 4.6, 0.36 * rows + 0.8)


def plot_scores(records: list[Record], path: pathlib.Path) -> None:
    """Plot the returns of every read-out, one panel per game."""
    figure, axes = bar_panels(records, max(len(measured(record)) for record in records))
    for axis, record in zip(axes, records, strict=True):
        rows = []
        for key, name, sampled, _ in tables.score_rows(record):
            means = [float(np.mean(run)) for run in sampled['per_seed']]
            dots = means if len(means) > 1 and key not in UNTRAINED else []
            colour, ci = COLOURS.get(key, PLAIN), figure_interval(sampled)
            rows.append((colour, name, sampled['mean'], ci, dots))
        bars(axis, rows)
        axis.set_xlabel('return per episode, sampled')
    save(figure, path, records)


def plot_differences(records: list[Record], path: pathlib.Path) -> None:
    """Plot paired differences of read-outs that share world models, one panel per game."""
    records = [record for record in records if record['differences']]
    if not records:
        return
    figure, axes = bar_panels(records, 2 * max(len(record['differences']) for record in records))
    for axis, record in zip(axes, records, strict=True):
        rows = []
        for _, name, *of in tables.difference_rows(record):
            for mode, difference in zip(('sampled', 'greedy'), of, strict=True):
                if not difference:
                    continue
                ci, seeds = figure_interval(difference), difference['per_seed']
                colour, dots = (
                    ACCENT if mode == 'sampled' else SOFT,
                    seeds if len(seeds) > 1 else [],
                )
                rows.append((colour, f'{name}, {mode}', difference['mean'], ci, dots))
        bars(axis, rows)
        axis.axvline(0.0, color=INK, linewidth=0.8)
        axis.set_xlabel('difference in return, per seed')
        print(tables.markdown(tables.difference_rows(record), f'{record["env"]}, per seed'), end='')
    save(figure, path, records)


def comparable(records: list[Record]) -> list[Record]:
    """Records of the games that have both ends of the normalised scale."""
    return [r for r in records if r.get('reference') is not None and 'random' in measured(r)]


def aggregate(records: list[Record]) -> list[tuple[str, float, Interval | None]]:
    """Rows (read-out, IQM of normalised scores over games and seeds, its 95% interval)."""
    games = comparable(records)
    rows = []
    for name in NAMES:
        if len(games) < 2 or not all(name in measured(record) for record in games):
            continue
        tasks = []
        for r in games:
            low, high = r['score']['random']['mean'], r['reference']
            tasks.append([normalised(row, low, high) for row in r['score'][name]['per_seed']])
        ci = stratified_interval(tasks, trained=name not in UNTRAINED)
        rows.append((name, float(iqm([np.mean(run) for task in tasks for run in task])), ci))
    return rows


def plot_aggregate(records: list[Record], path: pathlib.Path) -> None:
    """Plot and print the aggregate over games and seeds."""
    rows = aggregate(records)
    if not rows:
        print(
            f'{path.parent.name}: no read-out has a normalised score in two games and in every one, no aggregate'
        )
        return
    games = len(comparable(records))
    figure, axis = plt.subplots(figsize=(5.6, 0.36 * len(rows) + 1.1), layout='constrained')
    bars(axis, [(COLOURS.get(name, PLAIN), NAMES[name], value, ci, []) for name, value, ci in rows])
    axis.axvline(1.0, color=INK, linewidth=0.8, linestyle=':')
    axis.set_xlabel(f'IQM of normalised score\n{games} games; 0 random, 1 PPO')
    save(figure, path, records)
    for name, value, ci in rows:
        bounds = f'[{ci.low:.3f}, {ci.high:.3f}] {ci.label}' if ci else 'n = 1'
        print(f'  {NAMES[name]:16} {value:6.3f}  {bounds}')


def curve(axis: Axes, record: Record, colour: str) -> None:
    """Draw the score while training: seeds thin, their mean thick, its 95% interval shaded."""
    x, y = record['curve']['env_frames'], np.array(record['curve']['return_per_seed'], float)
    axis.xaxis.set_major_formatter(EngFormatter(sep=''))  # 20k, 1M
    axis.plot(x, y.T, color=colour, linewidth=0.6, alpha=0.4)
    axis.plot(x, y.mean(0), color=colour, linewidth=1.6, label='one seed' if len(y) == 1 else None)
    if len(y) > 1:
        columns = ([[value] for value in column] for column in y.T.tolist())
        bounds = [ci for column in columns if (ci := interval(column))]
        low, high = [ci.low for ci in bounds], [ci.high for ci in bounds]
        label = f'95% interval, {bounds[0].label}'
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, label=label)


def draw_references(axis: Axes, game: str, frames: float) -> None:
    """Draw published scores of a game within so many frames, and the curve of our PPO, whose end is
    in the legend.
    """
    limit = 1.2 * frames
    label: Any = dict(xytext=(-3, 2), textcoords='offset points', ha='right', fontsize=6)
    for i, other in enumerate(json.loads((FOLDER / 'published.json').read_text())['scores']):
        if game in other['score'] and other['env_frames'] <= limit:
            low, high = other['score'][game]
            x = other['env_frames'] * (1 + 0.02 * (i % 3))  # side by side
            axis.plot([x, x], [low, high], color=INK, linewidth=1.2, marker='_', markersize=6)
            axis.annotate(other['name'], (x, high), **label)
    path = FOLDER / 'ppo' / f'{game.replace("/", "_")}-minatar-default-10m.json'
    if path.exists():
        ours = json.loads(path.read_text())
        each = np.array(ours['curve']['return_per_seed'], float)
        x, y = np.array(ours['curve']['env_frames']), each.mean(0)
        near = x <= limit  # the end, beyond the plot, may be ten times as high
        end = f'PPO, protocol minatar, {x[-1] / 1e6:.1f}M: {y[-1]:.1f}, mean of {len(each)}'
        axis.plot(x[near], y[near], color=PLAIN, linewidth=1.2, label=end)
        axis.set_xlim(0, limit)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6.5, frameon=False)


def plot_curves(records: list[Record], path: pathlib.Path) -> None:
    """Plot the score while training, where a run was scored along the way."""
    records = [r for r in records if r.get('curve', {}).get('env_frames')]
    if not records:
        return
    figure, axes = panels([record['env'] for record in records], 3.2, 2.4)
    for axis, record in zip(axes, records, strict=True):
        curve(axis, record, ACCENT)
        draw_references(axis, record['env'], record['env_frames'])
        axis.set_xlabel('environment frames')
    save(figure, path, records)


def plot_together(chosen: dict[str, list[Record]], path: pathlib.Path) -> None:
    """Plot presets beside each other in every game they share: seeds thin, mean thick, the final
    score at the right.
    """
    games = [{r['env']: r for r in records} for records in chosen.values()]
    shared = sorted(set.intersection(*map(set, games)))
    if not shared:
        return
    figure, axes = panels(shared, 3.2, 2.6)
    for axis, game in zip(axes, shared, strict=True):
        for i, (preset, of) in enumerate(zip(chosen, games, strict=True)):
            record, colour = of[game], f'C{i}'
            score = record['score'].get('agent') or record['score'].get('imagination')
            if (record.get('curve') or {}).get('env_frames'):
                curve(axis, record, colour)
            end = record['env_frames'] * (1.03 + 0.03 * i)
            if score['ci95']:
                axis.plot([end, end], score['ci95'], color=colour, linewidth=2)
            label = f'{preset}: {score["mean"]:.2f}, {tables.interval_label(score)}'
            axis.plot(end, score['mean'], 'o', color=colour, markersize=4, label=label)
        draw_references(axis, game, max(of[game]['env_frames'] for of in games))
        axis.set_xlabel('environment frames')
    save(figure, path, [record for of in games for record in of.values()])


def main(folder: pathlib.Path, presets: list[str], write: bool = False) -> int:
    chosen = [folder / name for name in presets] or sorted(
        p for p in folder.iterdir() if p.is_dir() and p.name not in UNPLOTTED
    )
    found = {}
    if write and not presets:
        read(folder / 'ppo', write)  # has no plots of its own
    for preset in chosen:
        records = found[preset.name] = read(preset, write) if preset.is_dir() else []
        if not records:
            error = f'plot: no results in {preset}, expected <env>.json files with scores'
            print(error, file=sys.stderr)
            return 2
        with plt.rc_context(STYLE):
            plot_scores(records, preset / 'scores.svg')
            plot_differences(records, preset / 'differences.svg')
            plot_aggregate(records, preset / 'aggregate.svg')
            plot_curves(records, preset / 'curves.svg')
    if len(presets) > 1:
        with plt.rc_context(STYLE):
            plot_together(found, folder / f'{"_".join(presets)}.svg')
    return 0


if __name__ == '__main__':
    names = [name for name in sys.argv[1:] if name != '--recompute']
    sys.exit(main(FOLDER, names, write=len(names) < len(sys.argv[1:])))
