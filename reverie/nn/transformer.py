"""Block-causal efficient transformer over frames of tokens; Dreamer 4 section 3.4.

Tokens are [B, T, S, D]. Space layers let the tokens of one frame see each other under a static [S,
S] mask; every `time_every`-th layer lets each token see its own past, causally, through a sliding
window of `context` frames that never reaches across an episode's start. The same layers run a whole
window at once (training, prefill) and one frame against a cache of keys and values (acting,
imagination); both give the same numbers.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from reverie.nn.attention import Kernel, Keys, attend, attention_weights, rope, rotate
from reverie.nn.core import LayerNorm, Linear, NoNorm, RMSNorm


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a block-causal transformer.

    The paper gives the structure but no widths; head size, MLP ratio, soft cap, RoPE base and the
    ratio of query to key heads are not from the paper. The fields after `dtype` are for other
    papers' layers: a soft cap or a RoPE base of 0 leaves it out, `residual` 'gtrxl' puts a `Gate`
    where x + y was, `mlp` 'relu' is two layers with biases.

    kernel: what computes attention, see `attend`; the numbers are the same up to rounding.
    """

    width: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp_ratio: float = 4.0
    time_every: int = 4
    context: int = 64
    softcap: float = 50.0
    rope_base: float = 1e4
    dtype: str = 'bfloat16'
    norm: Literal['rms', 'layer'] = 'rms'
    qk_norm: bool = True
    mlp: Literal['swiglu', 'relu'] = 'swiglu'
    residual: Literal['add', 'gtrxl'] = 'add'
    kernel: Kernel = 'xla'

    def normaliser(self) -> RMSNorm | LayerNorm:
        """Of the residual stream."""
        return RMSNorm(self.width) if self.norm == 'rms' else LayerNorm(self.width, 1e-5)


class Cache(NamedTuple):
    """Keys and values of the last `context` frames of every time layer, as a ring; slot = frame
    number % context.
    """

    k: tuple[Float[Array, 'B S heads C d'], ...]
    v: tuple[Float[Array, 'B S heads C d'], ...]
    pos: Int[Array, ' B']  # frames seen by each row
    start: Int[Array, ' B']  # number of the frame that began the row's episode


def where_rows_cache(rows: Bool[Array, ' B'], new: Cache, old: Cache) -> Cache:
    """`old` where a row does not move on, else `new`, without copying keys and values.

    The slot that a row which stays would have written next holds a frame just out of its sight: it
    may be anything.
    """
    return Cache(
        new.k, new.v, jnp.where(rows, new.pos, old.pos), jnp.where(rows, new.start, old.start)
    )


