"""Actions beside videos: `actions.json` declares their parts, a sidecar of each video holds them.

Row n of a sidecar was chosen while frame n was on screen, so it led to frame n + 1. Datasets store
by arrival: row n becomes action[n + 1], as do its reward and the end of the episode.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reverie.types import ActionSpace, Component, UserError

DECLARATION = 'actions.json'
ENDINGS = ('.actions.jsonl', '.actions.npy')
COLUMNS = ('reward', 'done', 'label')  # of a line beside the components
FIELDS = ('name', 'kind', 'choices', 'n', 'low', 'high', 'rest', 'keys', 'camera')
MOST_CHOICES = 10_000


@dataclasses.dataclass(frozen=True)
class Declaration:
    """Parts of an action, and the task they were played for."""

    parts: tuple[Component, ...]
    task: str = ''

    def space(self, unknown: bool) -> ActionSpace:
        """Return the action space; unknown: single steps have no action, which indices cannot say.

        One choice without keys and camera is a plain discrete space.
        """
        if len(self.parts) == 1 and not unknown:
            part = self.parts[0]
            if part.choices and not part.keys and not part.camera:
                return ActionSpace('discrete', part.size, part.choices)
        return ActionSpace.composite(self.parts)


@dataclasses.dataclass(frozen=True)
class Labels:
    """Rows of a sidecar, as they were written: row n leads to frame n + 1."""

    action: np.ndarray  # [rows, parts] as stored; -1 or 0 where not known
    known: np.ndarray  # [rows] bool
    reward: np.ndarray  # [rows] float32
    done: np.ndarray  # [rows] bool: the episode ends with the frame that it leads to
    gap: np.ndarray  # [rows] bool: it leads nowhere, an episode begins at the next frame
    has_reward: bool

    def arrived(self, frames: int) -> 'Labels':
        """Return the rows by the frame [T] that each led to; none led to the first."""

        def moved(x: np.ndarray, first: Any) -> np.ndarray:
            return np.concatenate([np.full_like(x[:1], first), x[: frames - 1]])

        return Labels(
            moved(self.action, 0),
            moved(self.known, False),
            moved(self.reward, 0),
            moved(self.done, False),
            moved(self.gap, False),
            self.has_reward,
        )


def read_declaration(path: pathlib.Path) -> Declaration:
    """Read `actions.json`; raise UserError, naming file and component, for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: is not JSON ({error!s:.80}), expected components') from error
    if not isinstance(found, dict) or not isinstance(found.get('components'), list):
        raise UserError(f'{path}: expected {{"components": [...]}} and maybe "task"')
    if other := sorted(found.keys() - {'components', 'task'}):
        raise UserError(f'{path}: unknown field {other[0]!r:.60}, expected components and task')
    task = found.get('task', '')
    if not isinstance(task, str):
        raise UserError(f'{path}: task is {task!r:.60}, expected a name')
    try:
        parts = tuple(_component(entry) for entry in found['components'])
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1 or name in COLUMNS:
            raise UserError(f'{path}: component name {name!r} is taken, expected another')
    if not parts:
        raise UserError(f'{path}: has no components, expected at least one')
    return Declaration(parts, task)


def _component(entry: Any) -> Component:
    """Raises ValueError for what is no component."""
    if not isinstance(entry, dict) or not isinstance(entry.get('name'), str) or not entry['name']:
        raise ValueError(f'component {entry!r:.80} has no name, expected one')
    name = entry['name']
    if other := sorted(entry.keys() - set(FIELDS)):
        raise ValueError(
            f'component {name!r} has the field {other[0]!r:.40}, expected {", ".join(FIELDS)}'
        )
    camera = entry.get('camera', '')
    if camera not in ('', 'x', 'y'):
        raise ValueError(f"component {name!r} has camera {camera!r:.40}, expected 'x' or 'y'")
    if entry.get('kind') == 'discrete':
        choices = _choices(name, entry)
        rest = Component(name, choices).stored(_value(name, 'rest', entry.get('rest', 0)))
        if rest is None:
            raise ValueError(
                f'component {name!r} rests at {entry["rest"]!r:.40}, expected a choice'
            )
        return Component(name, choices, rest=rest, keys=_keys(name, entry, choices), camera=camera)
    if entry.get('kind') != 'continuous':
        kind = entry.get('kind')
        raise ValueError(
            f'component {name!r} is of kind {kind!r:.40}, expected discrete or continuous'
        )
    low, high = (_number(name, side, entry.get(side)) for side in ('low', 'high'))
    if not low < high:
        raise ValueError(f'component {name!r} goes from {low:g} to {high:g}, expected low < high')
    rest = _number(name, 'rest', entry.get('rest', min(max(0.0, low), high)))
    if not low <= rest <= high:
        raise ValueError(
            f'component {name!r} rests at {rest:g}, expected a number from {low:g} to {high:g}'
        )
    keys = _keys(name, entry, ('low', 'high'))
    return Component(name, (), low, high, rest, keys, camera)


