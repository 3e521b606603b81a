"""Worker process of one host environment, started by `envs.process`; never imports JAX.

It receives single bytes over a pipe: `a` attach to the shared memory, `r` reset (a seed may
follow), `s` step. It answers `.` when the record of its copy is filled in, `!` and a sentence when
the environment raised, `?` and one when the environment cannot be built as asked. Arrays go through
shared memory.
"""

import json
import mmap
import multiprocessing.connection
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from reverie.envs import suites

LOG_BYTES = 1 << 20  # size at which the log of a chatty environment is emptied
UNBOUNDED = 1e6  # a bound beyond this is no scale for an action in [-1, 1]


class Setup(NamedTuple):
    """First message to a worker: the environment to build."""

    name: str | None  # environment of a suite; None: made by `factory`
    factory: Callable[[], Any]  # makes a Gymnasium environment
    obs: str | None
    size: tuple[int, ...] | None
    action_repeat: int | None
    time_limit: int | None
    seed: int


def record(layout: dict[str, Any]) -> np.dtype:
    """Type of the record of one copy in shared memory."""
    action: tuple[Any, ...] = ('action', np.float32, (layout['actions'],))
    if layout['kind'] == 'discrete':
        action = ('action', np.int32)
    obs = ('obs', np.dtype(layout['dtype']), tuple(layout['shape']))
    scalars = [('reward', np.float32), ('last', np.bool_), ('terminal', np.bool_)]
    return np.dtype([obs, action, *scalars], align=True)


class EnvWorker:
    """Environment with action repeat, a time limit, actions in [-1, 1] and observations of one
    shape.

    Times are counted in the environment's own steps, of which `action_repeat` make one step here.
    """

    def __init__(self, setup: Setup):
        who = setup.name or 'the environment'
        obs, size = setup.obs, setup.size
        if setup.name:
            built = suites.build(setup.name, obs, size)
        else:
            built = suites.Built(setup.factory())
        self.env = built.env
        view = suites.viewer(self.env.observation_space, obs, size, who)
        if view is None:
            self.env = suites.camera(self.env, who)
            view = suites.viewer(self.env.observation_space, 'image', size, who)
        if view is None:
            raise suites.EnvRefusedError(
                f'{who} draws {self.env.observation_space}; expected images [h, w, 3] of uint8'
            )
        self.view: suites.ObsView = view
        self.repeat = setup.action_repeat or built.action_repeat
        self.limit = built.time_limit if setup.time_limit is None else setup.time_limit
        self.pool, self.meanings = built.pool, built.meanings
        self.seed: int | None = setup.seed
        self.kind, self.size, self.convert = converter(self.env.action_space, who)
        self.time = 0

    @property
    def layout(self) -> dict[str, Any]:
        """Description of the environment that its caller is sent, as JSON."""
        return dict(
            shape=list(self.view.shape),
            dtype=np.dtype(self.view.dtype).name,
            kind=self.kind,
            actions=self.size,
            meanings=list(self.meanings),
            repeat=self.repeat,
        )

    def reset(self) -> np.ndarray:
        obs, _ = self.env.reset(seed=self.seed)
        self.seed, self.time = None, 0  # later episodes draw on
        return self._see(obs)

    def step(self, action: np.ndarray | np.generic) -> tuple[np.ndarray, float, bool, bool]:
        """Repeat an action; return (obs, summed reward, last, terminal)."""
        converted = self.convert(action)
        total, obs = 0.0, None
        for _ in range(self.repeat):
            before = obs
            obs, reward, terminated, truncated, _ = self.env.step(converted)
            total += float(reward)
            self.time += 1
            truncated = truncated or (self.limit is not None and self.time >= self.limit)
            if terminated or truncated:
                break
        if not np.isfinite(total):
            raise ValueError(f'a reward of {total} was returned; expected a finite number')
        if self.pool and before is not None:
            obs = np.maximum(obs, before)  # some games draw a sprite every other frame only
        return self._see(obs), total, bool(terminated or truncated), bool(terminated)

    def _see(self, obs: Any) -> np.ndarray:
        seen = self.view.see(obs)
        if seen.shape != self.view.shape:
            raise ValueError(
                f'an observation {seen.shape} was returned; expected {self.view.shape}'
            )
        if seen.dtype == np.float32 and not np.isfinite(seen).all():
            raise ValueError('an observation with numbers that are not finite was returned')
        return seen


def converter(space: Any, who: str) -> tuple[str, int, Callable[[Any], Any]]:
    """Kind and size of an action space, and the function that turns an action in the convention of
    `ActionSpace` into the environment's.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return 'discrete', int(space.n), lambda action: int(action) + int(space.start)
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise suites.EnvRefusedError(
            f'{who} has actions {space}; expected Discrete, or a Box of real numbers'
        )
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    scaled = (np.abs(low) < UNBOUNDED) & (np.abs(high) < UNBOUNDED)
    low, high = np.where(scaled, low, -1.0), np.where(scaled, high, 1.0)

    def convert(action: np.ndarray) -> np.ndarray:
        action = action.astype(np.float64)
        inside = low + (np.clip(action, -1.0, 1.0) + 1.0) / 2.0 * (high - low)
        return np.where(scaled, inside, action).reshape(space.shape).astype(space.dtype)

    return 'continuous', low.size, convert


def serve(pipe: multiprocessing.connection.Connection, memory: int) -> None:
    """Build the environment and answer messages until the other end closes the pipe."""
    try:
        # Unpickles a message of our own parent, the only other process with this pipe, as
        # multiprocessing does.
        env_worker = EnvWorker(Setup(*pipe.recv()))
    except Exception as error:
        refused = isinstance(error, suites.EnvRefusedError)
        pipe.send_bytes(b'?' + str(error).encode() if refused else b'!' + sentence(error).encode())
        return
    layout = env_worker.layout
    pipe.send_bytes(json.dumps(layout).encode())
    record_type = record(layout)
    mine = np.zeros(1, record_type)
    try:
        while True:
            order = pipe.recv_bytes()
            if order[:1] == b'a':
                index, count = struct.unpack('<ii', order[1:])
                shared = mmap.mmap(memory, record_type.itemsize * count)
                mine = np.frombuffer(shared, record_type, count)[index : index + 1]
                continue
            pipe.send_bytes(obey(env_worker, order, mine))
    except (EOFError, ConnectionError):
        env_worker.env.close()


def obey(env_worker: EnvWorker, order: bytes, mine: np.ndarray) -> bytes:
    """Reset or step, fill in the record `mine`, and return the answer."""
    try:
        if order[:1] == b'r':
            trim_log()
            if order[1:]:
                (env_worker.seed,) = struct.unpack('<i', order[1:])
            arrived = (env_worker.reset(), 0.0, False, False)
        else:
            arrived = env_worker.step(mine['action'][0])
    except Exception as error:
        return b'!' + sentence(error).encode()
    for name, value in zip(('obs', 'reward', 'last', 'terminal'), arrived, strict=True):
        mine[name][0] = value
    return b'.'


def sentence(error: Exception) -> str:
    """Describe an exception in one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def trim_log() -> None:
    """Empty the log if it has grown beyond LOG_BYTES."""
    if os.fstat(2).st_size > LOG_BYTES:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)


def exit_with(parent: int) -> None:
    """End this process when its parent is gone, even while the environment hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    pipe, memory, parent = (int(x) for x in sys.argv[1:])
    threading.Thread(target=exit_with, args=(parent,), daemon=True).start()
    serve(multiprocessing.connection.Connection(pipe), memory)


if __name__ == '__main__':
    main()
