"""Patches."""

import jax.numpy as jnp
import numpy as np
import pytest

from reverie.nn.vision import patch_grid, patchify, unpatchify

pytestmark = pytest.mark.compat


def test_patches_are_the_blocks_of_the_image_and_go_back():
    image = np.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3).astype(np.float32)
    patches = np.asarray(patchify(jnp.asarray(image), (3, 2)))
    for i, (row, column) in enumerate(patch_grid((6, 4, 3), (3, 2))):
        block = image[:, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(patches[:, i], block.reshape(2, -1))
    np.testing.assert_array_equal(unpatchify(jnp.asarray(patches), (3, 2), (6, 4, 3)), image)
