"""A dream beside what happened: the same actions in the world model and in the recording."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from reverie.types import State, Step, WorldModel


class Dream(NamedTuple):
    """Frames [B, T] of windows: the first `context` were given, the others imagined."""

    image: Float[Array, 'B T h w c']
    feat: Float[Array, 'B T F']
    reward: Float[Array, 'B T']  # predicted for the arrival of each frame; of given frames 0
    cont: Float[Array, 'B T']


def dream(
    model: WorldModel, state: State, action: Float[Array, 'H B A'], keys: Key[Array, ' H']
) -> Dream:
    """Imagine the frames [H, B] that the actions [H, B] lead to, with one key for each step."""

    def imagine(state: State, x: tuple[Array, PRNGKeyArray]) -> tuple[State, Dream]:
        action, key = x
        state, pred = model.imagine(state, action, key)
        return state, Dream(model.decode(state), pred.feat, pred.reward, pred.cont)

    dreamed: Dream = jax.lax.scan(imagine, state, (action, keys))[1]
    return dreamed


def open_loop(model: WorldModel, step: Step, context: int, key: PRNGKeyArray) -> Dream:
    """Observe the first `context` frames of windows [B, T], then imagine the rest under the
    recorded actions.
    """
    b, t = step.is_first.shape
    time_major = jax.tree.map(lambda x: x.swapaxes(0, 1), step)
    keys = jax.random.split(key, t)

    def observe(state: State, x: tuple[Step, PRNGKeyArray]) -> tuple[State, Dream]:
        state, feat = model.observe(state, *x)
        return state, Dream(model.decode(state), feat, jnp.zeros(b), jnp.ones(b))

    given = jax.tree.map(lambda x: x[:context], (time_major, keys))
    state, seen = jax.lax.scan(observe, model.initial(b), given)
    dreamed = dream(model, state, time_major.prev_action[context:], keys[context:])
    joined: Dream = jax.tree.map(lambda x, y: jnp.concatenate([x, y]).swapaxes(0, 1), seen, dreamed)
    return joined
