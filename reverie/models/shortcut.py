"""Interactive dynamics: a transformer that denoises the next frame's latents in a few steps;
Dreamer 4 section 3.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.models.dynamics import Dynamics
from reverie.models.tokenizer import Decoder, Encoder
from reverie.nn.transformer import Cache, where_rows_cache
from reverie.types import Prediction, Step, where_rows


class ShortcutState(NamedTuple):
    """What the Dreamer 4 world model carries for N rows.

    `encoder` and `decoder` are None where no image is needed.
    """

    dynamics: Cache
    z: Float[Array, 'N Z c']  # latents of the newest frame
    encoder: Cache | None = None
    decoder: Cache | None = None
    image: Float[Array, 'N h w c'] | None = (
        None  # the newest frame: each is decoded once, when it comes
    )


class Pending(NamedTuple):
    """A dream whose newest frame is not in the dynamics' cache yet, and what its commit needs."""

    state: ShortcutState
    action: Float[Array, 'N A']  # that led to the newest frame
    noisy: Float[Array, 'N Z c']  # the newest frame as it will be written


class ShortcutModel:
    """The four-method world model of Dreamer 4.

    `encoder` and `decoder` may be missing where no image is needed; `reward` and `cont` turn feat
    [N, D] into the expected reward and the probability of going on [N] (0 and 1 where missing).
    """

    def __init__(
        self,
        dynamics: Dynamics,
        encoder: Encoder | None = None,
        decoder: Decoder | None = None,
        reward: Callable[[Array], Array] | None = None,
        cont: Callable[[Array], Array] | None = None,
    ):
        self.dynamics, self.encoder, self.decoder = dynamics, encoder, decoder
        self.reward, self.cont = reward, cont

    def initial(self, batch: int) -> ShortcutState:
        d = self.dynamics
        return ShortcutState(
            d.empty(batch),
            jnp.zeros((batch, d.tokens, d.channels)),
            None if self.encoder is None else self.encoder.empty(batch),
            None if self.decoder is None else self.decoder.empty(batch),
            None if self.decoder is None else jnp.zeros((batch, *self.decoder.shape)),
        )

    def prefill(
        self,
        z: Float[Array, 'B T Z c'],
        step: Step,
        has_action: Bool[Array, ' B'],
        key: PRNGKeyArray,
        attention_maps: list[Array] | None = None,
    ) -> tuple[ShortcutState, Float[Array, 'B T D']]:
        """Take in a window of tokenized frames at once.

        -> (state after the last, feat of every frame).
        """
        b, t = step.is_first.shape
        signal_level = jnp.full((b, t), self.dynamics.cfg.context_level)
        step_exponent = jnp.full((b, t), self.dynamics.cfg.finest)
        labelled = jnp.broadcast_to(has_action[:, None], (b, t))
        noisy = self.dynamics.noised(z, key)
        _, feat, written = self.dynamics(
            noisy,
            signal_level,
            step_exponent,
            step.prev_action,
            labelled,
            step.is_first,
            attention_maps=attention_maps,
        )
        assert feat is not None
        cache = self.dynamics.blocks.prefill(written, step.is_first)
        return ShortcutState(cache, z[:, -1]), feat

    def attention(self, step: Step, key: PRNGKeyArray) -> Float[Array, 'L B heads T T']:
        """How much each step of a window [B, T] looks at each step, per time layer; mean over the
        tokens of a frame.
        """
        assert self.encoder is not None, 'looking takes an encoder'
        z, _ = self.encoder(step.obs.astype(jnp.float32), step.is_first, None)
        attention_maps: list[Array] = []
        self.prefill(self.dynamics.packed(z), step, jnp.ones(len(z), bool), key, attention_maps)
        return jnp.stack(attention_maps).mean(2)

    def observe(
        self, state: ShortcutState, step: Step, key: PRNGKeyArray
    ) -> tuple[ShortcutState, Float[Array, 'N D']]:
        """Tokenize a real frame and commit it."""
        return self._write(self.observe_pending(state, step, key))

    def imagine(
        self, state: ShortcutState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[ShortcutState, Prediction]:
        """Dream the frame that `action` leads to: K denoising passes that read the cache, then the
        commit.
        """
        return self.commit(self.denoise_next(state, action, key))

    def predict(self, feat: Float[Array, 'N D']) -> Prediction:
        """Expected reward and probability of going on, at frames of any origin."""
        reward = jnp.zeros(len(feat)) if self.reward is None else self.reward(feat)
        cont = jnp.ones(len(feat)) if self.cont is None else self.cont(feat)
        return Prediction(feat, reward, cont)

    def denoise(
        self, state: ShortcutState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> Float[Array, 'N Z c']:
        """z <- z + (f(z, tau, d) - z) / (1 - tau) d for tau = 0, d, .., 1 - d with d = 1/K; Dreamer
        4 section 3.2.
        """
        z = jax.random.normal(key, (len(action), 1, self.dynamics.tokens, self.dynamics.channels))
        return self._denoise(z, 0, state.dynamics, action)

    def _denoise(self, z: Array, first: int, cache: Cache, action: Array) -> Array:
        """The denoising steps from number `first` on, which only read the cache.

        z [N, 1, Z, c] -> [N, Z, c]
        """
        cfg, n = self.dynamics.cfg, len(action)
        steps = cfg.sampling_steps
        step_exponent = jnp.full((n, 1), steps.bit_length() - 1)
        yes, no = jnp.ones((n, 1), bool), jnp.zeros((n, 1), bool)

        def step(z, i):
            signal_level = jnp.full((n, 1), i * (cfg.k_max // steps))
            x, _, _ = self.dynamics(
                z, signal_level, step_exponent, action[:, None], yes, no, cache, agent=False
            )
            return z + (x - z) / (steps - i), None  # d / (1 - tau) = 1 / (K - i)

        return jax.lax.scan(step, z, jnp.arange(first, steps))[0][:, 0]

    def denoise_next(
        self, state: ShortcutState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> Pending:
        """Dream a frame and leave its commit for later: `imagine` without its last pass."""
        key_sample, key_commit = jax.random.split(key)
        z = self.denoise(state, action, key_sample)
        state = self._shown(state, z, jnp.zeros(len(action), bool))
        return Pending(state, action, self.dynamics.noised(z, key_commit))

    def commit(self, pending: Pending) -> tuple[ShortcutState, Prediction]:
        """The commit that was left for later, and what is predicted of the newest frame."""
        state, feat = self._write(pending)
        return state, self.predict(feat)

    def uncommit(
        self, state: ShortcutState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> Pending:
        """Take back the commit of the newest frame, which `action` led to and which was observed
        with `key`.

        The frame's number is given back, so that nothing looks at its slot until it is written
        again; where its episode begins stays known.
        """
        dynamics = state.dynamics._replace(pos=state.dynamics.pos - 1)
        return Pending(
            state._replace(dynamics=dynamics), action, self.dynamics.noised(state.z, key)
        )

    def observe_pending(self, state: ShortcutState, step: Step, key: PRNGKeyArray) -> Pending:
        """Tokenize a real frame and leave its commit for later; where its episode begins is noted
        at once.
        """
        image, is_first = step.obs[:, None].astype(jnp.float32), step.is_first[:, None]
        assert self.encoder is not None, 'observing takes an encoder'
        z, encoder = self.encoder(image, is_first, None, state.encoder)
        cache = state.dynamics._replace(
            start=jnp.where(step.is_first, state.dynamics.pos, state.dynamics.start)
        )
        state = self._shown(
            state._replace(dynamics=cache, encoder=encoder),
            self.dynamics.packed(z)[:, 0],
            step.is_first,
        )
        return Pending(state, step.prev_action, self.dynamics.noised(state.z, key))

    def imagine_pipelined(
        self, pending: Pending, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[Pending, Prediction]:
        """Dream the next frame; the first denoising step is one forward pass with the commit of the
        newest frame.

        The same frames as `imagine` with the same keys, in K passes instead of K + 1; but what is
        predicted of a frame
        is known only with the one after it: the prediction is that of the frame which was the
        newest.
        """
        dynamics, cfg = self.dynamics, self.dynamics.cfg
        n, steps, state = len(action), self.dynamics.cfg.sampling_steps, pending.state
        key_sample, key_commit = jax.random.split(key)
        fresh = jax.random.normal(key_sample, (n, 1, dynamics.tokens, dynamics.channels))
        z = jnp.concatenate([pending.noisy[:, None], fresh], 1)
        both = lambda committed, new: jnp.tile(jnp.array([[committed, new]]), (n, 1))
        actions, yes, no = (
            jnp.stack([pending.action, action], 1),
            jnp.ones((n, 2), bool),
            jnp.zeros((n, 2), bool),
        )
        signal_level, step_exponent = (
            both(cfg.context_level, 0),
            both(cfg.finest, steps.bit_length() - 1),
        )
        x, feat, written = dynamics(
            z, signal_level, step_exponent, actions, yes, no, state.dynamics
        )
        assert feat is not None
        newest = [(k[:, :, :, :1], v[:, :, :, :1]) for k, v in written]
        cache = dynamics.blocks.commit(state.dynamics, newest, no[:, :1])
        z = self._denoise(fresh + (x[:, 1:] - fresh) / steps, 1, cache, action)
        state = self._shown(state, z, no[:, 0])._replace(dynamics=cache)
        return Pending(state, action, dynamics.noised(z, key_commit)), self.predict(feat[:, 0])

    def where_rows(
        self, rows: Bool[Array, ' N'], new: ShortcutState | Pending, old: ShortcutState | Pending
    ) -> ShortcutState | Pending:
        """`old` where a row does not move on, by at most one frame, else `new`; caches are not
        copied.
        """
        return jax.tree.map(
            lambda a, b: (
                where_rows_cache(rows, a, b) if isinstance(a, Cache) else where_rows(rows, a, b)
            ),
            new,
            old,
            is_leaf=lambda x: isinstance(x, Cache),
        )

    def decode(self, state: ShortcutState) -> Float[Array, 'N h w c']:
        """The newest frame as an image."""
        assert state.image is not None, 'decoding takes a decoder'
        return state.image

    def _shown(self, state: ShortcutState, z: Array, is_first: Array) -> ShortcutState:
        """With z as the newest frame, decoded in the light of the frames before it where there is a
        decoder.
        """
        state = state._replace(z=z)
        if self.decoder is None or state.decoder is None:
            return state
        latents = z.reshape(len(z), 1, self.decoder.cfg.latents, self.decoder.cfg.bottleneck)
        image, cache = self.decoder(latents, is_first[:, None], state.decoder)
        return state._replace(decoder=cache, image=image[:, 0])

    def _write(self, pending: Pending) -> tuple[ShortcutState, Float[Array, 'N D']]:
        """Write the newest frame, slightly noised, into the cache and read the agent's token.

        The noise: the model forgives its own small errors.
        """
        state, n, cfg = pending.state, len(pending.action), self.dynamics.cfg
        signal_level, step_exponent = (
            jnp.full((n, 1), cfg.context_level),
            jnp.full((n, 1), cfg.finest),
        )
        yes, no = jnp.ones((n, 1), bool), jnp.zeros((n, 1), bool)
        frame = (
            pending.noisy[:, None],
            signal_level,
            step_exponent,
            pending.action[:, None],
            yes,
            no,
        )
        _, feat, written = self.dynamics(*frame, state.dynamics)
        assert feat is not None
        return state._replace(
            dynamics=self.dynamics.blocks.commit(state.dynamics, written, no)
        ), feat[:, 0]