class Attention(nnx.Module):
    """Projections, QK-norm and rotation around `attend`."""

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        inner, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q = Linear(cfg.width, inner, bias=False, dtype=dtype, rngs=rngs)
        self.kv = Linear(cfg.width, 2 * kv, bias=False, dtype=dtype, rngs=rngs)
        self.o = Linear(
            inner, cfg.width, bias=False, scale=(2 * cfg.layers) ** -0.5, dtype=dtype, rngs=rngs
        )
        self.norm_q, self.norm_k = (
            RMSNorm(cfg.head_dim) if cfg.qk_norm else NoNorm() for _ in range(2)
        )
        self.cfg = cfg

    def project(self, x: Float[Array, 'B S N D'], angles) -> tuple[Array, Array, Array]:
        """-> q, k, v [B, S, heads, N, d]; N is the axis attended along."""
        split = lambda y, heads: y.reshape(*x.shape[:3], heads, -1).swapaxes(2, 3)
        q = split(self.q(x), self.cfg.heads)
        k, v = jnp.split(self.kv(x), 2, -1)
        k, v = split(k, self.cfg.kv_heads), split(v, self.cfg.kv_heads)
        q, k = self.norm_q(q), self.norm_k(k)
        return (rotate(q, angles), rotate(k, angles), v) if self.cfg.rope_base else (q, k, v)

    def __call__(self, q: Array, groups: tuple[Keys, ...]) -> Float[Array, 'B S N D']:
        out = attend(q, groups, self.cfg.softcap, self.cfg.kernel).swapaxes(2, 3)
        return self.o(out.reshape(*out.shape[:3], -1))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), hidden width `mlp_ratio` x width."""

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs):
        dtype, hidden = jnp.dtype(cfg.dtype), int(cfg.mlp_ratio * cfg.width)
        self.up = Linear(cfg.width, 2 * hidden, bias=False, dtype=dtype, rngs=rngs)
        self.down = Linear(
            hidden, cfg.width, bias=False, scale=(2 * cfg.layers) ** -0.5, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        gate, up = jnp.split(self.up(x), 2, -1)
        return self.down(jax.nn.silu(gate) * up)


class ReluMLP(nnx.Module):
    """down(relu(up(x))) with biases, hidden width `mlp_ratio` x width; the first transformers',
    TransDreamer's.
    """

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs):
        dtype, hidden = jnp.dtype(cfg.dtype), int(cfg.mlp_ratio * cfg.width)
        self.up = Linear(cfg.width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(
            hidden, cfg.width, scale=(2 * cfg.layers) ** -0.5, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        return self.down(jax.nn.relu(self.up(x)))


class Add(nnx.Module):
    """x + y."""

    def __call__(self, x: Array, y: Array) -> Array:
        return x + y


class Gate(nnx.Module):
    """(1 - u) x + u tanh(W_c y + r * U_c x), r = s(W_r y + U_r x), u = s(W_u y + U_u x - 0.1);
    GTrXL section 3.2.

    The stream x passes nearly unchanged at first. 0.1 is TransDreamer's. `of_y`, `of_x`: r, u and c
    side by side.
    """

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs):
        d, dtype = cfg.width, jnp.dtype(cfg.dtype)
        self.of_y = Linear(d, 3 * d, bias=False, dtype=dtype, rngs=rngs)
        self.of_x = Linear(d, 3 * d, bias=False, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(d))  # of u

    def __call__(self, x: Float[Array, '*B D'], y: Float[Array, '*B D']) -> Float[Array, '*B D']:
        yr, yu, yc = jnp.split(self.of_y(y).astype(jnp.float32), 3, -1)
        xr, xu, xc = jnp.split(self.of_x(x).astype(jnp.float32), 3, -1)
        r, u = jax.nn.sigmoid(yr + xr), jax.nn.sigmoid(yu + xu + self.bias[...] - 0.1)
        return ((1 - u) * x + u * jnp.tanh(yc + r * xc)).astype(x.dtype)


class Layer(nnx.Module):
    """x + attention(norm x), then x + SwiGLU(norm x); along space or along time. Other configs have
    other parts.
    """

    def __init__(self, cfg: TransformerConfig, along_time: bool, rngs: nnx.Rngs):
        self.norm1, self.norm2 = cfg.normaliser(), cfg.normaliser()
        self.attention = Attention(cfg, rngs)
        self.mlp = SwiGLU(cfg, rngs) if cfg.mlp == 'swiglu' else ReluMLP(cfg, rngs)
        self.join1, self.join2 = (
            Gate(cfg, rngs) if cfg.residual == 'gtrxl' else Add() for _ in range(2)
        )
        self.along_time = along_time

    def space(
        self, x: Float[Array, 'B T S D'], mask: Bool[Array, 'S S'] | None, angles
    ) -> Float[Array, 'B T S D']:
        q, k, v = self.attention.project(self.norm1(x), angles)
        x = self.join1(
            x, self.attention(q, (Keys(k, v, mask if mask is None else mask[None, None, None]),))
        )
        return self.join2(x, self.mlp(self.norm2(x)))

    def time(
        self,
        x: Float[Array, 'B T S D'],
        mask: Bool[Array, 'B T T'],
        angles,
        past: Keys | None,
        attention_maps=None,
    ):
        """-> (x, k, v) with the new frames' keys and values [B, S, heads, T, d].

        looks: a list to which the attention of the new frames is added, [B, S, heads, T, K], the
        past's keys first.
        """
        q, k, v = self.attention.project(self.norm1(x).swapaxes(1, 2), angles)
        groups: tuple[Keys, ...] = (Keys(k, v, mask[:, None, None]),)
        groups = groups if past is None else (past, *groups)
        if attention_maps is not None:
            attention_maps.append(attention_weights(q, groups, self.attention.cfg.softcap))
        x = self.join1(x, self.attention(q, groups).swapaxes(1, 2))
        return self.join2(x, self.mlp(self.norm2(x))), k, v


class BlockCausal(nnx.Module):
    """The transformer: `time_every - 1` space layers, then one time layer, repeated.

    `time_tokens` are the token slots the time layers act on (the first so many), None for all of
    them.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        space_angles: np.ndarray,
        *,
        time_tokens: int | None = None,
        rngs,
    ):
        along_time = [(i + 1) % cfg.time_every == 0 for i in range(cfg.layers)]
        self.layers = nnx.List(Layer(cfg, t, rngs) for t in along_time)
        self.norm = cfg.normaliser()
        self.cfg = cfg
        self.space_angles = tuple(map(tuple, np.asarray(space_angles).tolist()))  # [S, d/2], static
        self.time_tokens = time_tokens
        self.time_layers = sum(along_time)

    def empty(self, batch: int, tokens: int) -> Cache:
        """A cache that has seen nothing; every leaf has its own buffer."""
        shape = (batch, tokens, self.cfg.kv_heads, self.cfg.context, self.cfg.head_dim)
        zeros = lambda: tuple(jnp.zeros(shape, self.cfg.dtype) for _ in range(self.time_layers))
        return Cache(zeros(), zeros(), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    def __call__(
        self,
        x: Float[Array, 'B T S D'],
        is_first: Bool[Array, 'B T'],
        mask: Bool[Array, 'S S'] | None = None,
        cache: Cache | None = None,
        attention_maps: list[Array] | None = None,
    ) -> tuple[Float[Array, 'B T S D'], list[tuple[Array, Array]]]:
        """-> (normed tokens, [(k, v)] of the new frames per time layer). Frame t sees its episode's
        last C frames.

        With a cache the new frames follow the cached ones; the cache is only read: `commit` writes.
        looks: see `Layer.time`.
        """
        layer_outputs, written = self.layer_outputs(x, is_first, mask, cache, attention_maps)
        return self.norm(layer_outputs[-1]), written

    def layer_outputs(
        self,
        x: Float[Array, 'B T S D'],
        is_first: Bool[Array, 'B T'],
        mask: Bool[Array, 'S S'] | None = None,
        cache: Cache | None = None,
        attention_maps: list[Array] | None = None,
    ) -> tuple[list[Float[Array, 'B T S D']], list[tuple[Array, Array]]]:
        """As the call, with the tokens after every layer, not normed."""
        s = x.shape[2]
        number, begin = self.numbers(is_first, cache)
        oldest = jnp.maximum(begin, number - self.cfg.context + 1)[..., None]
        seen = (number[:, None] <= number[..., None]) & (number[:, None] >= oldest)
        if cache is not None:
            slot = jnp.arange(self.cfg.context)
            newest = cache.pos[:, None] - 1
            held = (
                newest - (newest - slot) % self.cfg.context
            )  # frame number in each slot, < 0 if none yet
            past_mask = ((held[:, None] >= oldest) & (held[:, None] >= 0))[:, None, None]
        angles = rope(number, self.cfg.head_dim, self.cfg.rope_base or 1.0)[:, None, None]
        space_angles = jnp.asarray(self.space_angles, jnp.float32)[:s]
        written: list[tuple[Array, Array]] = []
        layer_outputs: list[Array] = []
        for layer in self.layers:
            if not layer.along_time:
                layer_outputs.append(x := layer.space(x, mask, space_angles))
                continue
            n = s if self.time_tokens is None else self.time_tokens
            i = len(written)
            past = None if cache is None else Keys(cache.k[i][:, :n], cache.v[i][:, :n], past_mask)
            y, k, v = layer.time(x[:, :, :n], seen, angles, past, attention_maps)
            layer_outputs.append(x := y if n == s else jnp.concatenate([y, x[:, :, n:]], 2))
            written.append((k, v))
        return layer_outputs, written

    def numbers(
        self, is_first: Bool[Array, 'B T'], cache: Cache | None
    ) -> tuple[Int[Array, 'B T'], Int[Array, 'B T']]:
        """-> (number of each new frame, number of the frame that began its episode); without a
        cache from 0 on.
        """
        b, t = is_first.shape
        pos, start = (jnp.zeros(b, jnp.int32),) * 2 if cache is None else (cache.pos, cache.start)
        number = pos[:, None] + jnp.arange(t)
        return number, jax.lax.cummax(jnp.where(is_first, number, start[:, None]), axis=1)

    def commit(
        self, cache: Cache, written: list[tuple[Array, Array]], is_first: Bool[Array, 'B T']
    ) -> Cache:
        """Write the new frames' keys and values into the ring. T <= C."""
        t = is_first.shape[1]
        number = cache.pos[:, None] + jnp.arange(t)
        slots = number % self.cfg.context

        def put(old, new):  # [B, S, heads, C, d] <- [B, S, heads, T, d]
            return jax.vmap(lambda o, n, i: o.at[:, :, i].set(n.astype(o.dtype)))(old, new, slots)

        k = tuple(put(c, w[0]) for c, w in zip(cache.k, written, strict=True))
        v = tuple(put(c, w[1]) for c, w in zip(cache.v, written, strict=True))
        start = jnp.maximum(cache.start, jnp.where(is_first, number, 0).max(1))
        return Cache(k, v, cache.pos + t, start)

    def prefill(self, written: list[tuple[Array, Array]], is_first: Bool[Array, 'B T']) -> Cache:
        """The cache that a parallel pass over T frames leaves behind; T may exceed the context."""
        b, t = is_first.shape
        c = self.cfg.context
        kept = min(t, c)
        slots = (np.arange(t - kept, t)) % c

        def ring(x):
            x = x[:, :, :, t - kept :].astype(self.cfg.dtype)
            return jnp.zeros((*x.shape[:3], c, x.shape[4]), x.dtype).at[:, :, :, slots].set(x)

        start = jnp.where(is_first, jnp.arange(t), 0).max(1).astype(jnp.int32)
        pos = jnp.full(b, t, jnp.int32)
        return Cache(
            tuple(ring(k) for k, _ in written), tuple(ring(v) for _, v in written), pos, start
        )
