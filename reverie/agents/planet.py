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

from reverie.agents.dreamer.config import HeadConfig, ReplayConfig, WorldModelConfig
from reverie.agents.dreamer.losses import world_model_loss
from reverie.agents.dreamer.networks import SHAPED_BY, Net, term_scales, world_model_modules
from reverie.models.rssm import GRU, LatentModel, RSSMConfig
from reverie.nn.core import Style
from reverie.nn.dists import UnitNormalDist
from reverie.nn.encoders import ObsConfig
from reverie.nn.latents import GaussianLatent
from reverie.nn.networks import Networks
from reverie.nn.optim import clipped_adam
from reverie.nn.scan import lean_scan
from reverie.nn.vision import StridedConv
from reverie.objectives.latent import FreeNatsPerElement, LatentOvershooting
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

        def refit(belief: Belief, x: tuple[PRNGKeyArray, Array | None]) -> tuple[Belief, Belief]:
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
        begin = Belief(jnp.zeros(shape), jnp.ones(shape))
        beliefs: Belief = jax.lax.scan(refit, begin, xs)[1]
        return beliefs

    def score(
        self,
        model: WorldModel,
        state: PyTree[Array],
        plans: Float[Array, 'M H A'],
        key: PRNGKeyArray,
    ) -> Float[Array, ' M']:
        """Sum of the rewards that the model predicts for each plan."""

        def step(state: State, x: tuple[Array, PRNGKeyArray]) -> tuple[State, Array]:
            action, key = x
            state, pred = model.imagine(state, action, key)
            return state, pred.reward

        keys = jax.random.split(key, self.horizon)
        reward: Array = lean_scan(step, state, (plans.swapaxes(0, 1), keys))[1]
        return reward.sum(0)


@dataclasses.dataclass(frozen=True)
class PlanetConfig:
    """Everything about a PlaNet but the environment."""

    world: WorldModelConfig
    plan: CEM = CEM()
    """Search for the next action."""
    overshooting: LatentOvershooting | None = None
    """Latent overshooting, a further term of the loss; None as in the released experiments."""
    overshooting_scale: float = 1.0
    """Weight of that term."""
    noise: float = 0.3
    """Standard deviation of the noise that play adds to the planned action."""
    learning_rate: float = 1e-3
    eps: float = 1e-4
    """Epsilon of Adam."""
    clip_norm: float = 1000.0
    """Largest global norm of the gradients."""
    replay: ReplayConfig = ReplayConfig(
        envs=1, capacity=1_000_000, prefill=1250, ratio=2500 / 3, batch=50, length=50
    )
    steps: int = 10_000
    """Updates."""


class Planet:
    """Parameter groups: encoder, dynamics, decoder, reward.

    Raises UserError for discrete actions.
    """

    discount = 1.0  # of the sum that plans maximise
    shaped_by = SHAPED_BY

    def __init__(self, cfg: PlanetConfig, spec: EnvSpec):
        if spec.actions.kind != 'continuous':
            raise UserError(
                f'{spec.name} has {spec.actions.kind} actions; planet takes continuous ones'
            )
        self.cfg = cfg
        self.spec = spec
        self.networks = Networks(Net, lambda rngs: world_model_modules(cfg.world, spec, rngs))
        scales = term_scales(cfg.world, spec)
        if cfg.overshooting is not None:
            scales['overshooting'] = cfg.overshooting_scale
        self.phases: tuple[Phase, ...] = (
            Phase(
                'online',
                self.networks.names,
                self.networks.loss(planet_loss, cfg),
                scales,
                clipped_adam(cfg.learning_rate, cfg.clip_norm, cfg.eps),
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
        """Fresh weights of every group."""
        return self.networks.init(nnx.Rngs(key))

    def model(self, params: Params) -> LatentModel:
        """The four-method world model."""
        return LatentModel(self.networks(params))

    def for_inference(self, params: Params) -> Params:
        """Kernels in the type they are multiplied in, see `nn.core.cast_kernels`."""
        return self.networks.for_inference(params)

    def expected_return(self, params: Params, feat: Float[Array, '*B F']) -> None:
        """None: PlaNet has no critic."""
        return None

    def choose(
        self, params: Params, state: State, feat: Float[Array, 'N F'], key: PRNGKeyArray
    ) -> tuple[Float[Array, 'N A'], None]:
        """The planned action; a plan has no probabilities."""
        return self.cfg.plan.plan(self.model(params), state, key, self.spec.actions.size), None


def planet_loss(
    net: Net, batch: Batch, key: PRNGKeyArray, cfg: PlanetConfig, step: Array
) -> Outcome:
    """PlaNet eq. 3, and latent overshooting, eq. 7, where it is asked for."""
    key_world, key_over = jax.random.split(key)
    losses, metrics, unrolled = world_model_loss(net, batch, key_world, cfg.world)
    if cfg.overshooting is not None:
        s = batch.step
        losses |= cfg.overshooting(
            net.dynamics.imagine, unrolled.state, unrolled.post, s.prev_action, s.is_first, key_over
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
    ) -> tuple[State, Array]:
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


def planet() -> PlanetConfig:
    """PlaNet: plans every action anew in its latent model. Continuous actions only.

    Run:      reverie train planet --env control/cartpole_swingup --env-options action_repeat=8 --frames 2e4
    Expect:   docs/RESULTS.md
    Differs from the paper: updates are spread evenly over play, one for every three steps of the
              agent (the paper: one hundred after each episode of 250 steps, at action repeat 4);
              vectors go through an MLP.
    """
    style = Style(act='relu', norm='none', init='glorot_uniform')
    world = WorldModelConfig(
        dynamics=RSSMConfig(
            200,
            200,
            GaussianLatent(30, 0.1),
            GRU('reset_before'),
            prior_layers=1,
            feat='zh',
            style=style,
        ),
        obs=ObsConfig(StridedConv(32), 200, 2, symlog=False, style=style, bits=5),
        reward=HeadConfig(3, 300, style),
        cont=None,
        kl=FreeNatsPerElement(3.0),
        scales=dict(obs=1.0, reward=10.0, kl=1.0),
        reward_dist=UnitNormalDist(),
    )
    return PlanetConfig(world)


def planet_small() -> PlanetConfig:
    """PlaNet for two CPU cores: swings up a cart-pole from its state, with a smaller model and
    search.

    Run:      reverie train planet_small --env control/cartpole_swingup --env-options action_repeat=8 --frames 1e4
    Expect:   562 (539 to 583, one seed) after 11 minutes of processor time;
              results/planet_small/control_cartpole_swingup.json
    Differs from the paper: as `planet`; 128 units, batches of 16 x 25, a tenth of the candidates
              and half of the iterations of the search; weights and free nats as in
              `dreamer_v1_small`.
    """
    cfg = planet()
    world = dataclasses.replace(
        cfg.world,
        dynamics=RSSMConfig(
            128,
            128,
            GaussianLatent(30, 0.1),
            GRU('reset_before'),
            prior_layers=1,
            feat='zh',
            style=cfg.world.reward.style,
        ),
        obs=dataclasses.replace(cfg.world.obs, units=128),
        reward=dataclasses.replace(cfg.world.reward, layers=2, units=128),
        kl=FreeNatsPerElement(1.0),
        scales=dict(obs=10.0, reward=10.0, kl=1.0),
    )
    replay = dataclasses.replace(cfg.replay, envs=2, prefill=1000, ratio=200.0, batch=16, length=25)
    return dataclasses.replace(cfg, world=world, plan=CEM(12, 5, 100, 10), replay=replay)
