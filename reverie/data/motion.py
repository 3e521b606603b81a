"""Movement between successive frames, in NumPy: the shift of the picture, cuts, repeated frames."""

import itertools
from collections.abc import Iterator

import numpy as np

SIDE = 64  # pixels that pictures are averaged down to
REACH = 12  # of them: the largest shift that is looked for
CHUNK = 512  # frames at once
MOST_CHANNELS = 16
CUT = 0.08  # of full scale: mean difference of two frames at a cut
CUT_RATIO = 4.0  # of it to the median difference of its neighbours


def as_pictures(obs: np.ndarray) -> np.ndarray:
    """Return pictures [T, h, w, c] of any dtype as float32 in [0, 1], at most SIDE on a side."""
    scale = 255 if obs.dtype == np.uint8 else 1
    _, height, width, _ = obs.shape
    obs = obs[..., :MOST_CHANNELS]
    for axis, length in ((1, height), (2, width)):
        parts = min(SIDE, length)
        if parts < length:
            edges = np.arange(parts) * length // parts
            counts = np.diff([*edges, length])
            shape = [-1 if i == axis else 1 for i in range(4)]
            sums = np.add.reduceat(obs, edges, axis, dtype=np.float32)
            obs = sums / counts.reshape(shape)
    return (obs / np.float32(scale)).astype(np.float32)


def shift(grey: np.ndarray, axis: int) -> np.ndarray:
    """Return by how many pixels the view moved between frames [T, h, w], [T - 1]: along the width
    (axis 2) positive where it turned right, along the height (axis 1) where it turned down.

    Each row (column) is matched with itself by its correlation, and those that never change, as of
    a status bar, count little.
    """
    if axis == 1:
        grey = grey.swapaxes(1, 2)
    length = grey.shape[2]
    reach = min(REACH, length // 4)
    grey = grey - grey.mean(2, keepdims=True)
    activity = np.abs(np.diff(grey, axis=0)).mean((0, 2))
    weight = activity / max(float(activity.sum()), 1e-9)
    errors = []
    for s in range(-reach, reach + 1):
        before = grey[:-1, :, max(0, s) : length + min(0, s)]
        after = grey[1:, :, max(0, -s) : length + min(0, -s)]
        scale = (before**2).sum(2) * (after**2).sum(2)
        errors.append(-((before * after).sum(2) / np.sqrt(scale + 1e-6)) @ weight)
    moved: np.ndarray = _lowest(np.stack(errors, 1)) - reach
    return moved


def _lowest(errors: np.ndarray) -> np.ndarray:
    """Place of the minimum of each row [T, n], between its samples by a parabola."""
    rows, best = np.arange(len(errors)), errors.argmin(1)
    inside = np.clip(best, 1, errors.shape[1] - 2)
    left, middle, right = (errors[rows, inside + i] for i in (-1, 0, 1))
    bend = left - 2 * middle + right
    safe = (bend > 1e-12) & (inside == best)
    offset = np.where(safe, (left - right) / np.where(safe, 2 * bend, 1), 0)
    flat = errors.max(1) - errors.min(1) < 1e-12
    place: np.ndarray = np.where(flat, errors.shape[1] // 2, best + np.clip(offset, -0.5, 0.5))
    return place


def changes(pictures: np.ndarray) -> np.ndarray:
    """Return what changed between successive pictures [T, h, w, c] as numbers [T - 1, n]: sums and
    first moments for each channel, which a moving thing changes wherever it is, and a coarse grid.
    """
    delta = np.diff(pictures, axis=0)
    height, width = delta.shape[1:3]
    y, x = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    rows, columns = delta.sum(2), delta.sum(1)
    found = [
        rows.sum(1),
        np.einsum('thc,h->tc', rows, y),
        np.einsum('twc,w->tc', columns, x),
        np.abs(delta).sum((1, 2)),
    ]
    grey = delta.mean(-1)
    for values in (grey, np.abs(grey)):
        for band in np.array_split(values, min(4, height), 1):
            cells = np.array_split(band, min(4, width), 2)
            found.append(np.stack([cell.mean((1, 2)) for cell in cells], 1))
    return np.concatenate(found, 1)


def overlapping(obs: np.ndarray) -> Iterator[np.ndarray]:
    """Yield frames [T, ...] in pieces that begin with the last frame of the one before, so that long
    episodes take little memory; none if there is one frame.
    """
    for begin in range(0, len(obs) - 1, CHUNK):
        yield obs[begin : begin + CHUNK + 1]


def count_cuts(obs: np.ndarray) -> int:
    """Count scene changes in frames [T, h, w, c]: differences that are large, also next to their
    neighbours'.
    """
    parts = (as_pictures(part).mean(-1) for part in overlapping(obs))
    differences = [np.abs(np.diff(part, axis=0)).mean((1, 2)) for part in parts]
    difference = np.concatenate(differences) if differences else np.zeros(0)
    found = 0
    for t in np.flatnonzero(difference > CUT).tolist():
        near = np.delete(difference[max(0, t - 8) : t + 9], min(t, 8))
        found += len(near) > 0 and difference[t] > CUT_RATIO * float(np.median(near))
    return int(found)


def count_repeated(obs: np.ndarray) -> int:
    """Count frames [T, ...] that equal the frame before."""
    return sum(np.array_equal(a, b) for a, b in itertools.pairwise(obs))
