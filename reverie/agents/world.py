"""What PlaNet, Dreamer V1 to V3 and TransDreamerV3 share: a latent world model, its heads and its
loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.models.encoders import ObsConfig, ObsDecoder, ObsEncoder
from reverie.models.latent import LatentModel
from reverie.models.rssm import RSSMConfig
from reverie.models.tssm import TSSMConfig
from reverie.nn.core import MLP, Style, build
from reverie.nn.dists import Bernoulli, Normal, TwoHot, symexp_bins
from reverie.types import Batch, EnvSpec, Losses, Metrics, Params


@dataclasses.dataclass(frozen=True)
class TwoHotDist:
    """Rewards and values as a softmax over `size` symexp bins, zero at the start; V3."""

    size: int = 255
    out_scale: float = 0.0

    def __call__(self, out: Float[Array, '*B bins']) -> TwoHot:
        return TwoHot(out, symexp_bins(self.size))

    def mean(self, out: Float[Array, '*B bins']) -> Float[Array, '*B']:
        return self(out).mean()


@dataclasses.dataclass(frozen=True)
class UnitNormalDist:
    """Rewards and values as the mean of a Gaussian of variance 1; PlaNet, V1, V2."""

    size: int = 1
    out_scale: float = 1.0

    def __call__(self, out: Float[Array, '*B 1']) -> Normal:
        return Normal(self.mean(out), event=0)

    def mean(self, out: Float[Array, '*B 1']) -> Float[Array, '*B']:
        return out[..., 0]


@dataclasses.dataclass(frozen=True)
class Identity:
    """The agent learns the rewards of the environment."""

    def __call__(self, reward: Float[Array, '*B']) -> Float[Array, '*B']:
        return reward


@dataclasses.dataclass(frozen=True)
class Tanh:
    """The agent learns tanh(reward); V2 on Atari."""

    def __call__(self, reward: Float[Array, '*B']) -> Float[Array, '*B']:
        return jnp.tanh(reward)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A head's network: `layers` of `units`, in the style of its agent."""

    layers: int
    units: int
    style: Style = Style()

    def build(self, inputs: int, outputs: int, rngs: nnx.Rngs, out_scale: float = 1.0) -> MLP:
        return MLP(
            inputs,
            self.units,
            self.layers,
            outputs,
            out_scale=out_scale,
            style=self.style,
            rngs=rngs,
        )


@dataclasses.dataclass(frozen=True)
class WorldModelConfig:
    """A latent world model and how it is fitted.

    dynamics: builds the latent dynamics, see `models.rssm` and `models.tssm`.
    obs: how observations are read and predicted.
    reward_dist: the distribution of rewards. squash: what is learnt of them.
    cont: None for agents without a head for the end of episodes (PlaNet, V1).
    cont_discount: the head's target is this where the episode goes on, so that it predicts the
    discount too.
    kl: (post, prior) -> loss terms. scales: weight of each term, by name: obs, reward, cont, and
    those of `kl`.
    """

    dynamics: RSSMConfig | TSSMConfig
    obs: ObsConfig
    reward: HeadConfig
    cont: HeadConfig | None
    kl: Callable[[Any, Any], Losses]
    scales: Mapping[str, float]
    reward_dist: TwoHotDist | UnitNormalDist = TwoHotDist()
    reward_transform: Identity | Tanh = Identity()
    cont_discount: float = 1.0


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """How much is played and replayed.

    envs: environments played at once. capacity: steps kept. prefill: steps played before the first
    update.
    random_prefill: those steps are uniformly random, else the explorer's.
    ratio: replayed steps per played one. batch, length: windows of one update.
    context: steps before a window whose memories come with it, where the agent remembers anything.
    """

    envs: int = 1
    capacity: int = 1_000_000
    prefill: int = 1024
    random_prefill: bool = True
    ratio: float = 32.0
    batch: int = 16
    length: int = 64
    context: int = 1


def reconstruction(dists: Any, obs: Any) -> Losses:
    """-ln p of the observation: {'obs': [B, T]}, or {'obs/<key>': [B, T]} if it is a dictionary."""
    if isinstance(dists, Mapping):
        return {f'obs/{key}': -dist.log_prob(obs[key]) for key, dist in dists.items()}
    return {'obs': -dists.log_prob(obs)}


