"""Episodes that come as arrays: parts that the importers of npz and HDF5 files share."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from reverie.data.importers.common import (
    SHORTEST,
    Imported,
    Options,
    Say,
    longest_episode,
    make_step,
    pieces,
)
from reverie.data.records import DTYPES
from reverie.types import ActionSpace, Component, UserError

COLOURS = (1, 3)


def refuse_video_options(options: Options, kind: str) -> None:
    """Raise UserError for options that only videos have."""
    if options.size is not None:
        raise UserError(f'--size is for videos, {kind} keeps its observations as they are')


def as_observations(obs: np.ndarray, where: str) -> np.ndarray:
    """Return observations [T, ...] of a dtype that datasets hold, pictures with channels last."""
    if obs.dtype.kind == 'f':
        obs = obs if obs.dtype in (np.float16, np.float32) else obs.astype(np.float32)
    elif obs.dtype.kind in 'iu' and obs.dtype.name not in DTYPES:
        info = np.iinfo(np.int32)
        if obs.size and (obs.min() < info.min or obs.max() > info.max):
            raise UserError(f'{where}: numbers up to {obs.max()}, expected 32 bits')
        obs = obs.astype(np.int32)
    if obs.dtype.name not in DTYPES or obs.ndim < 2:
        raise UserError(
            f'{where}: is {obs.dtype}{list(obs.shape)}, expected [steps, ...] of {", ".join(DTYPES)}'
        )
    if obs.ndim == 4 and obs.shape[1] in COLOURS and obs.shape[3] not in COLOURS:
        obs = np.moveaxis(obs, 1, 3)
    return obs


def check_length(name: str, array: np.ndarray, length: int, where: object) -> None:
    """Raise UserError unless an array has that many steps."""
    if array.shape[:1] != (length,):
        raise UserError(f'{where}: {name} is {list(array.shape)}, expected {length} steps')


def component(index: int, size: int) -> Component:
    """Part of a composite action that has a number instead of a name."""
    return Component(f'part{index}', tuple(map(str, range(size))))


def stored_actions(space: ActionSpace, action: np.ndarray, where: str) -> np.ndarray:
    """Return actions [T, ...] as `Writer.add` takes them; raise UserError for one out of range."""
    low, high = (-1.0, 1.0) if space.kind == 'continuous' else (0, space.size - 1)
    sizes = [len(part.choices) for part in space.parts]
    above = np.asarray(sizes) - 1 if sizes else high
    if not np.isfinite(action).all() or (action < low).any() or (action > above).any():
        raise UserError(
            f'{where}: actions from {np.min(action):g} to {np.max(action):g}, expected {low:g} to '
            f'{np.max(above):g}'
        )
    return action


def cut(
    obs: np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    terminal: np.ndarray,
    where: pathlib.Path | str,
    say: Say,
) -> Iterator[Imported]:
    """Yield the episodes of arrays [T, ...] that arrived together; first, last, terminal: [T] bool.

    An episode is complete if it has its first and its last step.
    """
    edges = {0, len(obs), *np.flatnonzero(first).tolist(), *(np.flatnonzero(last) + 1).tolist()}
    longest = longest_episode(obs.shape[1:], obs.dtype.itemsize)
    at = 0
    for length in pieces(sorted(edges), longest):
        here = slice(at, at + length)
        if length < SHORTEST:
            say(f'{where}: left out {length} steps from {at} on, expected {SHORTEST}')
        else:
            end = at + length - 1
            step = make_step(obs[here], action[here], reward[here], bool(terminal[end]))
            whole = bool(first[at] and last[end])
            yield Imported(step, whole or bool(terminal[end]), True, True)
        at += length


def one_shape(shapes: Sequence[tuple[str, tuple[int, ...], str]]) -> tuple[int, ...]:
    """Return the shape that all observations have, given as (file, shape, dtype)."""
    name, shape, dtype = shapes[0]
    for other, its, kind in shapes:
        if (its, kind) != (shape, dtype):
            raise UserError(
                f'{name} has observations {dtype}{list(shape)}, {other} {kind}{list(its)}; expected '
                'the same in all'
            )
    return shape
