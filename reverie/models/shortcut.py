"""World model of Dreamer 4: `Dynamics` denoises the next frame's latents in a few steps; section
3.2.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie.models.dynamics import Dynamics
from reverie.models.tokenizer import Decoder, Encoder
from reverie.nn.transformer import Cache, where_rows_cache
from reverie.types import Prediction, Step, where_rows


class ShortcutState(NamedTuple):
    """State of N rows; `encoder`, `decoder` and `image` are None where no image is needed."""

    dynamics: Cache
    z: Float[Array, 'N Z c']  # latents of the newest frame
    encoder: Cache | None = None
    decoder: Cache | None = None
    image: Float[Array, 'N h w c'] | None = None  # the newest frame, decoded once, when it comes


class Pending(NamedTuple):
    """State whose newest frame is not in the dynamics' cache yet, and what its commit needs."""

    state: ShortcutState
    action: Float[Array, 'N A']  # the action that led to the newest frame
    noisy: Float[Array, 'N Z c']  # the newest frame as it will be written


StateOrPending = TypeVar('StateOrPending', ShortcutState, Pending)


class ShortcutModel:
    """World model of four methods, and of the pipelined ones, around a `Dynamics`.

    `encoder` and `decoder` may be missing where no image is needed; `reward` and `cont` turn feat
    [N, D] into the expected reward and the probability of going on [N] (0 and 1 where missing).
    task: number that the agent token is told, of each row [N] or of all.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        encoder: Encoder | None = None,
        decoder: Decoder | None = None,
        reward: Callable[[Array], Array] | None = None,
        cont: Callable[[Array], Array] | None = None,
        task: Int[Array, ' N'] | int = 0,
    ):
        self.dynamics, self.task = dynamics, task
        self.encoder, self.decoder = encoder, decoder
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
        """Commit a window of tokenized frames at once; return the state after it, and feat of every
        frame.
        """
        b, t = step.is_first.shape
        cfg = self.dynamics.cfg
        signal_level, step_exponent = (
            jnp.full((b, t), cfg.context_level),
            jnp.full((b, t), cfg.finest),
        )
        labelled = jnp.broadcast_to(has_action[:, None], (b, t))
        noisy = self.dynamics.noised(z, key)
        frames = (noisy, signal_level, step_exponent, step.prev_action, labelled, step.is_first)
        _, feat, written = self.dynamics(
            *frames, task=self._tasks(b), attention_maps=attention_maps
        )
        assert feat is not None
        cache = self.dynamics.blocks.prefill(written, step.is_first)
        return ShortcutState(cache, z[:, -1]), feat

    def attention(self, step: Step, key: PRNGKeyArray) -> Float[Array, 'L B heads T T']:
        """Attention weights of each step of a window [B, T] over the steps, for each time layer;
        mean over the tokens of a frame.
        """
        assert self.encoder is not None, 'attention from images takes an encoder'
        z, _ = self.encoder(step.obs, step.is_first, None)
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
        """Imagine the frame that `action` leads to: K denoising passes that read the cache, then
        the commit.
        """
        return self.commit(self.denoise_next(state, action, key))

    def predict(self, feat: Float[Array, 'N D']) -> Prediction:
        """Expected reward and probability of going on, at real or imagined frames."""
        reward = jnp.zeros(len(feat)) if self.reward is None else self.reward(feat)
        cont = jnp.ones(len(feat)) if self.cont is None else self.cont(feat)
        return Prediction(feat, reward, cont)

    def denoise(
        self, state: ShortcutState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> Float[Array, 'N Z c']:
        """Denoise: z <- z + (f(z, tau, d) - z) / (1 - tau) d for tau = 0, d, .., 1 - d with d = 1/K;
        Dreamer 4 section 3.2.
        """
        z = jax.random.normal(key, (len(action), 1, self.dynamics.tokens, self.dynamics.channels))
        return self._denoise(z, 0, state.dynamics, action)

    def _denoise(self, z: Array, first: int, cache: Cache, action: Array) -> Array:
        """Run the denoising steps from number `first` on, z [N, 1, Z, c] -> [N, Z, c]; they only
        read the cache.
        """
        cfg, n = self.dynamics.cfg, len(action)
        steps = cfg.sampling_steps
        step_exponent = jnp.full((n, 1), steps.bit_length() - 1)
        yes, no = jnp.ones((n, 1), bool), jnp.zeros((n, 1), bool)

        def step(z: Array, i: Array) -> tuple[Array, None]:
            signal_level = jnp.full((n, 1), i * (cfg.k_max // steps))
            x, _, _ = self.dynamics(
                z, signal_level, step_exponent, action[:, None], yes, no, cache, agent=False
            )
            return z + (x - z) / (steps - i), None  # d / (1 - tau) = 1 / (K - i)

        return jax.lax.scan(step, z, jnp.arange(first, steps))[0][:, 0]

    def denoise_next(
        self, state: ShortcutState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> Pending:
        """Imagine a frame and leave its commit for later: `imagine` without its last pass."""
        key_sample, key_commit = jax.random.split(key)
        z = self.denoise(state, action, key_sample)
        state = self._with_frame(state, z, jnp.zeros(len(action), bool))
        return Pending(state, action, self.dynamics.noised(z, key_commit))

    def commit(self, pending: Pending) -> tuple[ShortcutState, Prediction]:
        """Commit the pending frame (write K/V, run the heads); return (state, prediction)."""
        state, feat = self._write(pending)
        return state, self.predict(feat)

    def uncommit(
        self, state: ShortcutState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> Pending:
        """Undo the commit of the newest frame, which `action` led to and `observe` wrote with `key`.

        The frame's number is given back, so that nothing attends to its slot until it is written
        again; the start of its episode is kept.
        """
        dynamics = state.dynamics._replace(pos=state.dynamics.pos - 1)
        noisy = self.dynamics.noised(state.z, key)
        return Pending(state._replace(dynamics=dynamics), action, noisy)

    def observe_pending(self, state: ShortcutState, step: Step, key: PRNGKeyArray) -> Pending:
        """Tokenize a real frame and leave its commit for later; the start of its episode is set at
        once.
        """
        image, is_first = step.obs[:, None], step.is_first[:, None]
        assert self.encoder is not None, 'observing takes an encoder'
        z, encoder = self.encoder(image, is_first, None, state.encoder)
        start = jnp.where(step.is_first, state.dynamics.pos, state.dynamics.start)
        state = state._replace(dynamics=state.dynamics._replace(start=start), encoder=encoder)
        state = self._with_frame(state, self.dynamics.packed(z)[:, 0], step.is_first)
        return Pending(state, step.prev_action, self.dynamics.noised(state.z, key))

    def imagine_pipelined(
        self, pending: Pending, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[Pending, Prediction]:
        """Imagine the next frame, with its first denoising step and the commit of the newest frame
        in one forward pass.

        Frames equal those of `imagine` with the same keys, in K passes instead of K + 1; but the
        prediction is that of the frame just committed, so each is known only with the next frame.
        """
        dynamics, cfg = self.dynamics, self.dynamics.cfg
        n, steps = len(action), cfg.sampling_steps
        state = pending.state
        key_sample, key_commit = jax.random.split(key)
        fresh = jax.random.normal(key_sample, (n, 1, dynamics.tokens, dynamics.channels))
        z = jnp.concatenate([pending.noisy[:, None], fresh], 1)
        actions = jnp.stack([pending.action, action], 1)
        yes, no = jnp.ones((n, 2), bool), jnp.zeros((n, 2), bool)
        signal_level = jnp.tile(jnp.array([[cfg.context_level, 0]]), (n, 1))
        step_exponent = jnp.tile(jnp.array([[cfg.finest, steps.bit_length() - 1]]), (n, 1))
        frames = (z, signal_level, step_exponent, actions, yes, no)
        x, feat, written = dynamics(*frames, state.dynamics, task=self._tasks(n))
        assert feat is not None
        newest = [(k[:, :, :, :1], v[:, :, :, :1]) for k, v in written]
        cache = dynamics.blocks.commit(state.dynamics, newest, no[:, :1])
        z = self._denoise(fresh + (x[:, 1:] - fresh) / steps, 1, cache, action)
        state = self._with_frame(state, z, no[:, 0])._replace(dynamics=cache)
        return Pending(state, action, dynamics.noised(z, key_commit)), self.predict(feat[:, 0])

    def where_rows(
        self, rows: Bool[Array, ' N'], new: StateOrPending, old: StateOrPending
    ) -> StateOrPending:
        """Take `new` in rows that advance by one frame and `old` in the others; caches are not
        copied.
        """

        def part(new: Cache | Array, old: Cache | Array) -> Cache | Array:
            if isinstance(new, Cache) and isinstance(old, Cache):
                return where_rows_cache(rows, new, old)
            return where_rows(rows, new, old)

        result: StateOrPending
        result = jax.tree.map(part, new, old, is_leaf=lambda x: isinstance(x, Cache))
        return result

    def decode(self, state: ShortcutState) -> Float[Array, 'N h w c']:
        """Newest frame as an image."""
        assert state.image is not None, 'decoding takes a decoder'
        return state.image

    def _tasks(self, n: int) -> Int[Array, ' N']:
        return jnp.broadcast_to(jnp.asarray(self.task, jnp.int32), (n,))

    def _with_frame(self, state: ShortcutState, z: Array, is_first: Array) -> ShortcutState:
        """Set z as the newest frame; with a decoder, decode it after the frames before it."""
        state = state._replace(z=z)
        if self.decoder is None or state.decoder is None:
            return state
        latents = z.reshape(len(z), 1, self.decoder.cfg.latents, self.decoder.cfg.bottleneck)
        image, cache = self.decoder(latents, is_first[:, None], state.decoder)
        return state._replace(decoder=cache, image=image[:, 0])

    def _write(self, pending: Pending) -> tuple[ShortcutState, Float[Array, 'N D']]:
        """Write the newest frame into the cache and read the agent token.

        The frame is slightly noised: the model forgives its own small errors.
        """
        state, cfg = pending.state, self.dynamics.cfg
        n = len(pending.action)
        signal_level, step_exponent = (
            jnp.full((n, 1), cfg.context_level),
            jnp.full((n, 1), cfg.finest),
        )
        z, action = pending.noisy[:, None], pending.action[:, None]
        yes, no = jnp.ones((n, 1), bool), jnp.zeros((n, 1), bool)
        frame = (z, signal_level, step_exponent, action, yes, no)
        _, feat, written = self.dynamics(*frame, state.dynamics, task=self._tasks(n))
        assert feat is not None
        cache = self.dynamics.blocks.commit(state.dynamics, written, no)
        return state._replace(dynamics=cache), feat[:, 0]
