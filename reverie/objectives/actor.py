"""Losses of the actor: PMPO of Dreamer 4, and the gradients of Dreamer V1 to V3."""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from reverie.nn.dists import Categorical
from reverie.objectives.behavior import PolicyDistribution, Targets
from reverie.types import Metrics, sg


class PMPO(NamedTuple):
    """Preference policy gradient by the advantage's sign alone; Dreamer 4 eq. 11.

    The budget is not from the paper: of a policy that is far from the data the world model knows
    nothing.
    """

    alpha: float = 0.5
    """Weight of the actions with an advantage of at least 0, against the others (paper: 0.5)."""
    beta: float = 0.3
    """Weight of KL[pi || prior] (paper: 0.3)."""
    kl_budget: float | None = None
    """Mean KL[pi || prior] of a batch, in nats, above which the policy only returns to the prior."""

    def __call__(
        self,
        policy: Categorical,
        prior: Categorical,
        action: Float[Array, 'B T A'],
        adv: Float[Array, 'B T'],
        weight: Float[Array, 'B T'],
    ) -> dict[str, Float[Array, 'B T']]:
        """Terms (1 - alpha) mean_{A<0} ln pi - alpha mean_{A>=0} ln pi, and beta KL[pi || prior].

        The means are over the steps of each sign in the whole batch, weighted by `weight`; an empty
        set counts 0. Terms are scaled so that their plain mean over [B, T] is the equation.
        """
        log_prob = policy.log_prob(sg(action))
        good, bad = (
            sg(members * members.size / jnp.maximum(members.sum(), 1e-8))
            for members in (weight * (adv >= 0), weight * (adv < 0))
        )
        loss = (1 - self.alpha) * bad * log_prob - self.alpha * good * log_prob
        kl = policy.kl(Categorical(sg(prior.logits)))
        if self.kl_budget is not None:
            loss *= sg((weight * kl).sum() <= self.kl_budget * weight.sum())
        return dict(policy=loss, prior=self.beta * sg(weight) * kl)


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
