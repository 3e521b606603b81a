"""Encoder of observations into an embedding, and decoder of (h, z) into distributions over them.

An observation is an array or a dictionary of arrays, whose kinds follow from their shapes:
[h, w, c] is a small grid if no side exceeds GRID_SIDE and an image otherwise, [n] is a vector, [] a
vector of one. Grids and vectors share an MLP, images of equal size share convolutions. Images and
grids may be uint8 (0..255), bool or float (0..1).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.nn.core import MLP, Linear, Style
from reverie.nn.dists import MSE, PIXELS, Normal, Pixels, SymlogMSE, symlog, unit_range
from reverie.nn.vision import PooledConv, StridedConv, reduce_bits
from reverie.types import UserError

GRID_SIDE = 16
Shape = tuple[int, ...]
Kind = Literal['image', 'grid', 'vector']


@dataclasses.dataclass(frozen=True)
class ObsConfig:
    """Networks that read and predict observations."""

    conv: PooledConv | StridedConv = PooledConv()
    """Convolutions for images."""
    units: int = 1024
    """Width of the MLPs for grids and vectors."""
    layers: int = 3
    """Hidden layers of these MLPs."""
    symlog: bool = True
    """Read vectors through symlog and predict them with `SymlogMSE` (V3), else with N(mean, 1)."""
    grid: Literal['mse', 'bernoulli'] = 'mse'
    """Distribution of a grid's cells."""
    style: Style = Style()
    """Form of every layer."""
    bits: int | None = None
    """Bits kept of an image's eight, with noise below the last one (PlaNet: 5); None: all."""

    def prepare(self, obs: Any, shapes: Shape | Mapping[str, Shape], key: PRNGKeyArray) -> Any:
        """Turn an observation into the input of the encoder and the target of the decoder: images
        of fewer bits, if so configured.
        """
        if self.bits is None:
            return obs
        if not isinstance(shapes, Mapping):
            return reduce_bits(obs, key, self.bits) if kind(shapes) == 'image' else obs
        keys = dict(zip(sorted(shapes), jax.random.split(key, len(shapes)), strict=True))
        return {name: self.prepare(x, shapes[name], keys[name]) for name, x in obs.items()}


def kind(shape: Shape) -> Kind:
    """Kind of an observation by its shape. Raises UserError for a shape that has none."""
    if len(shape) == 3:
        return 'grid' if max(shape[:2]) <= GRID_SIDE else 'image'
    if len(shape) <= 1:
        return 'vector'
    raise UserError(f'observation of shape {list(shape)}: expected [h, w, c] or [n]')


def sorted_shapes(shapes: Shape | Mapping[str, Shape]) -> dict[str, Shape]:
    """Sort shapes by key; a single array is called 'obs'."""
    named = dict(shapes) if isinstance(shapes, Mapping) else {'obs': tuple(shapes)}
    return {key: tuple(named[key]) for key in sorted(named)}


def stacked(shapes: Mapping[str, Shape], keys: tuple[str, ...]) -> tuple[int, int, int]:
    """Shape of the images `keys` stacked along their channels. Raises UserError if sides differ."""
    sides = {shapes[key][:2] for key in keys}
    if len(sides) > 1:
        raise UserError(
            f'images {", ".join(keys)} have sides {sorted(sides)}: expected the same for all'
        )
    h, w = sides.pop()
    return h, w, sum(shapes[key][2] for key in keys)


