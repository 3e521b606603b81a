"""KL terms against the references and closed forms; overshooting against the references' layout and
a loop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from reverie.nn.dists import Normal, OneHots, unimix
from reverie.objectives.latent import (
    BalancedKL,
    FreeNatsOfMean,
    FreeNatsPerElement,
    LatentOvershooting,
    TwoSidedKL,
    ahead,
    inside,
    open_loop,
    state_before,
)
from tests.golden_numbers import golden

pytestmark = pytest.mark.compat


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def arrays(prefix):
    return {name: jnp.asarray(x) for name, x in golden(prefix).items()}


def test_v3_terms_and_their_gradients_equal_the_references():
    g = arrays('v3/kl')
    dist = lambda logits: OneHots(unimix(logits[None], 0.01))
    terms = lambda post, prior: TwoSidedKL(dyn=1.0, rep=1.0)(dist(post), dist(prior))
    post, prior = g['post_logits'], g['prior_logits']
    for name in ('dyn', 'rep'):
        close(terms(post, prior)[name][0], g['free'])
    dyn = jax.grad(lambda *x: terms(*x)['dyn'].sum(), (0, 1))(post, prior)
    rep = jax.grad(lambda *x: terms(*x)['rep'].sum(), (0, 1))(post, prior)
    close(dyn[1], g['dyn_grad_prior'])
    close(rep[0], g['rep_grad_post'])
    assert not dyn[0].any() and not rep[1].any()


def test_v3_terms_carry_their_weights():
    post, prior = (OneHots(x) for x in jax.random.normal(jax.random.key(0), (2, 1, 5, 3, 4)))
    plain, weighted = TwoSidedKL(1.0, 1.0, 0.0)(post, prior), TwoSidedKL(0.5, 0.1, 0.0)(post, prior)
    close(weighted['dyn'], 0.5 * plain['dyn'])
    close(weighted['rep'], 0.1 * plain['rep'])


V2 = {
    'atari': BalancedKL(0.8, 0.0),
    'free1': BalancedKL(0.8, 1.0),
    'free1_each': BalancedKL(0.8, 5.0, free_avg=False),
}


@pytest.mark.parametrize('name', V2)
def test_v2_balance_and_its_gradients_equal_the_references(name):
    g = arrays('v2/kl')
    loss = lambda post, prior: V2[name](OneHots(post), OneHots(prior))['kl'].mean()
    value, (to_post, to_prior) = jax.value_and_grad(loss, (0, 1))(g['post_logit'], g['prior_logit'])
    close(value, g[f'{name}/loss'])
    close(to_post, g[f'{name}/grad_post'])
    close(to_prior, g[f'{name}/grad_prior'])


def test_v2_balance_of_gaussians_equals_the_references():
    g = arrays('v2/klg')
    post, prior = Normal(g['post_mean'], g['post_std']), Normal(g['prior_mean'], g['prior_std'])
    close(post.kl(prior), g['value'])
    close(BalancedKL(0.8, 1.0)(post, prior)['kl'].mean(), g['loss'])


def test_v1_and_planet_place_their_free_nats_as_the_references_do():
    g = arrays('v1/rssm')
    post, prior = Normal(g['post_mean'], g['post_std']), Normal(g['prior_mean'], g['prior_std'])
    close(post.kl(prior), golden('v1/kl')['value'])
    close(FreeNatsOfMean(3.0)(post, prior)['kl'].mean(), golden('v1/kl')['div'])
    close(FreeNatsPerElement(3.0)(post, prior)['kl'].mean(), golden('planet/kl')['div'])


@pytest.mark.parametrize('free', [0.1, 100.0])
def test_the_floor_of_the_mean_stops_every_gradient_or_none(free):
    post, prior = jax.random.normal(jax.random.key(1), (2, 2, 3, 4))
    kl = lambda x: Normal(x, jnp.ones_like(x)).kl(Normal(prior, jnp.ones_like(x)))
    loss = lambda x: FreeNatsOfMean(free)(
        Normal(x, jnp.ones_like(x)), Normal(prior, jnp.ones_like(x))
    )['kl'].mean()
    value, grad = jax.value_and_grad(loss)(post)
    close(value, max(free, kl(post).mean()))
    close(grad, jax.grad(lambda x: kl(x).mean())(post) * (free < 1))


def test_free_nats_per_element_are_subtracted_and_silence_only_small_elements():
    mean = jnp.sqrt(2 * jnp.array([[1.0, 5.0]]))[..., None]  # KL of means m and 0 is m^2 / 2
    prior = Normal(jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 1)))
    loss = lambda m: FreeNatsPerElement(3.0)(Normal(m, jnp.ones_like(m)), prior)['kl']
    close(loss(mean), [[0.0, 2.0]])
    close(jax.grad(lambda m: loss(m).sum())(mean)[0, :, 0], [0.0, mean[0, 1, 0]])


class Sum(NamedTuple):
    """Distribution of a latent that is its mean alone; the transition adds the action."""

    mean: Array

    def kl(self, other):
        return jnp.square(self.mean - other.mean)[..., 0]


def add(state, action, key):
    return state + action, Sum(state + action)


def test_open_loop_priors_have_the_references_layout():
    g = golden('planet/os')
    distance = int(g['amount'])
    post = jnp.asarray(g['obs'], jnp.float32)[..., None]
    action = jnp.asarray(g['prev_action'], jnp.float32)[..., None]
    none = jnp.zeros(post.shape[:2], bool)
    prior = open_loop(add, state_before(post, none), action, jax.random.key(0), distance)
    target = ahead(Sum(post), distance)
    for row in range(2):
        mask = g[f'mask{row}']
        close(prior.mean[:, row, :, 0] * mask, g[f'prior{row}'])
        close(target.mean[:, row, :, 0] * mask, g[f'post{row}'])
    assert (inside(none, distance)[:, 0] == g['mask0'].astype(bool)).all()


def test_overshooting_is_the_mean_over_all_rollouts_that_stay_in_their_episode():
    rng = np.random.default_rng(0)
    b, t, distance, free = 2, 6, 3, 0.2
    post, action = rng.normal(size=(2, b, t)).astype(np.float32)
    first = np.zeros((b, t), bool)
    first[0, 3] = first[1, 0] = True
    found = []
    for i in range(b):
        for s in range(t):
            state = 0.0 if s == 0 or first[i, s] else post[i, s - 1]
            for d in range(min(distance + 1, t - s)):
                if d and first[i, s + d]:
                    break
                state += 0.0 if first[i, s + d] else action[i, s + d]
                if d:
                    found.append(max(0.0, (post[i, s + d] - state) ** 2 - free))
    x = jnp.asarray(post)[..., None]
    loss = lambda state, post: LatentOvershooting(distance, free)(
        add, state, Sum(post), jnp.asarray(action)[..., None], jnp.asarray(first), jax.random.key(0)
    )['overshooting']
    assert loss(x, x).shape == (b, t)
    close(loss(x, x).mean(), np.mean(found))
    to_state, to_post = jax.grad(lambda *args: loss(*args).mean(), (0, 1))(x, x)
    assert to_state.any() and not to_post.any()
