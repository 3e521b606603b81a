"""Transformer state-space model: an RSSM whose recurrence is a causal transformer; TransDreamer
(arXiv 2202.09481).

The state of step t is (h_t, z_t): h_t = transformer(x_1 .. x_t) with tokens x_t = embed(z_{t-1},
action that led to step t), so a token holds what is known just before frame t arrives, and nothing
shifts. Attention reaches back to the beginning of the episode, at most `context` tokens; where
`is_first`, z and action are zero. With the myopic posterior q(z_t | frame t) the z of a whole
window are inferred at once, and one parallel pass gives every h. Single steps (acting, imagination)
use a cache of keys and values and give the same numbers.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.models.rssm import features
from reverie.nn.attention import rope
from reverie.nn.core import MLP, Dense, Style
from reverie.nn.latents import CategoricalLatent, GaussianLatent
from reverie.nn.transformer import BlockCausal, Cache, KeysValues, TransformerConfig
from reverie.types import UserError, sg


@dataclasses.dataclass(frozen=True)
class Myopic:
    """Posterior q(z | frame), of all frames of a window in parallel."""

    parallel: ClassVar[bool] = True

    def width(self, embed: int, deter: int) -> int:
        return embed

    def __call__(self, embed: Array, h: Array | None) -> Array:
        return embed


@dataclasses.dataclass(frozen=True)
class History:
    """Posterior q(z | h, frame) as in an RSSM, of one step after the other."""

    parallel: ClassVar[bool] = False

    def width(self, embed: int, deter: int) -> int:
        return embed + deter

    def __call__(self, embed: Array, h: Array | None) -> Array:
        assert h is not None
        return jnp.concatenate([h, embed], -1)


@dataclasses.dataclass(frozen=True)
class Last:
    """Use the last layer's output, normed, as h."""

    def width(self, cfg: TransformerConfig) -> int:
        return cfg.width

    def __call__(self, blocks: BlockCausal, layer_outputs: list[Array]) -> Array:
        return blocks.norm(layer_outputs[-1])


@dataclasses.dataclass(frozen=True)
class Concat:
    """Use the outputs of all layers, side by side, as h; TransDreamer's released code."""

    def width(self, cfg: TransformerConfig) -> int:
        return cfg.layers * cfg.width

    def __call__(self, blocks: BlockCausal, layer_outputs: list[Array]) -> Array:
        return jnp.concatenate(layer_outputs, -1)


@dataclasses.dataclass(frozen=True)
class TSSMConfig:
    """Shape of a TSSM.

    Without RoPE (`rope_base` 0) tokens get an absolute sinusoid that counts from the first step of
    the episode, or of the window.
    """

    transformer: TransformerConfig = TransformerConfig(time_every=1)
    """Shape of the transformer over time alone, hence `time_every` 1."""
    hidden: int = 64
    """Width of the prior's and the posterior's layers."""
    latent: CategoricalLatent | GaussianLatent = CategoricalLatent(32, 4, 0.01)
    """Distribution of z."""
    posterior: Myopic | History = Myopic()
    """Inputs of the posterior."""
    h: Last | Concat = Last()
    """Outputs of the transformer that make up h."""
    prior_layers: int = 2
    """Hidden layers of the prior p(z | h)."""
    post_layers: int = 1
    """Hidden layers of the posterior."""
    feat: Literal['hz', 'zh'] = 'hz'
    """Order of h and z in the features."""
    style: Style = Style()
    """Form of the layers outside of the transformer."""

    @property
    def deter(self) -> int:
        """Width of h."""
        return self.h.width(self.transformer)

    @property
    def width(self) -> int:
        """Width F of the features."""
        return self.deter + self.latent.size

    def build(self, embed: int, actions: int, rngs: nnx.Rngs) -> 'TSSM':
        """Build the model for embeddings and action vectors of these widths.

        Raises UserError if the transformer has space layers.
        """
        if self.transformer.time_every != 1:
            raise UserError(
                f'time_every={self.transformer.time_every}: a TSSM attends along time alone, expected 1'
            )
        return TSSM(self, embed, actions, rngs=rngs)