def _choices(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    choices, n = entry.get('choices'), entry.get('n')
    if choices is None and isinstance(n, int) and 1 <= n <= MOST_CHOICES:
        return tuple(map(str, range(n)))
    named = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if (
        not named
        or not choices
        or len(set(choices)) < len(choices)
        or n not in (None, len(choices))
    ):
        raise ValueError(
            f'component {name!r} has choices {choices!r:.60} and n {n!r:.20}, expected different '
            f'names, or n from 1 to {MOST_CHOICES}'
        )
    return tuple(choices)


def _keys(
    name: str, entry: Mapping[str, Any], held_for: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    keys = entry.get('keys')
    if keys is None:
        return ()
    good = isinstance(keys, dict) and all(
        isinstance(held, list) and all(isinstance(key, str) for key in held)
        for held in keys.values()
    )
    if not good or not set(keys) <= set(held_for):
        raise ValueError(
            f'component {name!r} has keys {keys!r:.80}, expected lists for some of '
            f'{", ".join(held_for):.120}'
        )
    return tuple(tuple(keys.get(choice, ())) for choice in held_for)


def _number(name: str, field: str, value: Any) -> float:
    value = _value(name, field, value)
    if isinstance(value, str):
        raise ValueError(f'component {name!r} has {field} {value!r:.40}, expected a number')
    return float(value)


def _value(name: str, field: str, value: Any) -> float | int | str:
    """Return a number or a name; raises ValueError for anything else."""
    if isinstance(value, str) or (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ):
        return value
    raise ValueError(f'component {name!r} has {field} {value!r:.40}, expected a number or a name')


def read_labels(path: pathlib.Path, parts: Sequence[Component], frames: int) -> Labels:
    """Read the sidecar of a video of `frames`; raise UserError, naming file and row, if a value is
    out of range or there are neither T nor T - 1 rows.
    """
    if path.suffix == '.npy':
        labels = _read_npy(path, parts)
    else:
        labels = _read_lines(path, parts)
    if len(labels.action) not in (frames, frames - 1):
        raise UserError(
            f'{path}: has {len(labels.action):,} rows, expected {frames:,} or {frames - 1:,} for as '
            'many frames'
        )
    return labels


def _read_npy(path: pathlib.Path, parts: Sequence[Component]) -> Labels:
    try:
        values = np.load(path, mmap_mode='r', allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f'{path}: cannot be read ({error!s:.80}), expected an array of numbers'
        ) from error
    if values.ndim == 1 and len(parts) == 1:
        values = values[:, None]
    if values.ndim != 2 or values.shape[1] != len(parts) or values.dtype.kind not in 'iuf':
        raise UserError(
            f'{path}: is {values.dtype}{list(values.shape)}, expected numbers of [rows, {len(parts)}]'
        )
    action = np.empty(values.shape, np.float32)
    for i, part in enumerate(parts):
        # Each value is judged once, however often it occurs.
        found, inverse = np.unique(values[:, i], return_inverse=True)
        stored = [part.stored(x) if math.isfinite(x) else None for x in found.tolist()]
        if None in stored:
            row = int(np.flatnonzero(inverse == stored.index(None))[0])
            raise _outside(f'{path}: row {row}', part, values[row, i].item())
        action[:, i] = np.asarray(stored, np.float32)[inverse]
    return without_reward(action)


def without_reward(action: np.ndarray, gap: np.ndarray | None = None) -> Labels:
    """Return the labels of actions [rows, parts] as stored, all of them known."""
    none = np.zeros(len(action), bool)
    reward = np.zeros(len(action), np.float32)
    return Labels(action, ~none, reward, none, none if gap is None else gap, False)


def _read_lines(path: pathlib.Path, parts: Sequence[Component]) -> Labels:
    action: list[list[float]] = []
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    has_reward = False
    with open(path, encoding='utf-8', errors='replace') as file:
        for n, line in enumerate(file):
            where = f'{path}: line {n + 1}'
            row = _line(line, where)
            known = row.get('label', True)
            action.append([_stored(row, part, known, where) for part in parts])
            if other := sorted(row.keys() - {part.name for part in parts} - set(COLUMNS)):
                raise UserError(f'{where}: {other[0]!r:.40} is none of the components')
            has_reward |= 'reward' in row
            for name, value in (
                ('reward', row.get('reward', 0.0)), ('done', row.get('done', False)), ('label', known),
            ):  # fmt: skip
                columns[name].append(value)
    reward = np.asarray(columns['reward'], np.float32)
    done, label = (np.asarray(columns[name], bool) for name in ('done', 'label'))
    table = np.asarray(action, np.float32).reshape(len(action), len(parts))
    return Labels(table, label, reward, done, np.zeros_like(done), has_reward)


def _line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: is not JSON, expected {{component: value}}') from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: is {row!r:.40}, expected {{component: value}}')
    reward = row.get('reward', 0.0)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) < 1e38:
        raise UserError(f'{where}: reward is {reward!r:.40}, expected a number')
    for name in ('done', 'label'):
        if not isinstance(row.get(name, False), bool):
            raise UserError(f'{where}: {name} is {row[name]!r:.40}, expected true or false')
    return row


def _stored(row: Mapping[str, Any], part: Component, known: bool, where: str) -> float:
    if not known:
        return -1.0 if part.choices else 0.0
    if part.name not in row:
        raise UserError(f'{where}: has no {part.name}, expected a value, or "label": false')
    try:
        stored = part.stored(_value(part.name, 'the value', row[part.name]))
    except ValueError:
        stored = None
    if stored is None:
        raise _outside(where, part, row[part.name])
    return stored


def _outside(where: str, part: Component, value: Any) -> UserError:
    if part.choices:
        expected = f'0 to {len(part.choices) - 1} or one of {", ".join(part.choices):.120}'
    else:
        expected = f'a number from {part.low:g} to {part.high:g}'
    return UserError(f'{where}: {part.name} is {value!r:.40}, expected {expected}')
