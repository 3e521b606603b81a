"""Probe environments: worlds so small that what a working learner must find is known."""

import dataclasses

import jax
import jax.numpy as jnp

from reverie.data import Writer
from reverie.data.source import Dataset
from reverie.types import ActionSpace, Batch, EnvSpec, Step


@dataclasses.dataclass(frozen=True)
class Counter:
    """The observation is the sum of all actions (0 or 1) modulo `size`; arriving at the last number
    earns 1.

    The number lights one quadrant of a 4x4 image. An off-by-one of actions makes the next frame a
    coin flip, one of rewards makes them unpredictable. The best policy counts up and then waits, a
    reward at every step.
    """

    size: int = 2

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(
            f'counter/{self.size}', (4, 4, 1), ActionSpace('discrete', 2, ('wait', 'count'))
        )

    def _step(self, number, prev_action, reward, is_first) -> Step:
        quadrant = jnp.arange(4).reshape(2, 2).repeat(2, 0).repeat(2, 1) == number
        no = jnp.asarray(False)
        return Step(quadrant[..., None], prev_action, reward, is_first, no, no)

    def reset(self, key):
        number = jax.random.randint(key, (), 0, self.size)
        return number, self._step(number, jnp.zeros(2), jnp.zeros(()), jnp.asarray(True))

    def step(self, state, action, key):
        number = (state + action) % self.size
        reward = (number == self.size - 1).astype(jnp.float32)
        return number, self._step(number, jax.nn.one_hot(action, 2), reward, jnp.asarray(False))

    def best(self, number):
        return (number != self.size - 1).astype(jnp.int32)


class RandomPlay(Dataset):
    """A source that plays a `Counter` at random, with new episodes for every batch.

    The counter's size is data, so that agents which differ in nothing else share their compiled
    programs.
    """

    def __init__(self, env: Counter):
        self.actions, self.data = env.spec.actions.size, {'size': jnp.asarray(env.size)}

    def draw(self, data, loaded, key, batch, length, relevant=0.0) -> Batch:
        env = Counter(data['size'])
        key_reset, key_play = jax.random.split(key)

        def play(key_reset, key_play):
            state, first = env.reset(key_reset)

            def step(state, key):
                action = jax.random.randint(key, (), 0, self.actions)
                return env.step(state, action, key)

            _, rest = jax.lax.scan(step, state, jax.random.split(key_play, length - 1))
            return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

        steps = jax.vmap(play)(
            jax.random.split(key_reset, batch), jax.random.split(key_play, batch)
        )
        yes = jnp.ones(batch, bool)
        return Batch(steps, yes, yes, jnp.arange(batch) < round(relevant * batch))

    def get_state(self):
        return {}

    def set_state(self, state):
        assert state == {}


@dataclasses.dataclass(frozen=True)
class Match:
    """Continuous: each step shows a number, and the next action earns 1 less its distance to the
    number.

    A policy that does not see scores at most one half of what the best one does; rewards off by one
    earn no more.
    """

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec('match', (1,), ActionSpace('continuous', 1))

    def _step(self, number, prev_action, reward, is_first) -> Step:
        no = jnp.asarray(False)
        return Step(number[None], prev_action, reward, is_first, no, no)

    def reset(self, key):
        number = jax.random.choice(key, jnp.array([-0.6, 0.6]))
        return number, self._step(number, jnp.zeros(1), jnp.zeros(()), jnp.asarray(True))

    def step(self, state, action, key):
        reward = 1 - jnp.abs(action[0] - state)
        number = jax.random.choice(key, jnp.array([-0.6, 0.6]))
        return number, self._step(number, action, reward, jnp.asarray(False))


@dataclasses.dataclass(frozen=True)
class Ends:
    """A walk between four cells, shown as the quadrants of a 4x4 image; one end earns 1 at every step
    there, the other end -1.

    Random play earns 0 on average, the best policy nearly 1 at every step, and one that does the
    task of the other end nearly -1.
    """

    pays: int = 0  # 0: the left end, 1: the right one

    @property
    def spec(self) -> EnvSpec:
        name = f'tests.probes:{("left", "right")[self.pays]}'
        return EnvSpec(name, (4, 4, 1), ActionSpace('discrete', 2, ('left', 'right')))

    def _step(self, cell, prev_action, reward, is_first) -> Step:
        quadrant = jnp.arange(4).reshape(2, 2).repeat(2, 0).repeat(2, 1) == cell
        no = jnp.asarray(False)
        return Step(quadrant[..., None], prev_action, reward, is_first, no, no)

    def reset(self, key):
        cell = jax.random.randint(key, (), 0, 4)
        return cell, self._step(cell, jnp.zeros(2), jnp.zeros(()), jnp.asarray(True))

    def step(self, state, action, key):
        cell = jnp.clip(state + 2 * action - 1, 0, 3)
        right = (cell == 3).astype(jnp.float32) - (cell == 0).astype(jnp.float32)
        reward = right if self.pays else -right
        return cell, self._step(cell, jax.nn.one_hot(action, 2), reward, jnp.asarray(False))


def left() -> Ends:
    return Ends(0)


def right() -> Ends:
    return Ends(1)


def record(path, env, task, episodes=40, length=50, seed=0):
    """Write random play of an environment as the dataset of a task."""

    def play(key):
        key_reset, key_play = jax.random.split(key)
        state, first = env.reset(key_reset)

        def step(state, key):
            return env.step(state, jax.random.randint(key, (), 0, 2), key)

        _, rest = jax.lax.scan(step, state, jax.random.split(key_play, length - 1))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    with Writer(path, env.spec, task=task) as writer:
        for key in jax.random.split(jax.random.key(seed), episodes):
            played = jax.device_get(jax.jit(play)(key))
            is_last = played.is_first[::-1]
            writer.add('random', played._replace(is_last=is_last))
    return path
