"""Learning to act inside the model: rollouts, returns, and the losses of actor and critic.

An imagined sequence has H + 1 states; row 0 is the root, which was observed. Action t is chosen in
state t and leads to state t + 1; reward and cont of row t arrive with state t. In shapes, H1 is H +
1. Three agents cut it in three ways:

| agent | value of a state counts  | returns                        | actor learns actions | critic learns states |
|-------|--------------------------|--------------------------------|----------------------|----------------------|
| V1    | its own reward           | `InclusiveReturn(root=False)`  | 0 .. H - 2           | 1 .. H - 1           |
| V2    | its own reward           | `InclusiveReturn(root=True)`   | 0 .. H - 2           | 0 .. H - 1           |
| V3    | what comes after it      | `ExclusiveReturn`              | 0 .. H - 1           | 0 .. H - 1           |
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from reverie.nn.dists import Categorical, TwoHot
from reverie.types import Metrics, Policy, Prediction, WorldModel, sg


def rollout(
    model: WorldModel,
    policy: Policy,
    state: PyTree,
    feat: Float[Array, 'N F'],
    key: PRNGKeyArray,
    horizon: int,
) -> tuple[PyTree, Float[Array, 'H N A'], Prediction]:
    """Imagine `horizon` steps.

    -> (last state, actions, predictions [H, N, ...]); row t is what action t led to.
    """

    def step(carry, key):
        state, feat = carry
        key_act, key_model = jax.random.split(key)
        action = policy(state, feat, key_act)
        state, pred = model.imagine(state, action, key_model)
        return (state, pred.feat), (action, pred)

    (state, _), (action, pred) = jax.lax.scan(step, (state, feat), jax.random.split(key, horizon))
    return state, action, pred


def lambda_return(
    reward: Float[Array, 'H N'],
    cont: Float[Array, 'H N'],
    value: Float[Array, 'H N'],
    discount: float,
    lam: float,
) -> Float[Array, 'H N']:
    """R_t = r_t + discount c_t ((1 - lam) v_t + lam R_{t+1}), R_H = v_H; Dreamer V1 eq. 6, Dreamer
    4 eq. 10.

    Row t holds what arrived after action t, so R_t is the target for the state the action was taken
    in.
    """

    def step(ret, x):
        r, c, v = x
        ret = r + discount * c * ((1 - lam) * v + lam * ret)
        return ret, ret

    return jax.lax.scan(step, value[-1], (reward, cont, value), reverse=True)[1]


class PMPO(NamedTuple):
    """Preference policy gradient by the advantage's sign alone; Dreamer 4 eq. 11. alpha .5 and beta
    .3 in the paper.

    kl_budget: mean KL[pi || prior] of a batch, in nats, above which the policy only returns towards
    the prior; not from the paper. A policy that is far from the data is one that the world model
    knows nothing about.
    """

    alpha: float = 0.5
    beta: float = 0.3
    kl_budget: float | None = None

    def __call__(
        self,
        policy: Categorical,
        prior: Categorical,
        action: Float[Array, 'B T A'],
        adv: Float[Array, 'B T'],
        weight: Float[Array, 'B T'],
    ) -> dict[str, Float[Array, 'B T']]:
        """(1 - alpha) mean_{A<0} ln pi - alpha mean_{A>=0} ln pi, and beta KL[pi || prior].

        The means are over the steps of each sign in the whole batch, weighted by `weight`; an empty
        set counts 0. Terms are scaled so that their plain mean over [B, T] is the equation.
        """
        log_prob = policy.log_prob(sg(action))
        good, bad = weight * (adv >= 0), weight * (adv < 0)
        share = lambda members: sg(members * members.size / jnp.maximum(members.sum(), 1e-8))
        loss = (1 - self.alpha) * share(bad) * log_prob - self.alpha * share(good) * log_prob
        kl = policy.kl(Categorical(sg(prior.logits)))
        if self.kl_budget is not None:
            loss *= sg((weight * kl).sum() <= self.kl_budget * weight.sum())
        return dict(policy=loss, prior=self.beta * sg(weight) * kl)


def critic_loss(
    value: TwoHot, ret: Float[Array, 'B T'], weight: Float[Array, 'B T']
) -> Float[Array, 'B T']:
    """Cross entropy of the value law with the two-hot of the lambda-return, weighted by the odds of
    being there.
    """
    return -sg(weight) * value.log_prob(sg(ret))


@runtime_checkable
class Distribution(Protocol):
    """What a head says of values: a pytree with leading dims [H + 1, N] or [B, T]."""

    def log_prob(self, x: Any) -> Any: ...


@runtime_checkable
class PolicyDistribution(Distribution, Protocol):
    """What a head says of actions: a pytree with leading dims [H, N]."""

    def entropy(self) -> Any: ...


class Targets(NamedTuple):
    """What actor and critic learn from.

    M actions are learnt from the root on, K states up to the last but one.
    """

    acted: Float[Array, 'M N']  # the return that action t is credited with
    acted_weight: Float[Array, 'M N']  # the odds of being in state t
    ret: Float[Array, 'K N']  # what the value of states H - K .. H - 1 should be
    weight: Float[Array, 'K N']


@dataclasses.dataclass(frozen=True)
class InclusiveReturn:
    """R_t = r_t + discount c_t ((1 - lam) v_{t+1} + lam R_{t+1}): a state's value counts its own
    reward; V1, V2 eq. 4.

    root: the sequence begins with the observed state (V2), else with the first imagined one (V1).
    discount: 1 where the head that predicts `cont` has it in its target, as V2's has; V2 puts the
    recorded value into row 0 of `cont`. The weight of the first state is 1.
    """

    discount: float = 1.0
    lam: float = 0.95
    root: bool = True

    def __call__(
        self, reward: Float[Array, 'H1 N'], cont: Float[Array, 'H1 N'], value: Float[Array, 'H1 N']
    ) -> Targets:
        """value: what the returns bootstrap from, and the actor's gradient passes (V2: the slow
        critic's).
        """
        r, c, v = (x if self.root else x[1:] for x in (reward, cont, value))
        ret = lambda_return(r[:-1], c[:-1], v[1:], self.discount, self.lam)
        weight = sg(jnp.cumprod(jnp.concatenate([jnp.ones_like(c[:1]), self.discount * c[:-2]]), 0))
        if self.root:  # the root's return holds a reward that none of the actions earned
            return Targets(ret[1:], weight[:-1], sg(ret), weight)
        return Targets(ret, weight, sg(ret), weight)


@dataclasses.dataclass(frozen=True)
class ExclusiveReturn:
    """R_t = r_{t+1} + discount c_{t+1} ((1 - lam) v_{t+1} + lam R_{t+1}): the value of what comes
    after; V3.

    weight_t = c_0 prod_{i=1..t} discount c_i, so a root that ended its episode counts for nothing.
    """

    discount: float = 1.0
    lam: float = 0.95

    def __call__(
        self, reward: Float[Array, 'H1 N'], cont: Float[Array, 'H1 N'], value: Float[Array, 'H1 N']
    ) -> Targets:
        """value: what the returns bootstrap from (V3: the critic's own)."""
        ret = lambda_return(reward[1:], cont[1:], value[1:], self.discount, self.lam)
        weight = sg(jnp.cumprod(self.discount * cont, 0) / self.discount)[:-1]
        return Targets(ret, weight, sg(ret), weight)


class ActorObjective(abc.ABC):
    """-weight_t (objective_t + entropy H[pi_t]) for each learnt action t; subclasses say what the
    objective is.

    entropy: rate of the bonus, in the unit of the objective; at 0 the law's entropy is not asked
    for.
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
        """-> (what is to be made large, metrics). Arguments as those of the call."""

    def __call__(
        self,
        policy: PolicyDistribution,
        action: Float[Array, 'H N A'],
        targets: Targets,
        value: Float[Array, 'H+1 N'],
        scale: Float[Array, ''] | float = 1.0,
    ) -> tuple[Float[Array, 'M N'], Metrics]:
        """-> (loss, metrics).

        policy: the law in sg(states 0 .. H - 1), the actions' own. value: baseline, the one that
        entered the returns.
        scale: what returns are divided by.
        """
        objective, metrics = self.objective(policy, action, targets, value, scale)
        if self.entropy:
            entropy = policy.entropy()[: len(targets.acted)]
            objective, metrics = (
                objective + self.entropy * entropy,
                metrics | {'imag/entropy': entropy.mean()},
            )
        return -sg(targets.acted_weight) * objective, metrics


@dataclasses.dataclass(frozen=True)
class Backprop(ActorObjective):
    """R / scale: the gradient passes through the model's states to the actions; V1 eq. 7, V2 for
    control.

    The caller stops it at the parameters of model, reward and value, not at the states.
    """

    entropy: float = 0.0
    through_model: ClassVar[bool] = True

    def objective(self, policy, action, targets, value, scale):
        return targets.acted / sg(scale), {}


@dataclasses.dataclass(frozen=True)
class Reinforce(ActorObjective):
    """ln pi(sg a) sg((R - v) / scale); V2 for games, V3 for discrete and continuous actions."""

    entropy: float = 3e-4
    through_model: ClassVar[bool] = False

    def objective(self, policy, action, targets, value, scale):
        steps = len(targets.acted)
        adv = sg((targets.acted - value[:steps]) / scale)
        metrics = {'imag/adv': adv.mean(), 'imag/adv_size': jnp.abs(adv).mean()}
        return policy.log_prob(sg(action))[:steps] * adv, metrics


@dataclasses.dataclass(frozen=True)
class Mixed(ActorObjective):
    """rho of `Reinforce` and 1 - rho of `Backprop`; V2 eq. 6. The released `actor_grad_mix` 0.1 is
    rho 0.9.

    The released code lets the mixture's ln pi(a) pass a gradient to the action as well, which
    biases it; not here.
    """

    rho: float = 0.9
    entropy: float = 1e-3
    through_model: ClassVar[bool] = True

    def objective(self, policy, action, targets, value, scale):
        score, metrics = Reinforce().objective(policy, action, targets, value, scale)
        path, _ = Backprop().objective(policy, action, targets, value, scale)
        return self.rho * score + (1 - self.rho) * path, metrics


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


Running = dict[str, Float[Array, '']]


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


def with_root(root: Float[Array, 'N *F'], rest: Float[Array, 'H N *F']) -> Float[Array, 'H+1 N *F']:
    """Put what belongs to the root before the imagined rows."""
    return jnp.concatenate([root[None], rest])


def by_row(loss: Float[Array, 'H N'], batch: int) -> Float[Array, 'B TH']:
    """An imagined loss as the runner wants it, one row per window: N = batch * T starts -> [batch,
    T * H].
    """
    return loss.swapaxes(0, 1).reshape(batch, -1)
