"""Environments of the optional package gymnax, behind our protocol."""

import dataclasses
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from reverie.envs.options import typed
from reverie.types import ActionSpace, EnvSpec, Step, UserError


@dataclasses.dataclass(frozen=True)
class Gymnax:
    """Environment of gymnax with discrete actions.

    gymnax resets by itself when an episode ends and then returns the first observation of the next
    one. Here the true last one is returned; the state afterwards is never used, since the caller
    resets this environment after `is_last`.
    """

    env: Any
    params: Any
    spec: EnvSpec

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, Step]:
        obs, state = self.env.reset(key, self.params)
        step = Step(
            obs=obs,
            prev_action=jnp.zeros(self.spec.actions.size),
            reward=jnp.zeros(()),
            is_first=jnp.asarray(True),
            is_last=jnp.asarray(False),
            is_terminal=jnp.asarray(False),
        )
        return state, step

    def step(self, state: PyTree, action: Int[Array, ''], key: PRNGKeyArray) -> tuple[PyTree, Step]:
        _, state, reward, terminated, truncated, info = self.env.step(
            key, state, action, self.params
        )
        step = Step(
            obs=info['final_observation'],
            prev_action=jax.nn.one_hot(action, self.spec.actions.size),
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
    continuous actions.
    """
    gymnax = package(f'gymnax/{name}')
    if name not in gymnax.registered_envs:
        raise UserError(
            f'gymnax has no environment {name!r}; expected one of {", ".join(gymnax.registered_envs)}'
        )
    env, params = gymnax.make(name)
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    kinds = {k: type(x) if isinstance(x, bool | int | float) else Any for k, x in values.items()}
    params = params.replace(**typed(f'gymnax/{name}', options, kinds))
    actions = env.action_space(params)
    if not hasattr(actions, 'n'):
        raise UserError(f'gymnax/{name} has actions {actions}; expected discrete ones')
    shape = tuple(env.observation_space(params).shape)
    spec = EnvSpec(f'gymnax/{name}', shape, ActionSpace('discrete', int(actions.n)))
    return Gymnax(env, params, spec)


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
