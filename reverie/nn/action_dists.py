"""Distributions over actions, and the factories that make them of a network's output.

A factory is a frozen dataclass: `size(n)` is how many numbers the network must put out for an
n-dimensional action, a call turns these into the distribution.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.nn.dists import HALF_LOG_TAU, Categorical, Normal, unimix

DRAWS = 100  # samples for a mode or an entropy without a closed form


class StraightThrough(Categorical):
    """Categorical whose one-hot samples pass their gradient to the probabilities."""

    def _with_gradient(self, one_hot: Float[Array, '*B A']) -> Float[Array, '*B A']:
        probs = jax.nn.softmax(self.logits, -1)
        return one_hot + (probs - jax.lax.stop_gradient(probs))

    def sample(self, key: PRNGKeyArray) -> Float[Array, '*B A']:
        return self._with_gradient(super().sample(key))

    def mode(self) -> Float[Array, '*B A']:
        return self._with_gradient(super().mode())


class TanhNormal(NamedTuple):
    """tanh of a Gaussian, `mean` and `std` before the tanh; Dreamer V1's actor.

    Mode and entropy, which have no closed form, come from DRAWS draws whose noise is fixed.
    """

    mean: Float[Array, '*B A']
    std: Float[Array, '*B A']

    def sample(self, key: PRNGKeyArray) -> Float[Array, '*B A']:
        return jnp.tanh(self.mean + self.std * jax.random.normal(key, self.mean.shape))

    def _log_prob(self, before: Float[Array, '*B A']) -> Float[Array, '*B']:
        """Log-probability of tanh(before)."""
        # ln(1 - tanh^2), exact far out as well
        slope: Array = 2 * (np.log(2.0) - before - jax.nn.softplus(-2 * before))
        return Normal(self.mean, self.std).log_prob(before) - slope.sum(-1)

    def log_prob(self, x: Float[Array, '*B A']) -> Float[Array, '*B']:
        return self._log_prob(jnp.arctanh(jnp.clip(x, -0.99999997, 0.99999997)))

    def _draws(self) -> Float[Array, 'draws *B A']:
        """Draws with fixed noise, before the tanh."""
        noise = jax.random.normal(jax.random.key(0), (DRAWS, *self.mean.shape))
        return self.mean + self.std * noise

    def mode(self) -> Float[Array, '*B A']:
        """Likeliest of the draws."""
        draws = self._draws()
        best = jnp.argmax(self._log_prob(draws), 0)
        return jnp.tanh(jnp.take_along_axis(draws, best[None, ..., None], 0)[0])

    def entropy(self) -> Float[Array, '*B']:
        return -self._log_prob(self._draws()).mean(0)


class TruncNormal(NamedTuple):
    """Gaussian cut to [-1, 1]; Dreamer V2's continuous actor."""

    loc: Float[Array, '*B A']
    std: Float[Array, '*B A']

    def _parts(self) -> tuple[Array, Array, Array]:
        """Return the lower end, the upper end (in units of std) and the mass between them."""
        low, high = (-1 - self.loc) / self.std, (1 - self.loc) / self.std
        return low, high, jax.scipy.stats.norm.cdf(high) - jax.scipy.stats.norm.cdf(low)

    def sample(self, key: PRNGKeyArray) -> Float[Array, '*B A']:
        """Invert the distribution function at a uniform number, so gradients reach loc and std."""
        low, _, mass = self._parts()
        u = jax.random.uniform(key, self.loc.shape, minval=1e-6, maxval=1 - 1e-6)
        x = self.loc + self.std * jax.scipy.stats.norm.ppf(jax.scipy.stats.norm.cdf(low) + u * mass)
        return x + jax.lax.stop_gradient(jnp.clip(x, -1 + 1e-6, 1 - 1e-6) - x)

    def mode(self) -> Float[Array, '*B A']:
        return jnp.clip(self.loc, -1, 1)

    def mean(self) -> Float[Array, '*B A']:
        low, high, mass = self._parts()
        pdf = jax.scipy.stats.norm.pdf
        return self.loc + self.std * (pdf(low) - pdf(high)) / mass

    def log_prob(self, x: Float[Array, '*B A']) -> Float[Array, '*B']:
        """ln p(x), -inf outside of [-1, 1]."""
        _, _, mass = self._parts()
        inside = jax.scipy.stats.norm.logpdf(x, self.loc, self.std) - jnp.log(mass)
        return jnp.where(jnp.abs(x) <= 1, inside, -jnp.inf).sum(-1)

    def entropy(self) -> Float[Array, '*B']:
        low, high, mass = self._parts()
        pdf = jax.scipy.stats.norm.pdf
        edges = (low * pdf(low) - high * pdf(high)) / (2 * mass)
        return (0.5 + HALF_LOG_TAU + jnp.log(self.std * mass) + edges).sum(-1)


