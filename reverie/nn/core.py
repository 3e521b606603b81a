"""Building blocks, and the boundary between modules and `jit`: NNX inside it, plain nested dicts
across it.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Params = dict[str, Any]


def build(module: nnx.Module) -> tuple[Params, Callable[[Params], Any]]:
    """Split a module into (params, bind): its weights as a plain nested dict, and the function that
    makes a module of such a dict.

    `bind(params)` belongs inside a traced function, where it costs nothing at run time. A change
    made to the bound module there is lost: state is passed in and handed back, never kept in it.
    """
    graphdef, state = nnx.split(module)
    shape: Callable[..., Any] = jax.ShapeDtypeStruct  # untyped in JAX
    shapes = jax.tree.map(lambda x: shape(x.shape, x.dtype), state)

    def bind(params: Params) -> Any:
        filled = jax.tree.map(lambda x: x, shapes)
        nnx.replace_by_pure_dict(filled, params)  # by name, not by leaf order
        return nnx.merge(graphdef, filled)

    return nnx.to_pure_dict(state), bind


Init = Literal['trunc_normal', 'glorot_uniform', 'orthogonal']


def initial(
    init: Init, scale: float, rngs: nnx.Rngs, shape: tuple[int, ...], inputs: int | None = None
) -> Array:
    """Draw a kernel [.., I, O], whose leading axes count as inputs.

    trunc_normal: variance scale^2 / fan-in, cut at 2 deviations. scale: 0 gives zeros. inputs: the
    fan-in, where it is not that of the shape.
    """
    key = rngs.params()
    if not scale:
        return jnp.zeros(shape)
    if init == 'glorot_uniform':
        return scale * nnx.initializers.glorot_uniform()(key, shape, jnp.float32)
    if init == 'orthogonal':
        return nnx.initializers.orthogonal(scale)(key, shape, jnp.float32)
    flat = shape if inputs is None else (inputs, int(np.prod(shape)) // inputs)
    kernel = nnx.initializers.variance_scaling(scale**2, 'fan_in', 'truncated_normal')(
        key, flat, jnp.float32
    )
    return kernel.reshape(shape)


def embedding(rngs: nnx.Rngs, *shape: int) -> nnx.Param[Array]:
    """Draw a learned embedding from N(0, 0.5^2)."""
    return nnx.Param(0.5 * jax.random.normal(rngs.params(), shape))


class Linear(nnx.Module):
    """x @ kernel + bias with fp32 parameters drawn by `initial`, computed in `dtype`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        init: Init = 'trunc_normal',
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(initial(init, scale, rngs, (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, '*B I']) -> Float[Array, '*B O']:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def part(self, x: Float[Array, '*B i'], first: int, bias: bool = False) -> Float[Array, '*B O']:
        """Contribution of the inputs first .. first + i, in fp32; all contributions add up to y.

        A scan need not repeat the part that is known for all time steps at once.
        """
        kernel = self.kernel[...][first : first + x.shape[-1]].astype(self.dtype)
        y = (x.astype(self.dtype) @ kernel).astype(jnp.float32)
        return y + self.bias[...] if bias and self.bias is not None else y


def blocked(x: Float[Array, '*B D'], blocks: int) -> Float[Array, 'G *B d']:
    """Split the last axis into blocks, and move these to the front."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], blocks, -1), -2, 0)


def unblocked(x: Float[Array, 'G *B d']) -> Float[Array, '*B D']:
    """Inverse of `blocked`."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)


class BlockLinear(nnx.Module):
    """Block-diagonal x @ kernel + bias, block g of the outputs from block g of the inputs; Dreamer
    V3's recurrence.

    `shared` further inputs enter every block. kernel [G, I / G + shared, O / G], fan-in counted
    over all blocks.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        *,
        shared: int = 0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (blocks, inputs // blocks + shared, outputs // blocks)
        self.kernel = nnx.Param(initial('trunc_normal', 1.0, rngs, shape, blocks * shape[1]))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.blocks, self.own = blocks, inputs // blocks
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, x: Float[Array, '*B I'], shared: Float[Array, '*B O'] | None = None
    ) -> Float[Array, '*B O']:
        """Map x, and add `shared`, the sum of the shared inputs' `part`s.

        The result is fp32 with `shared`, else in `dtype`.
        """
        y = unblocked(self.on_blocks(blocked(x, self.blocks)))
        return y.astype(self.dtype) if shared is None else y + shared

    def on_blocks(self, x: Float[Array, 'G *B i']) -> Float[Array, 'G *B o']:
        """Map inputs that are `blocked`, in fp32: one batched product without transpositions."""
        kernel = self.kernel[...][:, : self.own].astype(self.dtype)
        flat = x.reshape(self.blocks, -1, self.own).astype(self.dtype)
        y = jnp.einsum('gni,gio->gno', flat, kernel).astype(jnp.float32)
        return (y + self.bias[...].reshape(self.blocks, 1, -1)).reshape(*x.shape[:-1], -1)

    def part(self, x: Float[Array, '*B i'], first: int) -> Float[Array, '*B O']:
        """Contribution of the shared inputs first .. first + i, in fp32: one dense product instead
        of a copy per block.
        """
        rows = slice(self.own + first, self.own + first + x.shape[-1])
        kernel = self.kernel[...][:, rows].astype(self.dtype).swapaxes(0, 1)
        kernel = kernel.reshape(kernel.shape[0], -1)
        return (x.astype(self.dtype) @ kernel).astype(jnp.float32)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in fp32 and returned in the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + shift over the last axis, computed in fp32 and returned in the
    dtype of x.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(width))
        self.shift = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        x32 = x.astype(jnp.float32)
        x32 = x32 - x32.mean(-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (normed * self.scale[...] + self.shift[...]).astype(x.dtype)


class NoNorm(nnx.Module):
    """Identity, for networks without a norm; takes the arguments of the norms."""

    def __init__(self, width: int = 0, eps: float = 0.0):
        pass

    def __call__(self, x: Array) -> Array:
        return x


Norm: TypeAlias = RMSNorm | LayerNorm | NoNorm
NORMS: dict[str, type[Norm]] = {'rms': RMSNorm, 'layer': LayerNorm, 'none': NoNorm}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'silu': jax.nn.silu, 'elu': jax.nn.elu, 'relu': jax.nn.relu,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Style:
    """Form of every layer of a network: act(norm(linear(x))). The default is Dreamer V3's in fp32."""

    act: Literal['silu', 'elu', 'relu'] = 'silu'
    """Activation function."""
    norm: Literal['rms', 'layer', 'none'] = 'rms'
    """RMSNorm, LayerNorm or no norm, between linear map and activation."""
    eps: float = 1e-4
    """Added to the variance that the norm divides by."""
    bias: bool = True
    """Linear maps add a bias."""
    init: Init = 'trunc_normal'
    """Distribution that kernels are drawn from."""
    dtype: str = 'float32'
    """Type of the products; parameters and norms are fp32."""

    def linear(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> Linear:
        return Linear(inputs, outputs, bias=self.bias, init=self.init, dtype=self.dtype, rngs=rngs)

    def normaliser(self, width: int) -> Norm:
        return NORMS[self.norm](width, self.eps)

    def activate(self, x: Array) -> Array:
        return ACTIVATIONS[self.act](x)


class Dense(nnx.Module):
    """One layer of a `Style`: act(norm(linear(x)))."""

    def __init__(self, inputs: int, outputs: int, style: Style, rngs: nnx.Rngs):
        self.linear = style.linear(inputs, outputs, rngs)
        self.norm = style.normaliser(outputs)
        self.style = style

    def __call__(self, x: Float[Array, '*B I']) -> Float[Array, '*B O']:
        return self.finish(self.linear(x))

    def finish(self, y: Float[Array, '*B O']) -> Float[Array, '*B O']:
        """Norm and activation after the linear map."""
        return self.style.activate(self.norm(y.astype(self.style.dtype)))


class MLP(nnx.Module):
    """`layers` times act(norm(linear(x))), then an fp32 output layer; [*B, I] -> [*B, O].

    Without `outputs` there is no output layer: O = units. By default: SiLU, RMSNorm with eps 1e-6,
    no biases. A `dtype` overrides that of the style.
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        layers: int,
        outputs: int | None,
        *,
        out_scale: float = 1.0,
        style: Style = Style(bias=False, eps=1e-6),
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if dtype is not None:
            style = dataclasses.replace(style, dtype=jnp.dtype(dtype).name)
        widths = [inputs] + [units] * layers
        self.hidden = nnx.List(style.linear(i, o, rngs) for i, o in itertools.pairwise(widths))
        self.norms = nnx.List(style.normaliser(units) for _ in range(layers))
        if outputs is None:
            self.out = None
        else:
            self.out = Linear(widths[-1], outputs, scale=out_scale, init=style.init, rngs=rngs)
        self.style = style
        self.width = widths[-1] if outputs is None else outputs

    def __call__(self, x: Float[Array, '*B I']) -> Float[Array, '*B O']:
        return self.finish(self.hidden[0](x)) if len(self.hidden) else self.finish(x)

    def finish(self, y: Float[Array, '*B U']) -> Float[Array, '*B O']:
        """All that follows the first linear map."""
        x = y.astype(self.style.dtype) if len(self.hidden) else y
        for i, norm in enumerate(self.norms):
            x = self.style.activate(norm(self.hidden[i](x) if i else x))
        return x if self.out is None else self.out(x.astype(jnp.float32))


def cast_kernels(module: nnx.Module, params: Params) -> Params:
    """Cast the kernels in `params`, the weights of `module`, to the type they are multiplied in.

    Outputs stay the same bit for bit, and a forward pass in bfloat16 reads half as much. Not for
    training, which keeps fp32 weights.
    """
    cast: Params = jax.tree.map(lambda x: x, params)
    for path, layer in nnx.iter_modules(module):
        # Linear, BlockLinear and convolutions
        if hasattr(layer, 'kernel') and hasattr(layer, 'dtype'):
            node: Any = cast
            for key in path:
                node = node[key]
            node['kernel'] = node['kernel'].astype(layer.dtype)
    return cast


def count(params: Params) -> int:
    """Number of weights."""
    return sum(x.size for x in jax.tree.leaves(params))
