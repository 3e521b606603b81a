"""Small host environments with known numbers and known faults.

Imported by worker processes, so never JAX.
"""

import os
import pathlib
import signal
import sys
import time

import gymnasium
import numpy as np


class Clock(gymnasium.Env):
    """Shows [seed, episode, time, action]; pays time; terminates after `length` steps.

    No step ends before the file `gate` exists.
    """

    def __init__(self, length: int = 5, gate: str | None = None):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = gymnasium.spaces.Discrete(3)
        self.length, self.gate, self.seed, self.episode, self.time = length, gate, -1, 0, 0

    def reset(self, *, seed=None, options=None):
        self.seed = self.seed if seed is None else seed % 1000
        self.episode, self.time = self.episode + 1, 0
        return self.show(-1), {}

    def step(self, action):
        while self.gate and not pathlib.Path(self.gate).exists():
            time.sleep(0.01)
        assert self.time < self.length, 'stepped after its end'
        self.time += 1
        return self.show(action), float(self.time), self.time == self.length, False, {}

    def show(self, action):
        return np.array([self.seed, self.episode, self.time, action], np.float64)


class Faulty(Clock):
    """Fails in one way at one time: in every life, or once if `scar` is a path that remembers it."""

    def __init__(self, how: str, at: int, scar: str | None = None, length: int = 5):
        super().__init__(length)
        self.how, self.at, self.scar = how, at, scar

    def reset(self, *, seed=None, options=None):
        seen = super().reset(seed=seed)
        self.fail(0)
        return seen

    def step(self, action):
        self.fail(self.time + 1)
        return super().step(action)

    def fail(self, now: int):
        if now != self.at or (self.scar and pathlib.Path(self.scar).exists()):
            return
        if self.scar:
            pathlib.Path(self.scar).touch()
        if self.how == 'raise':
            raise RuntimeError('the wheel came off')
        if self.how == 'exit':
            print('no fuel left', file=sys.stderr, flush=True)
            os._exit(3)
        if self.how == 'crash':
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.how == 'hang':
            time.sleep(1e6)


class Lever(gymnasium.Env):
    """Shows the action that arrived, and pays its sum."""

    def __init__(self, low: tuple[float, ...], high: tuple[float, ...]):
        self.action_space = gymnasium.spaces.Box(np.float32(low), np.float32(high))
        self.observation_space = gymnasium.spaces.Dict(
            {
                'b': gymnasium.spaces.Box(-np.inf, np.inf, (len(low),), np.float64),
                'a': gymnasium.spaces.Discrete(3),
            }
        )

    def reset(self, *, seed=None, options=None):
        return {'b': np.zeros(self.action_space.shape), 'a': 1}, {}

    def step(self, action):
        assert self.action_space.dtype == action.dtype
        return {'b': action, 'a': 2}, float(action.sum()), False, False, {}


class Screen(gymnasium.Env):
    """A 60 x 40 picture whose columns grow brighter; the first step shows a sprite that the second
    does not.
    """

    def __init__(self, height: int = 60, width: int = 40):
        self.observation_space = gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        height, width, _ = self.observation_space.shape
        ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3))
        return ramp.copy(), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


def tally(time, total, action, side=64, xp=np):
    """A picture of three numbers, one for each colour."""
    return xp.broadcast_to(
        xp.asarray([40 * time, 20 * total, 100 * action]).astype(xp.uint8), (side, side, 3)
    )


class Tally(gymnasium.Env):
    """Adds up its actions, pays the sum, and terminates after five steps; no chance. See
    `tests.serve.test_hosted`.
    """

    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        self.time = self.total = 0
        return tally(0, 0, 0), {}

    def step(self, action):
        self.time, self.total = self.time + 1, self.total + int(action)
        return (
            tally(self.time, self.total, int(action)),
            float(self.total),
            self.time == 5,
            False,
            {},
        )


class Mute(gymnasium.Env):
    """Actions of a kind that no agent has."""

    observation_space = gymnasium.spaces.Box(0, 1, (2,))
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])


class Witness(Clock):
    """Shows whether JAX was imported into its process."""

    def show(self, action):
        return np.full(4, float('jax' in sys.modules))


class Sick(Clock):
    """Shows something that is no number."""

    def step(self, action):
        return np.full(4, np.nan), 0.0, False, False, {}


class OneSeed(gymnasium.Wrapper):
    """Ignores which seed is given."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=None if seed is None else 7)


def crafter():
    from reverie.envs import suites

    return OneSeed(suites.build('crafter/reward').env)


def unbuildable():
    raise OSError('no such cartridge')
