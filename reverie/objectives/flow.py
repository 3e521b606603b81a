"""Shortcut forcing: diffusion forcing whose steps learn to be long ones; Dreamer 4 equations 4 and
6 to 8.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

# (z~ [B, T, Z, c], signal_level [B, T], step_exponent [B, T]) -> x-prediction [B, T, Z, c]
Denoiser = Callable[[Array, Array, Array], Array]


class SignalStep(NamedTuple):
    """Signal levels and step sizes of every frame, on the grid of 1 / k_max."""

    signal_level: Int[Array, 'B T']  # tau * k_max in 0..k_max-1; 0 is pure noise
    step_exponent: Int[Array, 'B T']  # e of the step size d = 2^-e; log2(k_max) is d_min


def draw_signal_step(
    key: PRNGKeyArray,
    lead: tuple[int, int],
    k_max: int,
    bootstrap_rows: int,
    bootstrap_on: Bool[Array, ''] | bool = True,
    every_step: bool = True,
) -> SignalStep:
    """Draw d and tau of every frame, tau ~ U{0, d, .., 1 - d}; Dreamer 4 eq. 4.

    d ~ 1/U{1, 2, .., k_max} in the first `bootstrap_rows` rows (once `bootstrap_on`), so that coarse
    steps follow frames at d_min, as they do in sampling; d_min in the others, which is not from the
    paper. every_step: whether d_min is among the draws; without, a coarse step never follows it.
    """
    finest = k_max.bit_length() - 1
    key_step, key_signal = jax.random.split(key)
    coarse = jax.random.randint(key_step, lead, 0, finest + 1 if every_step else max(finest, 1))
    is_bootstrap = (jnp.arange(lead[0]) < bootstrap_rows)[:, None] & bootstrap_on
    step_exponent = jnp.where(is_bootstrap, coarse, finest)
    cells = 2**step_exponent
    uniform = jax.random.uniform(key_signal, lead)
    cell = jnp.minimum(jnp.floor(uniform * cells).astype(jnp.int32), cells - 1)
    return SignalStep(cell * (k_max // cells), step_exponent)


def corrupt(
    z0: Float[Array, 'B T Z c'], z1: Float[Array, 'B T Z c'], tau: Float[Array, 'B T']
) -> Float[Array, 'B T Z c']:
    """Mix (1 - tau) z0 + tau z1: noise at tau = 0, data at tau = 1; Dreamer 4 eq. 6."""
    tau = tau[..., None, None]
    return (1 - tau) * z0 + tau * z1


def bootstrap_target(
    denoise: Denoiser, z: Float[Array, 'B T Z c'], noise: SignalStep, k_max: int
) -> Float[Array, 'B T Z c']:
    """Target of x for which one step of d lands where two steps of d/2 land; Dreamer 4 eq. 7,
    without gradient.

    b' = (f(z, tau, d/2) - z) / (1 - tau), z' = z + b' d/2,
    b'' = (f(z', tau + d/2, d/2) - z') / (1 - tau - d/2), and the loss
    (1 - tau)^2 |(x - z)/(1 - tau) - (b' + b'')/2|^2 = |x - (z + (1 - tau)(b' + b'')/2)|^2.
    Frames at d_min have no half step: they stay as they are in the second call, as context of their
    neighbours, and their target has no meaning.
    """
    finest = k_max.bit_length() - 1
    half = jnp.minimum(noise.step_exponent + 1, finest)
    tau = (noise.signal_level / k_max)[..., None, None]
    d = (2.0**-noise.step_exponent)[..., None, None]
    b1 = (denoise(z, noise.signal_level, half) - z) / (1 - tau)
    z_half = jnp.where((noise.step_exponent < finest)[..., None, None], z + b1 * d / 2, z)
    signal_half = jnp.minimum(
        noise.signal_level + k_max // 2 ** (noise.step_exponent + 1), k_max - 1
    )
    rest = jnp.maximum(1 - tau - d / 2, 1 / k_max)  # the bound acts on meaningless frames only
    b2 = (denoise(z_half, signal_half, half) - z_half) / rest
    return jax.lax.stop_gradient(z + (1 - tau) * (b1 + b2) / 2)


def ramp(tau: Float[Array, '*B'], floor: float = 0.1) -> Float[Array, '*B']:
    """Weight w(tau) = 0.9 tau + 0.1; Dreamer 4 eq. 8. A floor of 1 weighs all signal levels alike
    (not from the paper).
    """
    return (1 - floor) * tau + floor


def shortcut_loss(
    predicted: Float[Array, 'B T Z c'],
    target: Float[Array, 'B T Z c'],
    noise: SignalStep,
    k_max: int,
    floor: float = 0.1,
) -> Float[Array, 'B T']:
    """Ramp-weighted squared error, mean over a frame's numbers; `target` is z1 at d_min, else
    `bootstrap_target`.
    """
    return ramp(noise.signal_level / k_max, floor) * jnp.square(predicted - target).mean((-2, -1))
