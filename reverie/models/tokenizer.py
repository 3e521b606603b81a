"""Causal tokenizer: masked autoencoding of frames into a few bounded latent tokens; Dreamer 4
section 3.1.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

from reverie.nn.attention import rope
from reverie.nn.core import Linear, embedding
from reverie.nn.dists import MSE, PIXELS, Bernoulli, unit_range
from reverie.nn.transformer import BlockCausal, Cache, TransformerConfig
from reverie.nn.vision import patch_grid, patchify, unpatchify
from reverie.types import Params, UserError, sg


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Shape of the causal tokenizer; `latents` x `bottleneck` numbers describe a frame (paper: 512 x
    16).
    """

    patch: tuple[int, int] = (16, 16)
    """Rows and columns of a patch, in pixels."""
    latents: int = 512
    """Latent tokens of a frame."""
    bottleneck: int = 16
    """Numbers of a latent token."""
    max_mask_rate: float = 0.9
    """Greatest share of an image's patches that is masked while training (paper: 0.9)."""
    transformer: TransformerConfig = TransformerConfig()
    """Shape of the encoder's transformer, and of the decoder's."""
    pixels: Literal['mse', 'bernoulli'] = 'mse'
    """Distribution of a pixel: the paper's squared error, or (not from the paper) a cross-entropy
    for boolean grids, where one bullet of 600 cells is hardly worth a squared error."""
    pixel_mean: float = 0.0
    """Mean of the pixels in [0, 1], which the encoder takes off and the decoder adds (not from the
    paper): dark video of low contrast is learnt as its mean picture else."""
    pixel_std: float = 1.0
    """Standard deviation of the pixels, which the encoder divides by and the decoder multiplies
    with (not from the paper)."""
    readout_scale: float = 1.0
    """Scale of the decoder's first output weights (not from the paper)."""
    time_first: bool = True
    """Order of the decoder's layers: each time layer before the space layers, so that patches read
    it (the paper leaves it open). False: after them, where no patch does, as in version 0.2."""
    in_place: bool = False
    """Latents own a place (not from the paper): each has the position of a cell of the image, begins
    like the patch there, and attends to what is like it at first."""
    cache_latents: bool = True
    """Encode a dataset once, after the tokenizer's phase, instead of in every update after it; a
    latent then knows all its past, not its window's."""
    unit_latents: bool = True
    """Latents leave the encoder with a standard deviation of 1 over the dataset, from the end of the
    tokenizer's phase on (not from the paper): context noise is then the share it says."""


class Masked(NamedTuple):
    """Patches hidden from the encoder: Bernoulli(rate) per patch, rate ~ U(0, max) per image."""

    hidden: Bool[Array, 'B T P']
    rate: Float[Array, 'B T']


def draw_mask(key: PRNGKeyArray, lead: tuple[int, int], patches: int, max_rate: float) -> Masked:
    """Draw a masking rate for each image, uniform in [0, max_rate], and its hidden patches."""
    key_rate, key_patch = jax.random.split(key)
    rate = jax.random.uniform(key_rate, lead, maxval=max_rate)
    return Masked(jax.random.bernoulli(key_patch, rate[..., None], (*lead, patches)), rate)


