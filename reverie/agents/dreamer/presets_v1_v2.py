"""Experiments with Dreamer V1 and V2, as values."""

import dataclasses

from reverie.agents.dreamer.config import (
    ActionNoise,
    Adams,
    DreamerConfig,
    HeadConfig,
    PolicyConfig,
    ReplayConfig,
    Sampling,
    WorldModelConfig,
)
from reverie.models.rssm import GRU, RSSMConfig
from reverie.nn.action_dists import OneHotDist, StraightThroughDist, TanhNormalDist, TruncNormalDist
from reverie.nn.core import Style
from reverie.nn.dists import Identity, Tanh, UnitNormalDist
from reverie.nn.encoders import ObsConfig
from reverie.nn.latents import CategoricalLatent, GaussianLatent
from reverie.nn.vision import StridedConv
from reverie.objectives.actor_critic import Backprop, Critic, Mixed, Reinforce, SlowCopy
from reverie.objectives.behavior import InclusiveReturn
from reverie.objectives.latent import BalancedKL, FreeNatsOfMean


def dreamer_v2() -> DreamerConfig:
    """Dreamer V2 with the released settings for Atari (continuous actions: those for control).

    Run:      reverie train dreamer_v2 --env minatar/breakout --frames 1e6 --seeds 3
    Expect:   docs/RESULTS.md
    Differs from the paper: 8 environments at once; replay does not prefer the ends of episodes;
              small grids go through an MLP.
    """
    style = Style(act='elu', norm='none', init='glorot_uniform')
    head = HeadConfig(4, 400, style)
    world = WorldModelConfig(
        dynamics=RSSMConfig(
            600,
            600,
            CategoricalLatent(32, 32),
            GRU('layer_norm'),
            prior_layers=1,
            feat='zh',
            style=style,
        ),
        obs=ObsConfig(StridedConv(48), 400, 4, symlog=False, style=style),
        reward=head,
        cont=head,
        kl=BalancedKL(balance=0.8, free=0.0),
        scales=dict(obs=1.0, reward=1.0, cont=5.0, kl=0.1),
        reward_dist=UnitNormalDist(),
        reward_transform=Tanh(),
        cont_discount=0.999,
    )
    return DreamerConfig(
        world,
        policy=head,
        value=head,
        discrete=PolicyConfig(OneHotDist(), Reinforce(1e-3)),
        continuous=PolicyConfig(TruncNormalDist(), Backprop(1e-4)),
        explore=Sampling(),
        returns=InclusiveReturn(discount=1.0, lam=0.95, root=True),
        critic=Critic(),
        optimiser=Adams(2e-4, 4e-5, 1e-4, clip_norm=100.0, eps=1e-5, weight_decay=1e-6),
        value_dist=UnitNormalDist(),
        slow=SlowCopy(100),
        slow_target=True,
        recorded_root=True,
        replay=ReplayConfig(
            envs=8, capacity=2_000_000, prefill=50_000, ratio=50.0, batch=16, length=50
        ),
    )


def dreamer_v2_mixed() -> DreamerConfig:
    """Dreamer V2 whose policy learns by REINFORCE and by the gradient through the model at once,
    eq. 6 with rho 0.9.

    Run:      reverie train dreamer_v2_mixed --env minatar/breakout --frames 1e6 --seeds 3
    Expect:   docs/RESULTS.md
    Differs from the paper: as `dreamer_v2`; the mixture of the released `actor_grad: both`, not
    annealed.
    """
    mixed = Mixed(rho=0.9, entropy=1e-3)
    return dataclasses.replace(
        dreamer_v2(),
        discrete=PolicyConfig(StraightThroughDist(), mixed),
        continuous=PolicyConfig(TruncNormalDist(), mixed),
    )


