"""Transformer state-space model: an RSSM whose recurrence is a causal transformer; TransDreamer
(arXiv 2202.09481).

The state of step t is (h_t, z_t): h_t = transformer(x_1 .. x_t) with tokens x_t = embed(z_{t-1},
action that led to step t), so a token holds what is known just before frame t arrives, and nothing
shifts. Attention reaches back to the beginning of the episode, at most `context` tokens; where
`is_first`, z and action are zero. With the myopic posterior q(z_t | frame t) the z of a whole
window are inferred at once, and one parallel pass gives every h.

Steps one by one (acting, imagination) use a cache of keys and values; both ways give the same
numbers.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.models.rssm import CategoricalLatent, GaussianLatent
from reverie.nn.attention import rope
from reverie.nn.core import MLP, Dense, Style
from reverie.nn.transformer import BlockCausal, Cache, TransformerConfig
from reverie.types import UserError, sg


@dataclasses.dataclass(frozen=True)
class Myopic:
    """q(z | frame): all posteriors of a window in parallel."""

    parallel: ClassVar[bool] = True

    def width(self, embed: int, deter: int) -> int:
        return embed

    def __call__(self, embed: Array, h: Array | None) -> Array:
        return embed


@dataclasses.dataclass(frozen=True)
class History:
    """q(z | h, frame), as an RSSM's: steps must be taken one by one."""

    parallel: ClassVar[bool] = False

    def width(self, embed: int, deter: int) -> int:
        return embed + deter

    def __call__(self, embed: Array, h: Array | None) -> Array:
        assert h is not None
        return jnp.concatenate([h, embed], -1)


@dataclasses.dataclass(frozen=True)
class Last:
    """h is the last layer's output, normed."""

    def width(self, cfg: TransformerConfig) -> int:
        return cfg.width

    def __call__(self, blocks: BlockCausal, layer_outputs: list[Array]) -> Array:
        return blocks.norm(layer_outputs[-1])


@dataclasses.dataclass(frozen=True)
class Concat:
    """h is the outputs of all layers side by side; TransDreamer's released code."""

    def width(self, cfg: TransformerConfig) -> int:
        return cfg.layers * cfg.width

    def __call__(self, blocks: BlockCausal, layer_outputs: list[Array]) -> Array:
        return jnp.concatenate(layer_outputs, -1)


@dataclasses.dataclass(frozen=True)
class TSSMConfig:
    """Shape of a TSSM.

    transformer: over time alone, so `time_every` is 1. Its `context` is how far attention reaches
    back; without RoPE (`rope_base` 0) tokens get an absolute sinusoid that counts from the
    episode's, or the window's, first step.
    h: what of the transformer becomes h. feat: order of h and z in the features.
    """

    transformer: TransformerConfig = TransformerConfig(time_every=1)
    hidden: int = 64
    latent: CategoricalLatent | GaussianLatent = CategoricalLatent(32, 4, 0.01)
    posterior: Myopic | History = Myopic()
    h: Last | Concat = Last()
    prior_layers: int = 2
    post_layers: int = 1
    feat: Literal['hz', 'zh'] = 'hz'
    style: Style = Style()

    @property
    def deter(self) -> int:
        """Width of h."""
        return self.h.width(self.transformer)

    @property
    def width(self) -> int:
        """Width F of the features."""
        return self.deter + self.latent.size

    def build(self, embed: int, actions: int, rngs: nnx.Rngs) -> 'TSSM':
        """The model, for embeddings and action vectors of these widths."""
        if self.transformer.time_every != 1:
            raise UserError(
                f'time_every={self.transformer.time_every}: a TSSM attends along time alone, expected 1'
            )
        return TSSM(self, embed, actions, rngs=rngs)


class TSSMState(NamedTuple):
    """What the model carries from step to step."""

    h: Float[Array, '*B D']
    z: Float[Array, '*B Z']
    action: Float[Array, '*B A']  # that led to the newest step
    first: Bool[Array, '*B']  # whether the newest step began an episode
    cache: Cache  # of the tokens up to the newest step's


class Memory(NamedTuple):
    """A step as replay stores it; all zeros where there is none."""

    z: Array  # [*B, ...], see `pack` of the latent
    action: Float[Array, '*B A']
    first: Bool[Array, '*B']
    known: Bool[Array, '*B']


class Latents(NamedTuple):
    """h and z of every step of a window."""

    h: Float[Array, 'B T D']
    z: Float[Array, 'B T Z']


