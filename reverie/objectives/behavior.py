"""Learning to act inside the model: rollouts, returns, and the losses of actor and critic."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from reverie.nn.dists import Categorical, TwoHot
from reverie.types import Policy, Prediction, WorldModel, sg


def rollout(
    model: WorldModel, policy: Policy, state: PyTree, feat: Float[Array, 'N F'], key: PRNGKeyArray, horizon: int
) -> tuple[PyTree, Float[Array, 'H N A'], Prediction]:
    """Imagine `horizon` steps. -> (last state, actions, predictions [H, N, ...]); row t is what action t led to."""

    def step(carry, key):
        state, feat = carry
        key_act, key_model = jax.random.split(key)
        action = policy(state, feat, key_act)
        state, pred = model.imagine(state, action, key_model)
        return (state, pred.feat), (action, pred)

    (state, _), (action, pred) = jax.lax.scan(step, (state, feat), jax.random.split(key, horizon))
    return state, action, pred


def lambda_return(
    reward: Float[Array, 'H N'], cont: Float[Array, 'H N'], value: Float[Array, 'H N'], discount: float, lam: float
) -> Float[Array, 'H N']:
    """R_t = r_t + discount c_t ((1 - lam) v_t + lam R_{t+1}), R_H = v_H; Dreamer V1 eq. 6, Dreamer 4 eq. 10.

    Row t holds what arrived after action t, so R_t is the target for the state the action was taken in.
    """

    def step(ret, x):
        r, c, v = x
        ret = r + discount * c * ((1 - lam) * v + lam * ret)
        return ret, ret

    return jax.lax.scan(step, value[-1], (reward, cont, value), reverse=True)[1]


class PMPO(NamedTuple):
    """Preference policy gradient by the advantage's sign alone; Dreamer 4 eq. 11. alpha .5 and beta .3 in the paper."""

    alpha: float = 0.5
    beta: float = 0.3

    def __call__(
        self,
        policy: Categorical,
        prior: Categorical,
        action: Float[Array, 'B T A'],
        adv: Float[Array, 'B T'],
        weight: Float[Array, 'B T'],
    ) -> dict[str, Float[Array, 'B T']]:
        """(1 - alpha) mean_{A<0} ln pi - alpha mean_{A>=0} ln pi, and beta KL[pi || prior].

        The means are over the steps of each sign in the whole batch, weighted by `weight`; an empty set counts 0.
        Terms are scaled so that their plain mean over [B, T] is the equation.
        """
        log_prob = policy.log_prob(sg(action))
        good, bad = weight * (adv >= 0), weight * (adv < 0)
        share = lambda members: sg(members * members.size / jnp.maximum(members.sum(), 1e-8))
        loss = (1 - self.alpha) * share(bad) * log_prob - self.alpha * share(good) * log_prob
        return dict(policy=loss, prior=self.beta * sg(weight) * policy.kl(Categorical(sg(prior.logits))))


def critic_loss(value: TwoHot, ret: Float[Array, 'B T'], weight: Float[Array, 'B T']) -> Float[Array, 'B T']:
    """Cross entropy of the value law with the two-hot of the lambda-return, weighted by the odds of being there."""
    return -sg(weight) * value.log_prob(sg(ret))