@dataclasses.dataclass(frozen=True)
class OneHotDist:
    """Discrete actions from n logits."""

    unimix: float = 0.0
    """Share of the uniform distribution that is mixed in; V3: 0.01."""

    def size(self, n: int) -> int:
        return n

    def __call__(self, out: Float[Array, '*B n']) -> Categorical:
        return Categorical(unimix(out, self.unimix))


@dataclasses.dataclass(frozen=True)
class StraightThroughDist:
    """Discrete actions that learn by the gradient through the model; the Dreamer V1 release's
    'onehot'.
    """

    def size(self, n: int) -> int:
        return n

    def __call__(self, out: Float[Array, '*B n']) -> StraightThrough:
        return StraightThrough(out)


@dataclasses.dataclass(frozen=True)
class TanhNormalDist:
    """Continuous actions of Dreamer V1: mean 5 tanh(m / 5), std softplus(s + ln(e^5 - 1)) + 1e-4,
    then tanh.
    """

    scale: float = 5.0
    """Bound of the mean before the tanh."""
    init_std: float = 5.0
    """Deviation before the tanh for a network output of 0."""
    min_std: float = 1e-4
    """Added to the deviation."""

    def size(self, n: int) -> int:
        return 2 * n

    def __call__(self, out: Float[Array, '*B outs']) -> TanhNormal:
        m, s = jnp.split(out, 2, -1)
        std = jax.nn.softplus(s + float(np.log(np.expm1(self.init_std)))) + self.min_std
        return TanhNormal(self.scale * jnp.tanh(m / self.scale), std)


@dataclasses.dataclass(frozen=True)
class TruncNormalDist:
    """Continuous actions of Dreamer V2: loc tanh(m), std 2 sigmoid(s / 2) + 0.1, cut to [-1, 1]."""

    min_std: float = 0.1
    """Added to the deviation."""

    def size(self, n: int) -> int:
        return 2 * n

    def __call__(self, out: Float[Array, '*B outs']) -> TruncNormal:
        m, s = jnp.split(out, 2, -1)
        return TruncNormal(jnp.tanh(m), 2 * jax.nn.sigmoid(s / 2) + self.min_std)


@dataclasses.dataclass(frozen=True)
class BoundedNormalDist:
    """Continuous actions of Dreamer V3: a Gaussian with mean tanh(m) and std (max - min)
    sigmoid(s + 2) + min, whose draws may leave [-1, 1].
    """

    min_std: float = 0.1
    """Lower bound of the deviation."""
    max_std: float = 1.0
    """Upper bound of the deviation."""

    def size(self, n: int) -> int:
        return 2 * n

    def __call__(self, out: Float[Array, '*B outs']) -> Normal:
        m, s = jnp.split(out, 2, -1)
        std = (self.max_std - self.min_std) * jax.nn.sigmoid(s + 2) + self.min_std
        return Normal(jnp.tanh(m), std)
