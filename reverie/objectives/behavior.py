"""Imagined rollouts and their returns, from which `actor` and `critic` learn.

An imagined sequence has H + 1 states; row 0 is the root, which was observed. Action t is chosen in
state t and leads to state t + 1; reward and cont of row t arrive with state t. In shapes, H1 is
H + 1. Three agents cut it in three ways:

| agent | value of a state counts  | returns                        | actor learns actions | critic learns states |
|-------|--------------------------|--------------------------------|----------------------|----------------------|
| V1    | its own reward           | `InclusiveReturn(root=False)`  | 0 .. H - 2           | 1 .. H - 1           |
| V2    | its own reward           | `InclusiveReturn(root=True)`   | 0 .. H - 2           | 0 .. H - 1           |
| V3    | the rewards after it     | `ExclusiveReturn`              | 0 .. H - 1           | 0 .. H - 1           |
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from reverie.nn.scan import discounted, lean_scan
from reverie.types import Policy, Prediction, WorldModel, sg


def rollout(
    model: WorldModel,
    policy: Policy,
    state: PyTree,
    feat: Float[Array, 'N F'],
    key: PRNGKeyArray,
    horizon: int,
) -> tuple[PyTree, Float[Array, 'H N A'], Prediction]:
    """Imagine `horizon` steps; return the last state, the actions and the predictions [H, N, ...],
    where row t is the step that action t led to.
    """

    def step(carry: tuple[PyTree, Array], key: PRNGKeyArray) -> tuple[PyTree, Any]:
        state, feat = carry
        key_act, key_model = jax.random.split(key)
        action = policy(state, feat, key_act)
        state, pred = model.imagine(state, action, key_model)
        return (state, pred.feat), (action, pred)

    (state, _), (action, pred) = lean_scan(step, (state, feat), jax.random.split(key, horizon))
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

    Row t arrived after action t, so R_t is the target for the state the action was taken in.
    """
    go_on = discount * cont
    return discounted(reward + go_on * (1 - lam) * value, go_on * lam, value[-1])


@runtime_checkable
class Distribution(Protocol):
    """Distribution of values: a pytree with leading dims [H + 1, N] or [B, T]."""

    def log_prob(self, x: Any) -> Array: ...


@runtime_checkable
class PolicyDistribution(Distribution, Protocol):
    """Distribution of actions: a pytree with leading dims [H, N]."""

    def entropy(self) -> Array: ...


class Targets(NamedTuple):
    """Targets of the actor, in M actions from the root on, and of the critic, in the K states up to
    the last but one.
    """

    acted: Float[Array, 'M N']  # return credited to action t
    acted_weight: Float[Array, 'M N']  # probability of being in state t
    ret: Float[Array, 'K N']  # target of the value of states H - K .. H - 1
    weight: Float[Array, 'K N']  # probability of being in them


@dataclasses.dataclass(frozen=True)
class InclusiveReturn:
    """R_t = r_t + discount c_t ((1 - lam) v_{t+1} + lam R_{t+1}): a state's value counts its own
    reward; V1, V2 eq. 4.

    V2 puts the recorded value into row 0 of `cont`. The weight of the first state is 1.
    """

    discount: float = 1.0
    """Discount of a step; 1 where the target of `cont` includes it, as in V2."""
    lam: float = 0.95
    """Weight of longer returns, lambda."""
    root: bool = True
    """Begin with the observed state (V2), else with the first imagined one (V1)."""

    def __call__(
        self, reward: Float[Array, 'H1 N'], cont: Float[Array, 'H1 N'], value: Float[Array, 'H1 N']
    ) -> Targets:
        """Compute the targets; returns bootstrap from `value` (V2: the slow critic's), which the
        actor's gradient passes.
        """
        r, c, v = (x if self.root else x[1:] for x in (reward, cont, value))
        ret = lambda_return(r[:-1], c[:-1], v[1:], self.discount, self.lam)
        weight = sg(jnp.cumprod(jnp.concatenate([jnp.ones_like(c[:1]), self.discount * c[:-2]]), 0))
        if self.root:  # the root's return holds a reward that none of the actions earned
            return Targets(ret[1:], weight[:-1], sg(ret), weight)
        return Targets(ret, weight, sg(ret), weight)


@dataclasses.dataclass(frozen=True)
class ExclusiveReturn:
    """R_t = r_{t+1} + discount c_{t+1} ((1 - lam) v_{t+1} + lam R_{t+1}): a state's value counts
    the rewards after it; V3.

    weight_t = c_0 prod_{i=1..t} discount c_i, so a root that ended its episode counts for nothing.
    """

    discount: float = 1.0
    """Discount of a step; 1 where the target of `cont` includes it, as in V3."""
    lam: float = 0.95
    """Weight of longer returns, lambda."""

    def __call__(
        self, reward: Float[Array, 'H1 N'], cont: Float[Array, 'H1 N'], value: Float[Array, 'H1 N']
    ) -> Targets:
        """Compute the targets; returns bootstrap from `value` (V3: the critic's own)."""
        ret = lambda_return(reward[1:], cont[1:], value[1:], self.discount, self.lam)
        weight = sg(jnp.cumprod(self.discount * cont, 0) / self.discount)[:-1]
        return Targets(ret, weight, sg(ret), weight)


def with_root(root: Float[Array, 'N *F'], rest: Float[Array, 'H N *F']) -> Float[Array, 'H+1 N *F']:
    """Put the root's row before the imagined rows."""
    return jnp.concatenate([root[None], rest])


def by_row(loss: Float[Array, 'H N'], batch: int) -> Float[Array, 'B TH']:
    """Arrange an imagined loss as one row per window: N = batch * T starts -> [batch, T * H]."""
    return loss.swapaxes(0, 1).reshape(batch, -1)
