"""Objects that presets are made of: they survive JSON, and the objects that only some of them use are wired
in.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie.agents import registry
from reverie.agents.dreamer.losses import world_model_loss
from reverie.agents.dreamer.networks import Net, world_model_modules
from reverie.commands.experiment import restore
from reverie.models.rssm import LatentModel
from reverie.nn.dists import Identity
from reverie.nn.encoders import ObsConfig
from reverie.nn.networks import Networks
from reverie.types import ActionSpace, Batch, EnvSpec, Step, UserError
from tests.small import world as shrunk

B, T = 2, 3
SPEC = EnvSpec('numbers', (5,), ActionSpace('discrete', 2))


@pytest.mark.parametrize('name', registry.PRESETS)
def test_a_preset_survives_json(name):
    config = registry.get(name)
    assert restore(config, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def batch(reward: float) -> Batch:
    obs = jax.random.normal(jax.random.key(1), (B, T, 5))
    no, yes = jnp.zeros((B, T), bool), jnp.ones(B, bool)
    step = Step(obs, jnp.zeros((B, T, 2)), jnp.full((B, T), reward), no, no, no)
    return Batch(step, yes, yes, yes)


def networks(cfg):
    return Networks(Net, lambda rngs: world_model_modules(cfg, SPEC, rngs))


def losses(cfg, reward: float):
    nets = networks(cfg)
    loss = lambda p, b: world_model_loss(nets(p), b, jax.random.key(2), cfg)[0]
    return jax.jit(loss)(nets.init(nnx.Rngs(0)), batch(reward))


def test_planet_sees_five_bits_and_noise_below_them():
    cfg = registry.planet().world.obs
    image = jax.random.bits(jax.random.key(0), (2, 64, 64, 3), jnp.uint8)
    shapes = dict(front=(64, 64, 3), grid=(10, 10, 4), vector=(3,))
    obs = dict(front=image, grid=jnp.ones((2, 10, 10, 4), jnp.uint8), vector=jnp.ones((2, 3)))
    seen, again = (cfg.prepare(obs, shapes, jax.random.key(k)) for k in (1, 2))
    np.testing.assert_array_equal(np.floor(np.asarray(seen['front']) * 32), image // 8)
    assert 0 < float(jnp.abs(seen['front'] - again['front']).max()) < 1 / 32
    assert seen['grid'] is obs['grid'] and seen['vector'] is obs['vector']
    assert ObsConfig().prepare(obs, shapes, jax.random.key(1)) is obs


def test_what_the_encoder_and_the_loss_see_is_the_prepared_observation(monkeypatch):
    """If preparing leaves nothing of an observation, two observations look the same to loss and
    player.
    """
    monkeypatch.setattr(ObsConfig, 'prepare', lambda self, obs, shapes, key: 0 * obs)
    cfg = shrunk(registry.planet().world)
    nets = networks(cfg)
    params = nets.init(nnx.Rngs(0))

    @jax.jit
    def both(step):
        model = LatentModel(nets(params))
        one = jax.tree.map(lambda x: x[:, 0], step)
        _, feat = model.observe(model.initial(B), one, jax.random.key(3))
        seen = batch(0.0)._replace(step=step)
        return world_model_loss(nets(params), seen, jax.random.key(2), cfg)[0]['obs'], feat

    step = batch(0.0).step
    jax.tree.map(np.testing.assert_array_equal, both(step), both(step._replace(obs=step.obs + 1)))


def test_dreamer_v2_learns_the_tanh_of_rewards():
    cfg = shrunk(registry.dreamer_v2().world)
    plain = dataclasses.replace(cfg, reward_transform=Identity())
    squashed, unlike = losses(cfg, 3.0), losses(plain, 3.0)
    like = losses(plain, float(np.tanh(3.0)))
    np.testing.assert_allclose(squashed['reward'], like['reward'], rtol=1e-6)
    assert float(jnp.abs(squashed['reward'] - unlike['reward']).min()) > 0.1


def test_the_mixture_passes_a_gradient_through_the_model_to_discrete_actions():
    acting = registry.dreamer_v2_mixed().discrete
    sample = lambda out: acting.dist(out).sample(jax.random.key(0))[1]
    assert acting.objective.through_model
    assert float(jnp.abs(jax.grad(sample)(jnp.zeros(2))).min()) > 0.1


@pytest.mark.parametrize('last', [1, 65])
def test_rollouts_that_start_beyond_the_window_are_refused(last):
    config = dataclasses.replace(registry.dreamer_v3(), imagine_last=last)
    with pytest.raises(UserError, match=f'imagine_last={last}: expected 2 to 64'):
        registry.make(config, SPEC)
