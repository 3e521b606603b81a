"""Worker process of one host environment, started by `envs.process`; never imports JAX.

It receives single bytes over a pipe: `a` attach to the shared memory, `r` reset (a seed may
follow), `s` step. It answers `.` when the record of its copy is filled in, `!` and a sentence when
the environment raised, `?` and one when it cannot be built as asked or is not what it declares.
Arrays go through shared memory.
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

from reverie.envs import spaces, suites
from reverie.envs.observations import EnvRefusedError, Wishes

LOG_BYTES = 1 << 20  # size at which the log of a chatty environment is emptied
LARGEST = float(np.finfo(np.float32).max)


class Setup(NamedTuple):
    """First message to a worker: the environment to build."""

    name: str | None  # environment of a suite; None: made by `factory`
    factory: Callable[[], Any]  # makes a Gymnasium environment
    wishes: Wishes
    arguments: dict[str, Any]  # of the environment's own class
    action_repeat: int | None
    time_limit: int | None
    seed: int


class Part(NamedTuple):
    """One array of an observation, as the layout has it; the only one is called ''."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    said: str  # what it was made of


def record(layout: dict[str, Any]) -> np.dtype:
    """Type of the record of one copy in shared memory."""
    action: tuple[Any, ...] = ('action', np.float32, (layout['actions'],))
    if layout['kind'] == 'discrete':
        action = ('action', np.int32)
    arrays = [(p.name, np.dtype(p.dtype), tuple(p.shape)) for p in parts(layout)]
    single = len(arrays) == 1 and arrays[0][0] == ''
    obs: tuple[Any, ...] = ('obs', *arrays[0][1:]) if single else ('obs', arrays)
    scalars = [('reward', np.float32), ('last', np.bool_), ('terminal', np.bool_)]
    return np.dtype([obs, action, *scalars], align=True)


def parts(layout: dict[str, Any]) -> list[Part]:
    """Arrays that an observation consists of."""
    return [Part(*part) for part in layout['obs']]


class EnvWorker:
    """Environment with action repeat, a time limit, actions in [-1, 1] and observations of fixed
    shapes.

    Times are counted in the environment's own steps, of which `action_repeat` make one step here.
    """

    def __init__(self, setup: Setup):
        who = setup.name or 'the environment'
        wishes = setup.wishes
        if setup.name:
            built = suites.build(setup.name, wishes, setup.arguments)
        else:
            built = suites.Built(setup.factory())
        self.env = built.env
        view = spaces.view(self.env.observation_space, wishes, who)
        if view is None:
            self.env = suites.camera(self.env, who)
            drawn = self.env.observation_space
            view = spaces.view(drawn, Wishes('image', size=wishes.size), who)
        if view is None:
            raise EnvRefusedError(
                f'{who} draws {self.env.observation_space}; expected images [h, w, 3] of uint8'
            )
        self.view: spaces.View = view
        self.repeat = setup.action_repeat or built.action_repeat
        self.limit = built.time_limit if setup.time_limit is None else setup.time_limit
        self.pool, self.meanings = built.pool, built.meanings
        self.seed: int | None = setup.seed
        self.kind, self.size, self.convert = spaces.action_converter(self.env.action_space, who)
        self.time = 0

    @property
    def layout(self) -> dict[str, Any]:
        """Description of the environment that its caller is sent, as JSON."""
        return dict(
            obs=[
                [name, form.kind, list(form.shape), form.dtype, form.said]
                for name, form in self.view.forms.items()
            ],
            kind=self.kind,
            actions=self.size,
            meanings=list(self.meanings),
            repeat=self.repeat,
        )

    def reset(self) -> Any:
        obs, _ = self.env.reset(seed=self.seed)
        self.seed, self.time = None, 0  # later episodes draw on
        return self._see(obs)

    def step(self, action: np.ndarray | np.generic) -> tuple[Any, float, bool, bool]:
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
        if not abs(total) <= LARGEST:
            raise ValueError(f'a reward of {total} was returned; expected a finite float32')
        if self.pool and before is not None:
            obs = np.maximum(obs, before)  # some games draw a sprite every other frame only
        return self._see(obs), total, bool(terminated or truncated), bool(terminated)

    def _see(self, obs: Any) -> Any:
        with np.errstate(over='ignore'):
            seen = self.view.see(obs)
        for x in seen.values():
            if x.dtype == np.float32 and not np.isfinite(x).all():
                raise ValueError('an observation with numbers that are not finite was returned')
        return seen[''] if list(seen) == [''] else seen


def serve(pipe: multiprocessing.connection.Connection, memory: int) -> None:
    """Build the environment and answer messages until the other end closes the pipe."""
    try:
        # Unpickles a message of our own parent, the only other process with this pipe, as
        # multiprocessing does.
        env_worker = EnvWorker(Setup(*pipe.recv()))
    except Exception as error:
        refused = isinstance(error, EnvRefusedError)
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
    except EnvRefusedError as error:
        return b'?' + str(error).encode()
    except Exception as error:
        return b'!' + sentence(error).encode()
    obs, *scalars = arrived
    for name, value in obs.items() if isinstance(obs, dict) else ():
        mine['obs'][name][0] = value
    if not isinstance(obs, dict):
        mine['obs'][0] = obs
    for name, value in zip(('reward', 'last', 'terminal'), scalars, strict=True):
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
