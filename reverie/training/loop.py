"""The training loop: fetch, update, log, save."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from reverie.errors import ExportError
from reverie.io import warn
from reverie.training import checkpoint, faults, warm
from reverie.training.compilation import Compiler
from reverie.training.held_out import HeldOut
from reverie.training.metrics import Sink
from reverie.training.progress import Call, PhaseLog
from reverie.training.run_folder import Saver
from reverie.training.setup import TrainSetup
from reverie.training.state import TrainState, swap_mean
from reverie.training.update import Program
from reverie.types import Params, UserError


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Scores while training, which go into the record of that update."""

    every: int  # environment frames of one seed; taken after the call that passes a multiple
    play: Callable[[Params], Mapping[str, np.ndarray]]  # params [seeds, ...] -> {name: [seeds]}


class Position(NamedTuple):
    """Phase and step where training goes on."""

    phase: int  # number of the first that is left
    params: Params  # [seeds, ...]
    train: TrainState | None = None  # set in the middle of that phase
    gradient_steps: int = 0
    seconds: float = 0.0  # of training so far


def restored(setup: TrainSetup, folder: pathlib.Path) -> Position | None:
    """Restore the newest sound checkpoint of a run, the source included; None if there is none."""

    def target(meta: checkpoint.Meta) -> tuple[Params, dict[str, Any]]:
        saved = dataclasses.replace(setup, source=setup.source.as_saved(meta['source']))
        rest = saved.expected(meta['phase_index'])._asdict()
        rest['host'] = saved.source.arrays()  # NumPy, so that they are read into NumPy
        return rest.pop('params'), rest

    def left(meta: checkpoint.Meta) -> bool:
        """Whether the phase of a checkpoint is to go on, or its replay to be exported."""
        return _goes_on(setup, meta) or (_is_end(setup, meta) and setup.source.owes_export)

    found = checkpoint.restore_latest(folder, target, left)
    if found is None:
        return None
    params, rest, meta = found
    setup.source.set_state(meta['source'])
    train = None
    if rest is not None:
        setup.source.set_arrays(rest.pop('host'))
        train = TrainState(params, **rest)
        train = train._replace(live=setup.source.enlarged(train.live))
        if meta['complete']:
            train = swap_mean(train, setup.phases[meta['phase_index']])
            params = train.params
    index = meta['phase_index'] + (meta['complete'] and not _goes_on(setup, meta))
    done = meta['gradient_steps']
    warn(
        f'every phase is complete ({done} gradient steps)'
        if index == len(setup.phases)
        else f'resuming after {meta["phase"]}/{meta["step"]} ({done} gradient steps in all)'
    )
    return Position(index, params, train, done, meta['seconds'])


def _is_end(setup: TrainSetup, meta: checkpoint.Meta) -> bool:
    """Whether a checkpoint stands at the end of the last phase."""
    return bool(meta['complete']) and meta['phase_index'] == len(setup.phases) - 1


def _goes_on(setup: TrainSetup, meta: checkpoint.Meta) -> bool:
    """Whether a checkpoint stands at the end of a run that is asked for more updates."""
    return _is_end(setup, meta) and meta['step'] < setup.phases[-1].steps


def begun(setup: TrainSetup, start: warm.Start | None) -> Position:
    """Begin a run with fresh weights, or where a warm start leaves off."""
    params = setup.init()
    if start is None:
        return Position(0, params)
    warn(start.line)
    index, train = start.first, None
    params = start.weights(params)
    if start.extends is not None:
        if start.same_data:
            setup.source.set_state(start.extends.meta['source'])
        train = start.resume(params, setup.expected(index), setup.phases[index])
    return Position(index, params, train)


