"""The tokenizer: who sees whom, what is masked, one frame at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from reverie.models.tokenizer import Decoder, Encoder, TokenizerConfig, draw_mask
from reverie.nn.transformer import TransformerConfig
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


def test_patches_that_do_not_tile_the_image_are_refused():
    with pytest.raises(UserError, match=r'\(2, 3\).*\(5, 6\)'):
        Encoder(CFG, (5, 6, 2), nnx.Rngs(0))


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