class TSSMState(NamedTuple):
    """State that the model carries from step to step."""

    h: Float[Array, '*B D']
    z: Float[Array, '*B Z']
    action: Float[Array, '*B A']  # the action that led to the newest step
    first: Bool[Array, '*B']  # the newest step began an episode
    cache: Cache  # tokens up to the newest step's


class Memory(NamedTuple):
    """Form of a step in replay; all zeros where there is none."""

    z: Array  # [*B, ...], see `pack` of the latent
    action: Float[Array, '*B A']
    first: Bool[Array, '*B']
    known: Bool[Array, '*B']


class Latents(NamedTuple):
    """Latents h and z of every step of a window."""

    h: Float[Array, 'B T D']
    z: Float[Array, 'B T Z']


class Unrolled(NamedTuple):
    """Window observed through the posterior; leading dims [B, T]."""

    feat: Float[Array, 'B T F']
    post: Any  # distribution
    prior: Any  # distribution
    state: Latents
    memory: Memory
    before: Cache  # tokens before the window
    written: KeysValues  # keys and values of the window
    is_first: Bool[Array, 'B T']


class TSSM(nnx.Module):
    """Latent dynamics: `embed` [*B, E] comes from an encoder, decoders and heads read `feat` or
    (h, z).
    """

    def __init__(self, cfg: TSSMConfig, embed: int, actions: int, *, rngs: nnx.Rngs):
        t, style = cfg.transformer, cfg.style
        outputs, inputs = cfg.latent.outputs, cfg.posterior.width(embed, cfg.deter)
        self.token = Dense(cfg.latent.size + actions, t.width, style, rngs)
        self.blocks = BlockCausal(t, np.zeros((1, t.head_dim // 2)), rngs=rngs)
        self.prior = MLP(cfg.deter, cfg.hidden, cfg.prior_layers, outputs, style=style, rngs=rngs)
        self.post = MLP(inputs, cfg.hidden, cfg.post_layers, outputs, style=style, rngs=rngs)
        self.cfg, self.actions = cfg, actions

    def initial(self, batch: int) -> TSSMState:
        """Zeros and an empty cache; each leaf has its own buffer."""
        widths = (self.cfg.deter, self.cfg.latent.size, self.actions)
        h, z, action = (jnp.zeros((batch, width)) for width in widths)
        return TSSMState(h, z, action, jnp.zeros(batch, bool), self.blocks.empty(batch, 1))

    def feat(self, state: TSSMState | Latents) -> Float[Array, '*B F']:
        return features(self.cfg.feat, state.h, state.z)

    def observe(
        self,
        state: TSSMState,
        embed: Float[Array, 'N E'],
        prev_action: Float[Array, 'N A'],
        is_first: Bool[Array, ' N'],
        key: PRNGKeyArray,
    ) -> tuple[TSSMState, Any, Any]:
        """Infer the state that a real frame leads to; return (state, post, prior)."""
        h, written = self._next(state.cache, state.z, prev_action, is_first)
        post = self._posterior(embed, h)
        cache = self.blocks.commit(state.cache, written, is_first[:, None])
        state = TSSMState(h, drawn(post, h, key), prev_action, is_first, cache)
        return state, post, self.cfg.latent(self.prior(h))

    def imagine(
        self, state: TSSMState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[TSSMState, Any]:
        """Draw the state that `action` leads to from the prior; return (state, prior)."""
        no = jnp.zeros(len(action), bool)
        h, written = self._next(state.cache, state.z, action, no)
        prior = self.cfg.latent(self.prior(h))
        cache = self.blocks.commit(state.cache, written, no[:, None])
        return TSSMState(h, drawn(prior, h, key), action, no, cache), prior

    def unroll(
        self,
        state: TSSMState,
        embed: Float[Array, 'B T E'],
        prev_action: Float[Array, 'B T A'],
        is_first: Bool[Array, 'B T'],
        key: PRNGKeyArray,
    ) -> Unrolled:
        """Observe T frames, in one parallel pass if the posterior is myopic, else in a scan."""
        keys = jax.random.split(key, is_first.shape[1])
        if self.cfg.posterior.parallel:
            post = self._posterior(embed, None)
            z = jax.vmap(drawn, in_axes=(1, 1, 0), out_axes=1)(post, embed, keys)
            before = jnp.concatenate([state.z[:, None], z[:, :-1]], 1)
            h, written = self._attend(state.cache, before, prev_action, is_first)
        else:
            h, z, post, written = self._scan(state, embed, prev_action, is_first, keys)
        seen = Latents(h, z)
        memory = sg(self._memory(z, prev_action, is_first))
        prior = self.cfg.latent(self.prior(h))
        return Unrolled(self.feat(seen), post, prior, seen, memory, state.cache, written, is_first)

    def _scan(
        self, state: TSSMState, embed: Array, prev_action: Array, is_first: Array, keys: Array
    ) -> tuple[Float[Array, 'B T D'], Float[Array, 'B T Z'], Any, KeysValues]:
        """Observe step after step; return h, z, post, and keys and values of the window."""

        def step(state: TSSMState, x: Any) -> tuple[TSSMState, Any]:
            embed, action, first, key = x
            h, written = self._next(state.cache, state.z, action, first)
            post = self._posterior(embed, h)
            z = drawn(post, h, key)
            cache = self.blocks.commit(state.cache, written, first[:, None])
            return TSSMState(h, z, action, first, cache), (h, z, post, written)

        xs = [x.swapaxes(0, 1) for x in (embed, prev_action, is_first)]
        _, (*rows, written) = jax.lax.scan(step, state, (*xs, keys))
        h, z, post = jax.tree.map(lambda x: x.swapaxes(0, 1), rows)
        # [T, B, 1, heads, 1, d] -> [B, 1, heads, T, d]
        joined: KeysValues = jax.tree.map(lambda x: jnp.moveaxis(x[..., 0, :], 0, 3), written)
        return h, z, post, joined

    def starts(self, unrolled: Unrolled, last: int) -> TSSMState:
        """States after each of the last so many steps of a window, as rows: [B, T, ...] ->
        [B * last, ...].

        Keys and values are cut from the parallel pass, nothing is computed again.
        """
        before, written = unrolled.before, unrolled.written
        b, c = len(unrolled.is_first), self.cfg.transformer.context
        oldest = before.pos[:, None] - c  # number of the token at the front of the line
        order = (oldest + jnp.arange(c)) % c
        number, begin = self.blocks.numbers(unrolled.is_first, before)
        number, begin = number[:, -last:, None], begin[:, -last:]
        held = number - (number - jnp.arange(c)) % c  # [B, K, C], the token in each slot of a ring
        index = held - oldest[..., None]

        @jax.vmap
        def cut(old: Array, new: Array, order: Array, index: Array) -> Array:
            # [1, heads, C, d], [1, heads, T, d] -> [K, 1, heads, C, d]
            line = jnp.concatenate([old[:, :, order], new.astype(old.dtype)], 2)
            return jnp.moveaxis(line[:, :, index], 2, 0)

        def rings(old: Array, new: Array) -> Array:
            return cut(old, new, order, index).reshape(b * last, *old.shape[1:])

        k = tuple(rings(old, new) for old, (new, _) in zip(before.k, written, strict=True))
        v = tuple(rings(old, new) for old, (_, new) in zip(before.v, written, strict=True))
        cache = Cache(k, v, (number[..., 0] + 1).reshape(-1), begin.reshape(-1))
        parts = (*unrolled.state, unrolled.memory.action, unrolled.memory.first)
        h, z, action, first = (x[:, -last:].reshape(b * last, *x.shape[2:]) for x in parts)
        return TSSMState(h, z, action, first, cache)

    def pack(self, state: TSSMState) -> Memory:
        """Convert a state for replay: (z, action) of its step; `unpack` computes keys and values of
        several.
        """
        return self._memory(state.z, state.action, state.first)

    def _memory(self, z: Array, action: Array, first: Array) -> Memory:
        return Memory(self.cfg.latent.pack(z), action, first, jnp.ones(first.shape, bool))

    def unpack(self, memory: Memory) -> TSSMState:
        """Restore the state after remembered steps [B, C, ...] in one pass over their tokens; no
        gradient passes.

        A token needs the z before it, so C steps are C - 1 tokens. Steps that are missing, at the
        front, are never attended to.
        """
        z = self.cfg.latent.unpack(memory.z)
        b, c = memory.known.shape
        action, first = memory.action[:, -1], memory.first[:, -1]
        state = self.initial(b)._replace(z=z[:, -1], action=action, first=first)
        if c == 1:
            return state
        first, known = memory.first[:, 1:], memory.known
        usable = known[:, 1:] & (known[:, :-1] | first)
        begins = first | (usable & ~jnp.pad(usable, ((0, 0), (1, 0)))[:, :-1])
        tokens = self._tokens(None, z[:, :-1], memory.action[:, 1:], first, begins)
        _, written = self.blocks.layer_outputs(tokens[:, :, None], begins)
        cache = self.blocks.prefill(written, begins)
        start = jnp.where(usable.any(1), cache.start, cache.pos)
        return sg(state._replace(cache=cache._replace(start=start)))

    def attention(
        self,
        state: TSSMState,
        z: Float[Array, 'B T Z'],
        prev_action: Float[Array, 'B T A'],
        is_first: Bool[Array, 'B T'],
    ) -> Float[Array, 'L B heads T T']:
        """Attention weights of each step of a window, which follows `state`, over its tokens.

        z: posteriors of the window, see `unroll`.
        """
        before = jnp.concatenate([state.z[:, None], z[:, :-1]], 1)
        attention_maps: list[Array] = []
        self._attend(state.cache, before, prev_action, is_first, attention_maps)
        cached = self.cfg.transformer.context
        return jnp.stack(attention_maps)[:, :, 0, :, :, cached:]

    def _next(
        self, cache: Cache, z: Array, action: Array, is_first: Array
    ) -> tuple[Array, KeysValues]:
        """Attend in one step [N], given z of the step before; return h, and its keys and values."""
        h, written = self._attend(cache, z[:, None], action[:, None], is_first[:, None])
        return h[:, 0], written

    def _attend(
        self,
        cache: Cache,
        z: Array,
        action: Array,
        is_first: Array,
        attention_maps: list[Array] | None = None,
    ) -> tuple[Float[Array, 'B T D'], KeysValues]:
        """Attend in T steps [B, T] after those in the cache, given z of the steps before them;
        return h, and keys and values.
        """
        tokens = self._tokens(cache, z, action, is_first, is_first)
        layer_outputs, written = self.blocks.layer_outputs(
            tokens[:, :, None], is_first, None, cache, attention_maps
        )
        return self.cfg.h(self.blocks, layer_outputs)[:, :, 0].astype(jnp.float32), written

    def _tokens(
        self, cache: Cache | None, z: Array, action: Array, is_first: Array, begins: Array
    ) -> Array:
        """Tokens x_t = act(W [z_{t-1}, a_t]) [B, T, D]; actions beyond [-1, 1] are scaled back, as
        in Dreamer V3.

        begins: steps at which absolute positions start to count.
        """
        x = jnp.concatenate([z, action / sg(jnp.maximum(1, jnp.abs(action)))], -1)
        x = self.token(jnp.where(is_first[..., None], 0, x))
        if not self.cfg.transformer.rope_base:
            number, begin = self.blocks.numbers(begins, cache)
            x = x + sinusoid(number - begin, x.shape[-1]).astype(x.dtype)
        return x.astype(self.cfg.transformer.dtype)

    def _posterior(self, embed: Array, h: Array | None) -> Any:
        return self.cfg.latent(self.post(self.cfg.posterior(embed, h)))


def drawn(dist: Any, like: Float[Array, '*B D'], key: PRNGKeyArray) -> Float[Array, '*B Z']:
    """Draw z, with the leading dims of `like`."""
    z: Array = dist.sample(key)
    return z.reshape(*like.shape[:-1], -1)


def sinusoid(position: Array, width: int) -> Float[Array, '*B D']:
    """Encode absolute positions: sines, then cosines, of position / 10000^(2i / width)."""
    angles = rope(position, width, 1e4)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
