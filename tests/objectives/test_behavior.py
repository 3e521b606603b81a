"""Returns, PMPO and the rollout against loops."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.nn.dists import Categorical, TwoHot, symexp_bins
from reverie.objectives.behavior import lambda_return, rollout
from reverie.objectives.pmpo import PMPO, critic_loss
from reverie.types import Prediction

pytestmark = pytest.mark.compat


def test_lambda_return_equals_the_references(golden):
    g = lambda name: jnp.asarray(golden[f'v2/lambda/{name}'])
    value_next = jnp.concatenate([g('value')[1:], g('bootstrap')[None]])
    np.testing.assert_allclose(
        lambda_return(g('reward'), g('pcont'), value_next, 1.0, 0.95), g('ret'), rtol=1e-4
    )
    g3 = lambda name: jnp.asarray(golden[f'v3/lambda/{name}'].T)
    ret = lambda_return(g3('rew')[1:], g3('con')[1:], g3('val')[1:], 1.0, 0.95)
    np.testing.assert_allclose(ret, g3('ret_imag'), rtol=1e-4)


def test_lambda_return_is_the_weighted_sum_of_n_step_returns():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 6)).astype(np.float32)
    cont, discount, lam, h = rng.random(6).astype(np.float32), 0.9, 0.7, 6
    for t in range(h):
        total = 0.0
        for n in range(1, h - t + 1):
            weight, n_step = 1.0, 0.0
            for i in range(n):
                n_step += weight * reward[t + i]
                weight *= discount * cont[t + i]
            n_step += weight * value[t + n - 1]
            total += n_step * (lam ** (n - 1) * (1 - lam) if n < h - t else lam ** (n - 1))
        columns = (jnp.asarray(x)[:, None] for x in (reward, cont, value))
        ret = lambda_return(*columns, discount, lam)
        np.testing.assert_allclose(ret[t, 0], total, rtol=1e-4)


def numpy_pmpo(logits, prior, action, adv, weight, alpha, beta):
    """Dreamer 4 eq. 11 as a loop, a scalar."""
    log = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    pi, pr = log(logits), log(prior)
    sums, sizes, kl = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}, 0.0
    for i in np.ndindex(*adv.shape):
        good = bool(adv[i] >= 0)
        sums[good] += weight[i] * (pi[i] * action[i]).sum()
        sizes[good] += weight[i]
        kl += weight[i] * (np.exp(pi[i]) * (pi[i] - pr[i])).sum()
    mean = lambda good: sums[good] / sizes[good] if sizes[good] else 0.0
    return (1 - alpha) * mean(False) - alpha * mean(True) + beta * kl / adv.size


def test_beyond_the_kl_budget_the_policy_only_returns_to_the_prior():
    key = jax.random.split(jax.random.key(4), 5)
    logits, prior = jax.random.normal(key[0], (6, 4, 3)), jax.random.normal(key[1], (6, 4, 3))
    action = jax.nn.one_hot(jax.random.randint(key[2], (6, 4), 0, 3), 3)
    adv, weight = jax.random.normal(key[3], (6, 4)), jax.random.uniform(key[4], (6, 4))
    kl = np.asarray(Categorical(logits).kl(Categorical(prior)))
    spent = float((weight * kl).sum() / weight.sum())
    terms = lambda budget: PMPO(kl_budget=budget)(
        Categorical(logits), Categorical(prior), action, adv, weight
    )
    within, beyond, free = terms(1.01 * spent), terms(0.99 * spent), terms(None)
    np.testing.assert_array_equal(within['policy'], free['policy'])
    assert np.any(free['policy']) and not np.any(beyond['policy'])
    np.testing.assert_array_equal(beyond['prior'], free['prior'])


@pytest.mark.parametrize('signs', ['both', 'all positive', 'all negative', 'no weight'])
def test_pmpo_equals_a_loop(signs):
    rng = np.random.default_rng(1)
    logits, prior = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    action = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (4, 5))]
    adv, weight = rng.normal(size=(4, 5)).astype(np.float32), rng.random((4, 5)).astype(np.float32)
    adv = {'all positive': np.abs(adv), 'all negative': -np.abs(adv) - 1}.get(signs, adv)
    weight = weight * (signs != 'no weight')
    args = lambda x: (Categorical(x), *map(jnp.asarray, (prior, action, adv, weight)))

    def total(x):
        policy, dist, *rest = args(x)
        terms = PMPO(0.4, 0.3)(policy, Categorical(dist), *rest)
        assert {k: v.shape for k, v in terms.items()} == {'policy': (4, 5), 'prior': (4, 5)}
        return sum(v.mean() for v in terms.values())

    expected = numpy_pmpo(logits, prior, action, adv, weight, 0.4, 0.3)
    np.testing.assert_allclose(total(jnp.asarray(logits)), expected, rtol=1e-4, atol=1e-6)
    grad = np.asarray(jax.grad(total)(jnp.asarray(logits)))
    numeric = np.zeros_like(logits, dtype=np.float64)
    for i in np.ndindex(*logits.shape):  # central differences of the loop
        up, down = logits.astype(np.float64), logits.astype(np.float64)
        up[i] += 1e-4
        down[i] -= 1e-4
        loop = lambda x: numpy_pmpo(x, prior, action, adv, weight, 0.4, 0.3)
        numeric[i] = (loop(up) - loop(down)) / 2e-4
    np.testing.assert_allclose(grad, numeric, atol=1e-5)


def test_pmpo_reads_the_sign_of_the_advantage_alone_and_leaves_the_prior_alone():
    logits, prior = jax.random.normal(jax.random.key(0), (2, 1, 6, 3))
    action = jax.nn.one_hot(jnp.array([[0, 1, 2, 0, 1, 2]]), 3)
    adv, weight = jnp.array([[1.0, -2, 0, -0.1, 5, -9]]), jnp.ones((1, 6))
    loss = lambda l, p, a: sum(
        x.mean() for x in PMPO()(Categorical(l), Categorical(p), action, a, weight).values()
    )
    np.testing.assert_allclose(loss(logits, prior, adv), loss(logits, prior, adv * 100), rtol=1e-6)
    assert not jax.grad(loss, 1)(logits, prior, adv).any()


def test_critic_loss_is_least_at_the_return_and_ignores_what_cannot_be_reached():
    bins = symexp_bins(63, 5.0)
    value = lambda logits: TwoHot(logits, bins)
    ret, weight = jnp.array([[2.0, -1.0]]), jnp.array([[1.0, 0.0]])
    grad = jax.grad(lambda x: critic_loss(value(x), ret, weight).sum())
    logits = jnp.zeros((1, 2, 63))
    assert not grad(logits)[0, 1].any()
    for _ in range(200):
        logits = logits - 5.0 * grad(logits)
    np.testing.assert_allclose(value(logits).mean()[0, 0], 2.0, atol=0.05)


class Counter(NamedTuple):
    """World model whose state is the sum of all actions: an off-by-one anywhere shows in its
    rewards.
    """

    def initial(self, batch):
        return jnp.zeros(batch)

    def observe(self, state, step, key):
        return state, state[:, None]

    def decode(self, state):
        return state

    def imagine(self, state, action, key):
        state = state + action[:, 0]
        return state, Prediction(state[:, None], 10 * state, jnp.ones_like(state))


def test_rollout_pairs_each_action_with_what_it_led_to():
    policy = lambda state, feat, key: feat + 1  # feat is the sum so far
    last, action, pred = rollout(
        Counter(), policy, jnp.zeros(1), jnp.zeros((1, 1)), jax.random.key(0), 4
    )
    assert action[:, 0, 0].tolist() == [1, 2, 4, 8]
    assert pred.reward[:, 0].tolist() == [10, 30, 70, 150]
    assert last.tolist() == [15]
