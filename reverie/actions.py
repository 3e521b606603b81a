"""Spaces of actions: one choice, numbers, or several named parts at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Component:
    """One part of a composite action: one of `choices`, or a number in [low, high]."""

    name: str
    choices: tuple[str, ...] = ()  # their names; empty for a number
    low: float = -1.0
    high: float = 1.0
    rest: float = 0.0  # value while no key is held: the index of a choice, or a number
    # Keys that are held for each choice, or for low and for high.
    keys: tuple[tuple[str, ...], ...] = ()
    camera: Literal['', 'x', 'y'] = ''  # turns the camera: choices or numbers rise with the shift

    @property
    def size(self) -> int:
        """Entries of the action vector that it takes."""
        return len(self.choices) or 1

    def stored(self, value: Any) -> float | None:
        """Return a value as datasets keep it: the index of a choice, given by number or name, or a
        number scaled to [-1, 1]; None if it is not in range.
        """
        if self.choices:
            if isinstance(value, str):
                return float(self.choices.index(value)) if value in self.choices else None
            whole = not isinstance(value, bool) and value == int(value)
            return float(value) if whole and 0 <= value < len(self.choices) else None
        if isinstance(value, str) or not self.low <= value <= self.high:
            return None
        return 2 * (float(value) - self.low) / (self.high - self.low) - 1


@dataclasses.dataclass(frozen=True)
class ActionSpace:
    """`size` choices (discrete), `size` numbers in [-1, 1] (continuous), or named parts whose vectors
    lie side by side (composite).

    A composite action is stored as one value per part: the index of a choice, or a number scaled
    from [low, high] to [-1, 1]. Its vector is all zeros where it is not known. A space without parts,
    of video without actions, has one column, which stays 0.
    """

    kind: Literal['discrete', 'continuous', 'composite']
    size: int  # A, entries of an action vector
    meanings: tuple[str, ...] = ()  # labels of the keys on screen
    parts: tuple[Component, ...] = ()

    @classmethod
    def composite(cls, parts: Sequence[Component]) -> 'ActionSpace':
        """Build the space of actions of several parts; of none for video without actions."""
        return cls('composite', sum(part.size for part in parts) or 1, (), tuple(parts))

    def sample(self, key: PRNGKeyArray, n: int) -> Array:
        """Draw n uniform actions: index [n] if discrete, [n, A] in [-1, 1] if continuous, the
        vectors [n, A] if composite.
        """
        if self.kind == 'discrete':
            return jax.random.randint(key, (n,), 0, self.size)
        if self.kind == 'continuous':
            return jax.random.uniform(key, (n, self.size), minval=-1.0, maxval=1.0)
        u = jax.random.uniform(key, (n, len(self.parts)))
        choices = np.array([len(part.choices) for part in self.parts])
        return self.vector(jnp.where(choices > 0, jnp.floor(u * choices), 2 * u - 1))

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw as `sample` does, on the host."""
        if self.kind == 'discrete':
            return rng.integers(0, self.size, n)
        if self.kind == 'continuous':
            return rng.uniform(-1, 1, (n, self.size)).astype(np.float32)
        return np.asarray(self.sample(jax.random.key(rng.integers(2**31)), n))

    def vector(self, values: Float[Array, '*B parts']) -> Float[Array, '*B A']:
        """Turn composite actions as they are stored into vectors: of a choice the one-hot (-1: all
        zeros), of a number in [-1, 1] itself.
        """
        columns = [
            jax.nn.one_hot(values[..., i], part.size) if part.choices else values[..., i : i + 1]
            for i, part in enumerate(self.parts)
        ]
        empty = jnp.zeros((*values.shape[:-1], self.size - sum(part.size for part in self.parts)))
        return jnp.concatenate([*columns, empty], -1).astype(jnp.float32)
