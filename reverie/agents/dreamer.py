"""Dreamer V1 (arXiv 1912.01603), V2 (2010.02193), V3 (2301.04104) and TransDreamerV3: one agent,
told apart by values.

The world model is fitted to replay; the policy and the critic learn in rollouts of its prior that
start from every replayed step. What differs between the versions, the latents, the KL, the returns,
the actor's gradient, the slow critic, the optimisers, are objects of the configuration;
`presets.py` puts them together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.agents.world import (
    HeadConfig,
    ReplayConfig,
    TwoHotDist,
    UnitNormalDist,
    World,
    WorldModelConfig,
)
from reverie.models.latent import LatentModel
from reverie.nn.action_dists import (
    BoundedNormalDist,
    OneHotDist,
    StraightThroughDist,
    TanhNormalDist,
    TruncNormalDist,
)
from reverie.nn.core import build, cast_all_kernels
from reverie.nn.optim import clipped_adam, laprop_agc, per_group
from reverie.objectives.actor import ActorObjective
from reverie.objectives.behavior import ExclusiveReturn, InclusiveReturn, by_row, rollout, with_root
from reverie.objectives.critic import (
    Critic,
    NoScale,
    PercentileScale,
    ReplayCritic,
    SlowAverage,
    SlowCopy,
)
from reverie.types import (
    Batch,
    EnvSpec,
    Losses,
    Metrics,
    Outcome,
    Params,
    Phase,
    ReadOut,
    State,
    Step,
    UserError,
    sg,
)


@dataclasses.dataclass(frozen=True)
class LaProp:
    """One optimiser for everything; V3."""

    learning_rate: float = 4e-5
    warmup_steps: int = 1000
    clip: float = 0.3

    def build(self, world: tuple[str, ...]) -> optax.GradientTransformation:
        return laprop_agc(self.learning_rate, self.warmup_steps, self.clip)


@dataclasses.dataclass(frozen=True)
class Adams:
    """Adam for the world model, the policy and the critic, each with its own rate and clipping; V1,
    V2.
    """

    world: float = 6e-4
    policy: float = 8e-5
    value: float = 8e-5
    clip_norm: float = 100.0
    eps: float = 1e-7
    weight_decay: float = 0.0

    def build(self, world: tuple[str, ...]) -> optax.GradientTransformation:
        adam = lambda rate: clipped_adam(rate, self.clip_norm, self.eps, self.weight_decay)
        return per_group(
            {world: adam(self.world), 'policy': adam(self.policy), 'value': adam(self.value)}
        )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Play samples the policy and adds nothing; V2, V3."""

    def __call__(self, action: Array, key: PRNGKeyArray, discrete: bool) -> Array:
        return action


@dataclasses.dataclass(frozen=True)
class ActionNoise:
    """Play adds N(0, std) to continuous actions and replaces a share `epsilon` of discrete ones by
    random; V1.
    """

    std: float = 0.3
    epsilon: float = 0.1

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
    """law: makes a law of actions out of the policy's numbers.

    objective: what the policy learns by.
    """

    dist: OneHotDist | StraightThroughDist | TanhNormalDist | TruncNormalDist | BoundedNormalDist
    objective: ActorObjective


@dataclasses.dataclass(frozen=True)
class DreamerConfig:
    """Everything about a Dreamer but the environment.

    discrete, continuous: the policy's law and objective in either kind of action space.
    explore: what play adds to the policy.
    value_dist: the distribution of values. returns, critic, scale: see `objectives`.
    horizon: imagined steps. imagine_last: rollouts start from this many last steps of each window,
    None for all.
    recorded_root: whether the root of a rollout ended its episode is read from replay (V2), not
    predicted (V3).
    slow: how the slow critic follows, None for none; slow_target: returns bootstrap from it (V2).
    replay_critic: the critic's loss on replayed steps (V3), weighed by replay_value_scale.
    remember: replay keeps the latent state of every step, and windows start from it (V3).
    steps: updates.
    """

    world: WorldModelConfig
    policy: HeadConfig
    value: HeadConfig
    discrete: PolicyConfig
    continuous: PolicyConfig
    explore: Sampling | ActionNoise
    returns: InclusiveReturn | ExclusiveReturn
    critic: Critic
    optimiser: LaProp | Adams
    value_dist: TwoHotDist | UnitNormalDist = TwoHotDist()
    policy_out_scale: float = 1.0
    scale: PercentileScale | NoScale = NoScale()
    slow: SlowAverage | SlowCopy | None = None
    slow_target: bool = False
    replay_critic: ReplayCritic | None = None
    replay_value_scale: float = 0.3
    recorded_root: bool = False
    horizon: int = 15
    imagine_last: int | None = None
    remember: bool = False
    replay: ReplayConfig = ReplayConfig()
    steps: int = 10_000


