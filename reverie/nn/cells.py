"""Recurrent cells (input, h) -> h of the papers, which differ in where the reset and the norm act."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from reverie.nn.core import LayerNorm, Linear, Style


class ResetAfterGRU(nnx.Module):
    """GRU whose reset gate acts on the recurrent product: c = tanh(W x + r * (U h)); Keras'
    default, Dreamer V1.

    h' = u h + (1 - u) c. Kernels hold the gates in the order u, r, c, and have a bias each.
    """

    def __init__(self, inputs: int, units: int, style: Style, rngs: nnx.Rngs):
        self.input = Linear(inputs, 3 * units, init='glorot_uniform', dtype=style.dtype, rngs=rngs)
        self.recurrent = Linear(units, 3 * units, init='orthogonal', dtype=style.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, '*B I'], h: Float[Array, '*B D']) -> Float[Array, '*B D']:
        xu, xr, xc = jnp.split(self.input(x).astype(jnp.float32), 3, -1)
        hu, hr, hc = jnp.split(self.recurrent(h).astype(jnp.float32), 3, -1)
        u, r = jax.nn.sigmoid(xu + hu), jax.nn.sigmoid(xr + hr)
        return u * h + (1 - u) * jnp.tanh(xc + r * hc)


class ResetBeforeGRU(nnx.Module):
    """GRU whose reset gate acts on the state: c = tanh(W [x, r * h]); PlaNet's, TensorFlow 1's
    `GRUBlockCell`.

    h' = u h + (1 - u) c. `gates` holds r, u and starts with bias 1: the cell forgets slowly at
    first.
    """

    def __init__(self, inputs: int, units: int, style: Style, rngs: nnx.Rngs):
        self.gates = Linear(
            inputs + units, 2 * units, init='glorot_uniform', dtype=style.dtype, rngs=rngs
        )
        self.gates.bias = nnx.Param(jnp.ones(2 * units))
        self.candidate = Linear(
            inputs + units, units, init='glorot_uniform', dtype=style.dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, '*B I'], h: Float[Array, '*B D']) -> Float[Array, '*B D']:
        gates = self.gates(jnp.concatenate([x, h], -1)).astype(jnp.float32)
        r, u = jnp.split(jax.nn.sigmoid(gates), 2, -1)
        c = jnp.tanh(self.candidate(jnp.concatenate([x, r * h], -1)).astype(jnp.float32))
        return u * h + (1 - u) * c


class LayerNormGRU(nnx.Module):
    """r, c, u = LayerNorm(W [x, h]); h' = s(u - 1) tanh(s(r) c) + (1 - s(u - 1)) h, s the sigmoid;
    Dreamer V2.
    """

    def __init__(self, inputs: int, units: int, style: Style, rngs: nnx.Rngs):
        self.linear = Linear(
            inputs + units, 3 * units, init=style.init, dtype=style.dtype, rngs=rngs
        )
        self.norm = LayerNorm(3 * units, 1e-3)

    def __call__(self, x: Float[Array, '*B I'], h: Float[Array, '*B D']) -> Float[Array, '*B D']:
        y = self.norm(self.linear(jnp.concatenate([x, h], -1)).astype(jnp.float32))
        r, c, u = jnp.split(y, 3, -1)
        return gate(r, c, u, h)


def gate(r: Array, c: Array, u: Array, h: Array) -> Array:
    """Update h as Dreamer V2's and V3's cells do; the bias -1 makes the state last at first."""
    u = jax.nn.sigmoid(u - 1)
    return u * jnp.tanh(jax.nn.sigmoid(r) * c) + (1 - u) * h
