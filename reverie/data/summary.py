"""Contents of a dataset for people: counts and returns per kind, actions, rewards, lengths."""

import collections
import itertools
import os
from typing import Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.table import Table

from reverie.data.alignment import Alignment
from reverie.data.episodes import Episodes
from reverie.data.manifest import words
from reverie.data.motion import count_cuts, count_repeated
from reverie.data.records import unpack
from reverie.types import ActionSpace

BAR = 30  # characters of the longest bar
BINS = 10


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read every record; return the manifest's counts, env, three histograms (actions, rewards,
    lengths), cuts, repeated frames, and whether actions move the picture.

    Raises UserError if the dataset is missing or damaged.
    """
    episodes = Episodes(path)
    space = episodes.schema.actions
    labels = _labels(space)
    actions = np.zeros(len(labels), np.int64)
    rewards: collections.Counter[float] = collections.Counter()
    lengths = []
    cuts = repeated = 0
    alignment = Alignment(episodes.schema, len(episodes))
    for record in episodes.records():
        lengths.append(len(record))
        if record.has_action and labels:
            actions += _counts(space, record.action[1:])
        repeated += count_repeated(record.obs)
        if len(episodes.schema.obs_shape) == 3:
            cuts += count_cuts(unpack(record.obs, episodes.schema))
        alignment.add(record)
        if record.has_reward:
            values, counts = np.unique(record.reward[1:], return_counts=True)
            rewards.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    spec = episodes.spec
    verdict = alignment.verdict()
    return {
        'path': str(path),
        'env': spec.name,
        'obs': f'{episodes.schema.obs_dtype}{list(spec.obs_shape)}',
        'action_space': words(space),
        'held_out': len(episodes.held_out),
        'bytes': sum(shard['bytes'] for shard in episodes.manifest['shards']),
        'shards': len(episodes.shards),
        'counts': episodes.counts,
        'actions': dict(zip(labels, actions.tolist(), strict=True)),
        'rewards': _histogram(rewards),
        'lengths': _histogram(collections.Counter(lengths)),
        'fps': episodes.provenance.get('fps'),
        'cuts': cuts,
        'repeated': repeated,
        'shift': verdict and verdict.shift,
        'alignment': verdict.line if verdict else '',
        'provenance': episodes.manifest['provenance'],
    }


def _labels(space: ActionSpace) -> tuple[str, ...]:
    """Names of the choices that are counted: of a discrete space, or of each part that has some."""
    if space.kind == 'discrete':
        return space.meanings or tuple(str(i) for i in range(space.size))
    return tuple(f'{part.name}: {choice}' for part in space.parts for choice in part.choices)


def _counts(space: ActionSpace, action: np.ndarray) -> np.ndarray:
    """How often each label was chosen; an action that is not known counts nowhere."""
    if space.kind == 'discrete':
        return np.bincount(action, minlength=space.size)
    counts = []
    for i, part in enumerate(space.parts):
        if part.choices:
            chosen = action[:, i].astype(int)
            counts.append(np.bincount(chosen[chosen >= 0], minlength=part.size))
    return np.concatenate(counts)


def _histogram(counter: collections.Counter[Any]) -> dict[str, int]:
    """Return label -> count, with a bar for each value if they are few, else equal bins."""
    if len(counter) <= BINS:
        return {f'{value:g}': counter[value] for value in sorted(counter)}
    values = np.fromiter(counter.keys(), np.float64)
    counts, edges = np.histogram(values, BINS, weights=np.fromiter(counter.values(), np.float64))
    labels = [f'{low:.4g} to {high:.4g}' for low, high in itertools.pairwise(edges)]
    return dict(zip(labels, counts.astype(int).tolist(), strict=True))


def render(report: dict[str, Any]) -> Group:
    """Render the report of `inspect` as tables for a rich console."""
    counts = report['counts']
    held = f' ({report["held_out"]:,} held out)' if report['held_out'] else ''
    head = (
        f'{report["env"]}  ·  observations {report["obs"]}  ·  actions {report["action_space"]}\n'
        f'{counts["episodes"]:,} episodes{held}, {counts["frames"]:,} frames, '
        f'{counts["rewarded_steps"]:,} rewarded steps'
        f'  ·  {report["shards"]} shards, {report["bytes"] / 1e6:.1f} MB\n'
        f'{_rate(report["fps"])}{report["cuts"]:,} cuts, {report["repeated"]:,} frames as before'
    )
    if report['alignment']:
        head += f'\n{report["alignment"]}'
    kinds = counts['kinds'] if len(counts['kinds']) == 1 else counts['kinds'] | {'all': counts}
    panels: list[Any] = [
        Panel(head, title=report['path']),
        _counts_table(kinds),
        _returns_table(kinds),
    ]
    for title, name in (
        ('Action', 'actions'),
        ('Reward', 'rewards'),
        ('Episode length', 'lengths'),
    ):
        if report[name]:
            panels.append(_bars(title, report[name]))
    return Group(*panels)


def _rate(fps: Any) -> str:
    return f'{fps:.4g} fps, ' if isinstance(fps, int | float) else ''


def _counts_table(kinds: dict[str, Any]) -> Table:
    table = Table()
    table.add_column('kind')
    for name in ('episodes', 'complete', 'frames', 'mean length'):
        table.add_column(name, justify='right')
    for kind, row in kinds.items():
        length = '–' if row['mean_length'] is None else f'{row["mean_length"]:.1f}'
        table.add_row(
            kind, *(f'{row[name]:,}' for name in ('episodes', 'complete', 'frames')), length
        )
    return table


def _returns_table(kinds: dict[str, Any]) -> Table:
    table = Table(title='Undiscounted return of complete episodes', title_justify='left')
    table.add_column('kind')
    names = ('mean', 'std', 'min', 'q25', 'median', 'q75', 'max')
    for name in names:
        table.add_column(name, justify='right')
    for kind, row in kinds.items():
        table.add_row(
            kind,
            *(f'{row["returns"][name]:.2f}' if name in row['returns'] else '–' for name in names),
        )
    return table


def _bars(title: str, histogram: dict[str, int]) -> Table:
    table = Table(title_justify='left')
    table.add_column(title)
    table.add_column('count', justify='right')
    table.add_column('share', justify='right')
    table.add_column('')
    total, longest = max(sum(histogram.values()), 1), max(1, *histogram.values())
    for label, count in histogram.items():
        bar = '█' * max(round(BAR * count / longest), 1 if count else 0)
        table.add_row(label, f'{count:,}', f'{100 * count / total:.1f}%', bar)
    return table
