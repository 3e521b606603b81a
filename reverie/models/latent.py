"""World model of four methods around a latent dynamics, an encoder, a decoder and heads."""

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
        """Embed observations for the dynamics."""
        assert self.encoder is not None, 'observing takes an encoder'
        embed: Array = self.encoder(self.encoder.prepare(obs, key))
        return embed

    def observe(
        self, state: State, step: Step, key: PRNGKeyArray
    ) -> tuple[State, Float[Array, 'N F']]:
        """Infer the state that a real frame leads to."""
        embed = self.embed(step.obs, key)
        state, _, _ = self.dynamics.observe(state, embed, step.prev_action, step.is_first, key)
        return state, self.dynamics.feat(state)

    def imagine(
        self, state: State, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[State, Prediction]:
        """Draw the next state from the prior."""
        state, _ = self.dynamics.imagine(state, action, key)
        feat = self.dynamics.feat(state)
        return state, Prediction(feat, self.reward(feat), self.cont(feat))

    def attention(self, step: Step, key: PRNGKeyArray) -> Float[Array, 'L B heads T T'] | None:
        """Attention weights of each step of a window [B, T] over the steps, None if the dynamics
        does not attend.
        """
        if not hasattr(self.dynamics, 'attention'):
            return None
        start, embed = self.initial(len(step.is_first)), self.embed(step.obs, key)
        seen = self.dynamics.unroll(start, embed, step.prev_action, step.is_first, key)
        weights: Array = self.dynamics.attention(
            start, seen.state.z, step.prev_action, step.is_first
        )
        return weights

    def decode(self, state: State) -> Any:
        """Likeliest observation of a state."""
        assert self.decoder is not None, 'decoding takes a decoder'
        dists = self.decoder(state)
        if isinstance(dists, dict):
            return {key: dist.mode() for key, dist in dists.items()}
        return dists.mode()
