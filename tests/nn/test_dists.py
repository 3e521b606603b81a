"""Distributions against the reference implementations' numbers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from reverie.nn.dists import Bernoulli, Categorical, TwoHot, symexp, symexp_bins, symlog

pytestmark = pytest.mark.compat


def test_symlog_equals_the_reference(golden):
    x, y, symexp_of_y = (
        jnp.asarray(golden[f'v3/symlog/{name}']) for name in ('x', 'y', 'symexp_of_y')
    )
    np.testing.assert_allclose(symlog(x), y, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(symexp(y), symexp_of_y, rtol=1e-4, atol=1e-6)


def test_two_hot_equals_the_reference(golden):
    g = {
        k.removeprefix('v3/twohot/'): jnp.asarray(v)
        for k, v in golden.items()
        if k.startswith('v3/twohot/')
    }
    np.testing.assert_allclose(symexp_bins(255), g['bins255'], rtol=1e-4)
    np.testing.assert_allclose(symexp_bins(4), g['bins4'], rtol=1e-4)
    dist = lambda logits: TwoHot(logits, symexp_bins(255))
    np.testing.assert_allclose(dist(g['logits']).mean(), g['pred'], rtol=1e-4)
    loss = lambda logits: -dist(logits).log_prob(g['target'])
    np.testing.assert_allclose(loss(g['logits']), g['loss'], rtol=1e-4)
    # a target on a bin's edge may leave its neighbour a weight of one rounding of the bin, some
    # 1e-5
    np.testing.assert_allclose(
        jax.grad(lambda x: loss(x).sum())(g['logits']), g['grad'], rtol=1e-4, atol=1e-6
    )
    assert float(dist(jnp.zeros(255)).mean()) == 0.0


@pytest.mark.parametrize('target', [-3.0, 0.0, 0.2, 1.0, 50.0])
def test_a_two_hot_target_has_the_mean_it_stands_for(target):
    bins = symexp_bins(41, 5.0)
    weights = (
        -jax.grad(lambda x: -TwoHot(x, bins).log_prob(jnp.array(target)))(jnp.zeros(41)) + 1 / 41
    )
    np.testing.assert_allclose(weights @ bins, target, atol=1e-4)
    assert (np.abs(weights) > 1e-6).sum() <= 2


def test_categorical_equals_scipy():
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.3, 0.1])
    dist, other = Categorical(jnp.log(p)), Categorical(jnp.log(q))
    np.testing.assert_allclose(dist.entropy(), scipy.stats.entropy(p), rtol=1e-5)
    np.testing.assert_allclose(dist.kl(other), scipy.stats.entropy(p, q), rtol=1e-5)
    np.testing.assert_allclose(dist.log_prob(jnp.array([0.0, 1.0, 0.0])), np.log(0.5), rtol=1e-5)
    draws = jax.vmap(dist.sample)(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(draws.mean(0), p, atol=0.03)
    assert dist.mode().tolist() == [0, 1, 0]


def test_bernoulli_equals_the_closed_form():
    dist = Bernoulli(jnp.array([-2.0, 0.5]))
    p = 1 / (1 + np.exp([2.0, -0.5]))
    np.testing.assert_allclose(dist.mean(), p, rtol=1e-5)
    np.testing.assert_allclose(
        dist.log_prob(jnp.array([True, False])), [np.log(p[0]), np.log(1 - p[1])], rtol=1e-5
    )
