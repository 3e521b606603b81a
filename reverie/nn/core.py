"""Building blocks, and the boundary between modules and `jit`: NNX inside it, plain nested dicts across it."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Params = dict[str, Any]


def build(module: nnx.Module) -> tuple[Params, Callable[[Params], Any]]:
    """-> (params, bind): weights as a plain nested dict, and the function that makes a module of such a dict.

    `bind(params)` belongs inside a traced function, where it costs nothing at run time. A change made to the bound
    module there is lost: state is passed in and handed back, never kept in the module.
    """
    graphdef, state = nnx.split(module)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def bind(params: Params) -> Any:
        filled = jax.tree.map(lambda x: x, shapes)
        nnx.replace_by_pure_dict(filled, params)  # by name, not by leaf order
        return nnx.merge(graphdef, filled)

    return nnx.to_pure_dict(state), bind


class Linear(nnx.Module):
    """x @ kernel + bias with fp32 parameters, computed in `dtype`.

    Initialised truncated-normal with variance scale^2 / fan-in; scale 0 makes an output layer start at zero.
    """

    def __init__(self, inputs: int, outputs: int, *, bias=True, scale=1.0, dtype=jnp.float32, rngs: nnx.Rngs):
        if scale:
            init = nnx.initializers.variance_scaling(scale**2, 'fan_in', 'truncated_normal')
        else:
            init = nnx.initializers.zeros
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, '*B I']) -> Float[Array, '*B O']:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in fp32 and returned in the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)


class MLP(nnx.Module):
    """`layers` times Linear, RMSNorm, SiLU, then an fp32 output layer; input [*B, I] -> [*B, O]."""

    def __init__(self, inputs: int, units: int, layers: int, outputs: int, *, out_scale=1.0, dtype, rngs: nnx.Rngs):
        widths = [inputs] + [units] * layers
        self.hidden = nnx.List(Linear(i, o, bias=False, dtype=dtype, rngs=rngs) for i, o in itertools.pairwise(widths))
        self.norms = nnx.List(RMSNorm(units) for _ in range(layers))
        self.out = Linear(widths[-1], outputs, scale=out_scale, rngs=rngs)

    def __call__(self, x: Float[Array, '*B I']) -> Float[Array, '*B O']:
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = jax.nn.silu(norm(linear(x)))
        return self.out(x.astype(jnp.float32))


def count(params: Params) -> int:
    """Number of weights."""
    return sum(x.size for x in jax.tree.leaves(params))
