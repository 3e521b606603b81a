"""The tokenizer: who sees whom, what is masked, one frame at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from reverie.models.tokenizer import (
    Decoder,
    Encoder,
    TokenizerConfig,
    cells,
    draw_mask,
    scale_latents,
)
from reverie.nn.core import build
from reverie.nn.transformer import TransformerConfig
from reverie.nn.vision import patch_grid, patchify, unpatchify
from reverie.types import UserError

TINY = TransformerConfig(
    width=16,
    layers=4,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_ratio=2.0,
    time_every=2,
    context=3,
    dtype='float32',
)
CFG = TokenizerConfig(patch=(2, 3), latents=3, bottleneck=4, transformer=TINY)
SHAPE, B, T = (4, 6, 2), 2, 7


@pytest.fixture(scope='module')
def parts():
    return Encoder(CFG, SHAPE, nnx.Rngs(0)), Decoder(CFG, SHAPE, nnx.Rngs(1))


@pytest.fixture(scope='module')
def window():
    first = jnp.zeros((B, T), bool).at[:, 0].set(True).at[1, 4].set(True)
    return jax.random.uniform(jax.random.key(0), (B, T, *SHAPE)), first


def test_frame_by_frame_equals_the_window_and_latents_are_bounded(parts, window):
    encoder, decoder = parts
    image, first = window

    @jax.jit
    def both(image, first):
        z, _ = encoder(image, first)
        out, _ = decoder(z, first)
        caches, zs, outs = (encoder.empty(B), decoder.empty(B)), [], []
        for t in range(T):
            z_t, enc = encoder(image[:, t : t + 1], first[:, t : t + 1], None, caches[0])
            out_t, dec = decoder(z_t, first[:, t : t + 1], caches[1])
            caches = enc, dec
            zs.append(z_t)
            outs.append(out_t)
        return z, out, jnp.concatenate(zs, 1), jnp.concatenate(outs, 1)

    z, out, z_steps, out_steps = both(image, first)
    assert z.shape == (B, T, 3, 4) and out.shape == image.shape and float(jnp.abs(z).max()) < 1
    np.testing.assert_allclose(z_steps, z, atol=1e-5)
    np.testing.assert_allclose(out_steps, out, atol=1e-5)


def test_masked_patches_do_not_reach_the_latents_and_others_do(parts, window):
    encoder, _ = parts
    image, first = window
    hidden = (
        jnp.zeros((B, T, encoder.patches), bool).at[0, 2, 1].set(True)
    )  # rows 0-1, columns 3-5 of frame 2
    grad = jax.jit(jax.grad(lambda x: (encoder(x, first, hidden)[0] ** 2).sum()))(image)
    touched = np.asarray(jnp.abs(grad).sum(-1) > 0)
    assert not touched[0, 2, 0:2, 3:6].any()
    assert touched[0, 2, 2:4].all() and touched[0, 2, 0:2, 0:3].all() and touched[1].all()


def test_reconstruction_of_a_frame_never_sees_the_future(parts, window):
    encoder, decoder = parts
    image, first = window
    frame3 = lambda x: (decoder(encoder(x, first)[0], first)[0][:, 3] ** 2).sum()
    grad = np.abs(jax.jit(jax.grad(frame3))(image)).sum((2, 3, 4))
    assert (grad[:, :4] > 0).all() and (grad[:, 4:] == 0).all()


def test_masking_rates_are_uniform_per_image_and_patches_follow_their_rate():
    mask = draw_mask(jax.random.key(0), (60, 50), 40, 0.9)
    rates = np.asarray(mask.rate).ravel()
    assert scipy.stats.kstest(rates / 0.9, 'uniform').pvalue > 0.01
    share = np.asarray(mask.hidden).mean(-1).ravel()
    error = (share - rates) / np.sqrt(rates * (1 - rates) / 40 + 1e-9)
    assert abs(error.mean()) < 0.1 and 0.9 < error.std() < 1.1


def test_images_are_filled_up_to_whole_patches_and_come_back_in_their_own_size(window):
    """360 rows in patches of 16 are 23 patches, and what fills the last one is nobody's picture."""
    shape = (5, 7, 2)
    encoder, decoder = Encoder(CFG, shape, nnx.Rngs(0)), Decoder(CFG, shape, nnx.Rngs(1))
    _, first = window
    assert encoder.patches == decoder.patches == 3 * 3
    image = jax.random.uniform(jax.random.key(0), (B, T, *shape))
    z, _ = encoder(image, first)
    assert decoder(z, first)[0].shape == image.shape
    ours = unpatchify(patchify(image, CFG.patch), CFG.patch, shape)
    np.testing.assert_array_equal(ours, image)


