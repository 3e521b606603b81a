"""Pure-JAX environments: many copies with auto-reset under `jit`, time limits, and environments by
name.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from reverie import imports
from reverie.envs import control, memory, registry
from reverie.envs.minatar import env as minatar
from reverie.types import Env, EnvSpec, Step, UserError


class VectorState(NamedTuple):
    env: PyTree  # [n, ...]
    done: Bool[Array, ' n']  # the last step was `is_last`: the next call resets this copy


@dataclasses.dataclass(frozen=True)
class Vector:
    """Vector of n copies of `env` in one array program, with auto-reset in the arrival convention.

    A copy that arrived at `is_last` ignores the action of the next call and yields the `is_first`
    step of a new episode: reward 0, prev_action zeros.
    """

    env: Env
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f'{self.n} environments asked for; expected at least 1')

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    def reset(self, key: PRNGKeyArray) -> tuple[VectorState, Step]:
        """Begin n episodes; return the state and Step [n], all `is_first`."""
        env, step = jax.vmap(self.env.reset)(jax.random.split(key, self.n))
        return VectorState(env, step.is_last), step

    def step(
        self, state: VectorState, action: Array, key: PRNGKeyArray
    ) -> tuple[VectorState, Step]:
        """Take `action`, indices [n] if discrete, [n, A] if continuous; return the state and
        Step [n].
        """
        keys = jax.random.split(key, self.n)
        moved = jax.vmap(self.env.step)(state.env, action, keys)
        # The branch keeps XLA from fusing both outcomes into one loop, which redraws the random
        # numbers for every pixel: 3 to 5 times slower on a CPU. A copy uses one outcome only, so
        # both may be drawn from the same key.
        any_done = state.done.any()
        fresh = jax.lax.cond(any_done, lambda: jax.vmap(self.env.reset)(keys), lambda: moved)

        @jax.vmap
        def choose(done: Array, fresh: PyTree, moved: PyTree) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(done, x, y), fresh, moved)

        env, step = choose(state.done, fresh, moved)
        return VectorState(env, step.is_last), step


class TimedState(NamedTuple):
    env: PyTree
    time: Int[Array, '']  # steps since the reset


@dataclasses.dataclass(frozen=True)
class TimeLimit:
    """Environment whose episodes end after `steps` steps by truncation: `is_last` without
    `is_terminal`.
    """

    env: Env
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f'time_limit={self.steps} ends no episode; expected at least 1 step')

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    def reset(self, key: PRNGKeyArray) -> tuple[TimedState, Step]:
        env, step = self.env.reset(key)
        return TimedState(env, jnp.zeros((), jnp.int32)), step

    def step(self, state: TimedState, action: Array, key: PRNGKeyArray) -> tuple[TimedState, Step]:
        env, step = self.env.step(state.env, action, key)
        time = state.time + 1
        return TimedState(env, time), step._replace(is_last=step.is_last | (time >= self.steps))


def names() -> tuple[str, ...]:
    """Names of the environments that need no other package; `make` also takes 'gymnax/<Id>'."""
    return (
        *(f'minatar/{game}' for game in minatar.GAMES),
        *(f'control/{task}' for task in control.SYSTEMS),
        *(f'hidden_order/{balls}' for balls in memory.BALLS),
        'memory/32',
    )


def make(name: str, **options: Any) -> Env:
    """Make an environment by name, e.g. make('minatar/breakout', sticky=0.0).

    Options of minatar/*: protocol ('minatar' or 'gymnax'), sticky, ramping, minimal_actions,
    time_limit (steps or None). Options of control/*: action_repeat, time_limit (in steps after the
    repeat) and the fields of the system.
    Options of hidden_order/*: obs ('grid' or 'image') and pays ('balls' or 'success').
    memory/<delay> has none.
    Options of gymnax/*: the fields of its EnvParams, e.g. max_steps_in_episode.
    <module>:<name> is a class or function of the reader's own, which takes the options.
    Raises UserError for an unknown name, an unknown option or a bad value.
    """
    if imports.is_own(name):
        env = imports.call(name, imports.find(name), **options)
        if not isinstance(env, Env) or not isinstance(env.spec, EnvSpec):
            raise UserError(
                f'{name} made {type(env).__name__}; expected an Env of reverie.types (one of '
                'Gymnasium is gym/<module>:<Id>)'
            )
        return env
    family, _, game = name.partition('/')
    if family == 'gymnax':
        from reverie.envs import gymnax  # an optional package; its import takes seconds

        return gymnax.build(game, **options)
    if family == 'control' and game in control.SYSTEMS:
        return TimeLimit(*control.build(game, **options))
    if family in ('hidden_order', 'memory'):
        remembered, limit = memory.build(family, game, **options)
        return remembered if limit is None else TimeLimit(remembered, limit)
    if family != 'minatar' or game not in minatar.GAMES:
        raise registry.unknown(name)
    env, time_limit = minatar.build(game, **options)
    return env if time_limit is None else TimeLimit(env, time_limit)