class Dreamer:
    """The agent as the runner sees it.

    Parameter groups: those of the world model, policy, value, slow_value (unless there is none),
    and scale (the running statistics of returns).
    """

    def __init__(self, cfg: DreamerConfig, spec: EnvSpec):
        if cfg.imagine_last is not None and not 2 <= cfg.imagine_last <= cfg.replay.length:
            raise UserError(
                f'imagine_last={cfg.imagine_last}: expected 2 to {cfg.replay.length}, the window, or None'
            )
        self.cfg, self.spec = cfg, spec
        self.world = World(cfg.world, spec)
        self.discrete = spec.actions.kind == 'discrete'
        self.acting = cfg.discrete if self.discrete else cfg.continuous
        outlines = nnx.eval_shape(lambda: self._heads(nnx.Rngs(0)))
        self.bind = {name: build(module)[1] for name, module in outlines.items()}
        self.shaped_by: Mapping[str, tuple[str, ...]] = self.world.shaped_by | {
            'policy': ('policy', 'discrete.law', 'continuous.law'), 'scale': ('scale',),
            'value': ('value', 'value_dist'), 'slow_value': ('value', 'value_dist'),
        }  # fmt: skip
        scales = {**self.world.scales, 'policy': 1.0, 'value': 1.0}
        if cfg.replay_critic is not None:
            scales['replay_value'] = cfg.replay_value_scale
        self.phases: tuple[Phase, ...] = (
            Phase(
                'online',
                (*self.world.groups, 'policy', 'value'),
                self.loss,
                scales,
                cfg.optimiser.build(self.world.groups),
                cfg.steps,
                cfg.replay.batch,
                cfg.replay.length,
                after=None if cfg.slow is None else self._follow,
            ),
        )
        self.actor = LatentActor(self)
        self.explorer = LatentActor(self, explore=True)
        acting = ('encoder', 'dynamics', 'policy')
        self.readouts: Mapping[str, ReadOut] = {
            'agent': ReadOut(self.actor, lambda params: {name: params[name] for name in acting})
        }

    def _heads(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        cfg, feat = self.cfg, self.cfg.world.dynamics.width
        actions = self.acting.dist.size(self.spec.actions.size)
        return dict(
            policy=cfg.policy.build(feat, actions, rngs, cfg.policy_out_scale),
            value=cfg.value.build(feat, cfg.value_dist.size, rngs, cfg.value_dist.out_scale),
        )

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh weights of every group."""
        rngs = nnx.Rngs(key)
        params = self.world.init(rngs) | {
            name: build(m)[0] for name, m in self._heads(rngs).items()
        }
        if self.cfg.slow is not None:
            params['slow_value'] = jax.tree.map(jnp.copy, params['value'])
        return params | {'scale': self.cfg.scale.initial()}

    def _follow(self, params: Params, step: Array) -> Params:
        """The slow critic moves after every update."""
        assert self.cfg.slow is not None
        return params | {'slow_value': self.cfg.slow(params['slow_value'], params['value'], step)}

    @property
    def discount(self) -> float:
        """Per step, where the episode goes on."""
        return self.cfg.returns.discount * self.cfg.world.cont_discount

    def expected_return(self, params: Params, feat: Float[Array, '*B F']) -> Float[Array, '*B']:
        """The critic's mean."""
        return self.cfg.value_dist.mean(self.value(params, feat))

    def model(self, params: Params) -> LatentModel:
        return self.world.model(params)

    def for_inference(self, params: Params) -> Params:
        """Kernels in the type they are multiplied in, see `nn.core.cast_kernels`; without the slow
        critic and statistics.
        """
        return cast_all_kernels(lambda rngs: self.world.modules(rngs) | self._heads(rngs), params)

    def policy(self, params: Params, feat: Float[Array, '*B F']) -> Any:
        """The law of actions."""
        return self.acting.dist(self.bind['policy'](params['policy'])(feat))

    def value(self, params: Params, feat: Float[Array, '*B F'], name: str = 'value') -> Any:
        """The raw output of a critic; `cfg.value_dist` makes a law or a mean of it."""
        return self.bind['value'](params[name])(feat)

    def choose(self, params: Params, state: State, feat: Float[Array, 'N F'], key: PRNGKeyArray):
        """The policy's draw [N, A] and, of discrete actions, the probabilities it was drawn with
        [N, A].
        """
        dist = self.policy(params, feat)
        return dist.sample(key), jax.nn.softmax(dist.logits, -1) if self.discrete else None

    def loss(self, params: Params, batch: Batch, key: PRNGKeyArray, step: Array) -> Outcome:
        """World model, actor and critic, in one pass; gradients do not mix, see `imagine_loss`."""
        key_world, key_imagine = jax.random.split(key)
        losses, metrics, unrolled = self.world.loss(params, batch, key_world)
        acted, more, boot, groups = self.imagine_loss(params, unrolled, batch.step, key_imagine)
        losses, metrics = losses | acted, metrics | more
        if self.cfg.replay_critic is not None:
            feat, s = self._last((unrolled.feat, batch.step))
            dist = self.cfg.value_dist(self.value(params, feat))
            slow = self.cfg.value_dist.mean(sg(self.value(params, feat, 'slow_value')))
            reward = self.cfg.world.reward_transform(s.reward)
            losses['replay_value'] = self.cfg.replay_critic(
                dist, slow, reward, s.is_last, s.is_terminal, boot
            )
        memory = unrolled.memory if self.cfg.remember else None
        return Outcome(losses, metrics, memory, groups)

    def _last(self, window: Any) -> Any:
        """The steps of a window [B, T, ...] that rollouts start from: [B, K, ...]."""
        k = self.cfg.imagine_last
        return window if k is None else jax.tree.map(lambda x: x[:, -k:], window)

    def imagine_loss(
        self, params: Params, unrolled: Any, seen: Step, key: PRNGKeyArray
    ) -> tuple[Losses, Metrics, Float[Array, 'B K'], Params]:
        """-> (losses of actor and critic, metrics, return imagined from each root, groups to
        replace).

        Rollouts start from replayed steps, the K last ones of each window. The world model and the
        critic that judges are constants here; where the actor's objective asks for it, the gradient
        passes through imagined states to the actions that led there.
        """
        cfg, terminal = self.cfg, self._last(seen.is_terminal)
        b, k = terminal.shape
        frozen = sg(params)
        model = self.model(frozen)  # its parameters are constants, its states are not
        start = sg(model.dynamics.starts(unrolled, k))
        root = model.dynamics.feat(start)
        acting = (
            params if self.acting.objective.through_model else frozen
        )  # without it nothing is kept for a backward pass
        act = lambda _, feat, key: self.policy(acting, sg(feat)).sample(key)
        _, action, pred = rollout(model, act, start, root, key, cfg.horizon)
        feat = with_root(root, pred.feat)
        cont_root = model.cont(root)
        if cfg.recorded_root:
            cont_root = (cfg.world.cont_discount * ~terminal).reshape(-1)
        reward, cont = with_root(model.reward(root), pred.reward), with_root(cont_root, pred.cont)
        slow = (
            None
            if cfg.slow is None
            else cfg.value_dist.mean(self.value(frozen, feat, 'slow_value'))
        )
        value = (
            slow
            if slow is not None and cfg.slow_target
            else cfg.value_dist.mean(self.value(frozen, feat))
        )
        targets = cfg.returns(reward, cont, value)
        stats = cfg.scale.update(params['scale'], targets.ret)
        policy = self.policy(params, sg(feat[:-1]))
        actor, metrics = self.acting.objective(
            policy, action, targets, value, cfg.scale.stats(stats)[1]
        )
        critic = cfg.critic(cfg.value_dist(self.value(params, sg(feat))), targets, slow)
        metrics |= {
            'imag/return': targets.ret.mean(),
            'imag/reward': reward.mean(),
            'imag/cont': cont.mean(),
            'imag/value': value.mean(),
            'imag/scale': cfg.scale.stats(stats)[1],
        }
        losses = dict(policy=by_row(actor, b), value=by_row(critic, b))
        return losses, metrics, targets.ret[0].reshape(b, k), {'scale': stats}


@dataclasses.dataclass(frozen=True, eq=False)
class LatentActor:
    """Acts on the latent state. Parameters: encoder, dynamics, policy."""

    agent: Dreamer
    explore: bool = False

    def initial(self, params: Params, batch: int) -> State:
        return self.agent.model(params).initial(batch)

    def act(
        self, params: Params, state: State, step: Step, key: PRNGKeyArray, greedy: Array | bool
    ):
        """-> (state, action index [N] or vector [N, A])."""
        key_observe, key_act, key_explore = jax.random.split(key, 3)
        state, feat = self.agent.model(params).observe(state, step, key_observe)
        dist = self.agent.policy(params, feat)
        action = jnp.where(greedy, dist.mode(), dist.sample(key_act))
        if self.explore:
            action = self.agent.cfg.explore(action, key_explore, self.agent.discrete)
        return state, action.argmax(-1) if self.agent.discrete else jnp.clip(action, -1, 1)

    def memory(self, state: State) -> Any:
        """The latent state, if replay is to keep it."""
        return self.agent.world.dynamics.pack(state) if self.agent.cfg.remember else ()
