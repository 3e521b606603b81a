"""KL terms between posterior and prior of PlaNet and Dreamer V1-V3, and latent overshooting.

The four agents differ in the place of the free nats, which decides when the gradient stops:

| agent  | object               | term                                              | free nats                       |
|--------|----------------------|---------------------------------------------------|---------------------------------|
| PlaNet | `FreeNatsPerElement` | KL[q, p]                                          | subtracted from each element    |
| V1     | `FreeNatsOfMean`     | KL[q, p]                                          | floor of the batch's mean       |
| V2     | `BalancedKL`         | balance KL[sg q, p] + (1 - balance) KL[q, sg p]   | floor of each side's mean       |
| V3     | `TwoSidedKL`         | KL[sg q, p] and KL[q, sg p] as two terms          | floor of each element and side  |
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from reverie.nn.scan import lean_scan
from reverie.types import sg

T = TypeVar('T')


@runtime_checkable
class Latent(Protocol):
    """Distribution of the latent: a pytree of arrays [*B, ...]."""

    def kl(self, other: Any) -> Float[Array, '*B']:
        """KL[self, other] in nats, summed over the state's dimensions."""
        ...


@dataclasses.dataclass(frozen=True)
class FreeNatsPerElement:
    """max(0, KL[q, p] - free) of each step; PlaNet's released objective."""

    free: float = 3.0
    """Nats of each step without a gradient."""

    def __call__(self, post: Latent, prior: Latent) -> dict[str, Float[Array, 'B T']]:
        return dict(kl=jnp.maximum(post.kl(prior) - self.free, 0.0))


@dataclasses.dataclass(frozen=True)
class FreeNatsOfMean:
    """max(free, mean KL[q, p]); Dreamer V1. All steps get a gradient, or none does."""

    free: float = 3.0
    """Nats of the batch's mean without a gradient."""

    def __call__(self, post: Latent, prior: Latent) -> dict[str, Float[Array, 'B T']]:
        return dict(kl=floor_of_mean(post.kl(prior), self.free))


@dataclasses.dataclass(frozen=True)
class BalancedKL:
    """balance KL[sg(q), p] + (1 - balance) KL[q, sg(p)]; Dreamer V2 algorithm 2."""

    balance: float = 0.8
    """Weight of the side that trains the prior."""
    free: float = 0.0
    """Nats of each side without a gradient."""
    free_avg: bool = True
    """Take the floor `free` of each side's mean, else of each element."""

    def __call__(self, post: Latent, prior: Latent) -> dict[str, Float[Array, 'B T']]:
        floor = floor_of_mean if self.free_avg else jnp.maximum
        to_prior, to_post = post_kl(post, prior)
        to_prior, to_post = floor(to_prior, self.free), floor(to_post, self.free)
        return dict(kl=self.balance * to_prior + (1 - self.balance) * to_post)


@dataclasses.dataclass(frozen=True)
class TwoSidedKL:
    """dyn max(free, KL[sg(q), p]) for the prior, rep max(free, KL[q, sg(p)]) for the posterior; V3."""

    dyn: float = 1.0
    """Weight of the prior's term."""
    rep: float = 0.1
    """Weight of the posterior's term."""
    free: float = 1.0
    """Nats of each step and term without a gradient."""

    def __call__(self, post: Latent, prior: Latent) -> dict[str, Float[Array, 'B T']]:
        to_prior, to_post = (jnp.maximum(kl, self.free) for kl in post_kl(post, prior))
        return dict(dyn=self.dyn * to_prior, rep=self.rep * to_post)


def post_kl(post: Latent, prior: Latent) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
    """KL[q, p] with a gradient to the prior alone, and with one to the posterior alone."""
    return sg(post).kl(prior), post.kl(sg(prior))


def floor_of_mean(x: Float[Array, 'B T'], free: float) -> Float[Array, 'B T']:
    """Elements whose mean, and its gradient, are those of max(free, mean of x)."""
    return jnp.where(x.mean() > free, x, free)


# (state [N], action [N, A], key) -> (state, distribution)
Imagine = Callable[[PyTree, Array, PRNGKeyArray], tuple[PyTree, Any]]


