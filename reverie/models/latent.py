"""A latent dynamics with an encoder, a decoder and heads, as the four-method world model."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.types import Prediction, State, Step

Head = Callable[[Float[Array, '*B F']], Float[Array, '*B']]


class LatentModel:
    """World model of every agent that infers a state from each observation and predicts the next.

    dynamics: `initial`, `observe`, `imagine`, `unroll` and `feat`, see `models.rssm.RSSM`.
    encoder, decoder: observation -> embedding, state -> distribution of the observation; may be
    missing where not needed.
    reward, cont: feat -> expected reward and probability of going on (0 and 1 where missing).
    """

    def __init__(
        self,
        dynamics: Any,
        encoder: Any = None,
        decoder: Callable[[State], Any] | None = None,
        reward: Head | None = None,
        cont: Head | None = None,
    ):
        self.dynamics = dynamics
        self.encoder = encoder
        self.decoder = decoder
        self.reward: Head = reward or (lambda feat: jnp.zeros(feat.shape[:-1]))
        self.cont: Head = cont or (lambda feat: jnp.ones(feat.shape[:-1]))

    def initial(self, batch: int) -> State:
        return self.dynamics.initial(batch)

    def embed(self, obs: Any, key: PRNGKeyArray) -> Float[Array, '*B E']:
        """Embedding of observations, as the dynamics takes them."""
        assert self.encoder is not None, 'observing takes an encoder'
        return self.encoder(self.encoder.prepare(obs, key))

    def observe(
        self, state: State, step: Step, key: PRNGKeyArray
    ) -> tuple[State, Float[Array, 'N F']]:
        """Infer the state that a real frame leads to."""
        state, _, _ = self.dynamics.observe(
            state, self.embed(step.obs, key), step.prev_action, step.is_first, key
        )
        return state, self.dynamics.feat(state)

    def imagine(
        self, state: State, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[State, Prediction]:
        """Draw the next state from the prior."""
        state, _ = self.dynamics.imagine(state, action, key)
        feat = self.dynamics.feat(state)
        return state, Prediction(feat, self.reward(feat), self.cont(feat))

    def attention(self, step: Step, key: PRNGKeyArray) -> Float[Array, 'L B heads T T'] | None:
        """How much each step of a window [B, T] attends to each step; None without attention."""
        attend = getattr(self.dynamics, 'attention', None)
        if attend is None:
            return None
        start = self.initial(len(step.is_first))
        seen = self.dynamics.unroll(
            start, self.embed(step.obs, key), step.prev_action, step.is_first, key
        )
        return attend(start, seen.state.z, step.prev_action, step.is_first)

    def decode(self, state: State) -> Any:
        """The likeliest observation of a state."""
        assert self.decoder is not None, 'decoding takes a decoder'
        dists = self.decoder(state)
        return (
            {key: dist.mode() for key, dist in dists.items()}
            if isinstance(dists, dict)
            else dists.mode()
        )
