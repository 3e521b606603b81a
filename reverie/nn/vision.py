"""Images: as patches, and through the convolutions of PlaNet and Dreamer V1 to V3."""

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.nn.core import BlockLinear, Dense, Style, initial
from reverie.nn.dists import MSE, Normal
from reverie.types import UserError


def patchify(image: Float[Array, '*B h w c'], size: tuple[int, int]) -> Float[Array, '*B P p']:
    """Cut images into non-overlapping patches, row by row; p = size[0] * size[1] * c.

    Rows and columns that no whole patch holds are filled up with zeros below and on the right.
    """
    (ph, pw), lead = size, image.shape[:-3]
    missing = [(0, -n % p) for n, p in zip(image.shape[-3:-1], size, strict=True)]
    if any(n for _, n in missing):
        image = jnp.pad(image, [(0, 0) for _ in lead] + [*missing, (0, 0)])
    h, w, c = image.shape[-3:]
    x = image.reshape(*lead, h // ph, ph, w // pw, pw, c)
    n = len(lead)
    x = x.transpose(*range(n), n, n + 2, n + 1, n + 3, n + 4)
    return x.reshape(*lead, (h // ph) * (w // pw), ph * pw * c)


def unpatchify(
    patches: Float[Array, '*B P p'], size: tuple[int, int], shape: tuple[int, int, int]
) -> Float[Array, '*B h w c']:
    """Inverse of `patchify` for images of `shape`."""
    *lead, _, _ = patches.shape
    (h, w, c), (ph, pw) = shape, size
    rows, columns = -(-h // ph), -(-w // pw)
    x = patches.reshape(*lead, rows, columns, ph, pw, c)
    n = len(lead)
    x = x.transpose(*range(n), n, n + 2, n + 1, n + 3, n + 4)
    return x.reshape(*lead, rows * ph, columns * pw, c)[..., :h, :w, :]


def patch_grid(shape: tuple[int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Row and column of every patch [P, 2], those that are filled up included."""
    rows, columns = np.arange(-(-shape[0] // size[0])), np.arange(-(-shape[1] // size[1]))
    return np.stack(np.meshgrid(rows, columns, indexing='ij'), -1).reshape(-1, 2)


class Conv(nnx.Module):
    """Convolution with fp32 parameters, computed in `dtype`; kernel [k, k, I, O], images [*B, h, w,
    c].
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: Literal['SAME', 'VALID'] = 'SAME',
        style: Style,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(initial(style.init, 1.0, rngs, (size, size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.stride, self.padding = stride, padding
        self.dtype = jnp.dtype(style.dtype)

    def __call__(self, x: Float[Array, '*B h w c']) -> Float[Array, '*B h2 w2 c2']:
        return self._run(x, window_strides=(self.stride,) * 2, padding=self.padding)

    def of_enlarged(self, x: Float[Array, '*B h w c']) -> Float[Array, '*B h2 w2 c2']:
        """self(enlarge(x)) for kernels of 5 x 5 with stride 1, without the enlarged image.

        Each of the 2 x 2 copies of a pixel sees the same 3 x 3 pixels of x. Taps of the kernel that
        fall on the same one are added up beforehand: four kernels of 3 x 3 take 36 products per
        pixel of x where 4 x 25 would do the same. Other kernels run on the enlarged image.
        """
        size = self.kernel.shape[0]
        if size != 5 or self.stride != 1 or self.padding != 'SAME':
            return self(enlarge(x))
        taps = np.zeros((2, size, 3), np.float32)  # copy, tap of the kernel, pixel of x
        for copy, tap in itertools.product(range(2), range(size)):
            taps[copy, tap, (copy + tap - size // 2) // 2 + 1] = 1
        kernel = self.kernel[...]
        kernel = jnp.einsum('pai,qbj,abco->ijcpqo', taps, taps, kernel, precision='highest')
        i, j, c, p, q, o = kernel.shape
        y = self._conv(x, kernel.reshape(i, j, c, p * q * o), window_strides=(1, 1), padding='SAME')
        *lead, h, w, _ = y.shape
        y = jnp.moveaxis(y.reshape(-1, h, w, p, q, o), 3, 2)  # [B, h, p, w, q, o]
        return y.reshape(*lead, p * h, q * w, o) + self.bias[...].astype(self.dtype)

    def _run(self, x: Array, **kwargs: Any) -> Array:
        return self._conv(x, self.kernel[...], **kwargs) + self.bias[...].astype(self.dtype)

    def _conv(self, x: Array, kernel: Array, **kwargs: Any) -> Array:
        flat = x.reshape(-1, *x.shape[-3:]).astype(self.dtype)
        layout = ('NHWC', 'HWIO', 'NHWC')
        y = jax.lax.conv_general_dilated(
            flat, kernel.astype(self.dtype), dimension_numbers=layout, **kwargs
        )
        return y.reshape(*x.shape[:-3], *y.shape[1:])


class Deconv(Conv):
    """Transposed convolution: pixels set `stride` apart, then a convolution.

    n pixels become (n - 1) stride + k with padding VALID and n stride with SAME. A kernel of Keras'
    Conv2DTranspose [k, k, O, I] is ours turned by half a circle:
    `kernel[::-1, ::-1].swapaxes(2, 3)`.
    """

    def __call__(self, x: Float[Array, '*B h w c']) -> Float[Array, '*B h2 w2 c2']:
        k, s = self.kernel.shape[0], self.stride
        around = (k - 1, k - 1)
        if self.padding == 'SAME':
            around = ((k - 1) // 2 + s - 1, k - 1 - (k - 1) // 2)
        return self._run(x, window_strides=(1, 1), padding=[around] * 2, lhs_dilation=(s, s))


def max_pool(x: Float[Array, '*B h w c']) -> Float[Array, '*B h2 w2 c']:
    """Largest value of each 2 x 2 pixels."""
    *lead, h, w, c = x.shape
    return x.reshape(*lead, h // 2, 2, w // 2, 2, c).max((-4, -2))


def enlarge(x: Float[Array, '*B h w c']) -> Float[Array, '*B h2 w2 c']:
    """Repeat each pixel 2 x 2 times."""
    return x.repeat(2, -2).repeat(2, -3)


def reduce_bits(
    image: Array, key: PRNGKeyArray | None = None, bits: int = 5
) -> Float[Array, '*B h w c']:
    """Reduce a uint8 image to 2^bits steps of [0, 1), with uniform noise within a step if there is
    a key; PlaNet's input.

    Noise keeps the density of a Gaussian image finite (Kingma and Dhariwal 2018, "Glow").
    """
    steps = 1 << bits
    x = jnp.floor(image.astype(jnp.float32) / (1 << (8 - bits))) / steps
    return x if key is None else x + jax.random.uniform(key, x.shape) / steps


@dataclasses.dataclass(frozen=True)
class PooledConv:
    """Networks of Dreamer V3 for images: convolutions, each followed by a 2 x 2 maximum; back by
    enlarging, MSE on [0, 1].
    """

    depth: int = 64
    """Channels, times `mults`."""
    mults: tuple[int, ...] = (2, 3, 4, 4)
    """Channels of each convolution, times `depth`; the last grid must measure 3 to 16."""
    kernel: int = 5
    """Rows and columns of a kernel."""
    blocks: int = 8
    """Blocks of the layer through which h enters the decoder."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Channels of each convolution."""
        return tuple(self.depth * m for m in self.mults)

    def grid(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of the last, smallest feature map. Raises UserError if the images do not fit."""
        h, w, _ = shape
        factor = 2 ** len(self.mults)
        if h % factor or w % factor or not all(3 <= n // factor <= 16 for n in (h, w)):
            raise UserError(
                f'image {h}x{w}: expected sides that are multiples of {factor}, {3 * factor} to {16 * factor}'
            )
        return h // factor, w // factor, self.depths[-1]

    def encoder(self, shape: tuple[int, int, int], style: Style, rngs: nnx.Rngs) -> 'PooledEncoder':
        return PooledEncoder(self, shape, style, rngs)

    def decoder(
        self,
        shape: tuple[int, int, int],
        inputs: tuple[int, int],
        units: int,
        style: Style,
        rngs: nnx.Rngs,
    ) -> 'PooledDecoder':
        return PooledDecoder(self, shape, inputs, units, style, rngs)


@dataclasses.dataclass(frozen=True)
class StridedConv:
    """Networks of PlaNet, Dreamer V1 and V2 for 64 x 64 images: kernel 4, stride 2, no padding;
    N(mean, 1).

    Backwards one linear layer, then transposed convolutions with kernels 5, 5, 6, 6.
    """

    depth: int = 32
    """Channels of the first convolution, doubled by each further one; V1: 32, V2: 48."""

    def encoder(
        self, shape: tuple[int, int, int], style: Style, rngs: nnx.Rngs
    ) -> 'StridedEncoder':
        return StridedEncoder(self, shape, style, rngs)

    def decoder(
        self,
        shape: tuple[int, int, int],
        inputs: tuple[int, int],
        units: int,
        style: Style,
        rngs: nnx.Rngs,
    ) -> 'StridedDecoder':
        return StridedDecoder(self, shape, inputs, style, rngs)


class PooledEncoder(nnx.Module):
    """Encoder of images in [-0.5, 0.5], [*B, h, w, c] -> [*B, E]."""

    def __init__(self, cfg: PooledConv, shape: tuple[int, int, int], style: Style, rngs: nnx.Rngs):
        widths = (shape[-1], *cfg.depths)
        pairs = itertools.pairwise(widths)
        self.convs = nnx.List(Conv(i, o, cfg.kernel, style=style, rngs=rngs) for i, o in pairs)
        self.norms = nnx.List(style.normaliser(n) for n in cfg.depths)
        self.style, self.width = style, math.prod(cfg.grid(shape))

    def __call__(self, x: Float[Array, '*B h w c']) -> Float[Array, '*B E']:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.style.activate(norm(max_pool(conv(x))))
        return x.reshape(*x.shape[:-3], -1)


class PooledDecoder(nnx.Module):
    """Decoder of h [*B, D] and z [*B, Z] into the `MSE` of an image in [0, 1]."""

    def __init__(
        self,
        cfg: PooledConv,
        shape: tuple[int, int, int],
        inputs: tuple[int, int],
        units: int,
        style: Style,
        rngs: nnx.Rngs,
    ):
        self.grid = cfg.grid(shape)
        flat, (deter, latent) = math.prod(self.grid), inputs
        if flat % cfg.blocks or deter % cfg.blocks or self.grid[-1] % cfg.blocks:
            raise UserError(
                f'deter={deter}, {self.grid[-1]} channels: expected multiples of blocks={cfg.blocks}'
            )
        self.from_h = BlockLinear(deter, flat, cfg.blocks, dtype=style.dtype, rngs=rngs)
        self.from_z = Dense(latent, 2 * units, style, rngs)
        self.from_z_out = style.linear(2 * units, flat, rngs)
        self.norm = style.normaliser(self.grid[-1])
        widths = tuple(reversed(cfg.depths))
        pairs = itertools.pairwise(widths)
        self.convs = nnx.List(Conv(i, o, cfg.kernel, style=style, rngs=rngs) for i, o in pairs)
        self.norms = nnx.List(style.normaliser(n) for n in widths[1:])
        self.out = Conv(widths[-1], shape[-1], cfg.kernel, style=style, rngs=rngs)
        self.style, self.blocks = style, cfg.blocks

    def __call__(self, h: Float[Array, '*B D'], z: Float[Array, '*B Z']) -> MSE:
        rows, columns, c = self.grid
        x = self.from_h(h)  # each block paints its own channels of the grid
        x = x.reshape(*x.shape[:-1], self.blocks, rows, columns, c // self.blocks)
        x = jnp.moveaxis(x, -4, -2).reshape(*h.shape[:-1], *self.grid)
        x = x + self.from_z_out(self.from_z(z)).reshape(x.shape)
        x = self.style.activate(self.norm(x))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.style.activate(norm(conv.of_enlarged(x)))
        return MSE(jax.nn.sigmoid(self.out.of_enlarged(x).astype(jnp.float32)), event=3)


class StridedEncoder(nnx.Module):
    """Encoder of images in [-0.5, 0.5], [*B, 64, 64, c] -> [*B, 32 depth]."""

    def __init__(self, cfg: StridedConv, shape: tuple[int, int, int], style: Style, rngs: nnx.Rngs):
        if tuple(shape[:2]) != (64, 64):
            raise UserError(f'image {shape[0]}x{shape[1]}: StridedConv expects 64x64')
        depths = tuple(cfg.depth * m for m in (1, 2, 4, 8))
        self.convs = nnx.List(
            Conv(i, o, 4, stride=2, padding='VALID', style=style, rngs=rngs)
            for i, o in itertools.pairwise((shape[-1], *depths))
        )
        self.norms = nnx.List(style.normaliser(n) for n in depths)
        self.style, self.width = style, 4 * depths[-1]

    def __call__(self, x: Float[Array, '*B h w c']) -> Float[Array, '*B E']:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.style.activate(norm(conv(x)))
        return x.reshape(*x.shape[:-3], -1)


class StridedDecoder(nnx.Module):
    """Decoder of [z, h], z [*B, Z] and h [*B, D], into N(mean, 1) of an image in [0, 1]; an output
    of 0 is mid-grey.
    """

    def __init__(
        self,
        cfg: StridedConv,
        shape: tuple[int, int, int],
        inputs: tuple[int, int],
        style: Style,
        rngs: nnx.Rngs,
    ):
        if tuple(shape[:2]) != (64, 64):
            raise UserError(f'image {shape[0]}x{shape[1]}: StridedConv expects 64x64')
        depths = tuple(cfg.depth * m for m in (4, 2, 1))
        self.input = style.linear(sum(inputs), 32 * cfg.depth, rngs)
        widths = zip((32 * cfg.depth, *depths), (*depths, shape[-1]), (5, 5, 6, 6), strict=True)
        self.deconvs = nnx.List(
            Deconv(i, o, k, stride=2, padding='VALID', style=style, rngs=rngs) for i, o, k in widths
        )
        self.norms = nnx.List(style.normaliser(n) for n in depths)
        self.style = style

    def __call__(self, h: Float[Array, '*B D'], z: Float[Array, '*B Z']) -> Normal:
        x = self.input(jnp.concatenate([z, h], -1))
        x = x.reshape(*x.shape[:-1], 1, 1, -1)
        for i, deconv in enumerate(self.deconvs):
            x = deconv(x)
            if i < len(self.norms):
                x = self.style.activate(self.norms[i](x))
        return Normal(x.astype(jnp.float32) + 0.5, event=3)
