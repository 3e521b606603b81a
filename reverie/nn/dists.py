"""Laws: what a network's output means as a probability, with its log-probability, mean and
divergences.

A law is a pytree, so it passes through `jit`, `scan` and `stop_gradient`. A law factory is a frozen
dataclass that says how many numbers a network must put out for an n-dimensional action, and makes
the law of them.
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

HALF_LOG_TAU = 0.5 * float(np.log(2 * np.pi))
T = TypeVar('T')


def static(default: Any) -> Any:
    """A field that is part of a law's structure rather than one of its arrays."""
    return dataclasses.field(default=default, metadata={'static': True})


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Frozen dataclass whose fields are arrays, save those marked `static`."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def _total(x: Array, event: int) -> Array:
    """Sum over the last `event` axes."""
    return x.sum(tuple(range(-event, 0))) if event else x


def symlog(x: Array) -> Array:
    """sign(x) ln(1 + |x|); Dreamer V3 eq. 9."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """Inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def symexp_bins(count: int = 255, limit: float = 20.0) -> np.ndarray:
    """`count` bins symexp(linspace(-limit, limit)), exactly symmetric; Dreamer V3 eq. 10. ->
    [count] fp32.
    """
    # JAX's linspace and expm1, not NumPy's: they differ in the last digit, which moves targets that
    # lie on a bin
    with jax.ensure_compile_time_eval():
        half = np.asarray(symexp(jnp.linspace(-limit, 0, (count + 1) // 2)))
    return np.concatenate([half, -half[:-1][::-1] if count % 2 else -half[::-1]]).astype(np.float32)


class TwoHot(NamedTuple):
    """A number as a softmax over bins in raw space; Dreamer V3 eq. 10, Dreamer 4 section 3.3."""

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
        low, high = (lambda x: x[..., :half][..., ::-1]), (lambda x: x[..., -half:])
        middle = probs[..., half] * bins[half] if probs.shape[-1] % 2 else 0.0
        pairs = (high(probs) - low(probs)) * high(bins) + low(probs) * (
            high(bins) + low(bins)
        )  # + 0 if symmetric
        return middle + pairs.sum(-1)

    def log_prob(self, target: Float[Array, '*B']) -> Float[Array, '*B']:
        """Cross entropy with the two-hot of `target`, negated: weights on the two bins that enclose
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


def unimix(logits: Float[Array, '*B K'], share: float) -> Float[Array, '*B K']:
    """ln((1 - share) softmax(logits) + share / K): no class is ever impossible; Dreamer V3 uses
    share 0.01.
    """
    if not share:
        return logits
    return jnp.log((1 - share) * jax.nn.softmax(logits, -1) + share / logits.shape[-1])


class OneHots(NamedTuple):
    """G categoricals of K classes as one-hot vectors with straight-through gradients; Dreamer V2,
    Algorithm 1.
    """

    logits: Float[Array, '*B G K']

    def _straight_through(self, index: Int[Array, '*B G']) -> Float[Array, '*B G K']:
        probs = jax.nn.softmax(self.logits, -1)
        return jax.nn.one_hot(index, probs.shape[-1], dtype=probs.dtype) + (
            probs - jax.lax.stop_gradient(probs)
        )

    def sample(self, key: PRNGKeyArray) -> Float[Array, '*B G K']:
        """By the inverse of the distribution function: one uniform number per categorical.

        K Gumbel numbers each would cost ten times as much, and a product with a triangle is cheaper
        than `cumsum`.
        """
        *_, k = self.logits.shape
        below = jnp.matmul(
            jax.nn.softmax(self.logits, -1), jnp.triu(jnp.ones((k, k))), precision='highest'
        )
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

    logit: Any  # [*B, *event]
    event: int = static(0)

    def mean(self) -> Array:
        return jax.nn.sigmoid(self.logit)

    def mode(self) -> Array:
        """Rounded to 0.0 or 1.0."""
        return (self.logit > 0).astype(jnp.float32)

    def log_prob(self, target: Array) -> Array:
        """`target` is bool, or a probability in [0, 1]: then the expectation t ln p + (1 - t) ln(1
        - p).
        """
        target = jnp.asarray(target)
        yes, no = jax.nn.softplus(-self.logit), jax.nn.softplus(self.logit)
        if target.dtype == bool:
            return -_total(jnp.where(target, yes, no), self.event)
        return -_total(target * yes + (1 - target) * no, self.event)


@pytree
class Normal:
    """Diagonal Gaussian; the last `event` axes are one event: their log-probabilities, entropies
    and KLs are summed.
    """

    mean: Any  # [*B, *event]
    std: Any = 1.0  # broadcasts to mean
    event: int = static(1)

    def sample(self, key: PRNGKeyArray) -> Array:
        """Reparametrised: mean + std * noise."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> Array:
        return self.mean

    def log_prob(self, x: Array) -> Array:
        return _total(
            -0.5 * jnp.square((x - self.mean) / self.std) - jnp.log(self.std) - HALF_LOG_TAU,
            self.event,
        )

    def entropy(self) -> Array:
        return _total(
            jnp.broadcast_to(0.5 + HALF_LOG_TAU + jnp.log(self.std), self.mean.shape), self.event
        )

    def kl(self, other: 'Normal') -> Array:
        """KL[self || other] in nats."""
        ratio, shift = (
            jnp.square(self.std / other.std),
            jnp.square((self.mean - other.mean) / other.std),
        )
        return _total(0.5 * (ratio + shift - 1 - jnp.log(ratio)), self.event)


@pytree
class MSE:
    """A squared error as if it were a log-probability, without the factor 1/2; Dreamer V3's image
    loss.
    """

    mean: Any  # [*B, *event]
    event: int = static(1)

    def mode(self) -> Array:
        return self.mean

    def log_prob(self, x: Array) -> Array:
        return -_total(jnp.square(self.mean - x), self.event)


@pytree
class SymlogMSE:
    """Squared error against symlog(x); Dreamer V3's loss for vectors. `mean` lives in symlog space."""

    mean: Any  # [*B, *event]
    event: int = static(1)

    def mode(self) -> Array:
        return symexp(self.mean)

    def log_prob(self, x: Array) -> Array:
        return -_total(jnp.square(self.mean - symlog(x)), self.event)


class Pixels(NamedTuple):
    """A law on [0, 1] for images that may come as uint8 (0..255), bool or float (0..1)."""

    dist: Any

    def mode(self) -> Array:
        """In [0, 1]."""
        return self.dist.mode()

    def log_prob(self, image: Array) -> Array:
        return self.dist.log_prob(unit_range(image))


def unit_range(image: Array) -> Array:
    """uint8 0..255 -> fp32 0..1; bool and floats are taken to be 0..1 already."""
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
