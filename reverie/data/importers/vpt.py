"""Import of Minecraft as OpenAI's contractors recorded it: mp4 and jsonl, 20 Hz.

Line n was recorded while frame n was on screen, so it led to frame n + 1. Quirks of the recorder,
after the public notes on the data: attack is stuck from the first tick on in some recordings, until
it is pressed again; the scroll wheel is not recorded, but the chosen slot of the hotbar is; the
cursor is missing where a window is open. Ticks at which nothing was done stay: without them time
would jump. Mouse movement becomes 11 bins for each axis, fine around 0 (mu-law, mu 10, 10 degrees).
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from reverie.data.importers.sidecars import Declaration, Labels, without_reward
from reverie.data.importers.video import Video, Videos
from reverie.types import Component, UserError

TASK = 'minecraft'
DEGREES = 360 / 2400  # of one count of the mouse
LARGEST = 10.0  # degrees in a tick
MU = 10.0
BINS = 11
ATTACK = 0  # number of the mouse's left button
# Name -> (key of the recorder, key of the player here).
KEYBOARD = {
    'forward': ('key.keyboard.w', 'w'),
    'back': ('key.keyboard.s', 's'),
    'left': ('key.keyboard.a', 'a'),
    'right': ('key.keyboard.d', 'd'),
    'jump': ('key.keyboard.space', ' '),
    'sneak': ('key.keyboard.left.shift', 'Shift'),
    'sprint': ('key.keyboard.left.control', 'Control'),
    'drop': ('key.keyboard.q', 'q'),
    'inventory': ('key.keyboard.e', 'e'),
    'swapHands': ('key.keyboard.f', 'f'),
    'ESC': ('key.keyboard.escape', 'Backspace'),
    **{f'hotbar.{i}': (f'key.keyboard.{i}', str(i)) for i in range(1, 10)},
}
# Name -> (button of the mouse, key of the player here).
MOUSE = {'attack': (ATTACK, 'j'), 'use': (1, 'k'), 'pickItem': (2, 'l')}
TURNS = {'camera.x': ('ArrowLeft', 'ArrowRight'), 'camera.y': ('ArrowUp', 'ArrowDown')}
HELD_BIN = 2  # bins from the middle that a key of the camera stands for


def to_bin(counts: float) -> int:
    """Return the bin, 0 to BINS - 1, of a mouse movement in the recorder's counts."""
    share = min(max(counts * DEGREES / LARGEST, -1.0), 1.0)
    curved = np.sign(share) * np.log1p(MU * abs(share)) / np.log1p(MU)
    return int(np.round((curved + 1) / 2 * (BINS - 1)))


def degrees_of(number: int) -> float:
    """Return the middle of a bin, in degrees."""
    curved = 2 * number / (BINS - 1) - 1
    return float(np.sign(curved) * ((1 + MU) ** abs(curved) - 1) / MU * LARGEST)


def _components() -> tuple[Component, ...]:
    buttons = {name: key for name, (_, key) in (KEYBOARD | MOUSE).items()}
    parts = [Component(name, ('up', 'down'), keys=((), (key,))) for name, key in buttons.items()]
    middle = BINS // 2
    names = tuple(f'{degrees_of(i):.2g}' for i in range(BINS))
    for name, held in TURNS.items():
        keys: list[tuple[str, ...]] = [()] * BINS
        keys[middle - HELD_BIN], keys[middle + HELD_BIN] = (held[0],), (held[1],)
        axis: Any = name[-1]
        parts.append(Component(name, names, rest=float(middle), keys=tuple(keys), camera=axis))
    return tuple(parts)


PARTS = _components()


class Contractors(Videos):
    """Importer of a folder of recordings; one without a jsonl has no actions."""

    def companions(
        self, root: pathlib.Path, stems: Sequence[str], whole: bool
    ) -> tuple[Declaration | None, dict[str, pathlib.Path]]:
        beside = {stem: root / f'{stem}.jsonl' for stem in stems}
        found = {stem: path for stem, path in beside.items() if path.is_file()}
        if not found:
            raise UserError(f'{root}: has no .jsonl beside its videos, expected recordings')
        return Declaration(PARTS, TASK), found

    def labels(self, video: Video) -> Labels | None:
        if video.sidecar is None:
            return None
        rows, ticks = [], []
        for row in _actions(_lines(video.sidecar)):
            rows.append(row[0])
            ticks.append(row[1])
        frames = video.probe.count
        if len(rows) < frames - 1:
            raise UserError(
                f'{video.sidecar}: has {len(rows):,} lines, expected {frames:,} or {frames - 1:,} for '
                'as many frames'
            )
        # Recordings of which the last frames were not written are common.
        action = np.asarray(rows[:frames], np.float32)
        steps = np.diff(np.asarray([*ticks, np.nan])[: len(action) + 1])
        gap = np.isfinite(steps) & (steps != 0) & (steps != 1)
        return without_reward(action, gap)

    def cursor(self, video: Video) -> dict[int, tuple[float, float]] | None:
        if video.sidecar is None:
            return None
        return {
            n: (float(row['mouse'].get('x', 0)), float(row['mouse'].get('y', 0)))
            for n, (_, row) in enumerate(_lines(video.sidecar))
            if row.get('isGuiOpen')
        }


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of a recording; raises UserError for what is none."""
    with open(path, encoding='utf-8', errors='replace') as file:
        for n, line in enumerate(file):
            where = f'{path}: line {n + 1}'
            try:
                row = json.loads(line)
                good = _is_row(row)
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                good = False
            if not good:
                raise UserError(f'{where}: expected JSON with mouse (dx, dy, buttons) and keyboard')
            yield where, row


def _is_row(row: Any) -> bool:
    mouse, keys = row['mouse'], row['keyboard']['keys']
    numbers = [mouse['dx'], mouse['dy'], mouse.get('x', 0), mouse.get('y', 0), row.get('hotbar', 0)]
    numbers.append(row.get('tick') or 0)
    lists = [keys, mouse['buttons'], mouse.get('newButtons', [])]
    return all(isinstance(x, list) for x in lists) and all(
        isinstance(x, int | float) and abs(x) < 1e12 for x in numbers
    )


def _actions(lines: Iterator[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[list[float], float]]:
    """Yield (stored action, tick) for each line."""
    stuck = False
    slot: int | None = None
    for n, (_, row) in enumerate(lines):
        mouse = row['mouse']
        pressed = mouse.get('newButtons', [])
        stuck = pressed == [ATTACK] if n == 0 else stuck and ATTACK not in pressed
        buttons = [b for b in mouse['buttons'] if not (stuck and b == ATTACK)]
        held = {name for name, (key, _) in KEYBOARD.items() if key in row['keyboard']['keys']}
        held |= {name for name, (button, _) in MOUSE.items() if button in buttons}
        now = row.get('hotbar')
        if now is not None:
            if slot is not None and now != slot:
                held.add(f'hotbar.{int(now) + 1}')
            slot = now
        action = [float(part.name in held) for part in PARTS if not part.camera]
        tick = row.get('tick')
        yield (
            [*action, float(to_bin(mouse['dx'])), float(to_bin(mouse['dy']))],
            float('nan') if tick is None else float(tick),
        )
