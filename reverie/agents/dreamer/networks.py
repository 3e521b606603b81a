"""The networks of Dreamer V1 to V3 and PlaNet."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from reverie.agents.dreamer.config import DreamerConfig, HeadConfig, WorldModelConfig
from reverie.nn.dists import BernoulliDist
from reverie.nn.encoders import ObsDecoder, ObsEncoder
from reverie.nn.networks import Bound, Head, Networks
from reverie.types import EnvSpec


class Net(Bound):
    """Modules with weights. Heads take feat [*B, F]; PlaNet has neither policy nor critics."""

    encoder: ObsEncoder
    dynamics: Any
    """RSSM or TSSM, see `models`."""
    decoder: ObsDecoder
    reward: Head
    """-> distribution of the transformed reward."""
    cont: Head
    """-> Bernoulli: the episode goes on (times the discount, if its target has it)."""
    policy: Head
    """-> distribution of actions."""
    value: Head
    """-> distribution of returns."""
    slow_value: Head
    """-> the slow critic's."""


# Fields of `WorldModelConfig` without which the weights of a group mean nothing.
SHAPED_BY: Mapping[str, tuple[str, ...]] = {
    'encoder': ('world.obs',),
    'decoder': ('world.obs',),
    'dynamics': ('world.dynamics',),
    'reward': ('world.reward', 'world.reward_dist', 'world.reward_transform'),
    'cont': ('world.cont', 'world.cont_discount'),
}


def head(
    cfg: HeadConfig, dist: Any, feat: int, outputs: int, rngs: nnx.Rngs, out_scale: float = 1.0
) -> Head:
    return Head(
        dist, feat, cfg.units, cfg.layers, outputs, out_scale=out_scale, style=cfg.style, rngs=rngs
    )


def world_model_modules(
    cfg: WorldModelConfig, spec: EnvSpec, rngs: nnx.Rngs
) -> dict[str, nnx.Module]:
    """Encoder, dynamics, decoder, reward and, unless left out, cont."""
    encoder = ObsEncoder(cfg.obs, spec.obs_shape, rngs=rngs)
    latent = (cfg.dynamics.deter, cfg.dynamics.latent.size)
    feat = cfg.dynamics.width
    scalar = cfg.reward_dist
    modules: dict[str, nnx.Module] = dict(
        encoder=encoder,
        dynamics=cfg.dynamics.build(encoder.width, spec.actions.size, rngs),
        decoder=ObsDecoder(cfg.obs, spec.obs_shape, latent, rngs=rngs),
        reward=head(cfg.reward, scalar, feat, scalar.size, rngs, scalar.out_scale),
    )
    if cfg.cont is not None:
        modules['cont'] = head(cfg.cont, BernoulliDist(), feat, 1, rngs)
    return modules


def networks(cfg: DreamerConfig, spec: EnvSpec) -> Networks[Net]:
    """World model, policy and critics of a Dreamer for an environment."""
    policy = cfg.discrete if spec.actions.kind == 'discrete' else cfg.continuous
    feat = cfg.world.dynamics.width
    scalar = cfg.value_dist

    def make(rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        outputs = policy.dist.size(spec.actions.size)
        return world_model_modules(cfg.world, spec, rngs) | dict(
            policy=head(cfg.policy, policy.dist, feat, outputs, rngs, cfg.policy_out_scale),
            value=head(cfg.value, scalar, feat, scalar.size, rngs, scalar.out_scale),
        )

    return Networks(Net, make, shared={'slow_value': 'value'})


def term_scales(cfg: WorldModelConfig, spec: EnvSpec) -> dict[str, float]:
    """Weight of each term of the world model's loss; obs/<key> where observations are a dictionary."""
    scales = dict(cfg.scales)
    if isinstance(spec.obs_shape, Mapping):
        obs = scales.pop('obs')
        scales |= {f'obs/{key}': obs for key in spec.obs_shape}
    return scales
