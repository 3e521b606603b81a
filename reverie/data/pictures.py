"""Pictures of a dataset as compressed files: lossless WebP for small ones, JPEG for large ones.

A picture's size is read from its header and compared with the dataset's before it is decoded, so a
file cannot claim more memory than the dataset says.
"""

import io
import math
from typing import Any

import numpy as np
from PIL import Image

from reverie.types import UserError

# Name -> (format of Pillow, options of its encoder).
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    'webp': ('WEBP', {'lossless': True, 'quality': 50, 'method': 2}),
    'jpeg': ('JPEG', {'quality': 95, 'subsampling': 0}),
}
LARGE = 128 * 128  # pixels beyond which pictures are JPEG files
MOST_BYTES = 1 << 34  # of the pictures of one episode


def codec_for(shape: tuple[int, ...], dtype: str, lossy: bool = False) -> str:
    """Return the codec of observations of a shape; '' for what is no picture of one or three
    colours. lossy: small pictures too are JPEG files, of about half the bytes.
    """
    if dtype != 'uint8' or len(shape) != 3 or shape[2] not in (1, 3):
        return ''
    return 'jpeg' if lossy or shape[0] * shape[1] > LARGE else 'webp'


def compress(frames: np.ndarray, codec: str) -> list[bytes]:
    """Return one file for each of the frames [T, h, w, 1 or 3] of uint8."""
    kind, options = CODECS[codec]
    files = []
    for frame in frames:
        out = io.BytesIO()
        Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).save(out, kind, **options)
        files.append(out.getvalue())
    return files


def decompress(field: Any, codec: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Inverse of `compress`: the frames, uint8 of `shape` [T, h, w, c].

    Raises UserError, starting with `where`, for anything but as many whole pictures of that size.
    """
    if not isinstance(field, dict) or field.get('dtype') != codec or not _files(field, shape[0]):
        raise UserError(f'{where}: field obs is missing or malformed, expected {codec} files')
    if field.get('shape') != list(shape):
        given = str(field.get('shape'))
        raise UserError(f'{where}: field obs is {given:.60}, expected {list(shape)}')
    # A file of one colour is a thousand times smaller than its picture.
    if math.prod(shape) > MOST_BYTES:
        raise UserError(
            f'{where}: {math.prod(shape):,} bytes of pictures, expected <= {MOST_BYTES:,}'
        )
    frames = np.empty(shape, np.uint8)
    kind = CODECS[codec][0]
    for i, file in enumerate(field['data']):
        try:
            with Image.open(io.BytesIO(file), formats=(kind,)) as picture:
                if picture.size != (shape[2], shape[1]):
                    raise UserError(
                        f'{where}: picture {i} is {picture.size[1]}x{picture.size[0]}, expected '
                        f'{shape[1]}x{shape[2]}'
                    )
                mode = 'L' if shape[3] == 1 else 'RGB'
                frames[i] = np.asarray(picture.convert(mode)).reshape(shape[1:])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(
                f'{where}: picture {i} cannot be read ({type(error).__name__}), expected {kind}'
            ) from error
    return frames


def _files(field: dict[str, Any], count: int) -> bool:
    files = field.get('data')
    return (
        isinstance(files, list)
        and len(files) == count
        and all(isinstance(file, bytes) for file in files)
    )
