"""Optimisers against recorded updates, and the partition into groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from reverie.nn.optim import clip_by_tensor_norm, clipped_adam, laprop_agc, per_group
from reverie.types import UserError
from tests.golden_numbers import golden

pytestmark = pytest.mark.compat

G = golden('v3/opt')
NAMES = ('a/kernel', 'a/bias', 'a/scale', 'b/kernel')


def close(tree, prefix):
    for name in NAMES:
        np.testing.assert_allclose(
            tree[name], G[f'{prefix}/{name}'], rtol=1e-4, atol=1e-9, err_msg=name
        )


def tensors(prefix):
    return {name: jnp.asarray(G[f'{prefix}/{name}']) for name in NAMES}


@pytest.mark.parametrize(('schedule', 'rate', 'warmup'), [('warm0', 1e-2, 0), ('warm3', 4e-5, 3)])
def test_laprop_with_adaptive_clipping_gives_the_recorded_updates(schedule, rate, warmup):
    optimiser, params = laprop_agc(rate, warmup), tensors('init')
    state, step = optimiser.init(params), jax.jit(optimiser.update)
    for t in range(5):
        updates, state = step(tensors(f'grad{t}'), state, params)
        params = optax.apply_updates(params, updates)
        close(updates, f'{schedule}/update{t}')
        close(params, f'{schedule}/param{t}')


def test_adaptive_clipping_gives_the_recorded_gradient():
    clip = clip_by_tensor_norm(0.3, 1e-3)
    params = tensors('init')
    close(clip.update(tensors('grad0'), clip.init(params), params)[0], 'agc0')


def test_a_tensor_without_gradient_stays_where_it_is():
    optimiser, params = laprop_agc(1e-2, 0), {'w': jnp.ones(3)}
    updates, _ = optimiser.update({'w': jnp.zeros(3)}, optimiser.init(params), params)
    assert not updates['w'].any()


def test_adam_with_multiplicative_decay_gives_the_recorded_weights():
    g = golden('v2/adam')
    optimiser = clipped_adam(1e-2, clip_norm=5.0, eps=1e-5, weight_decay=1e-3)
    params = {'w': jnp.asarray(g['init'])}
    state = optimiser.init(params)
    for t in range(5):
        updates, state = optimiser.update({'w': jnp.asarray(g[f'grad{t}'])}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params['w'], g[f'param{t}'], rtol=1e-4, atol=1e-6)


def test_every_group_is_clipped_by_its_own_norm():
    clip, sgd = optax.clip_by_global_norm(1.0), optax.sgd(1.0)
    optimiser = per_group(
        {('model', 'head'): optax.chain(clip, sgd), 'actor': optax.chain(clip, optax.sgd(0.5))}
    )
    params = {
        'actor': {'w': jnp.zeros(2)},
        'head': {'w': jnp.zeros(2)},
        'model': {'w': jnp.zeros(2)},
    }
    grads = {
        'actor': {'w': jnp.array([30.0, 40])},
        'head': {'w': jnp.array([0, 4.0])},
        'model': {'w': jnp.array([3.0, 0])},
    }
    state = optimiser.init(params)
    updates, after = jax.jit(optimiser.update)(grads, state, params)
    np.testing.assert_allclose(updates['model']['w'], [-0.6, 0], rtol=1e-6)
    np.testing.assert_allclose(updates['head']['w'], [0, -0.8], rtol=1e-6)
    np.testing.assert_allclose(updates['actor']['w'], [-0.3, -0.4], rtol=1e-6)
    assert list(updates) == list(params)
    assert jax.tree.structure(state) == jax.tree.structure(after)


def test_a_group_without_an_optimiser_is_named():
    with pytest.raises(UserError, match=r"\['actor'\].*\['actor', 'model'\]"):
        per_group({'actor': optax.sgd(1.0)}).init({'actor': {}, 'model': {}})
    with pytest.raises(UserError, match='one optimiser'):
        per_group({'actor': optax.sgd(1.0), ('actor', 'model'): optax.sgd(1.0)})
