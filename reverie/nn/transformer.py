"""Block-causal efficient transformer over frames of tokens; Dreamer 4 section 3.4.

Tokens are [B, T, S, D]. In space layers the tokens of a frame attend to each other under a static
[S, S] mask; in every `time_every`-th layer each token attends to its own past, causally, in a
sliding window of `context` frames that never reaches across an episode's start. The same layers run
a whole window at once (training, prefill) and one frame against a cache of keys and values (acting,
imagination); both give the same numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from reverie.nn.attention import Kernel, Keys, attend, attention_weights, rope, rotate
from reverie.nn.core import LayerNorm, Linear, NoNorm, RMSNorm

KeysValues: TypeAlias = list[tuple[Array, Array]]  # (k, v) of each time layer's new frames

NORMS: dict[str, Callable[[int], RMSNorm | LayerNorm]] = {
    'rms': RMSNorm, 'layer': functools.partial(LayerNorm, eps=1e-5),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a block-causal transformer.

    The paper gives the structure but no widths; head size, MLP ratio, soft cap, RoPE base and the
    ratio of query to key heads are not from the paper. The layers of other papers are chosen by
    `norm`, `qk_norm`, `mlp` and `residual`.
    """

    width: int = 256
    """Width D of a token."""
    layers: int = 8
    """Space and time layers together."""
    heads: int = 4
    """Heads of the queries."""
    kv_heads: int = 2
    """Heads of keys and values; each serves heads / kv_heads query heads."""
    head_dim: int = 64
    """Width of one head."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, in widths of a token."""
    time_every: int = 4
    """Every so many-th layer attends along time, the others along space."""
    context: int = 64
    """Frames that time layers attend to, the newest included."""
    softcap: float = 50.0
    """Bound c of attention logits, c tanh(x / c); 0 for none."""
    rope_base: float = 1e4
    """Base of the rotary positions' wavelengths; 0 for no rotation."""
    dtype: str = 'bfloat16'
    """Type of the products and the cache; parameters are fp32."""
    norm: Literal['rms', 'layer'] = 'rms'
    """Norm of the residual stream: RMSNorm or LayerNorm."""
    qk_norm: bool = True
    """Queries and keys have an RMSNorm."""
    mlp: Literal['swiglu', 'relu'] = 'swiglu'
    """MLP of a layer: SwiGLU, or two linear maps with biases around a ReLU (TransDreamer)."""
    residual: Literal['add', 'gtrxl'] = 'add'
    """Joining of the stream x and a layer's output y: x + y, or the gate of GTrXL."""
    kernel: Kernel = 'xla'
    """Implementation of attention, see `attend`; the numbers are the same up to rounding."""

    def normaliser(self) -> RMSNorm | LayerNorm:
        """Build a norm of the residual stream."""
        return NORMS[self.norm](self.width)


class Cache(NamedTuple):
    """Ring of keys and values of the last `context` frames, for every time layer; slot = frame
    number % context.
    """

    k: tuple[Float[Array, 'B S heads C d'], ...]
    v: tuple[Float[Array, 'B S heads C d'], ...]
    pos: Int[Array, ' B']  # frames seen by each row
    start: Int[Array, ' B']  # number of the frame that began the row's episode


def where_rows_cache(rows: Bool[Array, ' B'], new: Cache, old: Cache) -> Cache:
    """Take `new` in rows that advance and `old` in the others, without copying keys and values.

    In rows that do not advance, the overwritten slot had just left the window, so it is never read.
    """
    pos = jnp.where(rows, new.pos, old.pos)
    start = jnp.where(rows, new.start, old.start)
    return Cache(new.k, new.v, pos, start)


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
        norm = RMSNorm if cfg.qk_norm else NoNorm
        self.norm_q, self.norm_k = norm(cfg.head_dim), norm(cfg.head_dim)
        self.cfg = cfg

    def project(
        self, x: Float[Array, 'B S N D'], angles: Array
    ) -> tuple[
        Float[Array, 'B S heads N d'], Float[Array, 'B S kv N d'], Float[Array, 'B S kv N d']
    ]:
        """Return q, k and v; N is the axis attended along."""

        def split(y: Array, heads: int) -> Array:
            return y.reshape(*x.shape[:3], heads, -1).swapaxes(2, 3)

        q = split(self.q(x), self.cfg.heads)
        k, v = jnp.split(self.kv(x), 2, -1)
        k, v = split(k, self.cfg.kv_heads), split(v, self.cfg.kv_heads)
        q, k = self.norm_q(q), self.norm_k(k)
        return (rotate(q, angles), rotate(k, angles), v) if self.cfg.rope_base else (q, k, v)

    def tie(self) -> None:
        """Set the keys' kernel to the queries', so that a token attends to those like it at first."""
        cfg, kernel = self.cfg, self.q.kernel[...].reshape(self.cfg.width, self.cfg.heads, -1)
        keys = kernel[:, :: cfg.heads // cfg.kv_heads].reshape(cfg.width, -1)
        values = jnp.split(self.kv.kernel[...], 2, -1)[1]
        self.kv.kernel[...] = jnp.concatenate([keys, values], -1)

    def __call__(self, q: Array, groups: tuple[Keys, ...]) -> Float[Array, 'B S N D']:
        out = attend(q, groups, self.cfg.softcap, self.cfg.kernel).swapaxes(2, 3)
        return self.o(out.reshape(*out.shape[:3], -1))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) with hidden width `mlp_ratio` x width."""

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
    """down(relu(up(x))) with biases and hidden width `mlp_ratio` x width; the first transformers',
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

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs):
        pass

    def __call__(self, x: Array, y: Array) -> Array:
        return x + y