class ObsEncoder(nnx.Module):
    """Encoder of observations [*B, ...] into embed [*B, E], E = `width`; images enter as x - 0.5,
    grids as 0..1.
    """

    def __init__(self, cfg: ObsConfig, obs_shapes: Shape | Mapping[str, Shape], *, rngs: nnx.Rngs):
        self.shapes = sorted_shapes(obs_shapes)
        self.images = tuple(key for key, shape in self.shapes.items() if kind(shape) == 'image')
        self.flats = tuple(key for key in self.shapes if key not in self.images)
        self.cfg, self.width = cfg, 0
        if self.flats:
            inputs = sum(math.prod(self.shapes[key]) for key in self.flats)
            self.flat = MLP(inputs, cfg.units, cfg.layers, None, style=cfg.style, rngs=rngs)
            self.width += self.flat.width
        if self.images:
            self.image = cfg.conv.encoder(stacked(self.shapes, self.images), cfg.style, rngs)
            self.width += self.image.width

    def __call__(self, obs: Array | Mapping[str, Array]) -> Float[Array, '*B E']:
        obs = obs if isinstance(obs, Mapping) else {'obs': obs}
        parts = []
        if self.flats:
            flat = [self._flatten(key, obs[key]) for key in self.flats]
            parts.append(self.flat(jnp.concatenate(flat, -1)))
        if self.images:
            x = jnp.concatenate([unit_range(obs[key]) for key in self.images], -1)
            parts.append(self.image(x - 0.5))
        return jnp.concatenate(parts, -1)

    def prepare(self, obs: Any, key: PRNGKeyArray) -> Any:
        """Observations as encoder and decoder take them, see `ObsConfig.prepare`."""
        shapes = self.shapes if isinstance(obs, Mapping) else self.shapes['obs']
        return self.cfg.prepare(obs, shapes, jax.random.fold_in(key, 0))

    def _flatten(self, key: str, x: Array) -> Float[Array, '*B n']:
        shape = self.shapes[key]
        if kind(shape) == 'grid':
            x = unit_range(x)
        else:
            x = symlog(x.astype(jnp.float32)) if self.cfg.symlog else x.astype(jnp.float32)
        return x.reshape(*x.shape[: x.ndim - len(shape)], -1)


class ObsDecoder(nnx.Module):
    """Decoder of h [*B, D] and z [*B, Z] into {key: distribution}, or one distribution if the
    observation is one array; log_prob(obs) is [*B].

    Those of images and grids live on [0, 1] and take observations as the environment gives them;
    their mode is for the eye.
    """

    def __init__(
        self,
        cfg: ObsConfig,
        obs_shapes: Shape | Mapping[str, Shape],
        inputs: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        self.shapes = sorted_shapes(obs_shapes)
        self.single = not isinstance(obs_shapes, Mapping)
        self.images = tuple(key for key, shape in self.shapes.items() if kind(shape) == 'image')
        self.flats = tuple(key for key in self.shapes if key not in self.images)
        self.cfg = cfg
        if self.flats:
            self.flat = MLP(sum(inputs), cfg.units, cfg.layers, None, style=cfg.style, rngs=rngs)
            width, init = self.flat.width, cfg.style.init
            outputs = {key: math.prod(self.shapes[key]) for key in self.flats}
            heads = {key: Linear(width, n, init=init, rngs=rngs) for key, n in outputs.items()}
            self.heads = nnx.Dict(heads)
        if self.images:
            shape = stacked(self.shapes, self.images)
            self.image = cfg.conv.decoder(shape, inputs, cfg.units, cfg.style, rngs)

    def __call__(self, h: Float[Array, '*B D'], z: Float[Array, '*B Z']) -> Any:
        dists: dict[str, Any] = {}
        if self.flats:
            x = self.flat(jnp.concatenate([z, h], -1)).astype(jnp.float32)
            for key in self.flats:
                dists[key] = self._flat_dist(self.shapes[key], self.heads[key](x))
        if self.images:
            dists |= self._image_dists(self.image(h, z))
        return dists['obs'] if self.single else {key: dists[key] for key in self.shapes}

    def _flat_dist(self, shape: Shape, out: Float[Array, '*B n']) -> Any:
        out, event = out.reshape(*out.shape[:-1], *shape), len(shape)
        if kind(shape) == 'grid':
            return Pixels(PIXELS[self.cfg.grid](out, event))
        return SymlogMSE(out, event) if self.cfg.symlog else Normal(out, event=event)

    def _image_dists(self, dist: MSE | Normal) -> dict[str, Pixels]:
        """Split the distribution of stacked images by key."""
        dists, first = {}, 0
        for key in self.images:
            last = first + self.shapes[key][2]
            dists[key] = Pixels(dataclasses.replace(dist, mean=dist.mean[..., first:last]))
            first = last
        return dists
