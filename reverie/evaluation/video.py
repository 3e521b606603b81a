"""Frames a person can see and numbers for how right they are: PSNR, colours for symbolic grids, PNG
and APNG bytes.

The encoder is ~30 lines of zlib and struct, so that a report needs no imaging package (PNG
specification, 3rd
edition: the image, and the animation chunks acTL, fcTL, fdAT).
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

PSNR_CAP = 100.0  # dB, of identical frames: a mean square error below 1e-10 counts as 1e-10

# Okabe & Ito's colours without black, which is the background here, and three more that stay apart
# from them on a black ground under the common colour-vision deficiencies (they differ in lightness,
# not only in hue).
PALETTE = np.array(
    [
        (86, 180, 233), (230, 159, 0), (240, 228, 66), (0, 158, 115), (213, 94, 0), (204, 121, 167),
        (0, 114, 178), (255, 255, 255), (150, 150, 150), (176, 236, 176),
    ],
    np.uint8,
)  # fmt: skip
HIDDEN = np.array((72, 74, 82), np.uint8)  # a cell the encoder was not shown


def psnr(
    truth: Float[np.ndarray, '*n h w c'], dream: Float[np.ndarray, '*n h w c']
) -> Float[np.ndarray, '*n']:
    """Peak signal-to-noise ratio of each frame in dB: -10 log10(MSE), values in [0, 1], at most
    `PSNR_CAP`.
    """
    square = (np.asarray(truth, np.float64) - np.clip(np.asarray(dream, np.float64), 0, 1)) ** 2
    return -10 * np.log10(np.maximum(square.mean((-3, -2, -1)), 10 ** (-PSNR_CAP / 10)))


def ssim(
    truth: Float[np.ndarray, '*n h w c'], dream: Float[np.ndarray, '*n h w c']
) -> Float[np.ndarray, '*n']:
    """Structural similarity of each frame, 1 for identical ones: Wang et al. 2004, eq. 13, values
    in [0, 1].

    Local means, variances and covariance under an 11 x 11 Gaussian window of 1.5 pixels, wherever
    it lies inside the frame, averaged over those places and channels. Smaller frames have no place
    for it: a side below 11 (a grid of MinAtar has 10) takes a uniform window of 7 x 7, a side below
    7 the largest odd one that fits.
    """
    x, y = np.asarray(truth, np.float64), np.clip(np.asarray(dream, np.float64), 0, 1)
    side = min(x.shape[-3:-1])
    size = 11 if side >= 11 else min(7, side - 1 + side % 2)
    window = (
        np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * 1.5**2))
        if size == 11
        else np.ones(size)
    )
    window, inside = window / window.sum(), slice(size // 2, -(size // 2) or None)

    def local(z: np.ndarray) -> np.ndarray:
        return ndimage.correlate1d(ndimage.correlate1d(z, window, -3), window, -2)[
            ..., inside, inside, :
        ]

    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
    likeness = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
    return (likeness / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))).mean((-3, -2, -1))


def colourise(
    obs: np.ndarray, palette: UInt8[np.ndarray, 'k 3'] = PALETTE, symbolic: bool | None = None
) -> UInt8[np.ndarray, '*n h w 3']:
    """A symbolic grid [*n, h, w, c] in [0, 1] as colours on black; images (c = 1 or 3) pass as they
    are.

    Channel i has `palette[i % k]`, dimmed by its value; cells with several channels on show their
    mean, so that a dream's soft values blend. `symbolic` decides for c = 1 or 3, where it is not
    clear.
    """
    obs = np.clip(np.nan_to_num(np.asarray(obs, np.float32)), 0, 1)
    channels = obs.shape[-1]
    if symbolic is False or (symbolic is None and channels in (1, 3)):
        return np.round(255 * np.broadcast_to(obs, (*obs.shape[:-1], 3))).astype(np.uint8)
    colours = palette[np.arange(channels) % len(palette)].astype(np.float32)
    weight = np.maximum(obs.sum(-1, keepdims=True), 1.0)
    return np.round(obs @ colours / weight).astype(np.uint8)


def hide(rgb: UInt8[np.ndarray, '*n h w 3'], mask: np.ndarray) -> UInt8[np.ndarray, '*n h w 3']:
    """What the encoder saw: cells where `mask` [*n, h, w] is true are grey."""
    return np.where(mask[..., None], HIDDEN, rgb)


def enlarge(rgb: UInt8[np.ndarray, '*n h w k'], factor: int) -> UInt8[np.ndarray, '*n H W k']:
    """Nearest-neighbour enlargement by a whole factor."""
    return rgb.repeat(factor, -3).repeat(factor, -2)


def strip(frames: UInt8[np.ndarray, 'n h w 3'], gap: int = 1) -> UInt8[np.ndarray, 'h W 4']:
    """Frames side by side with transparent gaps of `gap` pixels, as RGBA."""
    n, h, w, _ = frames.shape
    out = np.zeros((h, n * (w + gap) - gap, 4), np.uint8)
    for i, frame in enumerate(frames):
        out[:, i * (w + gap) : i * (w + gap) + w] = np.concatenate(
            [frame, np.full((h, w, 1), 255, np.uint8)], -1
        )
    return out


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def _pixels(image: UInt8[np.ndarray, 'h w k']) -> bytes:
    rows = image.reshape(image.shape[0], -1)
    return zlib.compress(
        np.pad(rows, ((0, 0), (1, 0))).tobytes(), 9
    )  # the leading 0: filter 'none'


def _header(image: UInt8[np.ndarray, 'h w k']) -> bytes:
    h, w, k = image.shape
    if k not in (3, 4):
        raise ValueError(f'png: {k} channels given, expected 3 (RGB) or 4 (RGBA)')
    return b'\x89PNG\r\n\x1a\n' + _chunk(
        b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2 if k == 3 else 6, 0, 0, 0)
    )


def png(image: UInt8[np.ndarray, 'h w k']) -> bytes:
    """An RGB or RGBA image as the bytes of a PNG file."""
    return _header(image) + _chunk(b'IDAT', _pixels(image)) + _chunk(b'IEND', b'')


def apng(
    frames: UInt8[np.ndarray, 't h w k'], fps: float = 6.0, holds: Sequence[int] = ()
) -> bytes:
    """Frames as the bytes of an animated PNG that repeats for ever; `holds` are frames shown four
    times as long.
    """
    t, h, w, _ = frames.shape
    out = [_header(frames[0]), _chunk(b'acTL', struct.pack('>II', t, 0))]
    number = 0
    for i, frame in enumerate(frames):
        delay = round(1000 / fps) * (4 if i in holds else 1)
        out.append(
            _chunk(b'fcTL', struct.pack('>IIIIIHHBB', number, w, h, 0, 0, delay, 1000, 0, 0))
        )
        number += 1
        if i == 0:
            out.append(_chunk(b'IDAT', _pixels(frame)))
        else:
            out.append(_chunk(b'fdAT', struct.pack('>I', number) + _pixels(frame)))
            number += 1
    return b''.join([*out, _chunk(b'IEND', b'')])
