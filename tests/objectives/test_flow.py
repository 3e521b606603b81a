"""Shortcut forcing against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.objectives.flow import (
    SignalStep,
    bootstrap_target,
    corrupt,
    draw_signal_step,
    ramp,
    shortcut_loss,
)

pytestmark = pytest.mark.compat

K_MAX = 16


def toy(z, signal_level, step_exponent):
    """Denoiser that depends on all of its inputs, for NumPy and JAX arrays."""
    tau, d = signal_level[..., None, None] / K_MAX, 2.0 ** -step_exponent[..., None, None]
    return 0.7 * z**2 - 0.3 * z + 0.5 * tau - 0.2 * d


def numpy_loss(z, z1, signal_level, step_exponent):
    """Dreamer 4 eqs. 7 and 8, frame by frame, in velocity space as printed."""
    out = np.zeros(signal_level.shape)
    for i in np.ndindex(*signal_level.shape):
        tau, d, x = signal_level[i] / K_MAX, 2.0 ** -step_exponent[i], z[i]
        f = lambda x, tau, d: 0.7 * x**2 - 0.3 * x + 0.5 * tau - 0.2 * d
        if d == 1 / K_MAX:
            error = f(x, tau, d) - z1[i]
            loss = (error**2).mean()
        else:
            b1 = (f(x, tau, d / 2) - x) / (1 - tau)
            half = x + b1 * d / 2
            b2 = (f(half, tau + d / 2, d / 2) - half) / (1 - (tau + d / 2))
            v = (f(x, tau, d) - x) / (1 - tau)
            loss = (1 - tau) ** 2 * ((v - (b1 + b2) / 2) ** 2).mean()
        out[i] = (0.9 * tau + 0.1) * loss
    return out


def test_both_branches_of_the_loss_equal_the_printed_equations():
    rng = np.random.default_rng(0)
    noise = draw_signal_step(jax.random.key(0), (6, 9), K_MAX, 4)
    z, z1 = rng.normal(size=(2, 6, 9, 2, 3)).astype(np.float32)
    coarse = bootstrap_target(toy, jnp.asarray(z), noise, K_MAX)
    finest = (np.asarray(noise.step_exponent) == 4)[..., None, None]
    target = jnp.where(finest, jnp.asarray(z1), coarse)
    loss = shortcut_loss(toy(jnp.asarray(z), *noise), target, noise, K_MAX)
    np.testing.assert_allclose(loss, numpy_loss(z, z1, *map(np.asarray, noise)), rtol=2e-4)


def test_the_bootstrap_target_has_no_gradient():
    noise = SignalStep(jnp.zeros((1, 1), int), jnp.zeros((1, 1), int))
    z = jnp.ones((1, 1, 1, 1))
    grad = jax.grad(
        lambda w: bootstrap_target(lambda z, *n: w * toy(z, *n), z, noise, K_MAX).sum()
    )(1.0)
    assert grad == 0.0


def test_two_half_steps_of_a_perfect_denoiser_land_where_one_step_does():
    """If f always answers the data, the target is the data for every step size."""
    z1 = jax.random.normal(jax.random.key(0), (8, 10, 2, 3))
    noise = draw_signal_step(jax.random.key(1), (8, 10), K_MAX, 8)
    z = corrupt(jax.random.normal(jax.random.key(2), z1.shape), z1, noise.signal_level / K_MAX)
    target = bootstrap_target(lambda *_: z1, z, noise, K_MAX)
    coarse = np.asarray(noise.step_exponent) < 4  # the others have no half steps
    np.testing.assert_allclose(target[coarse], z1[coarse], atol=1e-5)


def test_levels_lie_on_the_grid_of_their_step_and_cover_it():
    noise = draw_signal_step(jax.random.key(0), (400, 50), K_MAX, 200)
    signal_level, step_exponent = np.asarray(noise.signal_level), np.asarray(noise.step_exponent)
    assert (step_exponent[200:] == 4).all()
    for e in range(5):
        rows = signal_level[step_exponent == e]
        cells, counts = np.unique(rows, return_counts=True)
        np.testing.assert_array_equal(cells, np.arange(0, K_MAX, K_MAX >> e))  # 0, d, .., 1 - d
        assert counts.min() > 0.8 * counts.mean()
    assert [(step_exponent[:200] == e).mean() for e in range(5)] == pytest.approx(
        [0.2] * 5, abs=0.02
    )


@pytest.mark.parametrize('every_step', [True, False])
def test_coarse_steps_follow_the_finest_as_they_do_in_sampling(every_step):
    """Sampling puts a frame at d = 1/4 behind frames at d_min: one in five of them, or none."""
    noise = draw_signal_step(jax.random.key(0), (400, 50), K_MAX, 200, True, every_step)
    e = np.asarray(noise.step_exponent[:200])
    follows = (e[:, 1:] == 2) & (e[:, :-1] == 4)
    share = follows.sum() / (e[:, 1:] == 2).sum()
    assert share == pytest.approx(0.2 if every_step else 0.0, abs=0.03)


def test_before_the_warmup_is_over_no_row_bootstraps():
    assert (
        draw_signal_step(jax.random.key(0), (8, 5), K_MAX, 8, jnp.array(False)).step_exponent == 4
    ).all()


def test_corruption_runs_from_noise_to_data_and_the_ramp_from_a_tenth_to_one():
    z0, z1 = jnp.zeros((1, 3, 1, 1)), jnp.ones((1, 3, 1, 1))
    np.testing.assert_allclose(corrupt(z0, z1, jnp.array([[0.0, 0.25, 1.0]])).ravel(), [0, 0.25, 1])
    np.testing.assert_allclose(ramp(jnp.array([0.0, 0.5, 1.0])), [0.1, 0.55, 1.0])
