"""Moments of play that the game can go on from again, and what its chance alone leaves of a frame."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from reverie.envs.device import Vector
from reverie.types import Actor, Env, Params, Step

WARM_UP = 256  # steps that a player plays; a moment is any of them that has its context


class Starts(NamedTuple):
    """Moments of play: states of the game, and the frames before them."""

    env: PyTree  # [N, ...]
    step: Step  # [N, C, ...]

    @property
    def alive(self) -> Bool[Array, ' N']:
        """Whether the episode goes on."""
        return ~self.step.is_last[:, -1]


def starts(
    env: Env, actor: Actor, weights: Params, key: PRNGKeyArray, *, count: int, context: int
) -> Starts:
    """Moments drawn uniformly from play of an actor without memory, each of a copy of the game of
    its own; traced.

    count: N. context: C, frames of the play up to the moment, with those of the episode before where
    one began within.
    """
    vector = Vector(env, count)
    key_reset, key_play, key_moment = jax.random.split(key, 3)

    def move(carry: tuple[PyTree, Step], key: PRNGKeyArray) -> tuple[tuple[PyTree, Step], Any]:
        state, step = carry
        key_act, key_env = jax.random.split(key)
        _, action = actor.act(weights, (), step, key_act, False)
        return vector.step(state, action, key_env), (state.env, step)

    keys = jax.random.split(key_play, WARM_UP + context)
    _, (states, steps) = jax.lax.scan(move, vector.reset(key_reset), keys)
    moment = jax.random.randint(key_moment, (count,), context - 1, len(keys))
    rows = jnp.arange(count)
    times = moment[:, None] + jnp.arange(1 - context, 1)
    state = jax.tree.map(lambda x: x[moment, rows], states)
    return Starts(state, jax.tree.map(lambda x: x[times, rows[:, None]], steps))


def replayed(
    env: Env, actor: Actor, weights: Params, begin: Starts, key: PRNGKeyArray, *, horizon: int
) -> Int[Array, '3 H c']:
    """Play boolean grids on from each start, and again under the same actions with other dice;
    traced.

    The second time is judged by the first until its episode ends: sticky actions and other chance
    part them, as they would a perfect model, whose dreams are further draws. Returns counts of
    cells: true; made; true among those made.
    """

    def arrive(state: PyTree, action: Array, key: PRNGKeyArray) -> tuple[PyTree, Step]:
        moved: tuple[PyTree, Step] = jax.vmap(env.step)(
            state, action, jax.random.split(key, len(action))
        )
        return moved

    def first(carry: Any, keys: tuple[PRNGKeyArray, PRNGKeyArray]) -> tuple[Any, Any]:
        state, step, goes_on = carry
        _, action = actor.act(weights, (), step, keys[0], False)
        state, step = arrive(state, action, keys[1])
        return (state, step, goes_on & ~step.is_last), (action, step.obs, goes_on)

    def again(carry: Any, x: tuple[Array, PRNGKeyArray]) -> tuple[Any, Any]:
        state, goes_on = carry
        state, step = arrive(state, *x)
        return (state, goes_on & ~step.is_last), (step.obs, goes_on)

    acts, firsts, agains = (jax.random.split(key, horizon) for key in jax.random.split(key, 3))
    newest = jax.tree.map(lambda x: x[:, -1], begin.step)
    carry = (begin.env, newest, begin.alive)
    _, (action, true, valid) = jax.lax.scan(first, carry, (acts, firsts))
    _, (made, there) = jax.lax.scan(again, (begin.env, begin.alive), (action, agains))
    inside = valid[..., None, None, None]
    true, made = true & inside, made & inside & there[..., None, None, None]
    return jnp.stack([x.sum((1, 2, 3)) for x in (true, made, true & made)])
