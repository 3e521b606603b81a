"""Losses of the critic, and the running statistics and slow copies around it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from reverie.nn.dists import TwoHot
from reverie.objectives.behavior import Distribution, Targets
from reverie.types import sg

Running = dict[str, Float[Array, '']]


def critic_loss(
    value: TwoHot, ret: Float[Array, 'B T'], weight: Float[Array, 'B T']
) -> Float[Array, 'B T']:
    """Cross entropy of the value law with the two-hot of the lambda-return, weighted by the odds of
    being there.
    """
    return -sg(weight) * value.log_prob(sg(ret))


@dataclasses.dataclass(frozen=True)
class Critic:
    """-weight ln p(sg R), and `slow` times the same with the slow critic's mean for R; V1-V3.

    Dreamer V1 and V2: slow 0 and a normal law of variance 1. V3: slow 1 and a two-hot law.
    """

    slow: float = 0.0

    def __call__(
        self, value: Distribution, targets: Targets, slow_value: Float[Array, 'H1 N'] | None = None
    ) -> Float[Array, 'K N']:
        """value: the law in sg(states 0 ..

        H). slow_value: the slow critic's mean there, not needed if slow is 0.
        """
        steps, total = len(targets.ret), len(jax.tree.leaves(value)[0])
        first = total - 1 - steps
        target = jnp.pad(sg(targets.ret), [(first, 1), (0, 0)])
        return -sg(targets.weight) * value_log_prob(value, target, slow_value, self.slow)[first:-1]


@dataclasses.dataclass(frozen=True)
class ReplayCritic:
    """The critic also learns returns of replayed steps, bootstrapped from imagined ones; V3,
    "critic replay loss".

    R_t = r_{t+1} + discount (1 - terminal_{t+1}) ((1 - l) b_{t+1} + l R_{t+1}), l = lam, 0 where t
    + 1 ends its episode, and R of the last step is b. Steps that end an episode weigh nothing.
    discount: here in full, since `terminal` is recorded, not predicted by a head that has learnt
    it.
    slow: as in `Critic`.
    """

    discount: float = 1 - 1 / 333
    lam: float = 0.95
    slow: float = 1.0

    def returns(
        self,
        reward: Float[Array, 'B T'],
        is_last: Bool[Array, 'B T'],
        is_terminal: Bool[Array, 'B T'],
        boot: Float[Array, 'B T'],
    ) -> Float[Array, 'B T-1']:
        """boot: the return imagined from each step, row 0 of `Targets.ret`."""

        def step(ret, x):
            r, goes_on, mixes, b = x
            ret = r + self.discount * goes_on * (
                (1 - self.lam * mixes) * b + self.lam * mixes * ret
            )
            return ret, ret

        later = lambda x: x.astype(jnp.float32).swapaxes(0, 1)[1:]
        rows = (later(reward), later(~is_terminal), later(~is_last), later(boot))
        return jax.lax.scan(step, rows[-1][-1], rows, reverse=True)[1].swapaxes(0, 1)

    def __call__(
        self,
        value: Distribution,
        slow_value: Float[Array, 'B T'],
        reward: Float[Array, 'B T'],
        is_last: Bool[Array, 'B T'],
        is_terminal: Bool[Array, 'B T'],
        boot: Float[Array, 'B T'],
    ) -> Float[Array, 'B T-1']:
        """value: the law in the replayed states, with gradient to them.

        slow_value: the slow critic's mean there.
        """
        ret = sg(self.returns(reward, is_last, is_terminal, boot))
        target = jnp.pad(ret, [(0, 0), (0, 1)])
        return -(value_log_prob(value, target, slow_value, self.slow) * ~is_last)[:, :-1]


def value_log_prob(
    value: Distribution, target: Float[Array, '*B'], slow_value: Array | None, slow: float
) -> Float[Array, '*B']:
    """ln p(target) + slow ln p(sg slow_value)."""
    if not slow:
        return value.log_prob(target)
    return value.log_prob(target) + slow * value.log_prob(sg(slow_value))


@dataclasses.dataclass(frozen=True)
class PercentileScale:
    """max(limit, P_high - P_low) of running percentiles; V3's return scale.

    The state is a dict of scalars, so that it can be a parameter group. debias divides out the zero
    it starts from, which V3's return scale does not.
    """

    rate: float = 0.01
    low: float = 5.0
    high: float = 95.0
    limit: float = 1.0
    debias: bool = False

    def initial(self) -> Running:
        return {name: jnp.zeros(()) for name in ('low', 'high', 'seen')}

    def update(self, state: Running, x: Array) -> Running:
        """The statistics after one batch of any shape."""
        low, high = jnp.percentile(sg(x), jnp.array([self.low, self.high]))
        return _mix(state, dict(low=low, high=high, seen=jnp.ones(())), self.rate)

    def stats(self, state: Running) -> tuple[Float[Array, ''], Float[Array, '']]:
        """-> (offset, scale)."""
        share = jnp.maximum(self.rate, state['seen']) if self.debias else 1.0
        low, high = state['low'] / share, state['high'] / share
        return low, jnp.maximum(self.limit, high - low)


@dataclasses.dataclass(frozen=True)
class MeanStdScale:
    """Running mean and standard deviation, debiased; an option of V3's for values and advantages."""

    rate: float = 0.01
    limit: float = 1e-8

    def initial(self) -> Running:
        return {name: jnp.zeros(()) for name in ('mean', 'square', 'seen')}

    def update(self, state: Running, x: Array) -> Running:
        """The statistics after one batch of any shape."""
        x = sg(x)
        return _mix(
            state, dict(mean=x.mean(), square=jnp.square(x).mean(), seen=jnp.ones(())), self.rate
        )

    def stats(self, state: Running) -> tuple[Float[Array, ''], Float[Array, '']]:
        """-> (offset, scale)."""
        share = jnp.maximum(self.rate, state['seen'])
        mean = state['mean'] / share
        variance = jnp.maximum(state['square'] / share - mean**2, 0.0)
        return mean, jnp.maximum(self.limit, jnp.sqrt(variance))


@dataclasses.dataclass(frozen=True)
class NoScale:
    """Offset 0, scale 1; V1, V2. Its state is an empty dict."""

    def initial(self) -> Running:
        return {}

    def update(self, state: Running, x: Array) -> Running:
        return state

    def stats(self, state: Running) -> tuple[Float[Array, ''], Float[Array, '']]:
        return jnp.zeros(()), jnp.ones(())


def _mix(old: PyTree, new: PyTree, rate: float | Array) -> PyTree:
    return jax.tree.map(lambda o, n: (1 - rate) * o + rate * n, old, new)


@dataclasses.dataclass(frozen=True)
class SlowAverage:
    """slow <- (1 - rate) slow + rate new after every update; V3's slow critic."""

    rate: float = 0.02

    def __call__(
        self, slow: PyTree[Array], new: PyTree[Array], step: Int[Array, ''] | int
    ) -> PyTree[Array]:
        """step: updates before this one, 0 at the first."""
        return _mix(slow, new, self.rate)


@dataclasses.dataclass(frozen=True)
class SlowCopy:
    """slow <- new after the first update and each `every` further ones; V2's target critic."""

    every: int = 100

    def __call__(
        self, slow: PyTree[Array], new: PyTree[Array], step: Int[Array, ''] | int
    ) -> PyTree[Array]:
        """step: updates before this one, 0 at the first."""
        due = jnp.asarray(step) % self.every == 0
        return jax.tree.map(lambda s, n: jnp.where(due, n, s), slow, new)