def test_bytes_are_scaled_to_one_and_decoded_pictures_lie_between_zero_and_one(parts, window):
    encoder, decoder = parts
    _, first = window
    image = np.random.default_rng(0).integers(0, 256, (B, T, *SHAPE), np.uint8)
    z, _ = encoder(jnp.asarray(image), first)
    scaled = encoder(jnp.asarray(image / np.float32(255)), first)[0]
    np.testing.assert_allclose(z, scaled, atol=1e-5)
    wild = jnp.sign(z) * 50.0
    picture, dist = decoder(wild, first)[0], decoder.dist(wild, first)[0]
    assert float(dist.mean.min()) < 0 and float(dist.mean.max()) > 1, 'nothing to clip'
    assert float(picture.min()) == 0.0 and float(picture.max()) == 1.0


def test_pictures_depend_on_earlier_latents_and_never_on_later_ones(parts, window):
    """A time layer after all space layers is read by no patch: the decoder would see one frame."""
    _, first = window
    z = jax.random.normal(jax.random.key(3), (B, T, CFG.latents, CFG.bottleneck))
    once = dataclasses.replace(TINY, time_every=4)
    late = dataclasses.replace(CFG, transformer=once, time_first=False)
    late = Decoder(late, SHAPE, nnx.Rngs(1))
    for decoder, reads in ((parts[1], True), (late, False)):
        picture = lambda z, d=decoder: d(z, first)[0]
        changed = jnp.abs(picture(z.at[0, 2].add(1.0)) - picture(z))[0].max((1, 2, 3))
        assert not changed[:2].any() and changed[2] > 1e-4
        assert (changed[3] > 1e-6) == reads


def test_latents_are_as_large_as_they_are_told_and_pictures_stay_as_they_were(parts, window):
    image, first = window
    modules = dict(zip(('encoder', 'decoder'), parts, strict=True))
    built = {name: build(module) for name, module in modules.items()}
    params = {name: built[name][0] for name in built}
    scaled = scale_latents(params, jnp.float32(3.0))
    bind = {name: built[name][1] for name in built}
    z, _ = bind['encoder'](params['encoder'])(image, first)
    larger, _ = bind['encoder'](scaled['encoder'])(image, first)
    np.testing.assert_allclose(larger, 3 * z, rtol=1e-6)
    before, _ = bind['decoder'](params['decoder'])(z, first)
    after, _ = bind['decoder'](scaled['decoder'])(larger, first)
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_latents_in_place_begin_as_the_patch_of_their_cell(window):
    """Sixteen patches, four latents: each has position and slot of the patch in its quarter."""
    cfg = dataclasses.replace(CFG, patch=(2, 2), latents=4, in_place=True)
    shape = (8, 8, 2)
    assert cells(4, patch_grid(shape, (2, 2))).tolist() == [5, 7, 13, 15]
    encoder = Encoder(cfg, shape, nnx.Rngs(0))
    slots = encoder.slots[...]
    np.testing.assert_array_equal(slots[:4], slots[4 + np.array([5, 7, 13, 15])])
    space = [layer for layer in encoder.blocks.layers if not layer.along_time]
    for layer in space:
        keys, values = jnp.split(layer.attention.kv.kernel[...], 2, -1)
        queries = layer.attention.q.kernel[...]
        np.testing.assert_array_equal(keys, queries[:, : TINY.head_dim])
        assert not np.allclose(values, keys)
    with pytest.raises(UserError, match='3 latents do not tile 4 x 4'):
        Encoder(dataclasses.replace(cfg, latents=3), shape, nnx.Rngs(0))
