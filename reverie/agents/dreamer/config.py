"""Configurations of Dreamer V1 to V3 and TransDreamerV3; PlaNet shares that of the world model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.models.rssm import RSSMConfig
from reverie.models.tssm import TSSMConfig
from reverie.nn.action_dists import (
    BoundedNormalDist,
    OneHotDist,
    StraightThroughDist,
    TanhNormalDist,
    TruncNormalDist,
)
from reverie.nn.core import Style
from reverie.nn.dists import Identity, Tanh, TwoHotDist, UnitNormalDist
from reverie.nn.encoders import ObsConfig
from reverie.nn.optim import clipped_adam, laprop_agc, per_group
from reverie.objectives.actor_critic import (
    ActorObjective,
    Critic,
    NoScale,
    PercentileScale,
    ReplayCritic,
    SlowAverage,
    SlowCopy,
)
from reverie.objectives.behavior import ExclusiveReturn, InclusiveReturn
from reverie.types import Losses


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Network of a head."""

    layers: int
    """Hidden layers."""
    units: int
    """Units of each hidden layer."""
    style: Style = Style()
    """Activation, norm, initialisation and type, those of the agent."""


@dataclasses.dataclass(frozen=True)
class WorldModelConfig:
    """A latent world model and how it is fitted."""

    dynamics: RSSMConfig | TSSMConfig
    """Latent dynamics, see `models.rssm` and `models.tssm`."""
    obs: ObsConfig
    """How observations are read and predicted."""
    reward: HeadConfig
    cont: HeadConfig | None
    """Head for the end of episodes; None for agents without one (PlaNet, V1)."""
    kl: Callable[[Any, Any], Losses]
    """(posterior, prior) -> loss terms."""
    scales: Mapping[str, float]
    """Weight of each loss term: obs, reward, cont, and those of `kl`."""
    reward_dist: TwoHotDist | UnitNormalDist = TwoHotDist()
    """Distribution of rewards."""
    reward_transform: Identity | Tanh = Identity()
    """The reward that is learnt."""
    cont_discount: float = 1.0
    """Target of `cont` where the episode goes on, so that the head predicts the discount too."""


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """How much is played and replayed."""

    envs: int = 1
    """Environments played at once."""
    capacity: int = 1_000_000
    """Steps kept."""
    prefill: int = 1024
    """Steps played before the first update."""
    random_prefill: bool = True
    """Those steps are uniformly random, else the explorer's."""
    ratio: float = 32.0
    """Replayed steps per played one."""
    batch: int = 16
    """Windows per update."""
    length: int = 64
    """Steps per window."""
    context: int = 1
    """Steps before a window whose memories come with it, where the agent has memories."""


@dataclasses.dataclass(frozen=True)
class LaProp:
    """LaProp with adaptive gradient clipping for everything; V3."""

    learning_rate: float = 4e-5
    warmup_steps: int = 1000
    """Updates over which the learning rate rises from zero."""
    clip: float = 0.3
    """Largest ratio of a tensor's gradient norm to its weights' norm."""

    def build(self, world_model: tuple[str, ...]) -> optax.GradientTransformation:
        return laprop_agc(self.learning_rate, self.warmup_steps, self.clip)


@dataclasses.dataclass(frozen=True)
class Adams:
    """Adam for the world model, the policy and the critic separately; V1, V2."""

    world: float = 6e-4
    """Learning rate of the world model."""
    policy: float = 8e-5
    """Learning rate of the policy."""
    value: float = 8e-5
    """Learning rate of the critic."""
    clip_norm: float = 100.0
    """Largest gradient norm of each of the three."""
    eps: float = 1e-7
    weight_decay: float = 0.0

    def build(self, world_model: tuple[str, ...]) -> optax.GradientTransformation:
        def adam(rate: float) -> optax.GradientTransformation:
            return clipped_adam(rate, self.clip_norm, self.eps, self.weight_decay)

        rates: dict[str | tuple[str, ...], float]
        rates = {world_model: self.world, 'policy': self.policy, 'value': self.value}
        return per_group({groups: adam(rate) for groups, rate in rates.items()})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Exploration by the policy's own entropy; V2, V3."""

    def __call__(self, action: Array, key: PRNGKeyArray, discrete: bool) -> Array:
        return action


@dataclasses.dataclass(frozen=True)
class ActionNoise:
    """Exploration by noise on actions; V1."""

    std: float = 0.3
    """Standard deviation added to continuous actions."""
    epsilon: float = 0.1
    """Share of discrete actions replaced by random ones."""

    def __call__(
        self, action: Float[Array, 'N A'], key: PRNGKeyArray, discrete: bool
    ) -> Float[Array, 'N A']:
        key_which, key_what = jax.random.split(key)
        if not discrete:
            return jnp.clip(action + self.std * jax.random.normal(key_what, action.shape), -1, 1)
        n, size = action.shape
        other = jax.nn.one_hot(jax.random.randint(key_what, (n,), 0, size), size)
        return jnp.where(jax.random.bernoulli(key_which, self.epsilon, (n, 1)), other, action)


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A policy in one kind of action space."""

    dist: OneHotDist | StraightThroughDist | TanhNormalDist | TruncNormalDist | BoundedNormalDist
    """Distribution of actions, from the network's outputs."""
    objective: ActorObjective
    """Objective that the policy maximises."""


@dataclasses.dataclass(frozen=True)
class DreamerConfig:
    """Everything about a Dreamer but the environment; see `objectives.behavior` for the choices."""

    world: WorldModelConfig
    policy: HeadConfig
    value: HeadConfig
    discrete: PolicyConfig
    """Policy for discrete actions."""
    continuous: PolicyConfig
    """Policy for continuous actions."""
    explore: Sampling | ActionNoise
    """Exploration while playing: samples of the policy, or noise added to its actions."""
    returns: InclusiveReturn | ExclusiveReturn
    critic: Critic
    optimiser: LaProp | Adams
    value_dist: TwoHotDist | UnitNormalDist = TwoHotDist()
    """Distribution of values."""
    policy_out_scale: float = 1.0
    """Scale of the first weights of the policy's output layer."""
    scale: PercentileScale | NoScale = NoScale()
    """Scale that returns are divided by in the actor's objective."""
    slow: SlowAverage | SlowCopy | None = None
    """How the slow critic follows the critic; None for none."""
    slow_target: bool = False
    """Returns bootstrap from the slow critic (V2)."""
    replay_critic: ReplayCritic | None = None
    """The critic's loss on replayed steps (V3)."""
    replay_value_scale: float = 0.3
    """Weight of that loss."""
    recorded_root: bool = False
    """Replay says whether the root of a rollout ended its episode (V2); else predicted (V3)."""
    horizon: int = 15
    """Imagined steps."""
    imagine_last: int | None = None
    """Rollouts start from this many last steps of each window; None for all."""
    remember: bool = False
    """Replay keeps the latent state of every step, and windows start from it (V3)."""
    replay: ReplayConfig = ReplayConfig()
    steps: int = 10_000
    """Updates."""
