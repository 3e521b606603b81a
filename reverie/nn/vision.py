"""Images as patches."""

import numpy as np
from jaxtyping import Array, Float


def patchify(image: Float[Array, '*B h w c'], size: tuple[int, int]) -> Float[Array, '*B P p']:
    """Cut into non-overlapping patches, row by row; p = size[0] * size[1] * c."""
    *lead, h, w, c = image.shape
    ph, pw = size
    x = image.reshape(*lead, h // ph, ph, w // pw, pw, c)
    n = len(lead)
    x = x.transpose(*range(n), n, n + 2, n + 1, n + 3, n + 4)
    return x.reshape(*lead, (h // ph) * (w // pw), ph * pw * c)


def unpatchify(
    patches: Float[Array, '*B P p'], size: tuple[int, int], shape: tuple[int, int, int]
) -> Float[Array, '*B h w c']:
    """Inverse of `patchify` for images of `shape`."""
    *lead, _, _ = patches.shape
    (h, w, c), (ph, pw) = shape, size
    x = patches.reshape(*lead, h // ph, w // pw, ph, pw, c)
    n = len(lead)
    x = x.transpose(*range(n), n, n + 2, n + 1, n + 3, n + 4)
    return x.reshape(*lead, h, w, c)


def patch_grid(shape: tuple[int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Row and column of every patch. -> [P, 2]"""
    rows, columns = shape[0] // size[0], shape[1] // size[1]
    return np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing='ij'), -1).reshape(-1, 2)
