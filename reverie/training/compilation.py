"""Programs of phases, the next one compiled while one trains."""

import signal
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any

import jax
from jaxtyping import PyTree

from reverie.io import warn
from reverie.training import faults, state
from reverie.training.setup import Inputs, TrainSetup
from reverie.training.signals import EXIT
from reverie.training.state import TrainState
from reverie.training.update import Program, make_program

HEARD_S = 0.25  # between two looks at signals


class Compiler:
    """Compiles the program of each phase once.

    Where nothing is loaded from the host, the shapes of the next phase are known as soon as this
    one trains, and its program is compiled beside it: on a processor only, which training leaves
    idle now and then; on accelerators a compiler tries kernels out on the device that trains.
    """

    def __init__(
        self,
        setup: TrainSetup,
        updates_per_call: int,
        executor: Executor,
        signals: Sequence[signal.Signals] = (),
    ):
        self.setup, self.executor, self.signals = setup, executor, signals
        self.updates_per_call = updates_per_call
        self.ahead: Future[tuple[Program, Any]] | None = None

    def program(self, index: int, train: TrainState, inputs: Inputs, updates: int) -> Program:
        """Return the program of a phase, compiled for such arguments.

        Raises OutOfMemoryError if an update does not fit beside what is on the device, SystemExit
        for a signal that comes meanwhile: a compiler cannot be stopped, and nothing is unsaved.
        """
        now = ThreadPoolExecutor(1, 'compiling')  # not this thread, which could not hear signals
        compiling = self.ahead or now.submit(self._compile, index, train, inputs, updates)
        now.shutdown(wait=False)
        (program, compiled), self.ahead = self._wait(compiling), None
        available = state.available_bytes(jax.devices()[0])
        faults.check_fits(self.setup.phases[index], self.setup.seeds, compiled, available)
        if not jax.tree.leaves(inputs.loaded) and jax.default_backend() == 'cpu':
            self._compile_next(index, inputs.data)
        return program

    def _wait(self, compiling: Future[tuple[Program, Any]]) -> tuple[Program, Any]:
        """Wait for a program in pieces, between which signals are heard."""
        while not wait([compiling], HEARD_S).done:
            if self.signals:
                name = self.signals[0].name
                warn(f'{name}: stopped while compiling; run the same command to continue')
                raise SystemExit(EXIT[self.signals[0]])
        return compiling.result()

    def _compile(
        self, index: int, train: TrainState, inputs: Inputs, updates: int
    ) -> tuple[Program, Any]:
        """Return a phase's program and XLA's executable for such arguments, arrays or shapes."""
        setup = self.setup
        shardings = None if setup.mesh is None else state.train_sharding(setup.mesh, train)
        program = make_program(setup.phases[index], setup.source, setup.mesh, shardings)
        keys = setup.phase_keys(index)
        data, loaded, fixed, long = inputs
        lowered = program.call.lower(train, data, loaded, keys, fixed, long, updates=updates)
        return program, lowered.compile()

    def _compile_next(self, index: int, data: PyTree) -> None:
        """Start compiling the first phase after `index` that is trained here, if it has steps."""
        phases = self.setup.phases
        data = self.setup.data_after(index, data)
        index += 1
        while index < len(phases) and phases[index].name in self.setup.given:
            index += 1
        if index < len(phases) and phases[index].steps:
            updates = self.setup.call_size(phases[index], self.updates_per_call)
            expected, phase = self.setup.expected(index), phases[index]
            long = self.setup.long(phase, 0, updates)
            inputs = Inputs(data, None if long is None else (None, None), phase.fixed(), long)
            self.ahead = self.executor.submit(self._compile, index, expected, inputs, updates)
