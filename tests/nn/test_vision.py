"""Patches and convolutions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie.nn.core import Style
from reverie.nn.vision import Conv, enlarge, patch_grid, patchify, unpatchify

pytestmark = pytest.mark.compat


def test_patches_are_the_blocks_of_the_image_and_go_back():
    image = np.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3).astype(np.float32)
    patches = np.asarray(patchify(jnp.asarray(image), (3, 2)))
    for i, (row, column) in enumerate(patch_grid((6, 4, 3), (3, 2))):
        block = image[:, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(patches[:, i], block.reshape(2, -1))
    np.testing.assert_array_equal(unpatchify(jnp.asarray(patches), (3, 2), (6, 4, 3)), image)


@pytest.mark.parametrize('size, stride', itertools.product((3, 5), (1, 2)))
def test_a_convolution_of_an_enlarged_image_is_that_of_the_small_one(size, stride):
    conv = Conv(2, 3, size, stride=stride, style=Style(), rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(3.0)
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, 2))
    np.testing.assert_allclose(conv.of_enlarged(x), conv(enlarge(x)), atol=1e-5)
