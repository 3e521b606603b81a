"""PlaNet: a latent model learnt from images, and planning in it by the cross-entropy method; arXiv
1811.04551.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from reverie.agents.world import ReplayConfig, World, WorldModelConfig
from reverie.models.latent import LatentModel
from reverie.nn.core import cast_all_kernels
from reverie.nn.optim import clipped_adam
from reverie.objectives.latent import LatentOvershooting
from reverie.types import (
    Batch,
    EnvSpec,
    Outcome,
    Params,
    Phase,
    ReadOut,
    State,
    Step,
    UserError,
    WorldModel,
)


class Belief(NamedTuple):
    """A diagonal Gaussian over action sequences."""

    mean: Float[Array, 'N H A']
    std: Float[Array, 'N H A']


@dataclasses.dataclass(frozen=True)
class CEM:
    """Cross-entropy method over action sequences in [-1, 1]; PlaNet algorithm 2. Replanned at every
    step from scratch.

    horizon: H, imagined steps. iterations: refits of the belief. candidates: sequences drawn for
    each refit, of which the `top` ones by the sum of predicted rewards are refitted to.
    """

    horizon: int = 12
    iterations: int = 10
    candidates: int = 1000
    top: int = 100

    def plan(
        self,
        model: WorldModel,
        state: PyTree[Array],
        key: PRNGKeyArray,
        action_size: int,
        noise: Float[Array, 'I N J H A'] | None = None,
    ) -> Float[Array, 'N A']:
        """The first action of the last belief's mean, for each of the N states [N, ...].

        Without exploration noise.
        """
        return self.beliefs(model, state, key, action_size, noise).mean[-1, :, 0]

    def beliefs(
        self,
        model: WorldModel,
        state: PyTree[Array],
        key: PRNGKeyArray,
        action_size: int,
        noise: Float[Array, 'I N J H A'] | None = None,
    ) -> Belief:
        """The belief after each iteration, fields [I, N, H, A].

        noise: the J candidates' draws, for tests.
        """
        n = jax.tree.leaves(state)[0].shape[0]
        start = jax.tree.map(lambda x: jnp.repeat(x, self.candidates, 0), state)

        def refit(belief, x):
            key, noise = x
            key_draw, key_model = jax.random.split(key)
            if noise is None:
                noise = jax.random.normal(key_draw, (n, self.candidates, *belief.mean.shape[1:]))
            plans = jnp.clip(belief.mean[:, None] + belief.std[:, None] * noise, -1.0, 1.0)
            score = self.score(model, start, plans.reshape(-1, *plans.shape[2:]), key_model)
            _, best = jax.lax.top_k(score.reshape(n, self.candidates), self.top)
            chosen = jnp.take_along_axis(plans, best[:, :, None, None], 1)
            belief = Belief(chosen.mean(1), jnp.sqrt(chosen.var(1) + 1e-6))
            return belief, belief

        shape = (n, self.horizon, action_size)
        xs = (jax.random.split(key, self.iterations), noise)
        return jax.lax.scan(refit, Belief(jnp.zeros(shape), jnp.ones(shape)), xs)[1]

    def score(
        self,
        model: WorldModel,
        state: PyTree[Array],
        plans: Float[Array, 'M H A'],
        key: PRNGKeyArray,
    ) -> Float[Array, ' M']:
        """Sum of the rewards that the model predicts for each plan."""

        def step(state, x):
            action, key = x
            state, pred = model.imagine(state, action, key)
            return state, pred.reward

        keys = jax.random.split(key, self.horizon)
        return jax.lax.scan(step, state, (plans.swapaxes(0, 1), keys))[1].sum(0)


@dataclasses.dataclass(frozen=True)
class PlanetConfig:
    """Everything about a PlaNet but the environment.

    overshooting: a further term of the loss, None as in the released experiments; weighed by
    overshooting_scale.
    noise: standard deviation of what play adds to the planned action.
    steps: updates.
    """

    world: WorldModelConfig
    plan: CEM = CEM()
    overshooting: LatentOvershooting | None = None
    overshooting_scale: float = 1.0
    noise: float = 0.3
    learning_rate: float = 1e-3
    eps: float = 1e-4
    clip_norm: float = 1000.0
    replay: ReplayConfig = ReplayConfig(
        envs=1, capacity=1_000_000, prefill=1250, ratio=2500 / 3, batch=50, length=50
    )
    steps: int = 10_000


class Planet:
    """The agent as the runner sees it. Parameter groups: encoder, dynamics, decoder, reward."""

    discount = 1.0  # of the sum that plans maximise

    def __init__(self, cfg: PlanetConfig, spec: EnvSpec):
        if spec.actions.kind != 'continuous':
            raise UserError(
                f'{spec.name} has {spec.actions.kind} actions; planet takes continuous ones'
            )
        self.cfg, self.spec = cfg, spec
        self.world = World(cfg.world, spec)
        self.shaped_by = self.world.shaped_by
        scales = self.world.scales
        if cfg.overshooting is not None:
            scales['overshooting'] = cfg.overshooting_scale
        optimiser = clipped_adam(cfg.learning_rate, cfg.clip_norm, cfg.eps)
        self.phases: tuple[Phase, ...] = (
            Phase(
                'online',
                self.world.groups,
                self.loss,
                scales,
                optimiser,
                cfg.steps,
                cfg.replay.batch,
                cfg.replay.length,
            ),
        )
        self.explorer = Planner(self, cfg.noise)
        acting = ('encoder', 'dynamics', 'reward')
        self.readouts: Mapping[str, ReadOut] = {
            'agent': ReadOut(
                Planner(self, 0.0), lambda params: {name: params[name] for name in acting}
            )
        }

    def init(self, key: PRNGKeyArray) -> Params:
        return self.world.init(nnx.Rngs(key))

    def model(self, params: Params) -> LatentModel:
        return self.world.model(params)

    def for_inference(self, params: Params) -> Params:
        """Kernels in the type they are multiplied in, see `nn.core.cast_kernels`."""
        return cast_all_kernels(self.world.modules, params)

    def expected_return(self, params: Params, feat: Float[Array, '*B F']) -> None:
        """PlaNet has no critic."""
        return None

    def choose(self, params: Params, state: State, feat: Float[Array, 'N F'], key: PRNGKeyArray):
        """The planned action [N, A]; a plan has no probabilities."""
        return self.cfg.plan.plan(self.model(params), state, key, self.spec.actions.size), None

    def loss(self, params: Params, batch: Batch, key: PRNGKeyArray, step: Array) -> Outcome:
        """PlaNet eq. 3, and eq. 7 where it is asked for."""
        key_world, key_over = jax.random.split(key)
        losses, metrics, unrolled = self.world.loss(params, batch, key_world)
        if self.cfg.overshooting is not None:
            imagine, s = self.model(params).dynamics.imagine, batch.step
            losses |= self.cfg.overshooting(
                imagine, unrolled.state, unrolled.post, s.prev_action, s.is_first, key_over
            )
        return Outcome(losses, metrics)


@dataclasses.dataclass(frozen=True, eq=False)
class Planner:
    """Acts by planning in the latent model. Parameters: encoder, dynamics, reward."""

    agent: Planet
    noise: float

    def initial(self, params: Params, batch: int) -> State:
        return self.agent.model(params).initial(batch)

    def act(
        self, params: Params, state: State, step: Step, key: PRNGKeyArray, greedy: Array | bool
    ):
        """-> (state, action [N, A]); plans are drawn anew whether `greedy` or not."""
        key_observe, key_plan, key_noise = jax.random.split(key, 3)
        model = self.agent.model(params)
        state, _ = model.observe(state, step, key_observe)
        action = self.agent.cfg.plan.plan(model, state, key_plan, self.agent.spec.actions.size)
        action = action + self.noise * jax.random.normal(key_noise, action.shape)
        return state, jnp.clip(action, -1, 1)

    def memory(self, state: State) -> Any:
        """Replay keeps nothing but the steps."""
        return ()