class World:
    """Parameter groups encoder, dynamics, decoder, reward and (unless left out) cont, and what is
    made of them.
    """

    def __init__(self, cfg: WorldModelConfig, spec: EnvSpec):
        self.cfg, self.spec = cfg, spec
        outlines = nnx.eval_shape(lambda: self.modules(nnx.Rngs(0)))
        self.bind = {name: build(module)[1] for name, module in outlines.items()}
        self.groups = tuple(outlines)
        self.shaped_by: dict[str, tuple[str, ...]] = {
            'encoder': ('world.obs',),
            'decoder': ('world.obs',),
            'dynamics': ('world.dynamics',),
            'reward': ('world.reward', 'world.reward_dist', 'world.squash'),
            'cont': ('world.cont', 'world.cont_discount'),
        }
        self.dynamics: Any = outlines[
            'dynamics'
        ]  # without weights: for what depends on the configuration alone

    @property
    def scales(self) -> dict[str, float]:
        """Weight of each term of `loss`."""
        scales = dict(self.cfg.scales)
        if isinstance(self.spec.obs_shape, Mapping):
            each = scales.pop('obs')
            scales |= {f'obs/{key}': each for key in self.spec.obs_shape}
        return scales

    def modules(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        cfg, obs = self.cfg, self.spec.obs_shape
        encoder = ObsEncoder(cfg.obs, obs, rngs=rngs)
        latent = (cfg.dynamics.deter, cfg.dynamics.latent.size)
        found: dict[str, nnx.Module] = dict(
            encoder=encoder,
            dynamics=cfg.dynamics.build(encoder.width, self.spec.actions.size, rngs),
            decoder=ObsDecoder(cfg.obs, obs, latent, rngs=rngs),
            reward=cfg.reward.build(
                cfg.dynamics.width, cfg.reward_dist.size, rngs, cfg.reward_dist.out_scale
            ),
        )
        if cfg.cont is not None:
            found['cont'] = cfg.cont.build(cfg.dynamics.width, 1, rngs)
        return found

    def init(self, rngs: nnx.Rngs) -> Params:
        return {name: build(module)[0] for name, module in self.modules(rngs).items()}

    def model(self, params: Params) -> LatentModel:
        """The four-method world model with these weights."""
        net = {name: self.bind[name](params[name]) for name in self.groups if name in params}
        decoder = net.get('decoder')
        reward = net.get('reward')
        cont = net.get('cont')
        return LatentModel(
            net['dynamics'],
            net.get('encoder'),
            decoder and (lambda state: decoder(state.h, state.z)),
            reward and (lambda feat: self.cfg.reward_dist.mean(reward(feat))),
            cont and (lambda feat: Bernoulli(cont(feat)[..., 0]).mean()),
            lambda obs, key: self.cfg.obs.prepare(obs, self.spec.obs_shape, key),
        )

    def loss(self, params: Params, batch: Batch, key: PRNGKeyArray) -> tuple[Losses, Metrics, Any]:
        """-> (terms [B, T], metrics, unrolled). Reconstruction, reward, end of episodes and KL of
        every step.

        V1 eq. 10, V2 eq. 2, V3 eqs. 2 to 5.
        """
        cfg, step, model = self.cfg, batch.step, self.model(params)
        b = len(step.is_first)
        start = (
            model.dynamics.initial(b)
            if batch.context is None
            else model.dynamics.unpack(batch.context)
        )
        assert model.encoder is not None and model.decoder is not None
        obs = model.prepare(step.obs, jax.random.fold_in(key, 0))
        unrolled = model.dynamics.unroll(
            start, model.encoder(obs), step.prev_action, step.is_first, key
        )
        reward = cfg.reward_dist(self.bind['reward'](params['reward'])(unrolled.feat))
        losses = reconstruction(model.decoder(unrolled.state), obs)
        losses['reward'] = -reward.log_prob(cfg.reward_transform(step.reward))
        if cfg.cont is not None:
            cont = Bernoulli(self.bind['cont'](params['cont'])(unrolled.feat)[..., 0])
            losses['cont'] = -cont.log_prob(cfg.cont_discount * ~step.is_terminal)
        losses |= cfg.kl(unrolled.post, unrolled.prior)
        entropy = dict(post=unrolled.post.entropy(), prior=unrolled.prior.entropy())
        metrics = {f'world/{name}_entropy': x.mean() for name, x in entropy.items()}
        return losses, metrics | {'world/kl': unrolled.post.kl(unrolled.prior).mean()}, unrolled
