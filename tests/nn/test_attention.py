"""The transformer: one frame at a time through the cache equals the window at once; nothing sees
the future.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie.nn.attention import Keys, attend, chosen, rope, rotate
from reverie.nn.core import build
from reverie.nn.transformer import BlockCausal, TransformerConfig
from reverie.types import UserError

pytestmark = pytest.mark.compat

CFG = TransformerConfig(
    width=16,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_ratio=2.0,
    time_every=2,
    context=5,
    dtype='float32',
)
B, T, S = 2, 14, 3


@pytest.fixture(scope='module')
def blocks():
    angles = np.asarray(rope(np.arange(S), CFG.head_dim, CFG.rope_base))
    params, bind = build(BlockCausal(CFG, angles, rngs=nnx.Rngs(0)))
    return bind(params)


@pytest.fixture(scope='module')
def tokens():
    return jax.random.normal(jax.random.key(1), (B, T, S, CFG.width))


@pytest.fixture(scope='module')
def is_first():
    first = np.zeros((B, T), bool)
    first[:, 0] = True
    first[1, 6] = True  # one row with an episode's end inside the window
    return jnp.asarray(first)


def stepwise(blocks, tokens, is_first, cache):
    """One frame per call against the cache."""

    def step(cache, x):
        frame, first = x
        y, written = blocks(frame[:, None], first[:, None], None, cache)
        return blocks.commit(cache, written, first[:, None]), y[:, 0]

    cache, out = jax.lax.scan(step, cache, (tokens.swapaxes(0, 1), is_first.swapaxes(0, 1)))
    return cache, out.swapaxes(0, 1)


def test_cached_frames_equal_the_parallel_pass_also_past_the_window(blocks, tokens, is_first):
    parallel, _ = jax.jit(blocks)(tokens, is_first)
    _, cached = jax.jit(lambda x, f: stepwise(blocks, x, f, blocks.empty(B, S)))(tokens, is_first)
    assert 2 * CFG.context < T
    np.testing.assert_allclose(cached, parallel, atol=1e-5)


@pytest.mark.parametrize('given', [3, 5, 9])  # shorter than, equal to and longer than the context
def test_a_prefilled_cache_continues_like_the_parallel_pass(blocks, tokens, is_first, given):
    @jax.jit
    def both(x, first):
        parallel, _ = blocks(x, first)
        _, written = blocks(x[:, :given], first[:, :given])
        cache = blocks.prefill(written, first[:, :given])
        return parallel[:, given:], stepwise(blocks, x[:, given:], first[:, given:], cache)[1]

    parallel, cached = both(tokens, is_first)
    np.testing.assert_allclose(cached, parallel, atol=1e-5)


def test_gradient_reaches_exactly_the_frames_of_the_window_in_the_same_episode(
    blocks, tokens, is_first
):
    """Two time layers see 2 (C - 1) frames back, never forward, never across an episode's start."""
    grad = jax.jit(
        jax.grad(
            lambda x, t: jnp.where(
                jnp.arange(T)[:, None, None] == t, blocks(x, is_first)[0] ** 2, 0
            ).sum()
        )
    )
    layers, reach = 2, 2 * (CFG.context - 1)
    assert layers == blocks.time_layers
    for t in (0, 4, 9, T - 1):
        touched = np.abs(np.asarray(grad(tokens, t))).sum((2, 3)) > 0
        frames = np.arange(T)
        for row, starts in enumerate(([0], [0, 6])):
            start = max(s for s in starts if s <= t)
            expected = (frames <= t) & (frames >= start) & (frames >= t - reach)
            np.testing.assert_array_equal(touched[row], expected, err_msg=f'frame {t}, row {row}')


def test_attend_equals_a_loop_over_heads_and_queries():
    rng = np.random.default_rng(0)
    b, s, heads, kv, n, k, d, cap = 1, 2, 4, 2, 3, 5, 8, 2.0
    q = rng.normal(size=(b, s, heads, n, d)).astype(np.float32)
    keys, values = rng.normal(size=(2, b, s, kv, k, d)).astype(np.float32)
    mask = rng.random((b, 1, 1, n, k)) < 0.7
    mask[..., 0] = True
    out = np.zeros_like(q)
    for i in range(s):
        for h in range(heads):
            for j in range(n):
                group = h // (heads // kv)
                logits = cap * np.tanh(keys[0, i, group] @ q[0, i, h, j] / np.sqrt(d) / cap)
                logits[~mask[0, 0, 0, j]] = -np.inf
                w = np.exp(logits - logits.max())
                out[0, i, h, j] = (w / w.sum()) @ values[0, i, group]
    split = lambda a, lo, hi: jnp.asarray(a[..., lo:hi, :])
    groups = tuple(
        Keys(split(keys, *r), split(values, *r), jnp.asarray(mask[..., slice(*r)]))
        for r in ((0, 2), (2, k))
    )
    np.testing.assert_allclose(attend(jnp.asarray(q), groups, cap), out, atol=1e-5)


@pytest.mark.external('tokamax', 'attention')
@pytest.mark.parametrize('softcap', [2.0, 0.0])
@pytest.mark.parametrize('masked', [True, False])
def test_tokamax_gives_the_same_numbers_and_gradients(softcap, masked):
    b, s, heads, kv, n, d = 2, 3, 4, 2, 5, 8
    q, k, v = (
        jax.random.normal(jax.random.key(i), (b, s, h, n, d)) for i, h in enumerate((heads, kv, kv))
    )
    mask = jnp.tril(jnp.ones((n, n), bool))[None, None, None] if masked else None
    both = lambda kernel: jax.jit(
        jax.value_and_grad(
            lambda q, k, v: (attend(q, (Keys(k, v, mask),), softcap, kernel) ** 2).sum(), (0, 1, 2)
        )
    )
    for a, b in zip(
        *(jax.tree.leaves(both(kernel)(q, k, v)) for kernel in ('tokamax', 'xla')), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_is_not_installed_is_refused_and_auto_does_without(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    chosen.cache_clear()
    with pytest.raises(UserError, match=r'tokamax.*reverie\[attention\]'):
        chosen('tokamax', 'bfloat16')
    assert chosen('auto', 'bfloat16') == 'xla'
    chosen.cache_clear()


def test_rope_makes_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    score = lambda i, j: (
        rotate(q, rope(jnp.array(i), 8, 1e4)) @ rotate(k, rope(jnp.array(j), 8, 1e4))
    )
    np.testing.assert_allclose(score(3, 1), score(103, 101), rtol=1e-4)
    assert abs(float(score(3, 1) - score(3, 2))) > 1e-3


def test_bfloat16_stays_close_to_float32_and_keeps_fp32_parameters(blocks, tokens, is_first):
    angles = np.asarray(rope(np.arange(S), CFG.head_dim, CFG.rope_base))
    half = BlockCausal(dataclasses.replace(CFG, dtype='bfloat16'), angles, rngs=nnx.Rngs(0))
    params, bind = build(half)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    full, _ = jax.jit(blocks)(tokens, is_first)
    out, written = jax.jit(lambda x: bind(params)(x, is_first))(tokens.astype(jnp.bfloat16))
    assert out.dtype == written[0][0].dtype == jnp.bfloat16
    assert float(jnp.abs(out.astype(jnp.float32) - full).mean()) < 0.03
