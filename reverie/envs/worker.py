"""The process in which one host environment lives. Started by `envs.host`; never imports JAX.

It talks over a pipe in single bytes: `a` attach to the shared memory, `r` reset (a seed may
follow), `s` step. It answers `.` when the record of its copy is filled in, `!` and a sentence when
the environment raised, `?` and one when it was asked for wrongly. Arrays go through shared memory.
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

LOG_BYTES = 1 << 20  # what a chatty environment may print before its log is emptied
UNBOUNDED = 1e6  # a bound beyond this is no scale for an action in [-1, 1]


class Setup(NamedTuple):
    """What a worker is told first."""

    name: str | None  # of a suite's environment,
    factory: Callable[[], Any]  # or who makes a Gymnasium environment
    obs: str | None
    size: tuple[int, ...] | None
    action_repeat: int | None
    time_limit: int | None
    seed: int


def record(layout: dict[str, Any]) -> np.dtype:
    """What one copy holds in shared memory."""
    action: tuple = ('action', np.float32, (layout['actions'],))
    if layout['kind'] == 'discrete':
        action = ('action', np.int32)
    obs = ('obs', np.dtype(layout['dtype']), tuple(layout['shape']))
    return np.dtype(
        [obs, action, ('reward', np.float32), ('last', np.bool_), ('terminal', np.bool_)],
        align=True,
    )


class EnvWorker:
    """An environment with action repeat, a time limit, actions in [-1, 1] and observations of one
    shape.

    time_limit and all counting are in the environment's own steps; `action_repeat` of them make one
    step here.
    """

    def __init__(self, setup: Setup):
        who = setup.name or 'the environment'
        built = (
            suites.build(setup.name, setup.obs, setup.size)
            if setup.name
            else suites.Built(setup.factory())
        )
        self.env, view = (
            built.env,
            suites.viewer(built.env.observation_space, setup.obs, setup.size, who),
        )
        if view is None:
            self.env = suites.camera(self.env, who)
            view = suites.viewer(self.env.observation_space, 'image', setup.size, who)
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
        """-> (obs, summed reward, last, terminal)."""
        converted, total, obs = self.convert(action), 0.0, None
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
    """-> (kind, size, action in the convention of `ActionSpace` -> action of the environment)."""
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
    """Obeys until the other end closes the pipe."""
    try:
        # Unpickles what our own parent wrote into a pipe that nobody else holds, as multiprocessing
        # does.
        player = EnvWorker(Setup(*pipe.recv()))
    except Exception as error:
        refused = isinstance(error, suites.EnvRefusedError)
        pipe.send_bytes(b'?' + str(error).encode() if refused else b'!' + sentence(error).encode())
        return
    layout = player.layout
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
            pipe.send_bytes(obey(player, order, mine))
    except (EOFError, ConnectionError):
        player.env.close()


def obey(player: EnvWorker, order: bytes, mine: np.ndarray) -> bytes:
    try:
        if order[:1] == b'r':
            trim_log()
            if order[1:]:
                (player.seed,) = struct.unpack('<i', order[1:])
            obs, reward, last, terminal = player.reset(), 0.0, False, False
        else:
            obs, reward, last, terminal = player.step(mine['action'][0])
    except Exception as error:
        return b'!' + sentence(error).encode()
    mine['obs'][0], mine['reward'][0], mine['last'][0], mine['terminal'][0] = (
        obs,
        reward,
        last,
        terminal,
    )
    return b'.'


def sentence(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def trim_log() -> None:
    if os.fstat(2).st_size > LOG_BYTES:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)


def exit_with(parent: int) -> None:
    """Ends this process when its parent is gone, even while the environment hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    pipe, memory, parent = (int(x) for x in sys.argv[1:])
    threading.Thread(target=exit_with, args=(parent,), daemon=True).start()
    serve(multiprocessing.connection.Connection(pipe), memory)


if __name__ == '__main__':
    main()
