import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.agents import registry
from reverie.commands.experiment import Recorded
from reverie.data.episodes import Writer, split_stream
from reverie.envs import device
from reverie.training import checkpoint


def random_params(agent):
    """Weights without compiling what makes them."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(agent.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture(scope='session')
def env():
    return device.make('minatar/breakout')


@pytest.fixture(scope='session')
def agent(env):
    return registry.make(registry.dreamer4_debug(), env.spec)


@pytest.fixture(scope='session')
def params(agent):
    return random_params(agent)


@pytest.fixture(scope='session')
def run_folder(agent, dataset, tmp_path_factory):
    """A finished run of the debug preset, as `reverie train` leaves it, but for the training."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    folder.mkdir()
    about = Recorded(
        'dreamer4_debug', registry.dreamer4_debug(), 'minatar/breakout', data=(dataset,)
    ).describe()
    (folder / 'config.json').write_text(json.dumps({**about, 'seed': 0, 'seeds': 1}))
    params = jax.tree.map(lambda x: 0.1 * x[None], random_params(agent))
    params['cont'] = jax.tree.map(jnp.zeros_like, params['cont'])  # dreams go on for ever
    meta = {'phase': 'imagine', 'step': 4, 'complete': True}
    checkpoint.save(folder / 'checkpoints', 20, params, None, meta)
    return folder


@pytest.fixture(scope='session')
def dataset(env, tmp_path_factory):
    """Four streams of random play."""
    vector, folder = device.Vector(env, 4), tmp_path_factory.mktemp('data') / 'breakout'

    @jax.jit
    def play(key):
        def move(carry, key):
            state, _ = carry
            key_act, key = jax.random.split(key)
            result = vector.step(state, jax.random.randint(key_act, (4,), 0, 6), key)
            return result, result[1]

        start = vector.reset(key)
        _, steps = jax.lax.scan(move, start, jax.random.split(key, 120))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start[1], steps)

    with Writer(folder, env.spec, {'env': {'name': 'minatar/breakout', 'options': {}}}) as writer:
        for episode, complete in split_stream(jax.tree.map(np.asarray, play(jax.random.key(0)))):
            writer.add('random', episode, complete)
    return folder
