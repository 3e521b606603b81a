"""The planner against recorded numbers, a loop and a known optimum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reverie.agents.planet import CEM
from reverie.types import Prediction
from tests.golden_numbers import golden


class Aim(NamedTuple):
    """The reward of step t is -|action - target[n, t]|^2; the state counts the steps."""

    def initial(self, batch):
        return begin(jnp.zeros((batch, 1, 1)))

    def observe(self, state, step, key):
        return state, state[0]

    def decode(self, state):
        return state[0]

    def imagine(self, state, action, key):
        target, at = state
        aim = jnp.take_along_axis(target, at[:, None, None], 1)[:, 0]
        reward = -jnp.square(action - aim).sum(-1)
        return (target, at + 1), Prediction(action, reward, jnp.ones_like(reward))


def begin(target):
    return jnp.asarray(target, jnp.float32), jnp.zeros(len(target), jnp.int32)


def test_the_belief_follows_the_recorded_iterations():
    g = golden('planet/cem')
    noise = jnp.asarray(g['noise'], jnp.float32)[:, None]
    cem = CEM(horizon=5, iterations=4, candidates=200, top=20)
    belief = cem.beliefs(Aim(), begin(g['target'][None]), jax.random.key(0), 2, noise)
    np.testing.assert_allclose(belief.mean[:, 0], g['mean'], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(belief.std[:, 0], g['std'], rtol=1e-4, atol=1e-6)
    action = cem.plan(Aim(), begin(g['target'][None]), jax.random.key(0), 2, noise)
    np.testing.assert_allclose(action[0], g['mean'][-1, 0], rtol=1e-4)


def test_each_state_gets_its_own_optimum():
    target = jax.random.uniform(jax.random.key(1), (3, 4, 2), minval=-0.9, maxval=0.9)
    target = target.at[2, 0].set(jnp.array([5.0, -5.0]))  # out of reach: the bound is best
    plan = jax.jit(lambda state, key: CEM(4, 12, 300, 30).plan(Aim(), state, key, 2))
    action = plan(begin(target), jax.random.key(2))
    np.testing.assert_allclose(action, jnp.clip(target[:, 0], -1, 1), atol=0.05)


def test_one_iteration_equals_a_loop():
    rng = np.random.default_rng(0)
    target, noise = rng.normal(size=(2, 3, 1)), rng.normal(size=(1, 2, 10, 3, 1))
    cem = CEM(horizon=3, iterations=1, candidates=10, top=4)
    belief = cem.beliefs(
        Aim(), begin(target), jax.random.key(0), 1, jnp.asarray(noise, jnp.float32)
    )
    for n in range(2):
        plans = [np.clip(noise[0, n, j], -1, 1) for j in range(10)]
        plans.sort(key=lambda plan: sum((plan[t] - target[n, t]) ** 2 for t in range(3)).item())
        np.testing.assert_allclose(belief.mean[0, n], np.mean(plans[:4], 0), rtol=1e-4)
        np.testing.assert_allclose(
            belief.std[0, n], np.sqrt(np.var(plans[:4], 0) + 1e-6), rtol=1e-4
        )
