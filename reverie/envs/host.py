"""Environments that are Python objects (Gymnasium, Atari, DeepMind Control, Crafter), each in a
process of its own.

Unlike `gymnasium.vector.AsyncVectorEnv` this builds no environment in the caller's process, where
one that hangs at birth would hang training; it replaces a worker that dies, instead of leaving the
others unusable; and workers do not import the caller's main module, here JAX, as `multiprocessing`
has it. Observations go through shared memory in both.
"""

import json
import logging
import mmap
import multiprocessing.connection
import os
import struct
import time
import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np

from reverie.envs import registry, worker
from reverie.envs.arguments import (
    Factory,
    check_actions,
    check_numbers,
    dumps,
    factories_of,
    name_of,
    wishes_of,
)
from reverie.envs.observations import hint
from reverie.envs.options import typed
from reverie.envs.process import (
    START_S,
    Process,
    WorkerError,
    WorkerRefusedError,
    memory_file,
    stop_all,
)
from reverie.envs.suites import OPTIONS
from reverie.io import warn
from reverie.types import ActionSpace, EnvSpec, Step, UserError

log = logging.getLogger(__name__)
LOOKS = 64  # observations looked at before a hint is given


class HostVector:
    """Vector of n copies of a host environment in worker processes, with auto-reset in the arrival
    convention.

    A copy that arrived at `is_last` ignores the action of the next call and yields the `is_first`
    step of a new episode: reward 0, prev_action zeros. A worker that dies, raises, or takes longer
    than `timeout_s` over a step is replaced: the open episode ends with a repeated observation,
    `is_last` and not `is_terminal`. A copy that fails more than `max_restarts` times without
    finishing an episode in between raises UserError.

    Args:
        env: 'atari/<game>', 'dmc/<domain>_<task>', 'crafter/reward', 'gym/<Id>'; or a function that
            makes a Gymnasium environment; or n such functions.
        n: copies; may be left out with a sequence of functions.
        action_repeat: environment steps per action, rewards summed, cut short at an episode's end;
            the suite's custom if None (Atari 4, dmc 2, else 1).
        size: (height, width) of images, resized by area; None keeps theirs.
        time_limit: environment steps (before action repeat) after which an episode is truncated;
            the suite's if None.
        obs: 'image' (rendered if need be), 'state' (one float32 vector), 'codes:<n>' (the numbers 0
            to n - 1 in a grid as one-hots), or None for the table of `observations`.
        keys: parts of an observation of several that are kept, with commas between them.
        arguments: of the environment's own class, with a name of a suite.
        seed: seed of the first episodes; copies and replacements draw differently.

    `spec` and `action_repeat` describe the environment; `restarts` counts replaced workers, `fault`
    is the cause of the last replacement. Close it, or use it in a `with` statement. Raises
    UserError if the environment cannot be built, or is not what it declares.
    """

    def __init__(self, env: str | Factory | Sequence[Factory], n: int | None = None, *,
                 action_repeat: int | None = None, size: tuple[int, ...] | int | None = (64, 64),
                 time_limit: int | None = None, obs: str | None = None, keys: str | None = None,
                 arguments: Mapping[str, Any] = MappingProxyType({}), seed: int = 0,
                 timeout_s: float | int = 60.0, max_restarts: int = 5):  # fmt: skip
        size = (size, size) if isinstance(size, int) else size
        counts = dict(n=n, action_repeat=action_repeat, time_limit=time_limit)
        check_numbers(size, timeout_s, max_restarts, **counts)
        wishes = wishes_of(obs, keys, size)
        if isinstance(env, str):
            registry.check(env)
        elif arguments:
            raise UserError(f'{dict(arguments)} given with a function that makes environments')
        factories = factories_of(env, n)
        name = env if isinstance(env, str) else None
        self.n = len(factories)
        self.name = name_of(factories[0]) if name is None else name
        self.max_restarts, self.timeout_s = max_restarts, timeout_s
        self.restarts, self.fault = 0, ''
        self._setups = [
            worker.Setup(name, f, wishes, dict(arguments), action_repeat, time_limit, 0)
            for f in factories
        ]
        self._seed, self._looks, self._highest = seed, LOOKS, 0
        self._strikes, self._births = [0] * self.n, [0] * self.n
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
        size = record.itemsize * self.n
        os.truncate(self._memory.fileno(), size)
        self._records = np.frombuffer(mmap.mmap(self._memory.fileno(), size), record)
        for i, process in enumerate(self._processes):
            process.send(self._attach(i))
        kind, width = self._layout['kind'], self._layout['actions']
        actions = ActionSpace(kind, width, tuple(self._layout['meanings']))
        self._parts = worker.parts(self._layout)
        shapes = {part.name: tuple(part.shape) for part in self._parts}
        seen = tuple(part.said for part in self._parts)
        self.spec = EnvSpec(self.name, shapes.get('', shapes), actions, seen=seen)
        self.action_repeat = int(self._layout['repeat'])
        self._done, self._broken = np.ones(self.n, bool), np.zeros(self.n, bool)
        self._asked, self._waiting = False, set[int]()
        self._obs = jax.tree.map(np.zeros_like, self._arrived())
        self._action = np.zeros((self.n, width), np.float32)

    def reset(self, seed: int | None = None) -> Step:
        """Begin new episodes and return their Step [n], all `is_first`; open ones are dropped.

        seed: seed of these episodes; None goes on with the random numbers of the last ones.
        """
        self._check_open()
        if self._asked:
            self.receive()
        self._done[:] = True
        self._ask(seed)
        return self.receive()

    def step(self, action: Any) -> Step:
        """Take `action`, [n] choices or [n, A] numbers in [-1, 1]; return Step [n] of NumPy arrays.

        Waits for the slowest copy. Numbers beyond [-1, 1] are clipped for the environment, not in
        prev_action. Raises UserError for actions of another shape or type.
        """
        self.send(action)
        return self.receive()

    def send(self, action: Any) -> None:
        """Begin a `step`: the copies compute while the caller does something else."""
        self._check_open()
        if self._asked:
            raise UserError(f'{self.name}: send was called twice; expected a receive in between')
        space, action = self.spec.actions, np.asarray(action)
        check_actions(action, space, self.n, self.name)
        self._records['action'] = action
        one_hot = np.eye(space.size, dtype=np.float32)
        self._action = one_hot[action] if space.kind == 'discrete' else action.astype(np.float32)
        self._ask()

    def _ask(self, seed: int | None = None) -> None:
        """Send every copy its order: reset where its episode is over, else step."""
        due = time.monotonic() + self.timeout_s
        for i, process in enumerate(self._processes):
            process.due = due if process.ready else max(process.due, due)
            begin = b'r' if seed is None else b'r' + struct.pack('<i', drawn(seed, i))
            process.send(begin if self._done[i] else b's')
        self._asked, self._waiting = True, set(range(self.n))
        self._broken = np.zeros(self.n, bool)

    def receive(self) -> Step:
        """Finish a `step`. Raises UserError if none was begun."""
        self._check_open()
        if not self._asked:
            raise UserError(f'{self.name}: receive was called before send')
        self._gather()
        self._asked = False
        records = self._records
        first, broken = self._done, self._broken
        last, terminal = records['last'] | broken, records['terminal'] & ~broken
        obs = self._arrived()
        for x, before in zip(jax.tree.leaves(obs), jax.tree.leaves(self._obs), strict=True):
            x[broken] = before[broken]  # a failed worker may have written half of its own
        self._obs, self._done = obs, last
        self._look(obs)
        for i in np.flatnonzero(last & ~broken):
            self._strikes[i] = 0
        fields: dict[str, Any] = dict(
            obs=jax.tree.map(np.copy, obs),
            prev_action=np.where(first[:, None], np.float32(0), self._action),
            reward=np.where(first | broken, np.float32(0), records['reward']),
            is_first=first,
            is_last=last.copy(),
            is_terminal=terminal,
        )
        return Step(**fields)

    def _arrived(self) -> Any:
        """Copies of the observations in shared memory: an array [n, ...], or a mapping of them."""
        obs = self._records['obs']
        names = [part.name for part in self._parts]
        return obs.copy() if names == [''] else {name: obs[name].copy() for name in names}

    def _look(self, obs: Any) -> None:
        """Say once, of the first observations, where a grid seems to hold codes."""
        if self._looks == 0:
            return
        self._looks -= 1
        for part in self._parts:
            if part.kind != 'grid':
                continue
            x = obs[part.name] if part.name else obs
            self._highest = max(self._highest, int(x.max()))
            if self._looks == 0 and (line := hint(part.dtype, self._highest)):
                warn(f'{self.name}: {line}')

    def _gather(self) -> None:
        """Wait until every copy has answered or has been replaced; may be interrupted and called
        again.
        """
        while self._waiting:
            pipes: dict[Any, int] = {self._processes[i].pipe: i for i in self._waiting}
            soonest = min(self._processes[i].due for i in self._waiting)
            left = max(0.0, soonest - time.monotonic())
            ready = multiprocessing.connection.wait(list(pipes), left)
            now = time.monotonic()
            for i in [pipes[pipe] for pipe in ready] or self._waiting.copy():
                process = self._processes[i]
                try:
                    if ready:
                        self._recv(i)
                    elif process.due <= now:
                        limit = self.timeout_s if process.ready else START_S
                        raise WorkerError(f'no answer within {limit:g} s')
                except WorkerRefusedError as refusal:
                    self.close()
                    raise UserError(str(refusal)) from None
                except WorkerError as failure:
                    self._replace(i, str(failure))

    def _recv(self, i: int) -> None:
        """Receive one message of copy i: its answer, or the layout of a new worker."""
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
        return Process(dumps(setup, self.name), self._memory.fileno())

    def _replace(self, i: int, cause: str) -> None:
        """Start a new worker for copy i; its open episode is over, else it begins the next one.

        Raises UserError if the copy has failed too often.
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
        """Receive the layout of a first worker. Raises UserError if there is none."""
        process = self._processes[i]
        try:
            if not process.pipe.poll(max(0.0, process.due - time.monotonic())):
                raise WorkerError(f'it was not built within {START_S:g} s')
            layout: dict[str, Any] = json.loads(process.recv())
            process.ready = True
        except WorkerRefusedError as refusal:
            raise UserError(str(refusal)) from None
        except WorkerError as failure:
            raise UserError(f'environment {self.name} cannot be built: {failure}') from None
        return layout

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise UserError(f'{self.name}: the environments are closed')

    def close(self) -> None:
        """End all workers, after two seconds by force; may be called twice."""
        self._finalizer()

    def __enter__(self) -> 'HostVector':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def drawn(*numbers: int) -> int:
    """Derive the seed of one environment from numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) % 2**31


Purpose = Literal['train', 'score', 'report', 'play', 'collect']
PURPOSES: tuple[Purpose, ...] = ('train', 'score', 'report', 'play', 'collect')


def seed_for(purpose: Purpose, *numbers: int) -> int:
    """Derive the seed of a vector, so that no two purposes see the same episodes."""
    return drawn(PURPOSES.index(purpose), *numbers)


def make(name: str, n: int = 1, *, seed: int = 0, **options: Any) -> HostVector:
    """Make copies of the environment called `name`, with options as people write them: those of
    `suites.OPTIONS`, others are arguments of the environment's own class; make.<argument> is one
    even if it is called like an option.

    Raises UserError for an unknown option, or a value that is not of its type.
    """
    given = {key: value for key, value in options.items() if key in OPTIONS}
    arguments = {k.removeprefix('make.'): x for k, x in options.items() if k not in OPTIONS}
    size = given.get('size')
    if size is not None and not isinstance(size, list | tuple) and ',' not in str(size):
        given['size'] = (size, size)
    return HostVector(name, n, seed=seed, arguments=arguments, **typed(name, given, OPTIONS))
