"""Programs of phases, compiled ahead of their turn."""

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

    Where nothing is loaded from the host, the shapes of all phases are known as soon as one is. On a
    processor, which training leaves idle now and then, the next phase is compiled while one trains.
    On an accelerator, whose compiler tries kernels out on the device that would train, all are
    compiled in parallel before the first one trains.
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
        self.ahead: dict[int, Future[tuple[Program, Any]]] = {}

    def program(self, index: int, train: TrainState, inputs: Inputs, updates: int) -> Program:
        """Return the program of a phase, compiled for such arguments.

        Raises OutOfMemoryError if an update does not fit beside what is on the device, SystemExit
        for a signal that comes meanwhile: a compiler cannot be stopped, and nothing is unsaved.
        """
        now = ThreadPoolExecutor(1, 'compiling')  # not this thread, which could not hear signals
        compiling = self.ahead.pop(index, None)
        compiling = compiling or now.submit(self._compile, index, train, inputs, updates)
        now.shutdown(wait=False)
        known, processor = not jax.tree.leaves(inputs.loaded), jax.default_backend() == 'cpu'
        if known and not processor:
            self._compile_ahead(index, inputs.data, most=len(self.setup.phases))
            for later in self.ahead.values():
                self._wait(later)
        program, compiled = self._wait(compiling)
        available = state.available_bytes(jax.devices()[0])
        faults.check_fits(self.setup.phases[index], self.setup.seeds, compiled, available)
        if known and processor:
            self._compile_ahead(index, inputs.data, most=1)
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

    def _compile_ahead(self, index: int, data: PyTree, most: int) -> None:
        """Start compiling the phases after `index` that are trained here, `most` of them at most."""
        phases = self.setup.phases
        for later in range(index + 1, len(phases)):
            data, phase = self.setup.data_after(later - 1, data), phases[later]
            if later in self.ahead or phase.name in self.setup.given or not phase.steps:
                continue
            if len(self.ahead) == most:
                return
            updates = self.setup.call_size(phase, self.updates_per_call)
            expected, long = self.setup.expected(later), self.setup.long(phase, 0, updates)
            inputs = Inputs(data, None if long is None else (None, None), phase.fixed(), long)
            self.ahead[later] = self.executor.submit(
                self._compile, later, expected, inputs, updates
            )
