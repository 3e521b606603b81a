"""Scores: play whole episodes in the real environment."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from reverie.types import ActionSpace, Actor, Env, Params, Step


@dataclasses.dataclass(frozen=True)
class Scores:
    """One whole episode per environment; leading dims [episodes] or [seeds, episodes]."""

    returns: np.ndarray  # undiscounted sum of rewards; of an unfinished episode, the sum so far
    lengths: np.ndarray  # env steps
    truncated: np.ndarray  # bool: ended by a time limit (its own or max_steps), not by the game


@dataclasses.dataclass(frozen=True)
class RandomActor:
    """Uniform over the actions; the floor of every normalised score."""

    actions: ActionSpace

    def initial(self, params: Params, batch: int) -> tuple[()]:
        return ()

    def act(
        self,
        params: Params,
        state: tuple[()],
        step: Step,
        key: PRNGKeyArray,
        greedy: bool | jax.Array,
    ) -> tuple[tuple[()], jax.Array]:
        return state, self.actions.sample(key, step.reward.shape[0])


class _Static:
    """Static argument of `jit`: equal values share a program, unhashable ones only if identical."""

    def __init__(self, value: Any):
        self.value = value
        try:
            self.hash = hash(value)
        except TypeError:
            self.hash = id(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or self.hash != other.hash:
            return False
        return self.value is other.value or bool(self.value == other.value)


class _Carry(NamedTuple):
    env: Any
    memory: Any
    step: Step
    ret: jax.Array  # [episodes] f32
    length: jax.Array  # [episodes] i32
    done: jax.Array  # [episodes] bool
    terminal: jax.Array  # [episodes] bool
    t: jax.Array  # [] i32


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def _start(
    env: _Static, actor: _Static, params: Params, key: jax.Array, episodes: int, seeded: bool
) -> _Carry:
    def one(params: Params, key: jax.Array) -> _Carry:
        state, step = jax.vmap(env.value.reset)(jax.random.split(key, episodes))
        memory = actor.value.initial(params, episodes)
        ret, length = jnp.zeros(episodes), jnp.zeros(episodes, jnp.int32)
        off = jnp.zeros(episodes, bool)
        return _Carry(state, memory, step, ret, length, off, off, jnp.zeros((), jnp.int32))

    return jax.vmap(one)(params, key) if seeded else one(params, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 6, 8), donate_argnums=(3,))
def _play(
    env: _Static,
    actor: _Static,
    params: Params,
    carry: _Carry,
    key: jax.Array,
    limit: jax.Array,
    steps: int,
    greedy: jax.Array,
    seeded: bool,
) -> tuple[_Carry, jax.Array]:
    """Play `steps` more steps of every episode; return (carry, [] bool: nothing left to play)."""

    def one(params: Params, carry: _Carry, key: jax.Array) -> _Carry:
        def body(c: _Carry, _: None) -> tuple[_Carry, None]:
            step_key = jax.random.fold_in(key, c.t)  # the same whatever `steps` is
            act_key, env_key = jax.random.split(step_key)
            memory, action = actor.value.act(params, c.memory, c.step, act_key, greedy)
            env_keys = jax.random.split(env_key, c.done.shape[0])
            state, step = jax.vmap(env.value.step)(c.env, action, env_keys)
            live = ~c.done & (c.t < limit)
            # finished envs keep stepping; their rewards are ignored
            ret = c.ret + jnp.where(live, step.reward, 0.0)
            done = c.done | (live & step.is_last)
            terminal = c.terminal | (live & step.is_terminal)
            return _Carry(state, memory, step, ret, c.length + live, done, terminal, c.t + 1), None

        return jax.lax.scan(body, carry, None, length=steps)[0]

    carry = (jax.vmap(one) if seeded else one)(params, carry, key)
    return carry, jnp.all(carry.done | (carry.t >= limit)[..., None])


def evaluate(
    env: Env,
    actor: Actor,
    params: Params,
    key: PRNGKeyArray | jax.Array,
    *,
    episodes: int = 128,
    max_steps: int = 5000,
    greedy: bool = False,
    chunk: int = 100,
    seeded: bool = False,
) -> Scores:
    """Play `episodes` copies of `env` at once, one episode each; return Scores [episodes].

    So short episodes are not over-counted.

    Args:
        params: of the actor.
        key: drives resets, environments and sampling; independent of `chunk`.
        max_steps: env steps after which an unfinished episode counts with its return so far, as
            truncated.
        greedy: the most probable action instead of a sampled one.
        chunk: env steps per jitted call; the host looks after each whether all are done.
        seeded: params and key are [seeds, ...], and so are the Scores; see `evaluate_seeds`.
    """
    statics = _Static(env), _Static(actor)
    split = jax.vmap(jax.random.split, out_axes=1)(key) if seeded else jax.random.split(key)
    carry = _start(*statics, params, split[0], episodes, seeded)
    limit, mode = jnp.int32(max_steps), jnp.bool_(greedy)
    over = False
    while not over:
        carry, end = _play(*statics, params, carry, split[1], limit, chunk, mode, seeded)
        over = bool(end)
    return Scores(np.asarray(carry.ret), np.asarray(carry.length), ~np.asarray(carry.terminal))


def evaluate_seeds(
    env: Env, actor: Actor, params: Params, key: PRNGKeyArray | jax.Array, **options: Any
) -> Scores:
    """`evaluate` every trained seed in one program; return Scores [seeds, episodes].

    Leaves of `params` are [seeds, ...]. options: those of `evaluate`.
    """
    keys = jax.random.split(key, jax.tree.leaves(params)[0].shape[0])
    return evaluate(env, actor, params, keys, seeded=True, **options)


def evaluate_host(
    vector: Any,
    actor: Actor,
    params: Params,
    key: PRNGKeyArray,
    *,
    episodes: int = 16,
    max_steps: int = 5000,
    greedy: bool = False,
) -> Scores:
    """`evaluate` in environments on the host; return Scores [episodes].

    Each of the n copies plays as many episodes, round(episodes / n) but at least one, so that short
    episodes are not over-counted. An episode is cut after `max_steps` steps of the agent; chance in
    the environments is their own.

    vector: has `n`, `reset()` and `step(action)`, see `envs.host.HostVector`.
    """
    n = vector.n

    @jax.jit
    def act(params: Params, state: Any, step: Step, t: Any) -> tuple[Any, jax.Array]:
        return actor.act(params, state, step, jax.random.fold_in(key, t), greedy)

    initial = jax.jit(actor.initial, static_argnums=1)
    each, t = max(1, round(episodes / n)), 0
    found: list[list[tuple[float, int, bool]]] = [[] for _ in range(n)]
    while min(map(len, found)) < each:  # a new round of episodes for all copies
        step, state = vector.reset(), initial(params, n)
        ret, length = np.zeros(n), np.zeros(n, int)
        done, terminal = np.zeros(n, bool), np.zeros(n, bool)
        for _ in range(max_steps):
            state, action = act(params, state, step, t)
            step, t = vector.step(np.asarray(action)), t + 1
            ret = ret + ~done * step.reward
            length = length + ~done
            terminal |= ~done & step.is_terminal
            done |= step.is_last
            if done.all():
                break
        for i in range(n):
            found[i].append((float(ret[i]), int(length[i]), not terminal[i]))
    rows = [row for of_copy in found for row in of_copy]
    return Scores(*(np.array(column) for column in zip(*rows, strict=True)))