class Gate(nnx.Module):
    """(1 - u) x + u tanh(W_c y + r * U_c x), r = s(W_r y + U_r x), u = s(W_u y + U_u x - 0.1);
    GTrXL section 3.2.

    The stream x passes nearly unchanged at first. 0.1 is TransDreamer's. The kernels `of_y` and
    `of_x` hold W and U of r, u and c side by side.
    """

    def __init__(self, cfg: TransformerConfig, rngs: nnx.Rngs):
        d, dtype = cfg.width, jnp.dtype(cfg.dtype)
        self.of_y = Linear(d, 3 * d, bias=False, dtype=dtype, rngs=rngs)
        self.of_x = Linear(d, 3 * d, bias=False, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(d))  # added to the logits of u

    def __call__(self, x: Float[Array, '*B D'], y: Float[Array, '*B D']) -> Float[Array, '*B D']:
        yr, yu, yc = jnp.split(self.of_y(y).astype(jnp.float32), 3, -1)
        xr, xu, xc = jnp.split(self.of_x(x).astype(jnp.float32), 3, -1)
        r, u = jax.nn.sigmoid(yr + xr), jax.nn.sigmoid(yu + xu + self.bias[...] - 0.1)
        return ((1 - u) * x + u * jnp.tanh(yc + r * xc)).astype(x.dtype)


MLPS: dict[str, type[SwiGLU | ReluMLP]] = {'swiglu': SwiGLU, 'relu': ReluMLP}
JOINS: dict[str, type[Add | Gate]] = {'add': Add, 'gtrxl': Gate}


