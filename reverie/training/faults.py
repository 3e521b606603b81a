"""Diagnostics: dump the batch of a skipped update; check memory before the first one.

faults/model-000000021-seed0.npz
  step/obs, step/reward, ..   the batch, one array for each leaf
  key                         of the loss: jax.random.wrap_key_data(key)
  update                      of the phase, from 0; the loss's `step`
  value/loss/flow, ..         what the losses and norms came to
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from reverie.io import atomic, warn
from reverie.training.checkpoint import key_name
from reverie.training.update import SkippedUpdate
from reverie.types import OutOfMemoryError, Phase

FOLDER = 'faults'
KEPT = 3  # files; also how many skips of a phase are reported one by one


def values_of(history: Mapping[str, Array], seed: int, update: int) -> dict[str, float]:
    """Return losses and norms of one update of a call; history: {name: [seeds, updates]}."""
    return {name: float(np.asarray(x)[seed, update]) for name, x in history.items()}


def words(values: Mapping[str, float]) -> str:
    """Name every loss, or else every norm, that is not finite: 'loss/flow is NaN'."""
    bad = {name: x for name, x in values.items() if not np.isfinite(x)}
    losses = {name: x for name, x in bad.items() if name.startswith('loss/')}
    said = ', '.join(
        f'{name} is {"NaN" if np.isnan(x) else x}' for name, x in (losses or bad).items()
    )
    return said or 'the weighted loss, or what it leaves behind, is not finite'


def dump(
    folder: pathlib.Path,
    phase: Phase,
    skipped: SkippedUpdate,
    seed: int,
    values: Mapping[str, float],
) -> str:
    """Write one seed's skipped update for `np.load`, and delete all but the newest `KEPT` files.

    Return words that say where it is. bfloat16, which NumPy's format does not know, is written as
    float32. A full disk is survived.
    """
    skipped = jax.device_get(skipped)
    assert phase.long is None or len(skipped.batches) == 2
    long = phase.long is not None and phase.long.at(int(skipped.update), phase.steps)
    leaves = jax.tree_util.tree_leaves_with_path(skipped.batches[long])
    arrays = {'/'.join(str(key_name(k)) for k in path): np.asarray(x) for path, x in leaves}
    arrays = {
        name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()
    }
    arrays |= {'key': np.asarray(skipped.key), 'update': np.asarray(skipped.update)}
    arrays |= {f'value/{name}': np.asarray(x, np.float32) for name, x in values.items()}
    path = folder / FOLDER / f'{phase.name}-{int(skipped.update):09d}-seed{seed}.npz'
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic(path, 'wb') as file:
            # NumPy's stub takes them for allow_pickle
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        for old in sorted(path.parent.glob('*.npz'), key=lambda p: p.stat().st_mtime_ns)[:-KEPT]:
            old.unlink()
    except OSError as error:
        return f'its batch could not be written to {path} ({error})'
    return f'its batch and key are in {path}'


class SkipMonitor:
    """Monitor that reports the skipped updates of one phase, and says when it has to stop.

    folder: of the run. max_streak: skipped updates in a row, of any seed, after which training
    stops.
    """

    def __init__(self, folder: pathlib.Path, phase: Phase, max_streak: int):
        self.folder, self.phase = folder, phase
        self.max_streak, self.reported = max_streak, 0
        self.where: dict[int, str] = {}  # by seed: words on the dump of the streak it is in

    def look(
        self, before: int, streak: np.ndarray, history: Mapping[str, Array], skipped: SkippedUpdate
    ) -> str | None:
        """Look at a call; return one line why training must stop, or None.

        before: updates of the phase before the call. streak: [seeds, updates]. skipped: [seeds,
        ...].
        """
        for seed in np.flatnonzero(streak.any(1)).tolist():
            if streak[seed, 0] <= 1:  # a new streak begins in this call
                self.where.pop(seed, None)
            fatal = streak[seed].max() >= self.max_streak
            if seed not in self.where and (fatal or self.reported < KEPT):
                mine = jax.tree.map(lambda x, i=seed: x[i], skipped)
                first = int(mine.update) - before
                values = values_of(history, seed, first)
                self.where[seed] = dump(self.folder, self.phase, mine, seed, values)
                self.reported += 1
                if not fatal:
                    at = f'phase {self.phase.name} step {before + first + 1}: {words(values)} (seed {seed})'
                    warn(f'{at}; the update is skipped, {self.where[seed]}')
        return self.verdict(before, streak, history) if streak.max() >= self.max_streak else None

    def verdict(self, before: int, streak: np.ndarray, history: Mapping[str, Array]) -> str:
        """Say why training stops: phase, step, seed and every loss or norm that was not finite."""
        seed, update = np.argwhere(streak >= self.max_streak)[0].tolist()
        return (
            f'phase {self.phase.name} step {before + update + 1}: {words(values_of(history, seed, update))} '
            f'(seed {seed}, {streak[seed, update]} updates in a row were skipped); of the first of them, '
            f'{self.where[seed]}; the last checkpoint is untouched'
        )


def advice(phase: Phase, seeds: int) -> str:
    """Say how to need less memory."""
    return f'expected a smaller batch or window (now {phase.batch} x {phase.length}) or fewer seeds (now {seeds})'


def check_fits(phase: Phase, seeds: int, compiled: Any, available: int | None) -> None:
    """Raise OutOfMemoryError if a compiled update takes more beside its arguments than is free."""
    sizes = compiled.memory_analysis()
    if sizes is None or available is None:
        return
    needed = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    if needed > available:
        raise OutOfMemoryError(
            f'phase {phase.name}: its updates take {needed / 1e9:.3g} GB beside weights, optimiser and data, but '
            f'{available / 1e9:.3g} GB are free; {advice(phase, seeds)}'
        )


@contextlib.contextmanager
def short_memory(phase: Phase, seeds: int) -> Iterator[None]:
    """Turn an allocation that failed on the device into OutOfMemoryError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        what = ' '.join(str(error).split('\n')[0].split())[:200]
        raise OutOfMemoryError(
            f'phase {phase.name}: out of memory ({what}); {advice(phase, seeds)}'
        ) from error
