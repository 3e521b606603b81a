"""Convolutions against the references' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie.nn.core import Style
from reverie.nn.vision import (
    Conv,
    Deconv,
    PooledConv,
    StridedConv,
    StridedDecoder,
    StridedEncoder,
    enlarge,
    max_pool,
    reduce_bits,
)
from reverie.types import UserError
from tests.golden_numbers import golden
from tests.nn.test_core_golden import filled

pytestmark = pytest.mark.compat

close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
RELU = Style('relu', 'none', init='glorot_uniform')


@pytest.mark.parametrize('name', ['conv', 'conv_s2', 'convT_s2'])
def test_convolutions_equal_the_reference(name):
    g = golden('v3/layer')
    layer = Deconv if name == 'convT_s2' else Conv
    params = {k: jnp.asarray(g[f'{name}/m/{k}']) for k in ('kernel', 'bias')}
    module = layer(3, 4, 5, stride=1 if name == 'conv' else 2, style=Style(), rngs=nnx.Rngs(0))
    close(filled(module, params)(jnp.asarray(g['img'])), g[f'{name}/y'])


def test_the_encoder_of_v1_equals_the_reference():
    g = golden('v1/enc')
    params = dict(
        convs={
            i: {k: jnp.asarray(g[f'h{i + 1}/{k}']) for k in ('kernel', 'bias')} for i in range(4)
        }
    )
    encoder = filled(StridedEncoder(StridedConv(2), (64, 64, 3), RELU, nnx.Rngs(0)), params)
    assert encoder.width == g['out'].shape[-1]
    close(jax.jit(encoder.__call__)(jnp.asarray(g['image'])), g['out'])


def test_the_decoder_of_v1_equals_the_reference():
    g = golden('v1/dec')
    ours = lambda k: jnp.asarray(k[::-1, ::-1].swapaxes(2, 3))  # see Deconv
    deconvs = {
        i: dict(kernel=ours(g[f'h{i + 2}/kernel']), bias=jnp.asarray(g[f'h{i + 2}/bias']))
        for i in range(4)
    }
    params = dict(input={k: jnp.asarray(g[f'h1/{k}']) for k in ('kernel', 'bias')}, deconvs=deconvs)
    decoder = filled(StridedDecoder(StridedConv(2), (64, 64, 3), (8, 4), RELU, nnx.Rngs(0)), params)
    z, h = jnp.split(jnp.asarray(g['feat']), [4], -1)
    dist = jax.jit(decoder.__call__)(h, z)
    close(dist.mean, g['mean'] + 0.5)
    close(dist.log_prob(dist.mean), -0.5 * np.log(2 * np.pi) * 64 * 64 * 3 * np.ones(2))


def test_fewer_bits_equal_planets():
    g = golden('planet/img')
    image = jnp.asarray(g['in'], jnp.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(reduce_bits(image) - 0.5, g['out'].reshape(16, 16, 1))
    noise = reduce_bits(image, jax.random.key(0)) - reduce_bits(image)
    assert float(noise.min()) >= 0 and 0.02 < float(noise.max()) < 1 / 32


def test_the_largest_of_an_enlarged_image_is_the_image():
    x = jnp.arange(24.0).reshape(1, 2, 4, 3)
    np.testing.assert_array_equal(max_pool(enlarge(x)), x)
    assert max_pool(x).tolist() == [[[[15, 16, 17], [21, 22, 23]]]]


def test_images_that_do_not_fit_are_refused():
    for make, shape in (
        (PooledConv(4), (40, 64, 3)),
        (PooledConv(4), (32, 32, 3)),
        (StridedConv(4), (96, 96, 3)),
    ):
        with pytest.raises(UserError, match=f'image {shape[0]}x{shape[1]}'):
            make.encoder(shape, Style(), nnx.Rngs(0))
    with pytest.raises(UserError, match='blocks=8'):
        PooledConv(4).decoder((64, 64, 3), (60, 16), 16, Style(), nnx.Rngs(0))


def test_other_image_sizes_come_back_as_they_went_in():
    cfg = PooledConv(4, blocks=4)

    def there_and_back(image):
        encoder = cfg.encoder((48, 96, 1), Style(), nnx.Rngs(0))
        decoder = cfg.decoder((48, 96, 1), (8, 6), 5, Style(), nnx.Rngs(0))
        assert encoder(image).shape == (2, 5, encoder.width) == (2, 5, 3 * 6 * 16)
        return decoder(jnp.zeros((2, 5, 8)), jnp.zeros((2, 5, 6))).mode()

    assert jax.eval_shape(there_and_back, jnp.zeros((2, 5, 48, 96, 1))).shape == (2, 5, 48, 96, 1)
