"""Frame rates of videos, and which frame is shown at each tick of another rate."""

import numpy as np

from reverie.data.importers.decoding import Probe

SAME = 0.01  # rates that differ by less are the same, as 30 and 29.97 are


def rate_of(probe: Probe) -> tuple[float | None, bool]:
    """Return (frames a second, whether the rate is constant); None where times are not known.

    A rate is constant if every frame is nearer to its place at the mean rate than to the next one;
    the rate of others is the median's.
    """
    times = probe.times
    if times is None or len(times) < 2 or times[-1] <= times[0]:
        return None, True
    step = float(times[-1] - times[0]) / (len(times) - 1)
    places = times[0] + step * np.arange(len(times))
    if np.abs(times - places).max() < step / 2:
        return 1 / step, True
    gaps = np.diff(times)
    return 1 / float(np.median(gaps[gaps > 0])), False


def same_rate(a: float, b: float) -> bool:
    return abs(a - b) <= SAME * max(a, b)


def ticks(times: np.ndarray, fps: float) -> int:
    """Ticks of a rate from the first to the last frame."""
    return int(np.floor((times[-1] - times[0]) * fps + 1e-6)) + 1


def shown(times: np.ndarray, fps: float) -> np.ndarray:
    """Return how often each frame is the nearest one to a tick of `fps`, [T]."""
    at = times[0] + np.arange(ticks(times, fps)) / fps
    nearest = np.searchsorted((times[:-1] + times[1:]) / 2, at, side='right')
    return np.bincount(nearest, minlength=len(times))
