"""Frames as pictures: colours for symbolic grids, image files, and PSNR and SSIM."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
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
    """Peak signal-to-noise ratio of each frame in dB: -10 log10(MSE) of values in [0, 1].

    At most `PSNR_CAP`.
    """
    square = (np.asarray(truth, np.float64) - np.clip(np.asarray(dream, np.float64), 0, 1)) ** 2
    error: np.ndarray = np.maximum(square.mean((-3, -2, -1)), 10 ** (-PSNR_CAP / 10))
    decibels: np.ndarray = -10 * np.log10(error)
    return decibels


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
    window = np.ones(size)
    if size == 11:
        window = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    inside = slice(size // 2, -(size // 2) or None)

    def local(z: np.ndarray) -> np.ndarray:
        along_rows = ndimage.correlate1d(z, window, -3)
        smooth: np.ndarray = ndimage.correlate1d(along_rows, window, -2)
        return smooth[..., inside, inside, :]

    mx, my = local(x), local(y)
    vx = local(x * x) - mx * mx
    vy = local(y * y) - my * my
    cov = local(x * y) - mx * my
    likeness = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
    likeness = likeness / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))
    mean: np.ndarray = likeness.mean((-3, -2, -1))
    return mean


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
    blended: np.ndarray = np.round(obs @ colours / weight)
    return blended.astype(np.uint8)


def hide(rgb: UInt8[np.ndarray, '*n h w 3'], mask: np.ndarray) -> UInt8[np.ndarray, '*n h w 3']:
    """Frames as the encoder saw them: cells where `mask` [*n, h, w] is true are grey."""
    return np.where(mask[..., None], HIDDEN, rgb)


def enlarge(rgb: UInt8[np.ndarray, '*n h w k'], factor: int) -> UInt8[np.ndarray, '*n H W k']:
    """Nearest-neighbour enlargement by a whole factor."""
    return rgb.repeat(factor, -3).repeat(factor, -2)


def png(rgb: UInt8[np.ndarray, 'h w k']) -> bytes:
    """An RGB or RGBA image as the bytes of a PNG file."""
    return _bytes(Image.fromarray(rgb), 'PNG')


def apng(
    frames: UInt8[np.ndarray, 't h w k'], fps: float = 6.0, holds: Sequence[int] = ()
) -> bytes:
    """Frames as the bytes of an animated PNG that repeats for ever.

    holds: frames shown four times as long.
    """
    delay = round(1000 / fps)
    delays = [delay * (4 if i in holds else 1) for i in range(len(frames))]
    first, *others = map(Image.fromarray, frames)
    return _bytes(first, 'PNG', save_all=True, append_images=others, duration=delays, loop=0)


def gif(frames: UInt8[np.ndarray, 't h w 3'], fps: float) -> bytes:
    """Frames as the bytes of an animated GIF that repeats for ever; its clock has 1/100 s."""
    delay = max(20, round(100 / fps) * 10)
    first, *others = (Image.fromarray(frame).quantize(256) for frame in frames)
    return _bytes(first, 'GIF', save_all=True, append_images=others, duration=delay, loop=0)


def jpeg(rgb: UInt8[np.ndarray, 'h w 3'], quality: int = 90) -> bytes:
    """An RGB image as the bytes of a JPEG file."""
    return _bytes(Image.fromarray(rgb), 'JPEG', quality=quality)


def _bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