def dreamer_v2_control() -> DreamerConfig:
    """Dreamer V2 with the released settings for DeepMind Control.

    Run:      reverie train dreamer_v2_control --env dmc/cartpole_swingup --env-options obs=image --frames 5e5
    Expect:   docs/RESULTS.md
    Differs from the paper: fp32; vectors go through an MLP.
    """
    cfg = dreamer_v2()
    world = dataclasses.replace(
        cfg.world,
        dynamics=RSSMConfig(
            200,
            200,
            CategoricalLatent(32, 32),
            GRU('layer_norm'),
            prior_layers=1,
            feat='zh',
            style=cfg.policy.style,
        ),
        cont=None,
        kl=BalancedKL(balance=0.8, free=1.0),
        scales=dict(obs=1.0, reward=1.0, kl=1.0),
        reward_transform=Identity(),
        cont_discount=1.0,
    )
    return dataclasses.replace(
        cfg,
        world=world,
        discrete=PolicyConfig(OneHotDist(), Reinforce(1e-4)),
        returns=InclusiveReturn(discount=0.99, lam=0.95, root=True),
        optimiser=Adams(3e-4, 8e-5, 8e-5, clip_norm=100.0, eps=1e-5, weight_decay=1e-6),
        recorded_root=False,
        replay=ReplayConfig(
            envs=1, capacity=2_000_000, prefill=1000, ratio=160.0, batch=16, length=50
        ),
    )


def dreamer_v1() -> DreamerConfig:
    """Dreamer V1: the policy learns by the gradient through the model, straight-through where
    actions are discrete.

    Run:      reverie train dreamer_v1 --env control/pendulum --env-options action_repeat=2 --frames 1e5
    Expect:   docs/RESULTS.md
    Differs from the paper: fp32 instead of fp16; the random steps of `explore` for discrete actions
              do not fade; vectors and small grids go through an MLP.
    """
    style = Style(act='elu', norm='none', init='glorot_uniform')

    def head(layers: int) -> HeadConfig:
        return HeadConfig(layers, 400, style)

    world = WorldModelConfig(
        dynamics=RSSMConfig(
            200,
            200,
            GaussianLatent(30, 0.1),
            GRU('reset_after'),
            prior_layers=1,
            feat='zh',
            style=style,
        ),
        obs=ObsConfig(
            StridedConv(32), 400, 2, symlog=False, style=dataclasses.replace(style, act='relu')
        ),
        reward=head(2),
        cont=None,
        kl=FreeNatsOfMean(3.0),
        scales=dict(obs=1.0, reward=1.0, kl=1.0),
        reward_dist=UnitNormalDist(),
    )
    return DreamerConfig(
        world,
        policy=head(4),
        value=head(3),
        discrete=PolicyConfig(StraightThroughDist(), Backprop()),
        continuous=PolicyConfig(TanhNormalDist(), Backprop()),
        explore=ActionNoise(std=0.3, epsilon=0.1),
        returns=InclusiveReturn(discount=0.99, lam=0.95, root=False),
        critic=Critic(),
        optimiser=Adams(6e-4, 8e-5, 8e-5, clip_norm=100.0, eps=1e-7),
        value_dist=UnitNormalDist(),
        replay=ReplayConfig(
            envs=1, capacity=1_000_000, prefill=2500, ratio=500.0, batch=50, length=50
        ),
    )


def dreamer_v1_small() -> DreamerConfig:
    """Dreamer V1 for two CPU cores: swings up a cart-pole from its state, the released model with
    fewer updates.

    Run:      reverie train dreamer_v1_small --env control/cartpole_swingup --env-options action_repeat=8 --frames 20e3
    Expect:   docs/RESULTS.md
    Differs from the paper: as `dreamer_v1`; 128 units in MLPs, batches of 8 x 25, higher rates;
              numbers and rewards weigh ten times as much and free nats are 1, since five numbers
              carry less than an image.
    """
    cfg = dreamer_v1()

    def narrow(head: HeadConfig) -> HeadConfig:
        return dataclasses.replace(head, units=128)

    world = dataclasses.replace(
        cfg.world,
        obs=dataclasses.replace(cfg.world.obs, units=128),
        reward=narrow(cfg.world.reward),
        kl=FreeNatsOfMean(1.0),
        scales=dict(obs=10.0, reward=10.0, kl=1.0),
    )
    return dataclasses.replace(
        cfg,
        world=world,
        policy=narrow(cfg.policy),
        value=narrow(cfg.value),
        optimiser=Adams(1e-3, 3e-4, 6e-4, clip_norm=100.0, eps=1e-7),
        replay=ReplayConfig(
            envs=4, capacity=1_000_000, prefill=1000, ratio=50.0, batch=8, length=25
        ),
    )
