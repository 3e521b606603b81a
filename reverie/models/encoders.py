"""From observations to an embedding, and from (h, z) back to laws over observations.

An observation is an array or a dictionary of arrays. What each is follows from its shape: [h, w, c]
is a small grid if no side exceeds GRID_SIDE and an image otherwise, [n] is a vector, [] a vector of
one. Grids and vectors share an MLP, images of equal size share convolutions. Images and grids may
be uint8 (0..255), bool or float (0..1).
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
from reverie.nn.dists import MSE, Bernoulli, Normal, Pixels, SymlogMSE, symlog, unit_range
from reverie.nn.vision import PooledConv, StridedConv, reduce_bits
from reverie.types import UserError

GRID_SIDE = 16
Shape = tuple[int, ...]
Kind = Literal['image', 'grid', 'vector']


@dataclasses.dataclass(frozen=True)
class ObsConfig:
    """How observations are read and predicted.

    conv: for images. units, layers: of the MLPs for grids and vectors. symlog: squash vectors, and
    predict them with `SymlogMSE` (V3) instead of N(mean, 1). grid: law of a grid's cells. bits: how
    many of an image's eight are kept, with noise below the last one (PlaNet: 5); None for the image
    as it is.
    """

    conv: PooledConv | StridedConv = PooledConv()
    units: int = 1024
    layers: int = 3
    symlog: bool = True
    grid: Literal['mse', 'bernoulli'] = 'mse'
    style: Style = Style()
    bits: int | None = None

    def prepare(self, obs: Any, shapes: Shape | Mapping[str, Shape], key: PRNGKeyArray) -> Any:
        """What encoder and decoder take for an observation: images of fewer bits, if so configured."""
        if self.bits is None:
            return obs
        if not isinstance(shapes, Mapping):
            return reduce_bits(obs, key, self.bits) if kind(shapes) == 'image' else obs
        keys = dict(zip(sorted(shapes), jax.random.split(key, len(shapes)), strict=True))
        return {name: self.prepare(x, shapes[name], keys[name]) for name, x in obs.items()}


def kind(shape: Shape) -> Kind:
    if len(shape) == 3:
        return 'grid' if max(shape[:2]) <= GRID_SIDE else 'image'
    if len(shape) <= 1:
        return 'vector'
    raise UserError(f'observation of shape {list(shape)}: expected [h, w, c] or [n]')


def sorted_shapes(shapes: Shape | Mapping[str, Shape]) -> dict[str, Shape]:
    """By key, in sorted order; a single array is called 'obs'."""
    named = dict(shapes) if isinstance(shapes, Mapping) else {'obs': tuple(shapes)}
    return {key: tuple(named[key]) for key in sorted(named)}


def stacked(shapes: Mapping[str, Shape], keys: tuple[str, ...]) -> tuple[int, int, int]:
    """Shape of the images laid on one another."""
    sides = {shapes[key][:2] for key in keys}
    if len(sides) > 1:
        raise UserError(
            f'images {", ".join(keys)} have sides {sorted(sides)}: expected the same for all'
        )
    h, w = sides.pop()
    return h, w, sum(shapes[key][2] for key in keys)


class ObsEncoder(nnx.Module):
    """Observations [*B, ...] -> embed [*B, E], E = `width`.

    Images enter as x - 0.5, grids as 0..1.
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
            parts.append(
                self.flat(jnp.concatenate([self._flatten(key, obs[key]) for key in self.flats], -1))
            )
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
    """h [*B, D], z [*B, Z] -> {key: law}, or one law if the observation is one array; log_prob(obs)
    -> [*B].

    Laws of images and grids live on [0, 1] and take what the environment gives; their mode is for
    the eye.
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
            self.heads = nnx.Dict(
                {key: Linear(width, n, init=init, rngs=rngs) for key, n in outputs.items()}
            )
        if self.images:
            shape = stacked(self.shapes, self.images)
            self.image = cfg.conv.decoder(shape, inputs, cfg.units, cfg.style, rngs)

    def __call__(self, h: Float[Array, '*B D'], z: Float[Array, '*B Z']) -> Any:
        dists: dict[str, Any] = {}
        if self.flats:
            x = self.flat(jnp.concatenate([z, h], -1)).astype(jnp.float32)
            dists |= {
                key: self._flat_dist(self.shapes[key], self.heads[key](x)) for key in self.flats
            }
        if self.images:
            dists |= self._image_dists(self.image(h, z))
        return dists['obs'] if self.single else {key: dists[key] for key in self.shapes}

    def _flat_dist(self, shape: Shape, out: Float[Array, '*B n']) -> Any:
        out, event = out.reshape(*out.shape[:-1], *shape), len(shape)
        if kind(shape) == 'grid':
            return Pixels(MSE(out, event) if self.cfg.grid == 'mse' else Bernoulli(out, event))
        return SymlogMSE(out, event) if self.cfg.symlog else Normal(out, event=event)

    def _image_dists(self, dist: MSE | Normal) -> dict[str, Pixels]:
        """Take the stacked images apart."""
        dists, first = {}, 0
        for key in self.images:
            last = first + self.shapes[key][2]
            dists[key] = Pixels(dataclasses.replace(dist, mean=dist.mean[..., first:last]))
            first = last
        return dists
