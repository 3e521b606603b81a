"""Distributions that a network's output stands for, with log-probability, mean and divergences.

A distribution is a pytree, so it passes through `jit`, `scan` and `stop_gradient`.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

HALF_LOG_TAU = 0.5 * float(np.log(2 * np.pi))
T = TypeVar('T')

if TYPE_CHECKING:
    Leaf = Array
else:  # JAX rebuilds pytrees with shapes and markers in the place of arrays
    Leaf = Any


def static(default: Any) -> Any:
    """Mark a field as part of a distribution's structure instead of one of its arrays."""
    return dataclasses.field(default=default, metadata={'static': True})


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make a frozen dataclass whose fields are arrays, save those marked `static`, a pytree."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def _total(x: Array, event: int) -> Array:
    """Sum over the last `event` axes."""
    return x.sum(tuple(range(-event, 0))) if event else x


def symlog(x: Array) -> Array:
    """sign(x) ln(1 + |x|); Dreamer V3 eq. 9."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """sign(x) (exp|x| - 1), the inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def symexp_bins(count: int = 255, limit: float = 20.0) -> np.ndarray:
    """Bins symexp(linspace(-limit, limit)) as fp32 [count], exactly symmetric; Dreamer V3 eq. 10."""
    # NumPy's linspace and expm1 differ from JAX's in the last digit, which moves targets that lie
    # on a bin.
    with jax.ensure_compile_time_eval():
        half = np.asarray(symexp(jnp.linspace(-limit, 0, (count + 1) // 2)))
    return np.concatenate([half, -half[:-1][::-1] if count % 2 else -half[::-1]]).astype(np.float32)


class TwoHot(NamedTuple):
    """Number as a softmax over bins in raw space; Dreamer V3 eq. 10, Dreamer 4 section 3.3."""

    logits: Float[Array, '*B bins']
    bins: Float[Array, ' bins'] | np.ndarray

    def mean(self) -> Float[Array, '*B']:
        """Expectation; symmetric logits over symmetric bins give exactly 0.

        Each pair of opposite bins is b (p+ - p-): the products p b reach 1e8 and must not be
        rounded before they cancel, which a compiler that contracts a product and a sum into one
        rounding does to one of the two.
        """
        probs, bins = jax.nn.softmax(self.logits, -1), jnp.asarray(self.bins)
        half = probs.shape[-1] // 2
        middle = probs[..., half] * bins[half] if probs.shape[-1] % 2 else 0.0
        p_low, p_high = probs[..., :half][..., ::-1], probs[..., -half:]
        b_low, b_high = bins[..., :half][..., ::-1], bins[..., -half:]
        pairs = (p_high - p_low) * b_high + p_low * (b_high + b_low)  # + 0 if symmetric
        return middle + pairs.sum(-1)

    def log_prob(self, target: Float[Array, '*B']) -> Float[Array, '*B']:
        """Negative cross entropy with the two-hot of `target`: weights on the two bins that enclose
        it.
        """
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
        at_below, at_above = (
            jnp.take_along_axis(log_probs, i[..., None], -1)[..., 0] for i in (below, above)
        )
        return (to_above / total) * at_below + (to_below / total) * at_above


class Categorical(NamedTuple):
    """One of A choices as a one-hot vector."""

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


def unimix(logits: Float[Array, '*B K'], share: float) -> Float[Array, '*B K']:
    """ln((1 - share) softmax(logits) + share / K), so that no class is ever impossible; share is
    0.01 in Dreamer V3.
    """
    return jnp.log(mixed_probs(logits, share)) if share else logits


def mixed_probs(logits: Float[Array, '*B K'], share: float) -> Float[Array, '*B K']:
    """(1 - share) softmax(logits) + share / K."""
    return (1 - share) * jax.nn.softmax(logits, -1) + share / logits.shape[-1]


class OneHots(NamedTuple):
    """Vector of G categoricals of K classes, one-hot with straight-through gradients; Dreamer V2,
    Algorithm 1.
    """

    logits: Float[Array, '*B G K']
    known: Float[Array, '*B G K'] | None = None
    """Probabilities, where they are at hand."""

    @classmethod
    def mixed(cls, logits: Float[Array, '*B G K'], share: float) -> 'OneHots':
        """Categoricals of `unimix(logits, share)`."""
        if not share:
            return cls(logits)
        probs = mixed_probs(logits, share)
        return cls(jnp.log(probs), probs)

    @property
    def probs(self) -> Float[Array, '*B G K']:
        return jax.nn.softmax(self.logits, -1) if self.known is None else self.known

    def _straight_through(self, index: Int[Array, '*B G']) -> Float[Array, '*B G K']:
        probs = self.probs
        one_hot = jax.nn.one_hot(index, probs.shape[-1], dtype=probs.dtype)
        return one_hot + (probs - jax.lax.stop_gradient(probs))

    def sample(self, key: PRNGKeyArray) -> Float[Array, '*B G K']:
        """Invert the distribution function at one uniform number per categorical.

        K Gumbel numbers each would cost ten times as much, and a product with a triangle is cheaper
        than `cumsum`.
        """
        k = self.logits.shape[-1]
        triangle = np.triu(np.ones((k, k), np.float32))
        below = jnp.matmul(self.probs, triangle, precision='highest')
        u = jax.random.uniform(key, (*self.logits.shape[:-1], 1)) * below[..., -1:]
        return self._straight_through(jnp.minimum((below <= u).sum(-1), k - 1))

    def mode(self) -> Float[Array, '*B G K']:
        return self._straight_through(jnp.argmax(self.logits, -1))

    def log_prob(self, x: Float[Array, '*B G K']) -> Float[Array, '*B']:
        return (jax.nn.log_softmax(self.logits, -1) * x).sum((-2, -1))

    def entropy(self) -> Float[Array, '*B']:
        log_probs = jax.nn.log_softmax(self.logits, -1)
        return -(jnp.exp(log_probs) * log_probs).sum((-2, -1))

    def kl(self, other: 'OneHots') -> Float[Array, '*B']:
        """KL[self || other] in nats, summed over the G categoricals."""
        p, q = jax.nn.log_softmax(self.logits, -1), jax.nn.log_softmax(other.logits, -1)
        return (jnp.exp(p) * (p - q)).sum((-2, -1))


@pytree
class Bernoulli:
    """True or false; the last `event` axes are summed in log_prob."""

    logit: Leaf  # [*B, *event]
    event: int = static(0)

    def mean(self) -> Array:
        return jax.nn.sigmoid(self.logit)

    def mode(self) -> Array:
        """1.0 where true is likelier, else 0.0."""
        return (self.logit > 0).astype(jnp.float32)

    def log_prob(self, target: Array) -> Array:
        """ln p(target) for a bool, its expectation t ln p + (1 - t) ln(1 - p) for a probability t."""
        target = jnp.asarray(target)
        yes, no = jax.nn.softplus(-self.logit), jax.nn.softplus(self.logit)
        if target.dtype == bool:
            return -_total(jnp.where(target, yes, no), self.event)
        return -_total(target * yes + (1 - target) * no, self.event)


@pytree
class Normal:
    """Diagonal Gaussian; log-probabilities, entropies and KLs are summed over the last `event` axes."""

    mean: Leaf  # [*B, *event]
    std: Leaf | float = 1.0  # broadcasts to mean
    event: int = static(1)

    def sample(self, key: PRNGKeyArray) -> Array:
        """mean + std * noise, so gradients reach mean and std."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> Array:
        return self.mean

    def log_prob(self, x: Array) -> Array:
        square = jnp.square((x - self.mean) / self.std)
        return _total(-0.5 * square - jnp.log(self.std) - HALF_LOG_TAU, self.event)

    def entropy(self) -> Array:
        each = 0.5 + HALF_LOG_TAU + jnp.log(self.std)
        return _total(jnp.broadcast_to(each, self.mean.shape), self.event)

    def kl(self, other: 'Normal') -> Array:
        """KL[self || other] in nats."""
        ratio = jnp.square(self.std / other.std)
        shift = jnp.square((self.mean - other.mean) / other.std)
        return _total(0.5 * (ratio + shift - 1 - jnp.log(ratio)), self.event)


@pytree
class MSE:
    """Squared error in the place of a log-probability, without the factor 1/2; Dreamer V3's image
    loss.
    """

    mean: Leaf  # [*B, *event]
    event: int = static(1)

    def mode(self) -> Array:
        return self.mean

    def log_prob(self, x: Array) -> Array:
        return -_total(jnp.square(self.mean - x), self.event)


@pytree
class SymlogMSE:
    """Squared error against symlog(x), `mean` in symlog space; Dreamer V3's loss for vectors."""

    mean: Leaf  # [*B, *event]
    event: int = static(1)

    def mode(self) -> Array:
        return symexp(self.mean)

    def log_prob(self, x: Array) -> Array:
        return -_total(jnp.square(self.mean - symlog(x)), self.event)


PIXELS: dict[str, type[MSE | Bernoulli]] = {'mse': MSE, 'bernoulli': Bernoulli}


class Pixels(NamedTuple):
    """Distribution on [0, 1] for images that may come as uint8 (0..255), bool or float (0..1)."""

    dist: MSE | Bernoulli | Normal

    def mode(self) -> Array:
        """Likeliest image, in [0, 1]."""
        return self.dist.mode()

    def log_prob(self, image: Array) -> Array:
        return self.dist.log_prob(unit_range(image))


def unit_range(image: Array) -> Array:
    """Scale uint8 0..255 to fp32 0..1; bool and floats are taken to be 0..1 already."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    return image.astype(jnp.float32)


class UnitNormal(NamedTuple):
    """A number as the mean of a Gaussian of variance 1; PlaNet, Dreamer V1 and V2."""

    loc: Float[Array, '*B']

    def mean(self) -> Float[Array, '*B']:
        return self.loc

    def log_prob(self, x: Float[Array, '*B']) -> Float[Array, '*B']:
        return Normal(self.loc, event=0).log_prob(x)


@dataclasses.dataclass(frozen=True)
class TwoHotDist:
    """Rewards and values as a softmax over symexp bins; Dreamer V3, Dreamer 4."""

    size: int = 255
    """Number of bins."""
    out_scale: float = 0.0
    """Scale of the output layer's first weights; 0 predicts zero at the start."""

    def __call__(self, out: Float[Array, '*B bins']) -> TwoHot:
        return TwoHot(out, symexp_bins(self.size))


@dataclasses.dataclass(frozen=True)
class UnitNormalDist:
    """Rewards and values as the mean of a Gaussian of variance 1; PlaNet, V1, V2."""

    size: int = 1
    """Number of outputs."""
    out_scale: float = 1.0
    """Scale of the output layer's first weights."""

    def __call__(self, out: Float[Array, '*B 1']) -> UnitNormal:
        return UnitNormal(out[..., 0])


@dataclasses.dataclass(frozen=True)
class BernoulliDist:
    """True or false, from one logit."""

    def __call__(self, out: Float[Array, '*B 1']) -> Bernoulli:
        return Bernoulli(out[..., 0])


@dataclasses.dataclass(frozen=True)
class Identity:
    """The agent learns the rewards of the environment."""

    def __call__(self, reward: Float[Array, '*B']) -> Float[Array, '*B']:
        return reward


@dataclasses.dataclass(frozen=True)
class Tanh:
    """The agent learns tanh(reward); V2 on Atari."""

    def __call__(self, reward: Float[Array, '*B']) -> Float[Array, '*B']:
        return jnp.tanh(reward)
