"""Losses of actor and critic of Dreamer V1 to V3, and the running statistics and slow copies around
them.
"""

import abc
import dataclasses
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from reverie.nn.scan import discounted
from reverie.objectives.behavior import Distribution, PolicyDistribution, Targets
from reverie.types import Metrics, sg

T = TypeVar('T')
Running = dict[str, Float[Array, '']]


class ActorObjective(abc.ABC):
    """Loss -weight_t (objective_t + entropy H[pi_t]) for each learnt action t, with the objective
    of a subclass.

    entropy: rate of the bonus, in the unit of the objective; at 0 no entropy is computed.
    through_model: the gradient passes from returns to actions, so rollouts must keep their backward
    pass.
    """

    entropy: float
    through_model: ClassVar[bool]

    @abc.abstractmethod
    def objective(
        self,
        policy: PolicyDistribution,
        action: Array,
        targets: Targets,
        value: Array,
        scale: Array | float,
    ) -> tuple[Float[Array, 'M N'], Metrics]:
        """Return the objective, to be maximised, and metrics. Arguments: see `__call__`."""

    def __call__(
        self,
        policy: PolicyDistribution,
        action: Float[Array, 'H N A'],
        targets: Targets,
        value: Float[Array, 'H+1 N'],
        scale: Float[Array, ''] | float = 1.0,
    ) -> tuple[Float[Array, 'M N'], Metrics]:
        """Return (loss, metrics).

        policy: distribution of the actions, in sg(states 0 .. H - 1). value: baseline, the value
        that the returns bootstrap from. scale: divisor of returns.
        """
        objective, metrics = self.objective(policy, action, targets, value, scale)
        if self.entropy:
            entropy = policy.entropy()[: len(targets.acted)]
            objective = objective + self.entropy * entropy
            metrics = metrics | {'imag/entropy': entropy.mean()}
        return -sg(targets.acted_weight) * objective, metrics


@dataclasses.dataclass(frozen=True)
class Backprop(ActorObjective):
    """R / scale, whose gradient passes through the model's states to the actions; V1 eq. 7, V2 for
    control.

    The caller stops it at the parameters of model, reward and value, not at the states.
    """

    entropy: float = 0.0
    """Rate of the entropy bonus, in units of R / scale."""
    through_model: ClassVar[bool] = True

    def objective(
        self,
        policy: PolicyDistribution,
        action: Array,
        targets: Targets,
        value: Array,
        scale: Array | float,
    ) -> tuple[Float[Array, 'M N'], Metrics]:
        return targets.acted / sg(scale), {}


@dataclasses.dataclass(frozen=True)
class Reinforce(ActorObjective):
    """ln pi(sg a) sg((R - v) / scale); V2 for games, V3 for discrete and continuous actions."""

    entropy: float = 3e-4
    """Rate of the entropy bonus, in units of the advantage."""
    through_model: ClassVar[bool] = False

    def objective(
        self,
        policy: PolicyDistribution,
        action: Array,
        targets: Targets,
        value: Array,
        scale: Array | float,
    ) -> tuple[Float[Array, 'M N'], Metrics]:
        steps = len(targets.acted)
        adv = sg((targets.acted - value[:steps]) / scale)
        metrics: Metrics = {'imag/adv': adv.mean(), 'imag/adv_size': jnp.abs(adv).mean()}
        return policy.log_prob(sg(action))[:steps] * adv, metrics


@dataclasses.dataclass(frozen=True)
class Mixed(ActorObjective):
    """rho of `Reinforce` and 1 - rho of `Backprop`; V2 eq. 6.

    The released code lets ln pi(a) pass a gradient to the action as well, which biases it; not so
    here.
    """

    rho: float = 0.9
    """Share of `Reinforce`; the released `actor_grad_mix` 0.1 is rho 0.9."""
    entropy: float = 1e-3
    """Rate of the entropy bonus, in the unit of the objective."""
    through_model: ClassVar[bool] = True

    def objective(
        self,
        policy: PolicyDistribution,
        action: Array,
        targets: Targets,
        value: Array,
        scale: Array | float,
    ) -> tuple[Float[Array, 'M N'], Metrics]:
        score, metrics = Reinforce().objective(policy, action, targets, value, scale)
        path, _ = Backprop().objective(policy, action, targets, value, scale)
        return self.rho * score + (1 - self.rho) * path, metrics


@dataclasses.dataclass(frozen=True)
class Critic:
    """-weight (ln p(sg R) + slow ln p(sg v_slow)); Dreamer V1 and V2 with a normal distribution of
    variance 1, V3 with a two-hot one.
    """

    slow: float = 0.0
    """Weight of the slow critic's mean as a second target; V1, V2: 0, V3: 1."""

    def __call__(
        self, value: Distribution, targets: Targets, slow_value: Float[Array, 'H1 N'] | None = None
    ) -> Float[Array, 'K N']:
        """Loss of the K learnt states.

        value: distribution of the values of sg(states 0 .. H). slow_value: mean of the slow
        critic's; may be None if `slow` is 0.
        """
        steps, total = len(targets.ret), len(jax.tree.leaves(value)[0])
        first = total - 1 - steps
        target = jnp.pad(sg(targets.ret), [(first, 1), (0, 0)])
        return -sg(targets.weight) * value_log_prob(value, target, slow_value, self.slow)[first:-1]