class Layer(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x), along space or along time; `cfg` names the norm,
    the MLP, and what joins x and y in the place of +.
    """

    def __init__(self, cfg: TransformerConfig, along_time: bool, rngs: nnx.Rngs):
        self.norm1, self.norm2 = cfg.normaliser(), cfg.normaliser()
        self.attention = Attention(cfg, rngs)
        self.mlp = MLPS[cfg.mlp](cfg, rngs)
        join = JOINS[cfg.residual]
        self.join1, self.join2 = join(cfg, rngs), join(cfg, rngs)
        self.along_time = along_time

    def space(
        self, x: Float[Array, 'B T S D'], mask: Bool[Array, 'S S'] | None, angles: Array
    ) -> Float[Array, 'B T S D']:
        q, k, v = self.attention.project(self.norm1(x), angles)
        keys = Keys(k, v, mask if mask is None else mask[None, None, None])
        x = self.join1(x, self.attention(q, (keys,)))
        return self.join2(x, self.mlp(self.norm2(x)))

    def time(
        self,
        x: Float[Array, 'B T S D'],
        mask: Bool[Array, 'B T T'],
        angles: Array,
        past: Keys | None,
        attention_maps: list[Array] | None = None,
    ) -> tuple[
        Float[Array, 'B T S D'], Float[Array, 'B S heads T d'], Float[Array, 'B S heads T d']
    ]:
        """Return x, and keys and values of the new frames.

        attention_maps: gets the attention of the new frames appended, [B, S, heads, T, K], the
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
    """Transformer of `time_every - 1` space layers and one time layer, repeated.

    time_tokens: time layers act on the first so many tokens of a frame; None for all of them.
    time_first: the layers in reverse, each time layer before the space layers that read it.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        space_angles: np.ndarray,
        *,
        time_tokens: int | None = None,
        time_first: bool = False,
        rngs: nnx.Rngs,
    ):
        along_time = [(i + 1) % cfg.time_every == 0 for i in range(cfg.layers)]
        if time_first:
            along_time.reverse()
        self.layers = nnx.List(Layer(cfg, t, rngs) for t in along_time)
        self.norm = cfg.normaliser()
        self.cfg = cfg
        self.space_angles = tuple(map(tuple, np.asarray(space_angles).tolist()))  # [S, d/2], static
        self.time_tokens = time_tokens
        self.time_layers = sum(along_time)

    def empty(self, batch: int, tokens: int) -> Cache:
        """Build a cache without frames; every leaf has its own buffer."""
        shape = (batch, tokens, self.cfg.kv_heads, self.cfg.context, self.cfg.head_dim)
        k, v = (
            tuple(jnp.zeros(shape, self.cfg.dtype) for _ in range(self.time_layers))
            for _ in range(2)
        )
        return Cache(k, v, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    def __call__(
        self,
        x: Float[Array, 'B T S D'],
        is_first: Bool[Array, 'B T'],
        mask: Bool[Array, 'S S'] | None = None,
        cache: Cache | None = None,
        attention_maps: list[Array] | None = None,
    ) -> tuple[Float[Array, 'B T S D'], KeysValues]:
        """Return the normed tokens, and keys and values of the new frames for each time layer.

        Frame t attends to the last C frames of its episode. With a cache the new frames follow the
        cached ones; it is only read, `commit` writes. attention_maps: see `Layer.time`.
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
    ) -> tuple[list[Float[Array, 'B T S D']], KeysValues]:
        """Run the layers as `__call__` does, and return the tokens after each of them, not normed."""
        s = x.shape[2]
        number, begin = self.numbers(is_first, cache)
        oldest = jnp.maximum(begin, number - self.cfg.context + 1)[..., None]
        seen = (number[:, None] <= number[..., None]) & (number[:, None] >= oldest)
        if cache is not None:
            slot = jnp.arange(self.cfg.context)
            newest = cache.pos[:, None] - 1
            # the number of the frame in each slot, below 0 if there is none yet
            held = newest - (newest - slot) % self.cfg.context
            past_mask = ((held[:, None] >= oldest) & (held[:, None] >= 0))[:, None, None]
        angles = rope(number, self.cfg.head_dim, self.cfg.rope_base or 1.0)[:, None, None]
        space_angles = jnp.asarray(self.space_angles, jnp.float32)[:s]
        written: KeysValues = []
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
        """Return the number of each new frame, and that of the first frame of its episode; numbers
        start at 0 without a cache.
        """
        b, t = is_first.shape
        pos, start = (jnp.zeros(b, jnp.int32),) * 2 if cache is None else (cache.pos, cache.start)
        number = pos[:, None] + jnp.arange(t)
        return number, jax.lax.cummax(jnp.where(is_first, number, start[:, None]), axis=1)

    def commit(self, cache: Cache, written: KeysValues, is_first: Bool[Array, 'B T']) -> Cache:
        """Write the new frames' keys and values into the ring. T <= C."""
        t = is_first.shape[1]
        number = cache.pos[:, None] + jnp.arange(t)
        slots = number % self.cfg.context

        @jax.vmap
        def put(
            old: Array, new: Array, slots: Array
        ) -> Array:  # [S, heads, C, d], [S, heads, T, d]
            return old.at[:, :, slots].set(new.astype(old.dtype))

        k = tuple(put(c, w[0], slots) for c, w in zip(cache.k, written, strict=True))
        v = tuple(put(c, w[1], slots) for c, w in zip(cache.v, written, strict=True))
        start = jnp.maximum(cache.start, jnp.where(is_first, number, 0).max(1))
        return Cache(k, v, cache.pos + t, start)

    def prefill(self, written: KeysValues, is_first: Bool[Array, 'B T']) -> Cache:
        """Build the cache from a parallel pass over T frames; T may exceed the context."""
        b, t = is_first.shape
        c = self.cfg.context
        kept = min(t, c)
        slots = (np.arange(t - kept, t)) % c

        def ring(x: Array) -> Array:
            x = x[:, :, :, t - kept :].astype(self.cfg.dtype)
            return jnp.zeros((*x.shape[:3], c, x.shape[4]), x.dtype).at[:, :, :, slots].set(x)

        k, v = tuple(ring(k) for k, _ in written), tuple(ring(v) for _, v in written)
        start = jnp.where(is_first, jnp.arange(t), 0).max(1).astype(jnp.int32)
        return Cache(k, v, jnp.full(b, t, jnp.int32), start)
