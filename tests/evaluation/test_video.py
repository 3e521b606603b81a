"""Frames and their numbers, against loops and an independent decoder."""

import io
import math
import struct
import zlib

import numpy as np
import pytest

from reverie.evaluation import video


def test_psnr_is_the_log_of_the_mean_square_error_of_each_frame():
    rng = np.random.default_rng(0)
    truth, dream = rng.random((2, 3, 4, 5, 2)), rng.random((2, 3, 4, 5, 2))
    got = video.psnr(truth, dream)
    for i in range(2):
        for j in range(3):
            square = [
                (a - b) ** 2 for a, b in zip(truth[i, j].ravel(), dream[i, j].ravel(), strict=True)
            ]
            assert got[i, j] == pytest.approx(10 * math.log10(1 / (sum(square) / len(square))))


def test_psnr_of_identical_frames_is_the_stated_cap():
    assert video.psnr(np.ones((1, 2, 2, 1)), np.ones((1, 2, 2, 1)))[0] == video.PSNR_CAP


def slow_ssim(x, y, window):
    """Wang et al. 2004, eq. 13, place by place; [h, w] images and [k, k] weights."""
    k, values = len(window), []
    for i in range(x.shape[0] - k + 1):
        for j in range(x.shape[1] - k + 1):
            a, b = x[i : i + k, j : j + k], y[i : i + k, j : j + k]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            top = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize('shape', [(14, 17), (11, 30), (10, 10), (6, 9), (1, 4)])
def test_ssim_is_a_loop_over_windows_of_eleven_or_seven_or_what_fits(shape):
    rng = np.random.default_rng(0)
    truth = rng.random((2, *shape, 3))
    dream = np.clip(truth + 0.3 * rng.normal(size=truth.shape), 0, 1)
    size = {14: 11, 11: 11, 10: 7, 6: 5, 1: 1}[shape[0]]
    bell = np.exp(-((np.arange(size) - size // 2) ** 2) / 4.5) if size == 11 else np.ones(size)
    window = np.outer(bell, bell) / bell.sum() ** 2
    got = video.ssim(truth, dream)
    for i in range(2):
        each = [slow_ssim(truth[i, ..., c], dream[i, ..., c], window) for c in range(3)]
        assert got[i] == pytest.approx(np.mean(each), rel=1e-9)


def test_ssim_equals_what_scikit_image_says():
    """0.26.0: structural_similarity(x, y, data_range=1.0, channel_axis=-1,
    use_sample_covariance=False), once with gaussian_weights=True, sigma=1.5, once with
    win_size=7."""
    i = np.arange(24 * 20 * 3).reshape(1, 24, 20, 3)
    image, grid = (np.sin(0.37 * i) + 1) / 2, (i[:, :10, :10] * 7 % 5 == 0).astype(float)
    given = image, np.clip(image + 0.3 * np.cos(0.9 * i), 0, 1)
    assert video.ssim(*given)[0] == pytest.approx(0.8670438199931173, abs=1e-12)
    assert video.ssim(grid, np.clip(0.8 * np.roll(grid, 1, 2) + 0.1, 0, 1))[0] == pytest.approx(
        -0.2235345805115, abs=1e-12
    )


def test_ssim_of_identical_frames_is_one_and_of_a_negative_below_nought():
    frame = np.random.default_rng(0).random((1, 20, 20, 1))
    assert video.ssim(frame, frame)[0] == pytest.approx(1.0) and video.ssim(frame, 1 - frame)[0] < 0


def test_a_channel_has_its_colour_dimmed_by_its_value_and_two_channels_blend():
    obs = np.zeros((3, 1, 4))
    obs[0, 0, 1], obs[1, 0, 1], obs[2, 0, [0, 2]] = 1.0, 0.5, 1.0
    rgb = video.colourise(obs)
    np.testing.assert_array_equal(rgb[0, 0], video.PALETTE[1])
    np.testing.assert_allclose(rgb[1, 0], video.PALETTE[1] / 2, atol=0.51)
    np.testing.assert_allclose(
        rgb[2, 0], (video.PALETTE[0] / 2.0 + video.PALETTE[2] / 2.0), atol=0.51
    )


def test_every_channel_of_the_largest_game_has_its_own_colour():
    colours = video.colourise(np.eye(10)[:, None, :])[:, 0]
    assert len({tuple(c) for c in colours}) == 10 and colours.max(1).min() > 100


@pytest.mark.parametrize('channels', [3, 4])
def test_png_decodes_to_the_same_pixels(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    reader = pytest.importorskip('matplotlib.image')
    decoded = reader.imread(io.BytesIO(video.png(image)), format='png')
    np.testing.assert_array_equal(np.round(decoded * 255).astype(np.uint8), image)


def chunks(data):
    """The chunks of a PNG file, each checked against its CRC."""
    assert data[:8] == b'\x89PNG\r\n\x1a\n'
    at, found = 8, []
    while at < len(data):
        (length,) = struct.unpack('>I', data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack('>I', data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        found.append((kind, body))
        at += 12 + length
    return found


def test_apng_repeats_for_ever_and_holds_frames_four_times_as_long():
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), dtype=np.uint8)
    found = chunks(video.apng(frames, fps=10.0, holds=(3,)))
    assert dict(found)[b'acTL'] == struct.pack('>II', 4, 0)
    delays = [struct.unpack('>HH', body[20:24]) for kind, body in found if kind == b'fcTL']
    assert [number / unit for number, unit in delays] == [0.1, 0.1, 0.1, 0.4]
    numbers = [
        struct.unpack('>I', body[:4])[0] for kind, body in found if kind in (b'fcTL', b'fdAT')
    ]
    assert numbers == list(range(7))


def test_apng_decodes_to_the_same_pixels():
    image = pytest.importorskip('PIL.Image')
    frames = np.random.default_rng(1).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    file = image.open(io.BytesIO(video.apng(frames)))
    assert file.n_frames == 3
    for i, frame in enumerate(frames):
        file.seek(i)
        np.testing.assert_array_equal(np.asarray(file.convert('RGB')), frame)