@dataclasses.dataclass(frozen=True)
class ReplayCritic:
    """Loss of the critic at replayed steps, with returns bootstrapped from imagined ones; V3,
    "critic replay loss".

    R_t = r_{t+1} + discount (1 - terminal_{t+1}) ((1 - l) b_{t+1} + l R_{t+1}) with l = lam, or 0
    where t + 1 ends its episode; R of the last step is b. Steps that end an episode weigh nothing.
    """

    discount: float = 1 - 1 / 333
    """Discount of a step in full, since `terminal` is recorded, not predicted with it."""
    lam: float = 0.95
    """Weight of longer returns, lambda."""
    slow: float = 1.0
    """Weight of the slow critic's mean as a second target."""

    def returns(
        self,
        reward: Float[Array, 'B T'],
        is_last: Bool[Array, 'B T'],
        is_terminal: Bool[Array, 'B T'],
        boot: Float[Array, 'B T'],
    ) -> Float[Array, 'B T-1']:
        """Returns of all steps but the last; `boot` is the return imagined from each step, row 0 of
        `Targets.ret`.
        """
        arrived = (reward, ~is_terminal, ~is_last, boot)
        r, goes_on, mixes, b = (x.astype(jnp.float32).swapaxes(0, 1)[1:] for x in arrived)
        goes_on, mixes = self.discount * goes_on, self.lam * mixes
        return discounted(r + goes_on * (1 - mixes) * b, goes_on * mixes, b[-1]).swapaxes(0, 1)

    def __call__(
        self,
        value: Distribution,
        slow_value: Float[Array, 'B T'],
        reward: Float[Array, 'B T'],
        is_last: Bool[Array, 'B T'],
        is_terminal: Bool[Array, 'B T'],
        boot: Float[Array, 'B T'],
    ) -> Float[Array, 'B T-1']:
        """Loss of all steps but the last.

        value: distribution of the values of the replayed states, with a gradient to these.
        slow_value: mean of the slow critic's. Others: see `returns`.
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
    """Scale max(limit, P_high - P_low) of running percentiles; V3's return scale.

    The state is a dict of scalars, so that it can be a parameter group.
    """

    rate: float = 0.01
    """Weight of the newest batch in the running percentiles."""
    low: float = 5.0
    """Lower percentile."""
    high: float = 95.0
    """Upper percentile."""
    limit: float = 1.0
    """Smallest scale."""
    debias: bool = False
    """Divide out the zero that the running percentiles start from; not so in V3."""

    def initial(self) -> Running:
        return {name: jnp.zeros(()) for name in ('low', 'high', 'seen')}

    def update(self, state: Running, x: Array) -> Running:
        """Add one batch of any shape to the statistics."""
        low, high = jnp.percentile(sg(x), jnp.array([self.low, self.high]))
        return _mix(state, dict(low=low, high=high, seen=jnp.ones(())), self.rate)

    def stats(self, state: Running) -> tuple[Float[Array, ''], Float[Array, '']]:
        """Return (offset, scale)."""
        share = jnp.maximum(self.rate, state['seen']) if self.debias else 1.0
        low, high = state['low'] / share, state['high'] / share
        return low, jnp.maximum(self.limit, high - low)


@dataclasses.dataclass(frozen=True)
class MeanStdScale:
    """Running mean and standard deviation, debiased; an option of V3 for values and advantages."""

    rate: float = 0.01
    """Weight of the newest batch in the running statistics."""
    limit: float = 1e-8
    """Smallest scale."""

    def initial(self) -> Running:
        return {name: jnp.zeros(()) for name in ('mean', 'square', 'seen')}

    def update(self, state: Running, x: Array) -> Running:
        """Add one batch of any shape to the statistics."""
        x = sg(x)
        batch = dict(mean=x.mean(), square=jnp.square(x).mean(), seen=jnp.ones(()))
        return _mix(state, batch, self.rate)

    def stats(self, state: Running) -> tuple[Float[Array, ''], Float[Array, '']]:
        """Return (offset, scale)."""
        share = jnp.maximum(self.rate, state['seen'])
        mean = state['mean'] / share
        variance = jnp.maximum(state['square'] / share - mean**2, 0.0)
        return mean, jnp.maximum(self.limit, jnp.sqrt(variance))


@dataclasses.dataclass(frozen=True)
class NoScale:
    """Offset 0 and scale 1, with an empty dict as state; V1, V2."""

    def initial(self) -> Running:
        return {}

    def update(self, state: Running, x: Array) -> Running:
        return state

    def stats(self, state: Running) -> tuple[Float[Array, ''], Float[Array, '']]:
        return jnp.zeros(()), jnp.ones(())


def _mix(old: T, new: T, rate: float | Array) -> T:
    mixed: T = jax.tree.map(lambda o, n: (1 - rate) * o + rate * n, old, new)
    return mixed


@dataclasses.dataclass(frozen=True)
class SlowAverage:
    """Slow critic slow <- (1 - rate) slow + rate new after every update; V3."""

    rate: float = 0.02
    """Share of the new weights."""

    def __call__(
        self, slow: PyTree[Array], new: PyTree[Array], step: Int[Array, ''] | int
    ) -> PyTree[Array]:
        """Weights after an update; `step` counts the updates before it."""
        return _mix(slow, new, self.rate)


@dataclasses.dataclass(frozen=True)
class SlowCopy:
    """Slow critic slow <- new after the first update and each `every` further ones; V2."""

    every: int = 100
    """Updates between two copies."""

    def __call__(
        self, slow: PyTree[Array], new: PyTree[Array], step: Int[Array, ''] | int
    ) -> PyTree[Array]:
        """Weights after an update; `step` counts the updates before it."""
        due = jnp.asarray(step) % self.every == 0
        return jax.tree.map(lambda s, n: jnp.where(due, n, s), slow, new)
