"""The jitted update against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_agent import BATCH, LENGTH, Table, head_loss, model_loss, poisoned, toy

from reverie.training import state
from reverie.training.setup import call_size
from reverie.training.update import finite, make_program, normalise, update
from reverie.types import UserError


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def step_by_step(agent, phase, steps, source=None):
    """Every state of one seed, by calling `update` alone: no scan, no vmap."""
    source = source or Table()
    train = state.create(agent.init(jax.random.key(0)), phase)
    one = jax.jit(lambda s, b, k: update(phase, s, b, k))
    key, states, metrics = jax.random.key(5), [train], []
    for i in range(steps):
        sample_key, loss_key = jax.random.split(jax.random.fold_in(key, i))
        train, m = one(train, source.draw(source.data, None, sample_key, BATCH, LENGTH), loss_key)
        states.append(train)
        metrics.append(m)
    return states, metrics


@pytest.fixture(scope='module')
def first_phase():
    agent = toy((7, 3))
    return agent, *step_by_step(agent, agent.phases[0], 7)


def test_rms_normalisation_equals_a_plain_loop_and_starts_at_one():
    losses = np.random.default_rng(1).normal(size=(6, 2)) * [1.0, 1e4]
    square, running = {'a': jnp.zeros(()), 'b': jnp.zeros(())}, np.zeros(2)
    for t, (a, b) in enumerate(losses):
        terms, square = normalise(
            dict(a=jnp.float32(a), b=jnp.float32(b)), square, 0.9, jnp.int32(t)
        )
        running = 0.9 * running + 0.1 * np.array([a, b]) ** 2
        expected = np.array([a, b]) / np.sqrt(running / (1 - 0.9 ** (t + 1)))
        np.testing.assert_allclose([terms['a'], terms['b']], expected, rtol=1e-4)
        if t == 0:
            np.testing.assert_allclose([terms['a'], terms['b']], np.sign([a, b]), rtol=1e-5)


def test_a_term_that_is_zero_keeps_its_gradient_and_divides_by_one():
    def term(x):
        return normalise(dict(a=x), dict(a=jnp.zeros(())), 0.9, jnp.int32(0))[0]['a']

    assert jax.value_and_grad(term)(jnp.float32(0)) == (0.0, 1.0)


def test_the_running_mean_of_squares_takes_no_gradient():
    def term(x):
        return normalise(dict(a=x), dict(a=jnp.float32(0.4)), 0.9, jnp.int32(3))[0]['a']

    rms = np.sqrt((0.9 * 0.4 + 0.1 * 4.0) / (1 - 0.9**4))
    np.testing.assert_allclose(jax.grad(term)(jnp.float32(2)), 1 / rms, rtol=1e-5)


def test_groups_that_are_not_trained_stay_bit_for_bit_and_have_no_optimiser_state(first_phase):
    _, states, _ = first_phase
    assert same(states[0].params['head'], states[-1].params['head'])
    assert not same(states[0].params['model'], states[-1].params['model'])
    adam = states[-1].opt_state[0]
    assert set(adam.mu) == {'model'} and int(adam.count) == 7


def test_the_weight_mean_equals_a_plain_loop(first_phase):
    _, states, _ = first_phase
    mean = np.asarray(states[0].params['model']['w'])
    for train in states[1:]:
        mean = 0.8 * mean + 0.2 * np.asarray(train.params['model']['w'])
    np.testing.assert_allclose(states[-1].ema['model']['w'], mean, rtol=1e-5)


def test_sgd_on_the_head_equals_numpy():
    agent = toy()
    phase, source = agent.phases[1], Table()
    states, metrics = step_by_step(agent, phase, 3)
    w, bias = np.asarray(states[0].params['head']['w']), float(states[0].params['model']['v'].sum())
    for i in range(3):
        sample_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(5), i))
        batch = source.draw(source.data, None, sample_key, BATCH, LENGTH)
        obs, reward = np.asarray(batch.step.obs), np.asarray(batch.step.reward)
        error = obs @ w + bias - reward
        grad = (2 * error[..., None] * obs).mean((0, 1))
        np.testing.assert_allclose(metrics[i]['loss/head'], (error**2).mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics[i]['opt/grad_norm'], np.linalg.norm(grad), rtol=1e-5)
        np.testing.assert_allclose(
            metrics[i]['opt/update_norm'], 0.05 * np.linalg.norm(grad), rtol=1e-5
        )
        w = w - 0.05 * grad
        np.testing.assert_allclose(states[i + 1].params['head']['w'], w, rtol=1e-4, atol=1e-6)


def test_a_poisoned_update_changes_nothing_but_counters():
    agent = toy(model=poisoned(2, 3))
    states, metrics = step_by_step(agent, agent.phases[0], 6)
    before, after = states[2], states[4]
    kept = lambda s: (s.params, s.opt_state, s.rms, s.ema)
    assert same(kept(before), kept(after))
    assert [int(s.streak) for s in states] == [0, 0, 0, 1, 2, 0, 0]
    assert int(states[-1].skipped) == 2 and int(states[-1].step) == 6
    assert not same(kept(after), kept(states[5])) and finite(states[-1].params)
    assert np.isnan(metrics[2]['loss/size']) and np.isfinite(metrics[2]['loss/fit'])


def test_an_update_that_overflows_in_the_optimiser_is_skipped():
    explode = optax.GradientTransformation(
        lambda p: (), lambda g, s, p=None: (jax.tree.map(lambda x: x / 0, g), s)
    )
    agent = toy(optimiser=explode)
    states, _ = step_by_step(agent, agent.phases[0], 1)
    assert int(states[1].skipped) == 1 and same(states[0].params, states[1].params)


@pytest.mark.parametrize(
    'scales, message',
    [
        (dict(fit=1.0), r"extra \['size'\]"),
        (dict(fit=1.0, size=1.0, kl=1.0), r"missing losses \['kl'\]"),
    ],
)
def test_losses_must_be_those_of_the_scales(scales, message):
    agent = toy(scales=scales)
    with pytest.raises(UserError, match=message):
        step_by_step(agent, agent.phases[0], 1)


def test_losses_must_not_be_reduced():
    reduced = lambda *args: (dict(head=head_loss(*args)[0]['head'].mean(1)), {})
    agent = toy()
    with pytest.raises(UserError, match=r'B=4, T\], got .*head.*\(4,\)'):
        step_by_step(agent, dataclasses.replace(agent.phases[1], loss=reduced), 1)


def test_a_phase_cannot_train_a_group_that_is_not_there():
    agent = toy(trains=('modle',))
    with pytest.raises(UserError, match='modle'):
        state.create(agent.init(jax.random.key(0)), agent.phases[0])


def test_one_call_of_a_program_equals_single_updates(first_phase):
    agent, states, metrics = first_phase
    program = make_program(agent.phases[0], Table())
    train = jax.tree.map(lambda x: jnp.array(x)[None], states[0])
    train = state.own_buffers(train)
    source = Table()
    train, means, streak, history, memory, _ = program.call(
        train, source.data, None, jax.random.key(5)[None], updates=7
    )
    for a, b in zip(leaves(train), leaves(states[-1]), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        means['loss/fit'][0], np.mean([m['loss/fit'] for m in metrics]), rtol=1e-5
    )
    np.testing.assert_allclose(history['loss/fit'][0], [m['loss/fit'] for m in metrics], rtol=1e-5)
    assert streak.shape == (1, 7) and program.compile_log == [7] and memory is None


def test_the_mean_of_a_call_leaves_out_what_is_not_finite():
    agent = toy(model=poisoned(1, 1))
    program, source = make_program(agent.phases[0], Table()), Table()
    train = state.create(agent.init(jax.random.key(0)), agent.phases[0])
    train = state.own_buffers(jax.tree.map(lambda x: x[None], train))
    _, means, _, history, _, _ = program.call(
        train, source.data, None, jax.random.key(5)[None], updates=3
    )
    np.testing.assert_allclose(
        means['loss/size'][0], np.asarray(history['loss/size'])[0, [0, 2]].mean(), rtol=1e-6
    )
    assert float(means['opt/skipped'][0]) == 1


@pytest.mark.parametrize(
    'steps, wanted, size', [(100, 50, 50), (90, 50, 45), (97, 50, 50), (7, 50, 7), (10, 1, 1)]
)
def test_calls_divide_a_phase_where_they_can(steps, wanted, size):
    assert call_size(steps, wanted) == size


def test_the_toy_has_gradients_in_both_terms():
    agent = toy()
    params, source = agent.init(jax.random.key(0)), Table()
    batch = source.draw(source.data, None, jax.random.key(1), BATCH, LENGTH)
    for name in ('fit', 'size'):
        grad = jax.grad(lambda p, n=name: model_loss(p, batch, jax.random.key(2), 0)[0][n].mean())(
            params
        )
        assert np.abs(grad['model']['w']).max() > 0