def cells(count: int, grid: np.ndarray) -> np.ndarray:
    """Cells of an image for `count` latents: patch [N] nearest to the middle of each, row by row.

    grid: row and column of every patch [P, 2]. Raises UserError unless the cells tile the image in
    whole patches.
    """
    rows, columns = (int(n) for n in grid.max(0) + 1)
    fits = [
        (r, count // r)
        for r in range(1, rows + 1)
        if count % r == 0 and rows % r == 0 and columns % (count // r) == 0
    ]
    if not fits:
        raise UserError(
            f'{count} latents do not tile {rows} x {columns} patches; expected a divisor of each side'
        )
    high, wide = min(fits, key=lambda fit: abs(rows / fit[0] - columns / fit[1]))
    row = (np.arange(high) * 2 + 1) * rows // (2 * high)
    column = (np.arange(wide) * 2 + 1) * columns // (2 * wide)
    return (row[:, None] * columns + column[None]).reshape(-1)


def _angles(cfg: TokenizerConfig, shape: tuple[int, int, int]) -> np.ndarray:
    """Rotation angles [N + P, d/2] of patches by row and column (axial 2D) and of latents by their
    number (1D), or by their cell where they own one; not from the paper.
    """
    grid = patch_grid(shape, cfg.patch)
    dim, base = cfg.transformer.head_dim, cfg.transformer.rope_base
    rows, columns = (rope(grid[:, i], dim // 2, base) for i in (0, 1))
    patches = np.concatenate([rows, columns], -1)
    if cfg.in_place:
        return np.concatenate([patches[cells(cfg.latents, grid)], patches])
    return np.concatenate([rope(np.arange(cfg.latents), dim, base), patches])


def _own_places(cfg: TokenizerConfig, shape: tuple[int, int, int], net: Any) -> None:
    """Give each latent the slot of the patch in its cell, and tie keys to queries in space layers."""
    slots = net.slots[...]
    place = cfg.latents + cells(cfg.latents, patch_grid(shape, cfg.patch))
    net.slots[...] = slots.at[: cfg.latents].set(slots[place])
    for layer in net.blocks.layers:
        if not layer.along_time:
            layer.attention.tie()


def scale_latents(params: Params, scale: Float[Array, '']) -> Params:
    """Return weights of encoder and decoder with latents so many times as large between them."""
    return params | {
        name: params[name] | {'latent_scale': params[name]['latent_scale'] * scale}
        for name in ('encoder', 'decoder')
    }


class Encoder(nnx.Module):
    """Transformer from patches and learned latent tokens to bounded latents.

    Latents attend to everything, patches to patches only.
    """

    def __init__(self, cfg: TokenizerConfig, shape: tuple[int, int, int], rngs: nnx.Rngs):
        width, dtype = cfg.transformer.width, jnp.dtype(cfg.transformer.dtype)
        self.patches = len(patch_grid(shape, cfg.patch))
        self.embed = Linear(cfg.patch[0] * cfg.patch[1] * shape[2], width, dtype=dtype, rngs=rngs)
        self.hidden_patch = embedding(rngs, width)
        self.slots = embedding(rngs, cfg.latents + self.patches, width)
        # time layers on latents only; not from the paper
        self.blocks = BlockCausal(
            cfg.transformer, _angles(cfg, shape), time_tokens=cfg.latents, rngs=rngs
        )
        self.readout = Linear(width, cfg.bottleneck, rngs=rngs)
        self.latent_scale = nnx.Param(jnp.ones(())) if cfg.unit_latents else None
        self.cfg = cfg
        if cfg.in_place:
            _own_places(cfg, shape, self)

    @property
    def reach(self) -> int:
        """Earlier frames that a frame's latents depend on."""
        return self.blocks.time_layers * (self.cfg.transformer.context - 1)

    def empty(self, batch: int) -> Cache:
        return self.blocks.empty(batch, self.cfg.latents)

    def __call__(
        self,
        image: Shaped[Array, 'B T h w c'],
        is_first: Bool[Array, 'B T'],
        hidden: Bool[Array, 'B T P'] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, 'B T Z b'], Cache | None]:
        """Return latents, in (-1, 1) before they are scaled, and the cache with these frames in it,
        if one was given.

        image: uint8 (0..255), bool or float (0..1). hidden: patches to mask.
        """
        n = self.cfg.latents
        pixels = (unit_range(image) - self.cfg.pixel_mean) / self.cfg.pixel_std
        x = self.embed(patchify(pixels, self.cfg.patch))
        if hidden is not None:
            x = jnp.where(hidden[..., None], self.hidden_patch[...].astype(x.dtype), x)
        x = jnp.concatenate([jnp.zeros((*x.shape[:2], n, x.shape[-1]), x.dtype), x], 2)
        x = x + self.slots[...].astype(x.dtype)
        is_latent = np.arange(n + self.patches) < n
        mask = is_latent[:, None] | ~is_latent[None]
        x, written = self.blocks(x, is_first, jnp.asarray(mask), cache)
        z = jnp.tanh(self.readout(x[:, :, :n].astype(jnp.float32)))
        if self.latent_scale is not None:
            z = z * sg(self.latent_scale[...])
        return z, None if cache is None else self.blocks.commit(cache, written, is_first)


class Decoder(nnx.Module):
    """Transformer from latents and learned readout tokens to patches.

    Readouts attend to everything, latents to latents only.
    """

    def __init__(self, cfg: TokenizerConfig, shape: tuple[int, int, int], rngs: nnx.Rngs):
        width, dtype = cfg.transformer.width, jnp.dtype(cfg.transformer.dtype)
        self.patches = len(patch_grid(shape, cfg.patch))
        self.embed = Linear(cfg.bottleneck, width, dtype=dtype, rngs=rngs)
        self.slots = embedding(rngs, cfg.latents + self.patches, width)
        self.blocks = BlockCausal(
            cfg.transformer,
            _angles(cfg, shape),
            time_tokens=cfg.latents,
            time_first=cfg.time_first,
            rngs=rngs,
        )
        outputs = cfg.patch[0] * cfg.patch[1] * shape[2]
        self.readout = Linear(width, outputs, scale=cfg.readout_scale, rngs=rngs)
        self.latent_scale = nnx.Param(jnp.ones(())) if cfg.unit_latents else None
        self.cfg, self.shape = cfg, shape
        if cfg.in_place:
            _own_places(cfg, shape, self)

    def empty(self, batch: int) -> Cache:
        return self.blocks.empty(batch, self.cfg.latents)

    def __call__(
        self, z: Float[Array, 'B T Z b'], is_first: Bool[Array, 'B T'], cache: Cache | None = None
    ) -> tuple[Float[Array, 'B T h w c'], Cache | None]:
        """Return images in [0, 1] (of Bernoulli pixels the probabilities), and the cache with these
        frames in it, if one was given.
        """
        dist, cache = self.dist(z, is_first, cache)
        mean = dist.mean() if isinstance(dist, Bernoulli) else jnp.clip(dist.mean, 0.0, 1.0)
        return mean, cache

    def dist(
        self, z: Float[Array, 'B T Z b'], is_first: Bool[Array, 'B T'], cache: Cache | None = None
    ) -> tuple[MSE | Bernoulli, Cache | None]:
        """Return the distribution of every pixel [B, T, h, w, c], and the cache with these frames
        in it, if one was given.
        """
        n = self.cfg.latents
        if self.latent_scale is not None:
            z = z / sg(self.latent_scale[...])
        x = self.embed(z)
        x = jnp.concatenate([x, jnp.zeros((*x.shape[:2], self.patches, x.shape[-1]), x.dtype)], 2)
        x = x + self.slots[...].astype(x.dtype)
        is_latent = np.arange(n + self.patches) < n
        mask = ~is_latent[:, None] | is_latent[None]
        x, written = self.blocks(x, is_first, jnp.asarray(mask), cache)
        patches = self.readout(x[:, :, n:].astype(jnp.float32))
        image = unpatchify(patches, self.cfg.patch, self.shape)
        if self.cfg.pixels == 'mse':
            image = image * self.cfg.pixel_std + self.cfg.pixel_mean
        dist = PIXELS[self.cfg.pixels](image, 0)
        return dist, None if cache is None else self.blocks.commit(cache, written, is_first)
