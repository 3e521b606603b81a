"""Dreamer V1 to V3 as the runner, the evaluation and the player see them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.agents.dreamer.config import DreamerConfig
from reverie.agents.dreamer.losses import dreamer_loss, update_slow_critic
from reverie.agents.dreamer.networks import SHAPED_BY, networks, term_scales
from reverie.models.rssm import LatentModel
from reverie.nn.networks import copy
from reverie.types import EnvSpec, Params, Phase, ReadOut, State, Step, UserError

ACTING = ('encoder', 'dynamics', 'policy')  # parameter groups that acting needs


class Dreamer:
    """Parameter groups: those of the world model, policy, value, slow_value (unless there is none),
    and scale (the running statistics of returns).

    The world model is fitted to replay; the policy and the critic learn in rollouts of its prior
    that start from replayed steps. Raises UserError for an `imagine_last` beyond the window.
    """

    shaped_by: Mapping[str, tuple[str, ...]] = {
        **SHAPED_BY,
        'policy': ('policy', 'discrete.dist', 'continuous.dist'),
        'scale': ('scale',),
        'value': ('value', 'value_dist'),
        'slow_value': ('value', 'value_dist'),
    }

    def __init__(self, cfg: DreamerConfig, spec: EnvSpec):
        length = cfg.replay.length
        if cfg.imagine_last is not None and not 2 <= cfg.imagine_last <= length:
            raise UserError(
                f'imagine_last={cfg.imagine_last}: expected 2 to {length}, the window, or None'
            )
        self.cfg = cfg
        self.spec = spec
        self.networks = networks(cfg, spec)
        self.discrete = spec.actions.kind == 'discrete'
        objective = (cfg.discrete if self.discrete else cfg.continuous).objective
        scales = term_scales(cfg.world, spec) | {'policy': 1.0, 'value': 1.0}
        if cfg.replay_critic is not None:
            scales['replay_value'] = cfg.replay_value_scale
        world_groups = tuple(n for n in self.networks.names if n not in ('policy', 'value'))
        self.phases: tuple[Phase, ...] = (
            Phase(
                'online',
                self.networks.names,
                self.networks.loss(functools.partial(dreamer_loss, objective=objective), cfg),
                scales,
                cfg.optimiser.build(world_groups),
                cfg.steps,
                cfg.replay.batch,
                length,
                after=functools.partial(update_slow_critic, cfg.slow) if cfg.slow else None,
            ),
        )
        self.explorer = LatentActor(self, explore=True)
        self.readouts: Mapping[str, ReadOut] = {
            'agent': ReadOut(LatentActor(self), lambda params: {n: params[n] for n in ACTING})
        }

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh weights of every group."""
        params = self.networks.init(nnx.Rngs(key))
        if self.cfg.slow is not None:
            params['slow_value'] = copy(params['value'])
        return params | {'scale': self.cfg.scale.initial()}

    @property
    def discount(self) -> float:
        """Per step, where the episode goes on."""
        return self.cfg.returns.discount * self.cfg.world.cont_discount

    def expected_return(self, params: Params, feat: Float[Array, '*B F']) -> Float[Array, '*B']:
        """The critic's mean."""
        mean: Array = self.networks(params).value(feat).mean()
        return mean

    def model(self, params: Params) -> LatentModel:
        """The four-method world model."""
        return LatentModel(self.networks(params))

    def for_inference(self, params: Params) -> Params:
        """Kernels in the type they are multiplied in, see `nn.core.cast_kernels`; without the slow
        critic and statistics.
        """
        return self.networks.for_inference(params)

    def choose(
        self, params: Params, state: State, feat: Float[Array, 'N F'], key: PRNGKeyArray
    ) -> tuple[Float[Array, 'N A'], Float[Array, 'N A'] | None]:
        """A draw of the policy and, of discrete actions, the probabilities it was drawn with."""
        policy = self.networks(params).policy(feat)
        return policy.sample(key), jax.nn.softmax(policy.logits, -1) if self.discrete else None


@dataclasses.dataclass(frozen=True, eq=False)
class LatentActor:
    """Acts on the latent state. Parameters: encoder, dynamics, policy."""

    agent: Dreamer
    explore: bool = False

    def initial(self, params: Params, batch: int) -> State:
        return self.agent.model(params).initial(batch)

    def act(
        self, params: Params, state: State, step: Step, key: PRNGKeyArray, greedy: Array | bool
    ) -> tuple[State, Array]:
        """-> (state, action index [N] or vector [N, A])."""
        agent = self.agent
        net = agent.networks(params)
        key_observe, key_act, key_explore = jax.random.split(key, 3)
        state, feat = LatentModel(net).observe(state, step, key_observe)
        policy = net.policy(feat)
        action = jnp.where(greedy, policy.mode(), policy.sample(key_act))
        if self.explore:
            action = agent.cfg.explore(action, key_explore, agent.discrete)
        return state, action.argmax(-1) if agent.discrete else jnp.clip(action, -1, 1)

    def memory(self, state: State) -> Any:
        """The latent state, if replay is to keep it."""
        if not self.agent.cfg.remember:
            return ()
        return self.agent.networks.outlines['dynamics'].pack(state)