class Unrolled(NamedTuple):
    """A window seen through the posterior; leading dims [B, T]."""

    feat: Float[Array, 'B T F']
    post: Any  # law
    prior: Any  # law
    state: Latents
    memory: Memory
    before: Cache  # of the tokens before the window
    written: list[tuple[Array, Array]]  # keys and values of the window, for each layer
    is_first: Bool[Array, 'B T']


class TSSM(nnx.Module):
    """A world model without eyes: `embed` [*B, E] comes from an encoder, decoders and heads read
    `feat` or (h, z).
    """

    def __init__(self, cfg: TSSMConfig, embed: int, actions: int, *, rngs: nnx.Rngs):
        t, outputs = cfg.transformer, cfg.latent.outputs
        self.token = Dense(cfg.latent.size + actions, t.width, cfg.style, rngs)
        self.blocks = BlockCausal(t, np.zeros((1, t.head_dim // 2)), rngs=rngs)
        self.prior = MLP(
            cfg.deter, cfg.hidden, cfg.prior_layers, outputs, style=cfg.style, rngs=rngs
        )
        seen = cfg.posterior.width(embed, cfg.deter)
        self.post = MLP(seen, cfg.hidden, cfg.post_layers, outputs, style=cfg.style, rngs=rngs)
        self.cfg, self.actions = cfg, actions

    def initial(self, batch: int) -> TSSMState:
        """Nothing seen yet; each leaf has its own buffer."""
        zeros = lambda width: jnp.zeros((batch, width))
        cache = self.blocks.empty(batch, 1)
        return TSSMState(
            zeros(self.cfg.deter),
            zeros(self.cfg.latent.size),
            zeros(self.actions),
            jnp.zeros(batch, bool),
            cache,
        )

    def feat(self, state: TSSMState | Latents) -> Float[Array, '*B F']:
        parts = (state.h, state.z)
        return jnp.concatenate(parts if self.cfg.feat == 'hz' else parts[::-1], -1)

    def observe(
        self,
        state: TSSMState,
        embed: Float[Array, 'N E'],
        prev_action: Float[Array, 'N A'],
        is_first: Bool[Array, ' N'],
        key: PRNGKeyArray,
    ) -> tuple[TSSMState, Any, Any]:
        """A real frame arrives: -> (state, post, prior)."""
        h, written = self._next(state.cache, state.z, prev_action, is_first)
        post = self._posterior(embed, h)
        cache = self.blocks.commit(state.cache, written, is_first[:, None])
        state = TSSMState(h, drawn(post, h, key), prev_action, is_first, cache)
        return state, post, self.cfg.latent(self.prior(h))

    def imagine(
        self, state: TSSMState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[TSSMState, Any]:
        """The state that `action` leads to, drawn from the prior: -> (state, prior)."""
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
        """`observe` over T frames: one parallel pass if the posterior is myopic, else a scan."""
        keys = jax.random.split(key, is_first.shape[1])
        if self.cfg.posterior.parallel:
            post = self._posterior(embed, None)
            z = jax.vmap(drawn, in_axes=(1, 1, 0), out_axes=1)(post, embed, keys)
            before = jnp.concatenate([state.z[:, None], z[:, :-1]], 1)
            h, written = self._attend(state.cache, before, prev_action, is_first)
        else:
            h, z, post, written = self._one_by_one(state, embed, prev_action, is_first, keys)
        seen = Latents(h, z)
        memory = sg(self._memory(z, prev_action, is_first))
        prior = self.cfg.latent(self.prior(h))
        return Unrolled(self.feat(seen), post, prior, seen, memory, state.cache, written, is_first)

    def _one_by_one(
        self, state: TSSMState, embed: Array, prev_action: Array, is_first: Array, keys: Array
    ):
        """-> (h [B, T, D], z [B, T, Z], post, keys and values of the window)."""

        def step(state, x):
            embed, action, first, key = x
            h, written = self._next(state.cache, state.z, action, first)
            post = self._posterior(embed, h)
            z = drawn(post, h, key)
            cache = self.blocks.commit(state.cache, written, first[:, None])
            return TSSMState(h, z, action, first, cache), (h, z, post, written)

        by_time = lambda x: x.swapaxes(0, 1)
        _, (h, z, post, written) = jax.lax.scan(
            step, state, (*map(by_time, (embed, prev_action, is_first)), keys)
        )
        joined = lambda x: jnp.moveaxis(
            x[..., 0, :], 0, 3
        )  # [T, B, 1, heads, 1, d] -> [B, 1, heads, T, d]
        return by_time(h), by_time(z), jax.tree.map(by_time, post), jax.tree.map(joined, written)

    def starts(self, unrolled: Unrolled, last: int) -> TSSMState:
        """The states after each of the last so many steps of a window, as rows: [B, T, ...] -> [B *
        last, ...].

        Keys and values are cut from the parallel pass, nothing is computed again.
        """
        before, written, is_first = unrolled.before, unrolled.written, unrolled.is_first
        b, c = len(is_first), self.cfg.transformer.context
        oldest = before.pos[:, None] - c  # number of the token at the front of the line
        order = (oldest + jnp.arange(c)) % c
        number, begin = self.blocks.numbers(is_first, before)
        number, begin = number[:, -last:, None], begin[:, -last:]
        held = number - (number - jnp.arange(c)) % c  # [B, K, C], the token in each slot of a ring
        index = held - oldest[..., None]

        def rings(old: Array, new: Array) -> Array:
            def row(old, new, order, index):  # [1, heads, C, d], [1, heads, T, d]
                line = jnp.concatenate([old[:, :, order], new.astype(old.dtype)], 2)
                return jnp.moveaxis(line[:, :, index], 2, 0)  # [K, 1, heads, C, d]

            return jax.vmap(row)(old, new, order, index).reshape(b * last, *old.shape[1:])

        flat = lambda x: x[:, -last:].reshape(b * last, *x.shape[2:])
        k = tuple(rings(old, new) for old, (new, _) in zip(before.k, written, strict=True))
        v = tuple(rings(old, new) for old, (_, new) in zip(before.v, written, strict=True))
        cache = Cache(k, v, (number[..., 0] + 1).reshape(-1), begin.reshape(-1))
        (h, z), memory = unrolled.state, unrolled.memory
        return TSSMState(flat(h), flat(z), flat(memory.action), flat(memory.first), cache)

    def pack(self, state: TSSMState) -> Memory:
        """What replay stores of a state: (z, action) of its step; keys and values are made anew
        from several.
        """
        return self._memory(state.z, state.action, state.first)

    def _memory(self, z: Array, action: Array, first: Array) -> Memory:
        return Memory(self.cfg.latent.pack(z), action, first, jnp.ones(first.shape, bool))

    def unpack(self, memory: Memory) -> TSSMState:
        """The state after remembered steps [B, C, ...], their tokens taken in at once. Constant: no
        gradient passes.

        A token needs the z before it, so C steps are C - 1 tokens. What is missing, at the front,
        is never looked at.
        """
        z = self.cfg.latent.unpack(memory.z)
        b, c = memory.known.shape
        state = self.initial(b)._replace(
            z=z[:, -1], action=memory.action[:, -1], first=memory.first[:, -1]
        )
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
        """How much each step of a window, which follows `state`, attends to each token of it.

        z: see `unroll`.
        """
        before = jnp.concatenate([state.z[:, None], z[:, :-1]], 1)
        attention_maps: list[Array] = []
        self._attend(state.cache, before, prev_action, is_first, attention_maps)
        return jnp.stack(attention_maps)[
            :, :, 0, :, :, self.cfg.transformer.context :
        ]  # without the cache's

    def _next(
        self, cache: Cache, z: Array, action: Array, is_first: Array
    ) -> tuple[Array, list[tuple[Array, Array]]]:
        """One step [N]: -> (h, its keys and values). z: of the step before."""
        h, written = self._attend(cache, z[:, None], action[:, None], is_first[:, None])
        return h[:, 0], written

    def _attend(
        self,
        cache: Cache,
        z: Array,
        action: Array,
        is_first: Array,
        attention_maps: list[Array] | None = None,
    ):
        """T steps [B, T] after those in the cache: -> (h [B, T, D], keys and values). z: of the
        steps before them.
        """
        tokens = self._tokens(cache, z, action, is_first, is_first)
        layer_outputs, written = self.blocks.layer_outputs(
            tokens[:, :, None], is_first, None, cache, attention_maps
        )
        return self.cfg.h(self.blocks, layer_outputs)[:, :, 0].astype(jnp.float32), written

    def _tokens(
        self, cache: Cache | None, z: Array, action: Array, is_first: Array, begins: Array
    ) -> Array:
        """x_t = act(W [z_{t-1}, a_t]), [B, T, D]. Actions beyond [-1, 1] are scaled back, as in
        Dreamer V3.

        begins: where absolute positions start to count.
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
    """z, with the leading dims of `like`."""
    return dist.sample(key).reshape(*like.shape[:-1], -1)


def sinusoid(position: Array, width: int) -> Float[Array, '*B D']:
    """Absolute positions: sines, then cosines, of position / 10000^(2i / width)."""
    angles = rope(position, width, 1e4)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
