"""Environments of the optional package gymnax, behind our protocol."""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from reverie.envs import registry
from reverie.envs.observations import IMAGE_SIZE, EnvRefusedError, Wishes, form_of
from reverie.envs.options import typed
from reverie.types import ActionSpace, EnvSpec, Step, UserError


@dataclasses.dataclass(frozen=True)
class Gymnax:
    """Environment of gymnax: observations by the table of `envs.observations`, actions one choice
    or numbers in [-1, 1] that span their bounds.

    gymnax resets by itself when an episode ends and then returns the first observation of the next
    one. Here the true last one is returned; the state afterwards is never used, since the caller
    resets this environment after `is_last`.
    """

    env: Any
    params: Any
    spec: EnvSpec
    see: Callable[[Any], Array]
    """Observation of gymnax -> ours."""
    move: Callable[[Array], Array]
    """Our action -> gymnax's."""

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, Step]:
        obs, state = self.env.reset(key, self.params)
        step = Step(
            obs=self.see(obs),
            prev_action=jnp.zeros(self.spec.actions.size),
            reward=jnp.zeros(()),
            is_first=jnp.asarray(True),
            is_last=jnp.asarray(False),
            is_terminal=jnp.asarray(False),
        )
        return state, step

    def step(self, state: PyTree, action: Array, key: PRNGKeyArray) -> tuple[PyTree, Step]:
        _, state, reward, terminated, truncated, info = self.env.step(
            key, state, self.move(action), self.params
        )
        discrete = self.spec.actions.kind == 'discrete'
        step = Step(
            obs=self.see(info['final_observation']),
            prev_action=jax.nn.one_hot(action, self.spec.actions.size) if discrete else action,
            reward=jnp.asarray(reward, jnp.float32),
            is_first=jnp.asarray(False),
            is_last=terminated | truncated,
            is_terminal=terminated,
        )
        return state, step


def build(name: str, **options: Any) -> Gymnax:
    """Build the gymnax environment with id `name`; `options` are fields of its EnvParams, e.g.
    max_steps_in_episode.

    Raises UserError if gymnax is missing or older than 1.0, for unknown ids and options, and for
    spaces that are no array or no choice.
    """
    gymnax = package(f'gymnax/{name}')
    if name not in gymnax.registered_envs:
        near = registry.nearest(name, gymnax.registered_envs) or gymnax.registered_envs
        raise UserError(f'gymnax has no environment {name!r}; expected one of {", ".join(near)}')
    env, params = gymnax.make(name)
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    kinds = {k: type(x) if isinstance(x, bool | int | float) else Any for k, x in values.items()}
    params = params.replace(**typed(f'gymnax/{name}', options, kinds))
    actions, move = _actions(env.action_space(params), name)
    shape, said, see = _observations(env, params, name)
    spec = EnvSpec(f'gymnax/{name}', shape, actions, seen=(said,))
    return Gymnax(env, params, spec, see, move)


def _observations(
    env: Any, params: Any, name: str
) -> tuple[tuple[int, ...], str, Callable[[Any], Array]]:
    """Shape of our observations, how they are made, and the function that makes them."""
    space = env.observation_space(params)
    if hasattr(space, 'n'):
        count = int(space.n)
        return (count,), f'{count} states -> one-hots', lambda x: jax.nn.one_hot(x, count)
    arrived, _ = jax.eval_shape(lambda key: env.reset(key, params), jax.random.key(0))
    if not hasattr(space, 'low') or not isinstance(arrived, jax.ShapeDtypeStruct):
        raise UserError(f'gymnax/{name} has observations {space}; expected an array or a choice')
    try:
        low, high = np.asarray(space.low), np.asarray(space.high)
        wishes = Wishes(size=IMAGE_SIZE)
        form = form_of(f'gymnax/{name}', arrived.shape, arrived.dtype, low, high, wishes, jnp)
    except EnvRefusedError as error:
        raise UserError(str(error)) from error
    return form.shape, form.said, form.convert


def _actions(space: Any, name: str) -> tuple[ActionSpace, Callable[[Array], Array]]:
    """Our action space, and the function that turns our action into gymnax's."""
    if hasattr(space, 'n'):
        return ActionSpace('discrete', int(space.n)), lambda action: action
    if not hasattr(space, 'low'):
        raise UserError(f'gymnax/{name} has actions {space}; expected a choice or an array')
    shape = tuple(space.shape)
    low, high = (np.broadcast_to(np.asarray(x, np.float32), shape) for x in (space.low, space.high))
    if not (np.isfinite(low) & np.isfinite(high)).all():
        raise UserError(f'gymnax/{name} has actions from {low} to {high}; expected bounds')

    def move(action: Array) -> Array:
        share = (jnp.clip(action, -1.0, 1.0) + 1.0) / 2.0
        return jnp.clip(low + share.reshape(shape) * (high - low), low, high)

    return ActionSpace('continuous', low.size), move


def package(wanted_by: str) -> Any:
    """Import gymnax, from 1.0 on: older ones do not tell truncation from termination.

    Raises UserError if it is missing or older.
    """
    try:
        import gymnax
    except ImportError as error:
        hint = "pip install 'reverie[gymnax]'"
        raise UserError(
            f'{wanted_by} needs the package gymnax, which is missing; install it with: {hint}'
        ) from error
    version = importlib.metadata.version('gymnax')
    if version.startswith('0.'):
        raise UserError(f'{wanted_by} needs gymnax 1.0 or newer, but {version} is installed')
    return gymnax
