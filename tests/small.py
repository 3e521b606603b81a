"""Presets small enough to learn a probe in seconds."""

import dataclasses

from reverie.agents.dreamer.config import Adams, LaProp
from reverie.agents.planet import CEM, PlanetConfig
from reverie.models.rssm import BlockGRU
from reverie.models.tssm import TSSMConfig
from reverie.nn.latents import CategoricalLatent, GaussianLatent
from reverie.objectives.actor_critic import SlowCopy


def world(cfg):
    latent = cfg.dynamics.latent
    latent = (
        CategoricalLatent(4, 8, latent.unimix)
        if isinstance(latent, CategoricalLatent)
        else GaussianLatent(8, 0.1)
    )
    fp32 = lambda style: dataclasses.replace(style, dtype='float32')
    head = lambda h: h and dataclasses.replace(h, layers=1, units=32, style=fp32(h.style))
    dynamics = dataclasses.replace(
        cfg.dynamics, hidden=32, latent=latent, style=fp32(cfg.dynamics.style)
    )
    if isinstance(dynamics, TSSMConfig):
        blocks = dataclasses.replace(
            dynamics.transformer,
            width=64,
            layers=2,
            heads=2,
            kv_heads=2,
            head_dim=32,
            context=8,
            dtype='float32',
        )
        dynamics = dataclasses.replace(dynamics, transformer=blocks)
    else:
        core = BlockGRU(4) if isinstance(dynamics.core, BlockGRU) else dynamics.core
        dynamics = dataclasses.replace(dynamics, deter=64, core=core)
    obs = dataclasses.replace(cfg.obs, units=32, layers=1, style=fp32(cfg.obs.style))
    return dataclasses.replace(
        cfg, dynamics=dynamics, obs=obs, reward=head(cfg.reward), cont=head(cfg.cont),
        cont_discount=min(cfg.cont_discount, 0.95 if cfg.cont else 1.0),
    )  # fmt: skip


def shrink(cfg, updates: int = 300):
    """A preset that plays, with a tiny model, a high learning rate, and one update for every 32
    frames.
    """
    replay = dataclasses.replace(
        cfg.replay,
        envs=8,
        capacity=8192,
        prefill=256,
        ratio=4.0,
        batch=16,
        length=8,
        context=min(cfg.replay.context, 8),
    )
    cfg = dataclasses.replace(cfg, world=world(cfg.world), replay=replay, steps=updates)
    if isinstance(cfg, PlanetConfig):
        replay = dataclasses.replace(replay, ratio=16.0)  # planning costs more than learning
        return dataclasses.replace(cfg, plan=CEM(2, 4, 64, 8), replay=replay, learning_rate=3e-3)
    head = lambda h: dataclasses.replace(
        h, layers=1, units=32, style=dataclasses.replace(h.style, dtype='float32')
    )
    fast = LaProp(3e-3, 20) if isinstance(cfg.optimiser, LaProp) else Adams(3e-3, 2e-3, 2e-3)
    slow = (
        SlowCopy(10) if isinstance(cfg.slow, SlowCopy) else cfg.slow
    )  # a hundred updates are a third of all
    return dataclasses.replace(
        cfg,
        policy=head(cfg.policy),
        value=head(cfg.value),
        optimiser=fast,
        slow=slow,
        horizon=5,
        imagine_last=None,
    )
