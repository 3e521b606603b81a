"""The host's reading of finished calls: faults, memories for replay, records for the sinks."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from reverie.training.faults import SkipMonitor
from reverie.training.metrics import Sink
from reverie.training.setup import TrainSetup
from reverie.training.update import SkippedUpdate
from reverie.types import Mean, Metrics, UserError


@dataclasses.dataclass
class Clock:
    """Seconds of training since the first start of a run, whatever the wall clock does."""

    started: float  # time.monotonic() of this start
    before: float = 0.0  # seconds of the starts before it

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started


class Call(NamedTuple):
    """Results of one call of a program; reading an array waits for the device."""

    step: int  # updates of the phase after it
    updates: int
    compilations: int
    metrics: Metrics
    streak: Array  # [seeds, updates]
    history: Mapping[str, Array]
    memory: PyTree  # [seeds, updates, B, T, ...] for a replay on the host, else None
    skipped: SkippedUpdate  # [seeds, ...] of the first update that was skipped


class PhaseLog:
    """Reads the calls of one phase one behind the device, and writes a record every so often."""

    def __init__(
        self,
        setup: TrainSetup,
        index: int,
        step: int,
        monitor: SkipMonitor,
        sinks: Sequence[Sink],
        clock: Clock,
        every_s: float,
    ):
        self.setup, self.index = setup, index
        self.monitor, self.sinks = monitor, sinks
        self.clock, self.every_s = clock, every_s
        self.logged_at, self.logged_step = time.monotonic(), step
        self.calls = 0
        self.played: dict[str, Mean] = {}  # sums since the last record
        self.unread: Call | None = None

    def push(self, call: Call) -> None:
        """Read the call before this one, while the device works on it."""
        self.flush()
        self.unread = call

    def flush(self, last: bool = False, scores: Mapping[str, np.ndarray] | None = None) -> None:
        """Read the call that was pushed last, if it is unread.

        A record is written when it is time, for the first and the last call of a phase, and with
        scores [seeds] of the weights after the call. Raises UserError if too many updates in a row
        were not finite.
        """
        call, self.unread = self.unread, None
        if call is None:
            return
        streak = np.asarray(call.streak)
        before = call.step - call.updates
        if fault := self.monitor.look(before, streak, call.history, call.skipped):
            raise UserError(fault)
        if call.memory is not None:
            self.setup.source.write_back(jax.device_get(call.memory), streak == 0)
        metrics = self._add_played(jax.device_get(dict(call.metrics)))
        self.calls += 1
        now = time.monotonic()
        waited = now - self.logged_at
        if self.calls == 1 or last or scores or waited >= self.every_s:
            # The first call of a phase spends its time compiling.
            rates = self._rates(call, waited) if last or self.calls > 1 else {}
            self.logged_at, self.logged_step = now, call.step
            self._write(call, {**metrics, **(scores or {})}, rates)

    def _add_played(self, metrics: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Add sums to those since the last record; return the other metrics."""
        for name, x in metrics.items():
            if isinstance(x, Mean):
                so_far = self.played.get(name, Mean(0.0, 0.0))
                self.played[name] = jax.tree.map(np.add, x, so_far)
        return {name: x for name, x in metrics.items() if not isinstance(x, Mean)}

    def _rates(self, call: Call, waited: float) -> dict[str, float]:
        """Return updates and frames of all seeds per second since the last record."""
        setup, phase = self.setup, self.setup.phases[self.index]
        rate = (call.step - self.logged_step) / max(waited, 1e-9)
        found = {
            'time/updates_per_s': rate,
            'time/frames_per_s': rate * phase.batch * phase.length * setup.seeds,
        }
        if setup.source.plays:
            before = setup.phase_frames(self.index, call.step - call.updates)
            played = setup.phase_frames(self.index, call.step) - before
            found['time/env_frames_per_s'] = rate * played / call.updates * setup.seeds
        return found

    def _write(
        self, call: Call, metrics: Mapping[str, np.ndarray], rates: dict[str, float]
    ) -> None:
        record: dict[str, Any] = dict(
            phase=self.setup.phases[self.index].name,
            step=call.step,
            gradient_steps=self.setup.gradient_steps(self.index, call.step),
            env_frames=self.setup.env_frames(self.index, call.step),
            seconds=self.clock.seconds,
        )
        record |= over_seeds(metrics) | episodes_played(self.played) | rates
        record['time/seconds'] = self.clock.seconds
        record['time/compilations'] = call.compilations
        self.played = {}
        for sink in self.sinks:
            sink.write(record)


def over_seeds(metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return metrics [seeds] as entries of a record: the mean, and each seed where there are many."""
    values: dict[str, Any] = {}
    for name, x in metrics.items():
        values[name] = float(x.mean())
        if x.shape[0] > 1:
            values[f'{name}/seeds'] = [float(v) for v in x]
    return values


def episodes_played(played: Mapping[str, Mean]) -> dict[str, Any]:
    """Return sums [seeds] over episodes as entries of a record: means, NaN where none ended."""
    values: dict[str, Any] = {}
    if 'env/return' in played:
        values['env/episodes'] = float(played['env/return'].n.sum())
    for name, (total, count) in played.items():
        each = [float(t / n) if n else float('nan') for t, n in zip(total, count, strict=True)]
        some = [x for x in each if not np.isnan(x)]
        values[name] = float(np.mean(some)) if some else float('nan')
        if len(each) > 1:
            values[f'{name}/seeds'] = each
    return values
