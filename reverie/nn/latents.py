"""Latents of recurrent state-space models: what an output means as a distribution, how a sample is
stored.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from reverie.nn.dists import Normal, OneHots


@dataclasses.dataclass(frozen=True)
class CategoricalLatent:
    """Latent z of several one-hots, straight-through; Dreamer V2 and V3."""

    groups: int = 32
    """One-hots of z."""
    classes: int = 32
    """Classes of a one-hot."""
    unimix: float = 0.0
    """Share of the uniform distribution that is mixed in; V3: 0.01."""

    @property
    def size(self) -> int:
        """Width of z."""
        return self.groups * self.classes

    @property
    def outputs(self) -> int:
        """Numbers a network puts out for the distribution."""
        return self.size

    def __call__(self, out: Float[Array, '*B outs']) -> OneHots:
        logits = out.astype(jnp.float32).reshape(*out.shape[:-1], self.groups, self.classes)
        return OneHots.mixed(logits, self.unimix)

    def pack(self, z: Float[Array, '*B Z']) -> Array:
        """Store z as small integers [*B, groups]: the class counted from 1, 0 where all are zero
        (no state yet).
        """
        z = z.reshape(*z.shape[:-1], self.groups, self.classes)
        index = jnp.where(z.max(-1) > 0.5, jnp.argmax(z, -1) + 1, 0)
        return index.astype(jnp.uint8 if self.classes < 256 else jnp.uint16)

    def unpack(self, packed: Array) -> Float[Array, '*B Z']:
        one_hots = jax.nn.one_hot(packed.astype(jnp.int32) - 1, self.classes)
        return one_hots.reshape(*packed.shape[:-1], self.size)


@dataclasses.dataclass(frozen=True)
class GaussianLatent:
    """Latent z from a diagonal Gaussian with std = softplus(s) + min_std; PlaNet, Dreamer V1."""

    size: int = 30
    """Width of z."""
    min_std: float = 0.1
    """Added to the deviation."""

    @property
    def outputs(self) -> int:
        """Numbers a network puts out for the distribution."""
        return 2 * self.size

    def __call__(self, out: Float[Array, '*B outs']) -> Normal:
        mean, std = jnp.split(out.astype(jnp.float32), 2, -1)
        return Normal(mean, jax.nn.softplus(std) + self.min_std)

    def pack(self, z: Float[Array, '*B Z']) -> Array:
        return z

    def unpack(self, packed: Array) -> Float[Array, '*B Z']:
        return packed
