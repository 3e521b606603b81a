"""Block-causal efficient transformer over frames of tokens; Dreamer 4 section 3.4.

Tokens are [B, T, S, D]. Space layers let the tokens of one frame see each other under a static [S, S] mask; every
`time_every`-th layer lets each token see its own past, causally, through a sliding window of `context` frames that
never reaches across an episode's start. The same layers run a whole window at once (training, prefill) and one frame
against a cache of keys and values (acting, imagination); both give the same numbers.
"""

import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from reverie.nn.core import Linear, RMSNorm

Positions = TypeVar('Positions', Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a block-causal transformer.

    The paper gives the structure but no widths; head size, MLP ratio, soft cap, RoPE base and the ratio of query to
    key heads are not from the paper.
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


class Cache(NamedTuple):
    """Keys and values of the last `context` frames of every time layer, as a ring; slot = frame number % context."""

    k: tuple[Float[Array, 'B S heads C d'], ...]
    v: tuple[Float[Array, 'B S heads C d'], ...]
    pos: Int[Array, ' B']  # frames seen by each row
    start: Int[Array, ' B']  # number of the frame that began the row's episode


class Keys(NamedTuple):
    """What queries may look at: keys, values and a mask that broadcasts to [B, S, heads, queries, K]."""

    k: Float[Array, 'B S heads K d']
    v: Float[Array, 'B S heads K d']
    mask: Bool[Array, '#B #S #heads #Q K'] | None


def rope(positions: Positions, head_dim: int, base: float) -> Positions:
    """Rotation angles of one-dimensional positions [*B], for each pair of channels; NumPy in, NumPy out."""
    freqs = base ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return positions[..., None].astype(np.float32) * freqs


def rotate(x: Float[Array, '*B d'], angles: Float[Array, '*#B half']) -> Float[Array, '*B d']:
    """RoPE: turn each pair (x[i], x[i + d/2]) by its angle."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def attend(q: Float[Array, 'B S heads Q d'], groups: tuple[Keys, ...], softcap: float) -> Float[Array, 'B S heads Q d']:
    """softmax(cap(q k / sqrt d)) v over the union of `groups`; cap(x) = softcap tanh(x / softcap).

    Grouped queries: q has a multiple of the key heads. Softmax in fp32. Several groups share one softmax without
    their keys being copied next to each other, so a cache is only ever read.
    """
    b, s, heads, n, d = q.shape
    kv = groups[0].k.shape[2]
    q = q.reshape(b, s, kv, heads // kv * n, d)
    logits = []
    for keys in groups:
        x = jnp.einsum('bshqd,bshkd->bshqk', q, keys.k, preferred_element_type=jnp.float32)
        x = softcap * jnp.tanh(x * (d**-0.5 / softcap))
        x = x.reshape(b, s, heads, n, -1)
        logits.append(x if keys.mask is None else jnp.where(keys.mask, x, -1e30))
    weights = jax.nn.softmax(jnp.concatenate(logits, -1), -1).astype(q.dtype)
    weights = weights.reshape(b, s, kv, heads // kv * n, -1)
    parts, first = [], 0
    for keys in groups:
        last = first + keys.k.shape[3]
        parts.append(jnp.einsum('bshqk,bshkd->bshqd', weights[..., first:last], keys.v))
        first = last
    return sum(parts[1:], parts[0]).reshape(b, s, heads, n, d)


class Attention(nnx.Module):
    """Projections, QK-norm and rotation around `attend`."""

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        inner, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q = Linear(cfg.width, inner, bias=False, dtype=dtype, rngs=rngs)
        self.kv = Linear(cfg.width, 2 * kv, bias=False, dtype=dtype, rngs=rngs)
        self.o = Linear(inner, cfg.width, bias=False, scale=(2 * cfg.layers) ** -0.5, dtype=dtype, rngs=rngs)
        self.norm_q, self.norm_k = RMSNorm(cfg.head_dim), RMSNorm(cfg.head_dim)
        self.cfg = cfg

    def project(self, x: Float[Array, 'B S N D'], angles) -> tuple[Array, Array, Array]:
        """-> q, k, v [B, S, heads, N, d]; N is the axis attended along."""
        split = lambda y, heads: y.reshape(*x.shape[:3], heads, -1).swapaxes(2, 3)
        q = split(self.q(x), self.cfg.heads)
        k, v = jnp.split(self.kv(x), 2, -1)
        k, v = split(k, self.cfg.kv_heads), split(v, self.cfg.kv_heads)
        return rotate(self.norm_q(q), angles), rotate(self.norm_k(k), angles), v

    def __call__(self, q: Array, groups: tuple[Keys, ...]) -> Float[Array, 'B S N D']:
        out = attend(q, groups, self.cfg.softcap).swapaxes(2, 3)
        return self.o(out.reshape(*out.shape[:3], -1))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), hidden width `mlp_ratio` x width."""

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs):
        dtype, hidden = jnp.dtype(cfg.dtype), int(cfg.mlp_ratio * cfg.width)
        self.up = Linear(cfg.width, 2 * hidden, bias=False, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, cfg.width, bias=False, scale=(2 * cfg.layers) ** -0.5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        gate, up = jnp.split(self.up(x), 2, -1)
        return self.down(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """x + attention(norm x), then x + SwiGLU(norm x); along space or along time."""

    def __init__(self, cfg: TransformerConfig, along_time: bool, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(cfg.width), RMSNorm(cfg.width)
        self.attention, self.mlp = Attention(cfg, rngs), SwiGLU(cfg, rngs)
        self.along_time = along_time

    def space(self, x: Float[Array, 'B T S D'], mask: Bool[Array, 'S S'] | None, angles) -> Float[Array, 'B T S D']:
        q, k, v = self.attention.project(self.norm1(x), angles)
        x = x + self.attention(q, (Keys(k, v, mask if mask is None else mask[None, None, None]),))
        return x + self.mlp(self.norm2(x))

    def time(self, x: Float[Array, 'B T S D'], mask: Bool[Array, 'B T T'], angles, past: Keys | None):
        """-> (x, k, v) with the new frames' keys and values [B, S, heads, T, d]."""
        q, k, v = self.attention.project(self.norm1(x).swapaxes(1, 2), angles)
        groups = (Keys(k, v, mask[:, None, None]),)
        x = x + self.attention(q, groups if past is None else (past, *groups)).swapaxes(1, 2)
        return x + self.mlp(self.norm2(x)), k, v


class BlockCausal(nnx.Module):
    """The transformer: `time_every - 1` space layers, then one time layer, repeated.

    `time_tokens` are the token slots the time layers act on (the first so many), None for all of them.
    """

    def __init__(self, cfg: TransformerConfig, space_angles: np.ndarray, *, time_tokens: int | None = None, rngs):
        along_time = [(i + 1) % cfg.time_every == 0 for i in range(cfg.layers)]
        self.layers = nnx.List(Layer(cfg, t, rngs) for t in along_time)
        self.norm = RMSNorm(cfg.width)
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
    ) -> tuple[Float[Array, 'B T S D'], list[tuple[Array, Array]]]:
        """-> (normed tokens, [(k, v)] of the new frames per time layer). Frame t sees its episode's last C frames.

        With a cache the new frames follow the cached ones; the cache is only read: `commit` writes.
        """
        b, t, s, _ = x.shape
        pos = jnp.zeros(b, jnp.int32) if cache is None else cache.pos
        number = pos[:, None] + jnp.arange(t)  # frame numbers [B, T]
        start = jnp.zeros(b, jnp.int32) if cache is None else cache.start
        begin = jax.lax.cummax(jnp.where(is_first, number, start[:, None]), axis=1)
        oldest = jnp.maximum(begin, number - self.cfg.context + 1)[..., None]
        seen = (number[:, None] <= number[..., None]) & (number[:, None] >= oldest)
        if cache is not None:
            slot = jnp.arange(self.cfg.context)
            newest = pos[:, None] - 1
            held = newest - (newest - slot) % self.cfg.context  # frame number in each slot, < 0 if none yet
            past_mask = ((held[:, None] >= oldest) & (held[:, None] >= 0))[:, None, None]
        angles = rope(number, self.cfg.head_dim, self.cfg.rope_base)[:, None, None]
        space_angles = jnp.asarray(self.space_angles, jnp.float32)[:s]
        written: list[tuple[Array, Array]] = []
        for layer in self.layers:
            if not layer.along_time:
                x = layer.space(x, mask, space_angles)
                continue
            n = s if self.time_tokens is None else self.time_tokens
            i = len(written)
            past = None if cache is None else Keys(cache.k[i][:, :n], cache.v[i][:, :n], past_mask)
            y, k, v = layer.time(x[:, :, :n], seen, angles, past)
            x = y if n == s else jnp.concatenate([y, x[:, :, n:]], 2)
            written.append((k, v))
        return self.norm(x), written

    def commit(self, cache: Cache, written: list[tuple[Array, Array]], is_first: Bool[Array, 'B T']) -> Cache:
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
        return Cache(tuple(ring(k) for k, _ in written), tuple(ring(v) for _, v in written), pos, start)