@dataclasses.dataclass(frozen=True)
class Loop:
    """Trains the phases of a run, each by calls of its program of many updates."""

    setup: TrainSetup
    compiler: Compiler
    saver: Saver
    sinks: Sequence[Sink]
    scoring: Scoring | None
    held_out: HeldOut | None
    log_every_s: float
    updates_per_call: int
    max_streak: int

    def run(self, position: Position) -> Params:
        """Train every phase that is left; return the parameters."""
        setup = self.setup
        first, params, train, *_ = position
        owed = train if first == len(setup.phases) else None  # its export failed at the end
        if owed is not None and (failure := self._export(owed)):
            raise ExportError(failure, params) from failure
        del position  # a phase's parameters are let go when the next begins
        for index in range(first, len(setup.phases)):
            phase = setup.phases[index]
            if phase.name in setup.given:
                self.saver.save(index, params, None, phase.steps)
                continue
            with faults.short_memory(phase, setup.seeds):
                setup.begin_latents(index, params if train is None else train.params)
                params = self.phase(index, setup.begin(index, params) if train is None else train)
            train = None
        return params

    def phase(self, index: int, train: TrainState) -> Params:
        """Train one phase to its end; return its parameters."""
        setup, phase = self.setup, self.setup.phases[index]
        step, size = int(train.step[0]), setup.call_size(phase, self.updates_per_call)
        log, keys = self._log(index, step), setup.phase_keys(index)
        program: Program | None = None
        setup.source.set_params(train.params)
        while step < phase.steps:
            updates = min(size, phase.steps - step)
            inputs = setup.fetch(phase, step, updates)
            # The call takes the weights' buffers; the next `load`, which runs beside it, acts with
            # a copy of them.
            setup.source.set_params(train.params)
            played = setup.source.metrics()
            if program is None:
                program = self.compiler.program(index, train, inputs, updates)
            data, loaded, fixed, long = inputs
            train, metrics, *rest = program.call(
                train, data, loaded, keys, fixed, long, updates=updates
            )
            step += updates
            compiled = len(program.compile_log)
            log.push(Call(step, updates, compiled, {**metrics, **played}, *rest))
            # Looked at now: the next call takes the weights' buffers.
            if self.held_out is not None and self.held_out.due(phase, step - updates, step):
                log.flush(scores=self.held_out.losses(phase, train.params, step))
            if self._score_due(index, step - updates, step):
                assert self.scoring is not None
                log.flush(scores=self.scoring.play(train.params))
            if self.saver.due and step < phase.steps:
                log.flush()
                self.saver.save(index, train.params, train, step)
        log.flush(last=True)
        return self._finish(index, train)

    def _finish(self, index: int, train: TrainState) -> Params:
        """Save the end of a phase; return its parameters, the mean of the weights if it keeps one."""
        setup, phase = self.setup, self.setup.phases[index]
        failure = self._export(train)
        train = swap_mean(train, phase)
        params = setup.end_tokenizer(index, train.params)
        train = train._replace(params=params)
        last = index == len(setup.phases) - 1  # a finished run may be asked for more
        kept = last or (self.saver.checkpoints.keep_phase_ends and not setup.source.plays)
        self.saver.save(index, params, train if kept else None, phase.steps)
        if failure is not None:
            raise ExportError(failure, params) from failure
        return params

    def _export(self, train: TrainState) -> UserError | OSError | None:
        """Let the source end the phase; return the error of an export that failed."""
        try:
            self.setup.source.finish(train.live)
        except (UserError, OSError) as error:
            return error
        return None

    def _score_due(self, index: int, before: int, after: int) -> bool:
        """Tell if the updates between passed a multiple of `scoring.every` frames."""
        if self.scoring is None:
            return False
        passed = [self.setup.phase_frames(index, n) // self.scoring.every for n in (before, after)]
        return passed[1] > passed[0]

    def _log(self, index: int, step: int) -> PhaseLog:
        folder = self.saver.checkpoints.folder.parent
        monitor = faults.SkipMonitor(folder, self.setup.phases[index], self.max_streak)
        clock = self.saver.clock
        return PhaseLog(self.setup, index, step, monitor, self.sinks, clock, self.log_every_s)
