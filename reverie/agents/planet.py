"""PlaNet: a latent model learnt from images, and planning in it by the cross-entropy method; arXiv 1811.04551."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from reverie.types import WorldModel


class Belief(NamedTuple):
    """A diagonal Gaussian over action sequences."""

    mean: Float[Array, 'N H A']
    std: Float[Array, 'N H A']


@dataclasses.dataclass(frozen=True)
class CEM:
    """Cross-entropy method over action sequences in [-1, 1]; PlaNet algorithm 2. Replanned at every step from scratch.

    horizon: H, imagined steps. iterations: refits of the belief. candidates: sequences drawn for each refit, of which
    the `top` ones by the sum of predicted rewards are refitted to.
    """

    horizon: int = 12
    iterations: int = 10
    candidates: int = 1000
    top: int = 100

    def plan(
        self,
        model: WorldModel,
        state: PyTree[Array],
        key: PRNGKeyArray,
        action_size: int,
        noise: Float[Array, 'I N J H A'] | None = None,
    ) -> Float[Array, 'N A']:
        """The first action of the last belief's mean, for each of the N states [N, ...]. Without exploration noise."""
        return self.beliefs(model, state, key, action_size, noise).mean[-1, :, 0]

    def beliefs(
        self,
        model: WorldModel,
        state: PyTree[Array],
        key: PRNGKeyArray,
        action_size: int,
        noise: Float[Array, 'I N J H A'] | None = None,
    ) -> Belief:
        """The belief after each iteration, fields [I, N, H, A]. noise: the J candidates' draws, for tests."""
        n = jax.tree.leaves(state)[0].shape[0]
        start = jax.tree.map(lambda x: jnp.repeat(x, self.candidates, 0), state)

        def refit(belief, x):
            key, noise = x
            key_draw, key_model = jax.random.split(key)
            if noise is None:
                noise = jax.random.normal(key_draw, (n, self.candidates, *belief.mean.shape[1:]))
            plans = jnp.clip(belief.mean[:, None] + belief.std[:, None] * noise, -1.0, 1.0)
            score = self.score(model, start, plans.reshape(-1, *plans.shape[2:]), key_model)
            _, best = jax.lax.top_k(score.reshape(n, self.candidates), self.top)
            chosen = jnp.take_along_axis(plans, best[:, :, None, None], 1)
            belief = Belief(chosen.mean(1), jnp.sqrt(chosen.var(1) + 1e-6))
            return belief, belief

        shape = (n, self.horizon, action_size)
        xs = (jax.random.split(key, self.iterations), noise)
        return jax.lax.scan(refit, Belief(jnp.zeros(shape), jnp.ones(shape)), xs)[1]

    def score(
        self, model: WorldModel, state: PyTree[Array], plans: Float[Array, 'M H A'], key: PRNGKeyArray
    ) -> Float[Array, ' M']:
        """Sum of the rewards that the model predicts for each plan."""

        def step(state, x):
            action, key = x
            state, pred = model.imagine(state, action, key)
            return state, pred.reward

        keys = jax.random.split(key, self.horizon)
        return jax.lax.scan(step, state, (plans.swapaxes(0, 1), keys))[1].sum(0)
