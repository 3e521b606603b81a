"""Causal tokenizer: masked autoencoding of frames into a few bounded latent tokens; Dreamer 4
section 3.1.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.nn.attention import rope
from reverie.nn.core import Linear
from reverie.nn.dists import MSE, Bernoulli
from reverie.nn.transformer import BlockCausal, Cache, TransformerConfig
from reverie.nn.vision import patch_grid, patchify, unpatchify
from reverie.types import UserError


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """patch: rows and columns of a patch in pixels. latents x bottleneck numbers describe a frame
    (paper: 512 x 16).

    max_mask_rate is the paper's 0.9. The encoder and the decoder each have the shape `transformer`.
    pixels: law of a pixel; 'mse' is the paper's squared error, 'bernoulli' (not from the paper) a
    cross-entropy for boolean grids, where one bullet of 600 cells is hardly worth a squared error.
    """

    patch: tuple[int, int] = (16, 16)
    latents: int = 512
    bottleneck: int = 16
    max_mask_rate: float = 0.9
    transformer: TransformerConfig = TransformerConfig()
    pixels: Literal['mse', 'bernoulli'] = 'mse'


class Masked(NamedTuple):
    """What was hidden from the encoder: Bernoulli(rate) per patch, rate ~ U(0, max) per image."""

    hidden: Bool[Array, 'B T P']
    rate: Float[Array, 'B T']


def draw_mask(key: PRNGKeyArray, lead: tuple[int, int], patches: int, max_rate: float) -> Masked:
    """One masking rate for each image, uniform in [0, max_rate]."""
    key_rate, key_patch = jax.random.split(key)
    rate = jax.random.uniform(key_rate, lead, maxval=max_rate)
    return Masked(jax.random.bernoulli(key_patch, rate[..., None], (*lead, patches)), rate)


def _angles(cfg: TokenizerConfig, shape: tuple[int, int, int]) -> np.ndarray:
    """Latents turn by their number (1D), patches by row and column (axial 2D); not from the paper.
    -> [N + P, d/2]
    """
    grid, dim, base = (
        patch_grid(shape, cfg.patch),
        cfg.transformer.head_dim,
        cfg.transformer.rope_base,
    )
    latents = rope(np.arange(cfg.latents), dim, base)
    rows, columns = (rope(grid[:, i], dim // 2, base) for i in (0, 1))
    return np.concatenate([latents, np.concatenate([rows, columns], -1)])


def _embedding(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(0.5 * jax.random.normal(rngs.params(), shape))


class Encoder(nnx.Module):
    """Patches and learned latent tokens in, bounded latents out.

    Latents see everything, patches only patches.
    """

    def __init__(self, cfg: TokenizerConfig, shape: tuple[int, int, int], rngs: nnx.Rngs):
        if shape[0] % cfg.patch[0] or shape[1] % cfg.patch[1]:
            raise UserError(
                f'patches of {cfg.patch} do not tile an image of {shape[:2]}; expected divisors of its sides'
            )
        width, dtype = cfg.transformer.width, jnp.dtype(cfg.transformer.dtype)
        self.patches = len(patch_grid(shape, cfg.patch))
        self.embed = Linear(cfg.patch[0] * cfg.patch[1] * shape[2], width, dtype=dtype, rngs=rngs)
        self.hidden_patch = _embedding(rngs, width)
        self.slots = _embedding(rngs, cfg.latents + self.patches, width)
        self.blocks = BlockCausal(
            cfg.transformer, _angles(cfg, shape), time_tokens=cfg.latents, rngs=rngs
        )  # time layers on latents only; not from the paper
        self.readout = Linear(width, cfg.bottleneck, rngs=rngs)
        self.cfg = cfg

    def empty(self, batch: int) -> Cache:
        return self.blocks.empty(batch, self.cfg.latents)

    def __call__(
        self,
        image: Float[Array, 'B T h w c'],
        is_first: Bool[Array, 'B T'],
        hidden: Bool[Array, 'B T P'] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, 'B T Z b'], Cache | None]:
        """-> (latents in (-1, 1), the cache with these frames in it, if one was given).

        `hidden` patches are masked.
        """
        n = self.cfg.latents
        x = self.embed(patchify(image, self.cfg.patch))
        if hidden is not None:
            x = jnp.where(hidden[..., None], self.hidden_patch[...].astype(x.dtype), x)
        x = jnp.concatenate([jnp.zeros((*x.shape[:2], n, x.shape[-1]), x.dtype), x], 2)
        x = x + self.slots[...].astype(x.dtype)
        is_latent = np.arange(n + self.patches) < n
        mask = is_latent[:, None] | ~is_latent[None]
        x, written = self.blocks(x, is_first, jnp.asarray(mask), cache)
        z = jnp.tanh(self.readout(x[:, :, :n].astype(jnp.float32)))
        return z, None if cache is None else self.blocks.commit(cache, written, is_first)


class Decoder(nnx.Module):
    """Latents and learned readout tokens in, patches out.

    Readouts see everything, latents only latents.
    """

    def __init__(self, cfg: TokenizerConfig, shape: tuple[int, int, int], rngs: nnx.Rngs):
        width, dtype = cfg.transformer.width, jnp.dtype(cfg.transformer.dtype)
        self.patches = len(patch_grid(shape, cfg.patch))
        self.embed = Linear(cfg.bottleneck, width, dtype=dtype, rngs=rngs)
        self.slots = _embedding(rngs, cfg.latents + self.patches, width)
        self.blocks = BlockCausal(
            cfg.transformer, _angles(cfg, shape), time_tokens=cfg.latents, rngs=rngs
        )
        self.readout = Linear(width, cfg.patch[0] * cfg.patch[1] * shape[2], rngs=rngs)
        self.cfg, self.shape = cfg, shape

    def empty(self, batch: int) -> Cache:
        return self.blocks.empty(batch, self.cfg.latents)

    def __call__(
        self, z: Float[Array, 'B T Z b'], is_first: Bool[Array, 'B T'], cache: Cache | None = None
    ) -> tuple[Float[Array, 'B T h w c'], Cache | None]:
        """-> (images, of Bernoulli pixels the probabilities; the cache with these frames in it, if
        one was given).
        """
        dist, cache = self.dist(z, is_first, cache)
        return dist.mean() if isinstance(dist, Bernoulli) else dist.mean, cache

    def dist(
        self, z: Float[Array, 'B T Z b'], is_first: Bool[Array, 'B T'], cache: Cache | None = None
    ) -> tuple[MSE | Bernoulli, Cache | None]:
        """-> (law of every pixel [B, T, h, w, c], the cache with these frames in it, if one was
        given).
        """
        n = self.cfg.latents
        x = self.embed(z)
        x = jnp.concatenate([x, jnp.zeros((*x.shape[:2], self.patches, x.shape[-1]), x.dtype)], 2)
        x = x + self.slots[...].astype(x.dtype)
        is_latent = np.arange(n + self.patches) < n
        mask = ~is_latent[:, None] | is_latent[None]
        x, written = self.blocks(x, is_first, jnp.asarray(mask), cache)
        image = unpatchify(
            self.readout(x[:, :, n:].astype(jnp.float32)), self.cfg.patch, self.shape
        )
        dist = MSE(image, 0) if self.cfg.pixels == 'mse' else Bernoulli(image, 0)
        return dist, None if cache is None else self.blocks.commit(cache, written, is_first)
