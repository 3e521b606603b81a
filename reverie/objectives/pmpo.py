"""Losses of actor and critic of Dreamer 4: PMPO, and the two-hot value."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from reverie.nn.dists import Categorical, TwoHot
from reverie.types import sg


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


def critic_loss(
    value: TwoHot, ret: Float[Array, 'B T'], weight: Float[Array, 'B T']
) -> Float[Array, 'B T']:
    """Cross entropy of the value with the two-hot of the lambda-return, weighted by the probability
    of being in the state.
    """
    return -sg(weight) * value.log_prob(sg(ret))
