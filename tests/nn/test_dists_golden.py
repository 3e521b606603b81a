"""Distributions of the recurrent agents against the references' numbers, SciPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from reverie.nn.action_dists import (
    BoundedNormalDist,
    OneHotDist,
    TanhNormal,
    TanhNormalDist,
    TruncNormal,
    TruncNormalDist,
)
from reverie.nn.dists import MSE, Bernoulli, Normal, OneHots, Pixels, SymlogMSE, unimix
from reverie.types import sg
from tests.golden_numbers import golden

pytestmark = pytest.mark.compat

close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_v3_divergences_equal_the_reference_with_their_gradients():
    g = golden('v3/kl')
    dist = lambda logits: OneHots(unimix(logits, 0.01))
    post, prior = jnp.asarray(g['post_logits']), jnp.asarray(g['prior_logits'])
    close(jnp.exp(dist(post).logits), g['unimix_probs'])
    close(dist(post).kl(dist(prior)), g['raw'])
    close(dist(post).entropy(), g['entropy_post'])
    dyn = lambda q, p: jnp.maximum(sg(dist(q)).kl(dist(p)), 1).sum()
    rep = lambda q, p: jnp.maximum(dist(q).kl(sg(dist(p))), 1).sum()
    close(jax.grad(dyn, 1)(post, prior), g['dyn_grad_prior'])
    close(jax.grad(rep, 0)(post, prior), g['rep_grad_post'])


def test_straight_through_gradient_equals_the_reference():
    g = golden('v3/kl')
    weight, dist = jnp.asarray(g['st_weight']), lambda x: OneHots(unimix(x, 0.01))
    close(
        jax.grad(lambda x: (weight * dist(x).mode()).sum())(jnp.asarray(g['post_logits'])),
        g['st_grad'],
    )


def test_one_hots_are_one_hot_with_the_frequency_of_their_probabilities():
    dist = OneHots(jnp.log(jnp.array([[0.2, 0.8], [0.7, 0.3]])))
    draws = jax.vmap(dist.sample)(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(
        jnp.sort(draws, -1), jnp.broadcast_to(jnp.array([0.0, 1.0]), draws.shape), atol=1e-6
    )
    np.testing.assert_allclose(draws.mean(0), jnp.exp(dist.logits), atol=0.03)
    close(dist.log_prob(jnp.array([[0.0, 1.0], [1.0, 0.0]])), np.log(0.8 * 0.7))


def test_draws_of_many_classes_pass_a_chi_squared_test_and_avoid_the_impossible():
    probs = np.random.default_rng(0).dirichlet(np.ones(32), 3)
    probs[:, [0, 7, 31]] = 0
    probs /= probs.sum(-1, keepdims=True)
    dist = OneHots(jnp.log(jnp.asarray(probs, jnp.float32)))
    draws = np.asarray(
        jax.vmap(dist.sample)(jax.random.split(jax.random.key(2), 5000)).round().sum(0)
    )
    assert (draws[:, [0, 7, 31]] == 0).all() and (draws.sum(-1) == 5000).all()
    for found, p in zip(draws, probs, strict=True):
        assert (
            scipy.stats.chisquare(found[p > 0], 5000 * p[p > 0] / p.sum(), sum_check=False).pvalue
            > 0.001
        )


@pytest.mark.parametrize('name', ['atari', 'free1_each'])
def test_v2_divergences_equal_the_reference(name):
    g = golden('v2/kl')
    close(
        OneHots(jnp.asarray(g['post_logit'])).kl(OneHots(jnp.asarray(g['prior_logit']))),
        g[f'{name}/value'],
    )


def test_gaussian_divergence_equals_the_reference():
    g = {k: jnp.asarray(v) for k, v in golden('v2/klg').items()}
    close(
        Normal(g['post_mean'], g['post_std']).kl(Normal(g['prior_mean'], g['prior_std'])),
        g['value'],
    )
    r = {k: jnp.asarray(v) for k, v in golden('v1/rssm').items()}
    post, prior = Normal(r['post_mean'], r['post_std']), Normal(r['prior_mean'], r['prior_std'])
    close(post.kl(prior), golden('v1/kl')['value'])


def test_v3_bounded_normal_equals_the_reference():
    g = {k: jnp.asarray(v) for k, v in golden('v3/bounded_normal').items()}
    assert BoundedNormalDist().size(3) == 6
    dist = BoundedNormalDist()(jnp.concatenate([g['raw_mean'], g['raw_std']], -1))
    close(dist.mean, g['mean'])
    close(dist.std, g['std'])
    close(dist.log_prob(g['event']), g['logp'])
    close(dist.entropy(), g['entropy'])
    for std, expected in ((0.1, g['minent']), (1.0, g['maxent'])):
        close(Normal(jnp.zeros(1), std).entropy(), expected[0])


def test_bernoulli_takes_soft_targets_as_the_reference_does():
    g = {k: jnp.asarray(v) for k, v in golden('v3/binary').items()}
    close(-Bernoulli(g['logit']).log_prob(g['target']), g['loss'])
    close(Bernoulli(g['logit']).mean(), g['prob1'])
    hard = g['target'] > 0.5
    close(
        Bernoulli(g['logit'], 1).log_prob(hard),
        Bernoulli(g['logit']).log_prob(hard.astype(jnp.float32)).sum(),
    )


def test_v2_truncated_normal_equals_the_reference():
    g = {k: jnp.asarray(v) for k, v in golden('v2/trunc').items()}
    dist = TruncNormalDist()(jnp.concatenate([g['raw_mean'], g['raw_std']], -1))
    close(dist.log_prob(g['event']), g['logp'])
    close(dist.entropy(), g['entropy'])
    close(dist.mean(), g['mean'])


def test_draws_of_a_truncated_normal_follow_its_law_and_carry_gradients():
    dist = TruncNormal(jnp.array([0.7]), jnp.array([0.5]))
    draws = jax.vmap(dist.sample)(jax.random.split(jax.random.key(1), 4000))[:, 0]
    exact = scipy.stats.truncnorm((-1 - 0.7) / 0.5, (1 - 0.7) / 0.5, 0.7, 0.5)
    assert scipy.stats.kstest(np.asarray(draws), exact.cdf).pvalue > 0.001
    mean = lambda loc: jax.vmap(TruncNormal(loc, dist.std).sample)(
        jax.random.split(jax.random.key(1), 2000)
    ).mean()
    expected = jax.grad(lambda loc: TruncNormal(loc, dist.std).mean().sum())(dist.loc)
    np.testing.assert_allclose(jax.grad(mean)(dist.loc), expected, atol=0.03)


def test_v1_tanh_normal_equals_the_reference():
    g, raw = golden('v1/tanh_normal'), golden('v2/trunc')
    dist = TanhNormalDist()(
        jnp.concatenate([jnp.asarray(raw['raw_mean']), jnp.asarray(raw['raw_std'])], -1)
    )
    close(dist.mean, g['mean'])
    close(dist.std, g['std'])
    close(dist.log_prob(jnp.asarray(raw['event'])), g['logp'])


def test_tanh_normal_of_small_std_has_the_entropy_and_mode_of_its_linearisation():
    dist = TanhNormal(jnp.array([[0.5], [-1.0]]), jnp.array([[0.01], [0.01]]))
    slope = 1 - np.tanh([0.5, -1.0]) ** 2
    np.testing.assert_allclose(
        dist.entropy(), np.log(0.01 * slope) + 0.5 * np.log(2 * np.pi * np.e), atol=0.25
    )
    np.testing.assert_allclose(dist.mode()[:, 0], np.tanh([0.5, -1.0]), atol=0.005)
    far = TanhNormal(jnp.array([[5.0]]), jnp.array([[5.0]]))
    assert jnp.isfinite(far.log_prob(jnp.ones((1, 1)))).all()


def test_squared_errors_and_normals_sum_over_their_event():
    x, mean = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1)), np.zeros((2, 3, 4, 4, 1))
    close(MSE(jnp.asarray(mean), 3).log_prob(jnp.asarray(x)), -(x**2).sum((2, 3, 4)))
    expected = scipy.stats.norm(0, 1).logpdf(x).sum((2, 3, 4))
    close(Normal(jnp.asarray(mean), event=3).log_prob(jnp.asarray(x)), expected)
    close(
        SymlogMSE(jnp.zeros(3)).log_prob(jnp.asarray([1.0, -2.0, 0.0])),
        -(np.log([2, 3]) ** 2).sum(),
    )


def test_uint8_pixels_and_unit_floats_are_the_same_image():
    image = np.array([[0, 51, 255]], np.uint8)
    dist = Pixels(MSE(jnp.full((1, 3), 0.2)))
    close(dist.log_prob(jnp.asarray(image)), -(0.04 + 0.64))
    close(dist.log_prob(jnp.asarray(image / 255)), -(0.04 + 0.64))


def test_laws_pass_through_jit_and_stop_gradient():
    dist = jax.jit(lambda x: sg(Normal(x, jnp.exp(x), event=2)))(jnp.zeros((2, 3, 4)))
    assert dist.event == 2 and dist.entropy().shape == (2,)
    assert OneHotDist(0.1).size(4) == 4
    assert float(
        jnp.exp(OneHotDist(0.1)(jnp.array([50.0, 0.0])).log_prob(jnp.array([0.0, 1.0])))
    ) == pytest.approx(0.05)
