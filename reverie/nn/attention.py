"""Attention over groups of keys and values, with rotary positions; Dreamer 4 section 3.4."""

import functools
import importlib.util
import logging
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from reverie.types import UserError

log = logging.getLogger(__name__)
Positions = TypeVar('Positions', Array, np.ndarray)
Kernel = Literal['xla', 'tokamax', 'auto']


class Keys(NamedTuple):
    """Group of keys and values that queries attend to."""

    k: Float[Array, 'B S heads K d']
    v: Float[Array, 'B S heads K d']
    mask: Bool[Array, '#B #S #heads #Q K'] | None  # None: every query attends to every key


def rope(positions: Positions, head_dim: int, base: float) -> Positions:
    """Rotation angles [*B, d/2] of positions [*B], one for each pair of channels; NumPy in, NumPy
    out.
    """
    freqs = base ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return positions[..., None].astype(np.float32) * freqs


def rotate(x: Float[Array, '*B d'], angles: Float[Array, '*#B half']) -> Float[Array, '*B d']:
    """Turn each pair (x[i], x[i + d/2]) by its angle (RoPE)."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def attention_weights(
    q: Float[Array, 'B S heads Q d'], groups: tuple[Keys, ...], softcap: float
) -> Float[Array, 'B S heads Q K']:
    """softmax(cap(q k / sqrt d)) over the union of `groups`, in fp32; cap(x) = softcap
    tanh(x / softcap), left out if 0.
    """
    b, s, heads, n, d = q.shape
    kv = groups[0].k.shape[2]
    q = q.reshape(b, s, kv, heads // kv * n, d)
    logits = []
    for keys in groups:
        x = jnp.einsum('bshqd,bshkd->bshqk', q, keys.k, preferred_element_type=jnp.float32)
        x = softcap * jnp.tanh(x * (d**-0.5 / softcap)) if softcap else x * d**-0.5
        x = x.reshape(b, s, heads, n, -1)
        logits.append(x if keys.mask is None else jnp.where(keys.mask, x, -1e30))
    return jax.nn.softmax(jnp.concatenate(logits, -1), -1)


@functools.cache
def chosen(kernel: Kernel, dtype: str) -> Literal['xla', 'tokamax']:
    """Resolve 'auto': tokamax for half precision on a GPU where it is installed, else XLA.

    Raises UserError if tokamax is asked for and not installed.
    """
    found = importlib.util.find_spec('tokamax') is not None
    if kernel == 'tokamax' and not found:
        raise UserError(
            "attention kernel 'tokamax' given, which is missing; pip install 'reverie[attention]'"
        )
    if kernel != 'auto':
        return kernel
    fits = found and jax.default_backend() == 'gpu' and dtype in ('bfloat16', 'float16')
    log.warning(
        'attention in %s on %s: %s', dtype, jax.default_backend(), 'tokamax' if fits else 'xla'
    )
    return 'tokamax' if fits else 'xla'


def attend(
    q: Float[Array, 'B S heads Q d'],
    groups: tuple[Keys, ...],
    softcap: float,
    kernel: Kernel = 'xla',
) -> Float[Array, 'B S heads Q d']:
    """Multiply `attention_weights` by v; q may have a multiple of the key heads (grouped queries).

    Several groups share one softmax without their keys being copied next to each other, so a cache
    is only ever read. kernel: 'xla', these products; 'tokamax', one that never writes the weights
    to memory, used for one group only, since few queries against a cache are bound by reading it;
    'auto', see `chosen`.
    """
    if len(groups) == 1 and chosen(kernel, q.dtype.name) == 'tokamax':
        import tokamax

        q_t, k_t, v_t = (x.swapaxes(2, 3) for x in (q, groups[0].k, groups[0].v))
        out: Array = tokamax.dot_product_attention(
            q_t, k_t, v_t, mask=groups[0].mask, logits_soft_cap=softcap or None
        )
        return out.swapaxes(2, 3)
    b, s, heads, n, d = q.shape
    kv = groups[0].k.shape[2]
    weights = attention_weights(q, groups, softcap).astype(q.dtype)
    weights = weights.reshape(b, s, kv, heads // kv * n, -1)
    parts, first = [], 0
    for keys in groups:
        last = first + keys.k.shape[3]
        parts.append(jnp.einsum('bshqk,bshkd->bshqd', weights[..., first:last], keys.v))
        first = last
    return sum(parts[1:], parts[0]).reshape(b, s, heads, n, d)
