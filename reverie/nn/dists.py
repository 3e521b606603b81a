"""Laws: what a network's output means as a probability, with its log-probability, mean and divergences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray


def symlog(x: Array) -> Array:
    """sign(x) ln(1 + |x|); Dreamer V3 eq. 9."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """Inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def symexp_bins(count: int = 255, limit: float = 20.0) -> np.ndarray:
    """`count` bins symexp(linspace(-limit, limit)), exactly symmetric; Dreamer V3 eq. 10. -> [count] fp32."""
    # JAX's linspace and expm1, not NumPy's: they differ in the last digit, which moves targets that lie on a bin
    with jax.ensure_compile_time_eval():
        half = np.asarray(symexp(jnp.linspace(-limit, 0, (count + 1) // 2)))
    return np.concatenate([half, -half[:-1][::-1] if count % 2 else -half[::-1]]).astype(np.float32)


class TwoHot(NamedTuple):
    """A number as a softmax over bins in raw space; Dreamer V3 eq. 10, Dreamer 4 section 3.3."""

    logits: Float[Array, '*B bins']
    bins: Float[Array, ' bins'] | np.ndarray

    def mean(self) -> Float[Array, '*B']:
        """Expectation, summed from the outside in so that symmetric logits give exactly 0."""
        probs, bins = jax.nn.softmax(self.logits, -1), jnp.asarray(self.bins)
        n = probs.shape[-1]
        weighted = probs * bins
        low, high = weighted[..., : n // 2], weighted[..., n - n // 2 :]
        middle = weighted[..., n // 2] if n % 2 else 0.0
        return middle + (low[..., ::-1] + high).sum(-1)

    def log_prob(self, target: Float[Array, '*B']) -> Float[Array, '*B']:
        """Cross entropy with the two-hot of `target`, negated: weights on the two bins that enclose it."""
        bins = jnp.asarray(self.bins)
        n = bins.shape[0]
        target = jax.lax.stop_gradient(target)[..., None]
        below = (bins <= target).sum(-1) - 1
        above = n - (bins > target).sum(-1)
        below, above = jnp.clip(below, 0, n - 1), jnp.clip(above, 0, n - 1)
        same = below == above
        to_below = jnp.where(same, 1.0, jnp.abs(bins[below] - target[..., 0]))
        to_above = jnp.where(same, 1.0, jnp.abs(bins[above] - target[..., 0]))
        total = to_below + to_above
        log_probs = jax.nn.log_softmax(self.logits, -1)
        pick = lambda i: jnp.take_along_axis(log_probs, i[..., None], -1)[..., 0]
        return (to_above / total) * pick(below) + (to_below / total) * pick(above)


class Categorical(NamedTuple):
    """One of A choices, as a one-hot vector."""

    logits: Float[Array, '*B A']

    def sample(self, key: PRNGKeyArray) -> Float[Array, '*B A']:
        return jax.nn.one_hot(jax.random.categorical(key, self.logits), self.logits.shape[-1])

    def mode(self) -> Float[Array, '*B A']:
        return jax.nn.one_hot(jnp.argmax(self.logits, -1), self.logits.shape[-1])

    def sample_index(self, key: PRNGKeyArray) -> Int[Array, '*B']:
        return jax.random.categorical(key, self.logits)

    def log_prob(self, action: Float[Array, '*B A']) -> Float[Array, '*B']:
        return (jax.nn.log_softmax(self.logits, -1) * action).sum(-1)

    def entropy(self) -> Float[Array, '*B']:
        log_probs = jax.nn.log_softmax(self.logits, -1)
        return -(jnp.exp(log_probs) * log_probs).sum(-1)

    def kl(self, other: 'Categorical') -> Float[Array, '*B']:
        """KL[self || other] in nats."""
        p, q = jax.nn.log_softmax(self.logits, -1), jax.nn.log_softmax(other.logits, -1)
        return (jnp.exp(p) * (p - q)).sum(-1)


class Bernoulli(NamedTuple):
    """True or false."""

    logit: Float[Array, '*B']

    def mean(self) -> Float[Array, '*B']:
        return jax.nn.sigmoid(self.logit)

    def log_prob(self, target: Array) -> Float[Array, '*B']:
        return -jnp.where(target, jax.nn.softplus(-self.logit), jax.nn.softplus(self.logit))
