"""Layers and cells against the references' numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie.nn.cells import LayerNormGRU, ResetAfterGRU, ResetBeforeGRU
from reverie.nn.core import MLP, BlockLinear, Dense, LayerNorm, Linear, RMSNorm, Style, build, count
from tests.golden_numbers import golden

pytestmark = pytest.mark.compat

close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
rngs = lambda seed=0: nnx.Rngs(seed)


def filled(module: nnx.Module, params: dict):
    """The module with these weights; names and shapes must agree exactly."""
    ours, bind = build(module)
    shapes = lambda tree: {
        k: shapes(v) if isinstance(v, dict) else v.shape for k, v in tree.items()
    }
    assert shapes(ours) == shapes(params)
    return bind(params)


@pytest.mark.parametrize('kind', [RMSNorm, LayerNorm])
def test_norms_equal_the_reference(kind):
    g = golden('v3/layer')
    name = 'norm_rms' if kind is RMSNorm else 'norm_layer'
    params = {k.split('/')[-1]: jnp.asarray(v) for k, v in g.items() if k.startswith(f'{name}/m/')}
    close(filled(kind(16, 1e-4), params)(jnp.asarray(g['x'])), g[f'{name}/y'])


def test_a_block_linear_equals_the_reference():
    g = golden('v3/layer')
    params = {k: jnp.asarray(g[f'block/m/{k}']) for k in ('kernel', 'bias')}
    close(filled(BlockLinear(16, 24, 8, rngs=rngs()), params)(jnp.asarray(g['x'])), g['block/y'])


def test_shared_inputs_of_a_block_linear_equal_a_copy_in_each_block():
    layer, r = BlockLinear(8, 12, 4, shared=5, rngs=rngs()), np.random.default_rng(0)
    x, a, b = r.normal(size=(3, 8)), r.normal(size=(3, 2)), r.normal(size=(3, 3))
    copied = np.concatenate(
        [x.reshape(3, 4, 2), np.repeat(np.concatenate([a, b], -1)[:, None], 4, 1)], -1
    )
    expected = np.stack(
        [copied[:, g] @ np.asarray(layer.kernel[...][g]) for g in range(4)], 1
    ).reshape(3, 12)
    x, a, b = jnp.asarray(x, jnp.float32), jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    close(layer(x, layer.part(a, 0) + layer.part(b, 2)), expected)


def test_parts_of_a_linear_add_up_to_the_whole():
    layer, x = (
        Linear(7, 3, rngs=rngs()),
        jnp.asarray(np.random.default_rng(1).normal(size=(2, 7)), jnp.float32),
    )
    close(layer.part(x[:, :4], 0, bias=True) + layer.part(x[:, 4:], 4), layer(x))


def test_kernels_start_with_the_reference_deviation_and_cut():
    std, largest = golden('v3/init')['trunc_normal_std']
    for kernel in (
        Linear(512, 256, rngs=rngs()).kernel,
        BlockLinear(512, 256, 8, rngs=rngs()).kernel,
    ):
        assert (
            float(kernel[...].std())
            == pytest.approx(512**-0.5, rel=0.02)
            == pytest.approx(float(std), rel=0.02)
        )
        assert float(abs(kernel[...]).max()) <= 2 * 1.1368 * 512**-0.5 * 1.0001
    assert float(largest) <= 2 * 1.1368 * 512**-0.5 * 1.0001


def test_layer_norm_gru_equals_the_reference():
    g = {k: jnp.asarray(v) for k, v in golden('v2/gru').items()}
    params = dict(
        linear=dict(kernel=g['kernel'], bias=g['bias']),
        norm=dict(scale=g['gamma_ln'], shift=g['beta_ln']),
    )
    close(filled(LayerNormGRU(12, 16, Style(), rngs()), params)(g['x'], g['h']), g['out'])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize('cell', [ResetAfterGRU, ResetBeforeGRU])
def test_grus_equal_their_equations(cell):
    r = np.random.default_rng(0)
    x, h = r.normal(size=(2, 3)), r.normal(size=(2, 4))
    module = cell(3, 4, Style(), rngs())
    weights, bind = build(module)
    weights = {
        k: {n: r.normal(size=w.shape) for n, w in layer.items()} for k, layer in weights.items()
    }
    if cell is ResetAfterGRU:
        a = x @ weights['input']['kernel'] + weights['input']['bias']
        b = h @ weights['recurrent']['kernel'] + weights['recurrent']['bias']
        u, reset = sigmoid(a[:, :4] + b[:, :4]), sigmoid(a[:, 4:8] + b[:, 4:8])
        c = np.tanh(a[:, 8:] + reset * b[:, 8:])
    else:
        gates = sigmoid(
            np.concatenate([x, h], 1) @ weights['gates']['kernel'] + weights['gates']['bias']
        )
        reset, u = gates[:, :4], gates[:, 4:]
        inputs = np.concatenate([x, reset * h], 1)
        c = np.tanh(inputs @ weights['candidate']['kernel'] + weights['candidate']['bias'])
    cast = lambda a: jnp.asarray(a, jnp.float32)
    weights = {k: {n: cast(w) for n, w in layer.items()} for k, layer in weights.items()}
    close(bind(weights)(cast(x), cast(h)), u * h + (1 - u) * c)


def test_an_mlp_is_its_layers_one_after_the_other():
    style = Style('elu', 'layer', 1e-3)
    mlp, x = MLP(5, 8, 2, 3, style=style, rngs=rngs()), jnp.ones((2, 5))
    y = x
    for i in range(2):
        layer = Dense(y.shape[-1], 8, style, rngs())
        layer.linear, layer.norm = mlp.hidden[i], mlp.norms[i]
        y = layer(y)
    close(mlp(x), mlp.out(y))
    close(mlp.finish(mlp.hidden[0](x)), mlp(x))
    assert MLP(5, 8, 2, None, style=style, rngs=rngs())(x).shape == (2, 8)
    assert MLP(5, 8, 0, 3, rngs=rngs())(x).shape == (2, 3)


def test_an_mlp_without_a_style_has_no_hidden_biases_and_counts_as_before():
    params, _ = build(MLP(5, 8, 2, 3, dtype=jnp.bfloat16, rngs=rngs()))
    assert count(params) == 5 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3
