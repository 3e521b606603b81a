"""Environments that are Python objects (Gymnasium, Atari, DeepMind Control, Crafter), each in a
process of its own.

Why not `gymnasium.vector.AsyncVectorEnv`: it builds one environment in this process, so an
environment that hangs at birth hangs training; one state machine for all workers leaves the others
unusable when one dies, and offers no way to replace it; and `multiprocessing` imports the caller's
main module, here JAX, into every worker. Observations go through shared memory here as there.
"""

import json
import logging
import mmap
import multiprocessing.connection
import os
import struct
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from reverie.envs import worker
from reverie.envs.process import (
    START_S,
    Process,
    WorkerError,
    WorkerRefusedError,
    memory_file,
    stop_all,
)
from reverie.types import ActionSpace, EnvSpec, Step, UserError

log = logging.getLogger(__name__)
Factory = Callable[[], Any]  # -> gymnasium.Env


class HostVector:
    """n copies of a host environment in worker processes, with auto-reset in the arrival
    convention.

    A copy that arrived at `is_last` ignores the action of the next call and yields the `is_first`
    step of a new
    episode: reward 0, prev_action zeros. A worker that dies, raises, or takes longer than
    `timeout_s` over a step is
    replaced: the episode that was open ends with a repeated observation, `is_last` and not
    `is_terminal`. A copy that fails more than `max_restarts` times without finishing an episode in
    between raises UserError.

    Args:
        env: 'atari/<game>', 'dmc/<domain>_<task>', 'crafter/reward', 'gym/<Id>'; or a function that
            makes a Gymnasium environment; or n such functions.
        n: copies; may be left out with a sequence of functions.
        action_repeat: environment steps per action, rewards summed, cut short at an episode's end;
            the suite's custom if None (Atari 4, dmc 2, else 1).
        size: (height, width) of images, resized by area; None keeps theirs.
        time_limit: environment steps (before action repeat) after which an episode is truncated;
        the suite's if None.
        obs: 'image' (rendered if need be), 'state' (one float32 vector), or None: what the
        environment has.
        seed: of the first episodes; copies and replacements draw differently.

    `spec`, `action_repeat` and `obs_dtype` tell what was built; `restarts` counts replaced workers,
    `fault` says why the last one was. Close it, or use it in a `with` statement. Raises UserError
    if the environment cannot be built.
    """

    def __init__(self, env: str | Factory | Sequence[Factory], n: int | None = None, *,
                 action_repeat: int | None = None, size: tuple[int, ...] | int | None = (64, 64),
                 time_limit: int | None = None, obs: str | None = None, seed: int = 0,
                 timeout_s: float | int = 60.0, max_restarts: int = 5):  # fmt: skip
        size = (size, size) if isinstance(size, int) else size
        _check(
            obs,
            size,
            timeout_s,
            max_restarts,
            n=n,
            action_repeat=action_repeat,
            time_limit=time_limit,
        )
        factories = _factories(env, n)
        self.n, self.name = len(factories), env if isinstance(env, str) else _name(factories[0])
        self.restarts, self.max_restarts, self.timeout_s = 0, max_restarts, timeout_s
        self.fault = ''
        name = env if isinstance(env, str) else None
        self._setups = [
            worker.Setup(name, f, obs, size, action_repeat, time_limit, 0) for f in factories
        ]
        self._seed, self._strikes, self._births = seed, [0] * self.n, [0] * self.n
        self._memory = memory_file()
        self._processes: list[Process] = []
        self._finalizer = weakref.finalize(
            self, stop_all, self._processes, self._memory, os.getpid()
        )
        self._layout: dict[str, Any] = {}
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        for i in range(self.n):
            self._processes.append(self._launch(i))
        layouts = [self._handshake(i) for i in range(self.n)]
        for i, layout in enumerate(layouts):
            if layout != layouts[0]:
                raise UserError(
                    f'{self.name}: copy {i} is built as {layout}, copy 0 as {layouts[0]}; expected alike'
                )
        self._layout = layouts[0]
        record = worker.record(self._layout)
        os.truncate(self._memory.fileno(), record.itemsize * self.n)
        self._records = np.frombuffer(
            mmap.mmap(self._memory.fileno(), record.itemsize * self.n), record
        )
        for i, process in enumerate(self._processes):
            process.send(self._attach(i))
        kind, width = self._layout['kind'], self._layout['actions']
        actions = ActionSpace(kind, width, tuple(self._layout['meanings']))
        self.spec = EnvSpec(self.name, tuple(self._layout['shape']), actions)
        self.action_repeat, self.obs_dtype = (
            int(self._layout['repeat']),
            np.dtype(self._layout['dtype']),
        )
        self._done, self._broken = np.ones(self.n, bool), np.zeros(self.n, bool)
        self._asked, self._waiting = False, set[int]()
        self._obs = np.zeros((self.n, *self.spec.obs_shape), self.obs_dtype)
        self._action = np.zeros((self.n, width), np.float32)

    def reset(self, seed: int | None = None) -> Step:
        """-> Step [n], all `is_first`.

        An open episode is dropped. seed: of these episodes; None: chance goes on.
        """
        self._check_open()
        if self._asked:
            self.receive()
        self._done[:] = True
        self._ask(seed)
        return self.receive()

    def step(self, action: Any) -> Step:
        """`action` [n] choices, or [n, A] numbers in [-1, 1] -> Step [n] of NumPy arrays.

        Waits for the slowest copy. Numbers beyond [-1, 1] are clipped for the environment, not in
        prev_action.
        """
        self.send(action)
        return self.receive()

    def send(self, action: Any) -> None:
        """The first half of `step`: the copies move while the caller does something else."""
        self._check_open()
        if self._asked:
            raise UserError(f'{self.name}: send was called twice; expected a receive in between')
        space, action = self.spec.actions, np.asarray(action)
        discrete = space.kind == 'discrete'
        shape = (self.n,) if discrete else (self.n, space.size)
        if action.shape != shape:
            raise UserError(f'{self.name}: actions {action.shape} given; expected {shape}')
        if discrete and not np.issubdtype(action.dtype, np.integer):
            raise UserError(f'{self.name}: actions of type {action.dtype} given; expected integers')
        if discrete and not ((action >= 0) & (action < space.size)).all():
            raise UserError(
                f'{self.name}: actions {action.tolist()} given; expected 0 to {space.size - 1}'
            )
        if not np.isfinite(action).all():
            raise UserError(
                f'{self.name}: actions {action.tolist()} given; expected finite numbers'
            )
        self._records['action'] = action
        self._action = (
            np.eye(space.size, dtype=np.float32)[action] if discrete else action.astype(np.float32)
        )
        self._ask()

    def _ask(self, seed: int | None = None) -> None:
        now = time.monotonic()
        for i, process in enumerate(self._processes):
            process.due = (
                now + self.timeout_s if process.ready else max(process.due, now + self.timeout_s)
            )
            begin = b'r' if seed is None else b'r' + struct.pack('<i', drawn(seed, i))
            process.send(begin if self._done[i] else b's')
        self._asked, self._waiting, self._broken = True, set(range(self.n)), np.zeros(self.n, bool)

    def receive(self) -> Step:
        """The second half of `step`."""
        self._check_open()
        if not self._asked:
            raise UserError(f'{self.name}: receive was called before send')
        self._gather()
        self._asked, first, broken = False, self._done, self._broken
        records = self._records
        last, terminal = records['last'] | broken, records['terminal'] & ~broken
        obs = records['obs'].copy()
        obs[broken] = self._obs[broken]  # what a worker left behind may be half written
        self._obs, self._done = obs, last
        for i in np.flatnonzero(last & ~broken):
            self._strikes[i] = 0
        fields: dict[str, Any] = dict(
            obs=obs.copy(),
            prev_action=np.where(first[:, None], np.float32(0), self._action),
            reward=np.where(first | broken, np.float32(0), records['reward']),
            is_first=first,
            is_last=last.copy(),
            is_terminal=terminal,
        )
        return Step(**fields)

    def _gather(self) -> None:
        """Waits until every copy has answered or has been replaced; may be interrupted and called
        again.
        """
        while self._waiting:
            pipes: dict[Any, int] = {self._processes[i].pipe: i for i in self._waiting}
            soonest = min(self._processes[i].due for i in self._waiting)
            ready = multiprocessing.connection.wait(
                list(pipes), max(0.0, soonest - time.monotonic())
            )
            now = time.monotonic()
            for i in [pipes[pipe] for pipe in ready] or self._waiting.copy():
                process = self._processes[i]
                try:
                    if ready:
                        self._recv(i)
                    elif process.due <= now:
                        raise WorkerError(
                            f'no answer within {self.timeout_s if process.ready else START_S:g} s'
                        )
                except WorkerError as failure:
                    self._replace(i, str(failure))

    def _recv(self, i: int) -> None:
        """One message of copy i: its answer, or what a new worker has built."""
        process, reply = self._processes[i], self._processes[i].recv()
        if reply[:1] == b'.':
            self._waiting.discard(i)
            return
        if json.loads(reply) != self._layout:
            raise WorkerError(
                f'its replacement was built as {reply.decode()}; expected {self._layout}'
            )
        process.ready, process.due = True, time.monotonic() + self.timeout_s

    def _attach(self, i: int) -> bytes:
        return b'a' + struct.pack('<ii', i, self.n)

    def _launch(self, i: int) -> Process:
        setup = self._setups[i]._replace(seed=drawn(self._seed, i, self._births[i]))
        self._births[i] += 1
        return Process(_dumps(setup, self.name), self._memory.fileno())

    def _replace(self, i: int, cause: str) -> None:
        """A new worker for copy i.

        The open episode is over; if none was open, the new worker begins the next.
        """
        self._strikes[i] += 1
        if self._strikes[i] > self.max_restarts:
            self.close()
            raise UserError(
                f'environment {self.name}, copy {i}, failed {self._strikes[i]} times without finishing an episode '
                f'(max_restarts={self.max_restarts}); the last time: {cause}'
            )
        log.warning('environment %s, copy %d: %s; its worker is replaced', self.name, i, cause)
        self.restarts, self.fault = self.restarts + 1, cause
        self._processes[i].close(0.0)
        self._processes[i] = self._launch(i)
        self._processes[i].send(self._attach(i))
        if self._done[i]:
            self._processes[i].send(b'r')
        else:
            self._broken[i] = True
            self._waiting.discard(i)

    def _handshake(self, i: int) -> dict[str, Any]:
        process = self._processes[i]
        try:
            if not process.pipe.poll(max(0.0, process.due - time.monotonic())):
                raise WorkerError(f'it was not built within {START_S:g} s')
            process.ready, layout = True, json.loads(process.recv())
        except WorkerRefusedError as refusal:
            raise UserError(str(refusal)) from None
        except WorkerError as failure:
            raise UserError(f'environment {self.name} cannot be built: {failure}') from None
        return layout

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise UserError(f'{self.name}: the environments are closed')

    def close(self) -> None:
        """Ends all workers, by force if they do not leave within two seconds.

        May be called twice.
        """
        self._finalizer()

    def __enter__(self) -> 'HostVector':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def drawn(*numbers: int) -> int:
    """A seed of an environment's own, the same for the same numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) % 2**31


def _check(obs: str | None, size: tuple[int, ...] | None, timeout_s: float | int, max_restarts: int,
           **counts: int | None) -> None:  # fmt: skip
    for what, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f'{what}={value} given for host environments; expected at least 1')
    if obs not in (None, 'image', 'state'):
        raise UserError(f"obs={obs!r} given for host environments; expected 'image' or 'state'")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f'size={size} given for host environments; expected (height, width)')
    if timeout_s <= 0:
        raise UserError(f'timeout_s={timeout_s} given for host environments; expected more than 0')
    if max_restarts < 0:
        raise UserError(
            f'max_restarts={max_restarts} given for host environments; expected at least 0'
        )


def _factories(env: str | Factory | Sequence[Factory], n: int | None) -> list[Any]:
    if isinstance(env, str):
        return [None] * (n or 1)
    if callable(env):
        return [env] * (n or 1)
    if (
        not isinstance(env, Iterable)
        or not (many := list(env))
        or not all(callable(make) for make in many)
    ):
        raise UserError(
            f'{env!r} given as host environments; expected a name, or functions that make environments'
        )
    if n not in (None, len(many)):
        raise UserError(f'{len(many)} functions given for n={n} environments; expected as many')
    return many


def _name(factory: Factory) -> str:
    made_by = getattr(factory, 'func', factory)  # of a functools.partial
    return getattr(made_by, '__qualname__', type(made_by).__name__)


def _dumps(setup: worker.Setup, name: str) -> bytes:
    try:
        # comes with gymnasium; takes functions of the main module and closures, too
        import cloudpickle
    except ImportError as error:
        hint = "pip install 'reverie[gymnasium]'"
        raise UserError(
            f'{name} needs the package gymnasium, which is missing; install it with: {hint}'
        ) from error
    try:
        return cloudpickle.dumps(tuple(setup))
    except Exception as error:
        raise UserError(
            f'{name} cannot be sent to a worker process: {error}; expected a function to pickle'
        ) from error