@dataclasses.dataclass(frozen=True)
class LatentOvershooting:
    """KL of open-loop priors d = 1..distance further steps ahead to sg(posterior); PlaNet eq. 7 but
    for its one-step term.

    Each element is max(0, KL - free), as the one-step term of PlaNet; averaged over all (start, d)
    that stay inside the window and inside one episode. The released code computes that mask without
    using it, and drops the largest distance, so its `overshooting_distance` is one more than
    `distance`. Off in the released experiments.
    """

    distance: int = 5
    """Greatest number of further steps."""
    free: float = 3.0
    """Nats of each element without a gradient."""

    def __call__(
        self,
        imagine: Imagine,
        state: PyTree[Float[Array, 'B T ...']],
        post: Latent,
        prev_action: Float[Array, 'B T A'],
        is_first: Bool[Array, 'B T'],
        key: PRNGKeyArray,
    ) -> dict[str, Float[Array, 'B T']]:
        """One term [B, T], by the step that a rollout starts at.

        state, post: state and posterior of each step.
        """
        before = jax.tree.map(lambda x: state_before(x, is_first), state)
        action = jnp.where(is_first[..., None], 0.0, prev_action)
        prior = open_loop(imagine, before, action, key, self.distance)
        target, valid = ahead(post, self.distance), inside(is_first, self.distance)
        # distance 0 is the ordinary KL
        excess = jnp.maximum(sg(target).kl(prior) - self.free, 0.0)[1:]
        weight = valid[1:].astype(jnp.float32)
        share = jnp.maximum(weight.sum(), 1.0)
        return dict(overshooting=(excess * weight).sum(0) * weight[0].size / share)


def state_before(
    x: Float[Array, 'B T ...'], is_first: Bool[Array, 'B T']
) -> Float[Array, 'B T ...']:
    """State of the step before each step, zeros where an episode or the window begins."""
    x = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], 1)
    return jnp.where(is_first.reshape(is_first.shape + (1,) * (x.ndim - 2)), 0.0, x)


def open_loop(
    imagine: Imagine,
    before: PyTree[Float[Array, 'B T ...']],
    action: Float[Array, 'B T A'],
    key: PRNGKeyArray,
    distance: int,
) -> Any:
    """Roll out from every step at once; return distributions [distance + 1, B, T, ...], of which
    row d, column s is the prior of step s + d.

    before: the state that step s starts from, so row 0 is the ordinary prior. Entries beyond the
    window have no meaning.
    """
    b, t, _ = action.shape
    start = jax.tree.map(lambda x: x.reshape(b * t, *x.shape[2:]), before)
    actions = ahead(action, distance).reshape(distance + 1, b * t, -1)

    def step(state: PyTree, x: tuple[Array, PRNGKeyArray]) -> tuple[PyTree, Any]:
        action, key = x
        return imagine(state, action, key)

    _, prior = lean_scan(step, start, (actions, jax.random.split(key, distance + 1)))
    return jax.tree.map(lambda x: x.reshape(distance + 1, b, t, *x.shape[2:]), prior)


def ahead(tree: T, distance: int) -> T:
    """Shift leaves [B, T, ...] to [distance + 1, B, T, ...]: row d, column s holds step s + d, or
    the last step beyond it.
    """

    def leaf(x: Array) -> Array:
        step = jnp.arange(x.shape[1]) + jnp.arange(distance + 1)[:, None]
        return jnp.moveaxis(x[:, jnp.minimum(step, x.shape[1] - 1)], 0, 1)

    shifted: T = jax.tree.map(leaf, tree)
    return shifted


def inside(is_first: Bool[Array, 'B T'], distance: int) -> Bool[Array, 'D B T']:
    """Mask of steps s + d (row d, column s) that lie in the window and in the episode of step s."""
    t = is_first.shape[1]
    episode = jnp.cumsum(is_first, 1)
    in_window = jnp.arange(t) + jnp.arange(distance + 1)[:, None] < t
    return (ahead(episode, distance) == episode) & in_window[:, None]
