"""The environment that an experiment's scores count in, on the device or on the host."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from reverie.data.records import check_picture
from reverie.envs import device, host
from reverie.envs.device import Vector
from reverie.envs.host import HostVector
from reverie.envs.registry import on_host
from reverie.evaluation import returns
from reverie.types import Actor, Env, EnvSpec, Params


class Game(Protocol):
    """Environment by name and options."""

    name: str
    options: Mapping[str, Any]

    @property
    def spec(self) -> EnvSpec: ...

    def score(
        self,
        actor: Actor,
        params: Params,
        key: PRNGKeyArray,
        *,
        episodes: int,
        max_steps: int,
        greedy: bool,
    ) -> returns.Scores:
        """Play whole episodes with params [seeds, ...]; return Scores [seeds, episodes]."""
        ...


@dataclasses.dataclass(frozen=True)
class DeviceGame:
    """Pure-JAX environment."""

    name: str
    options: Mapping[str, Any]

    @functools.cached_property
    def env(self) -> Env:
        return device.make(self.name, **self.options)

    @property
    def spec(self) -> EnvSpec:
        return self.env.spec

    def check(self, steps: int = 16) -> None:
        """Raise UserError for pictures [h, w, c] that no model can scale, in a few random steps."""
        vector = Vector(self.env, 1)

        def move(state: Any, key: PRNGKeyArray) -> tuple[Any, Any]:
            action = self.spec.actions.sample(key, 1)
            state, step = vector.step(state, action, key)
            return state, step.obs

        def play(key: PRNGKeyArray) -> tuple[Any, Any]:
            state, first = vector.reset(key)
            return first.obs, jax.lax.scan(move, state, jax.random.split(key, steps))[1]

        for x in jax.tree.leaves(jax.device_get(jax.jit(play)(jax.random.key(0)))):
            if x.dtype != np.bool_ and x.ndim >= 4:
                check_picture(x, self.name)

    def score(self, actor: Actor, params: Params, key: PRNGKeyArray, **how: Any) -> returns.Scores:
        return returns.evaluate_seeds(self.env, actor, params, key, **how)


@dataclasses.dataclass(frozen=True)
class HostGame:
    """Gymnasium environment, in processes of its own; see `envs.host.HostVector`."""

    name: str
    options: Mapping[str, Any]

    def vector(self, copies: int, purpose: host.Purpose, seed: int = 0) -> HostVector:
        """Copies in processes, whose chance is that of a purpose and seed; close it."""
        return host.make(self.name, copies, seed=host.seed_for(purpose, seed), **self.options)

    @functools.cached_property
    def spec(self) -> EnvSpec:
        with self.vector(1, 'score') as vector:
            return vector.spec

    def score(
        self, actor: Actor, params: Params, key: PRNGKeyArray, *, episodes: int, **how: Any
    ) -> returns.Scores:
        each = []
        chance = int(jax.random.bits(key))
        with self.vector(min(8, episodes), 'score', chance) as vector:
            for i in range(len(jax.tree.leaves(params)[0])):
                one = jax.tree.map(lambda x, i=i: x[i], params)
                key_seed = jax.random.fold_in(key, i)
                each.append(
                    returns.evaluate_host(vector, actor, one, key_seed, episodes=episodes, **how)
                )
        fields = [field.name for field in dataclasses.fields(returns.Scores)]
        return returns.Scores(*(np.stack([getattr(s, name) for s in each]) for name in fields))


AnyGame: TypeAlias = DeviceGame | HostGame


def game(name: str, options: Mapping[str, Any]) -> AnyGame:
    """The environment of a name; it is made when it is first needed."""
    return (HostGame if on_host(name) else DeviceGame)(name, dict(options))
