"""Observations as arrays: one table from the space that an environment declares, for every agent.

| declared                                       | becomes                                        |
|------------------------------------------------|------------------------------------------------|
| [h, w, c] or [c, h, w], a side above 16        | image: uint8 [h, w, c], its bounds as 0 to 255 |
| a stack of these, [n, h, w, c] or [n, c, h, w] | image of n * c channels                        |
| [h, w], both sides at least 32                 | image of one channel                           |
| bool [h, w, c] up to 16 x 16                   | grid: bool                                     |
| whole numbers so, at most 256 of them          | grid: uint8, its bounds as 0 to 255            |
| whole numbers so, and codes=N given            | grid: bool [h, w, c * N], one-hots             |
| real numbers so, with bounds                   | grid: float32, its bounds as 0 to 1            |
| any other Box; choices                         | vector: float32, its numbers; one-hots         |
| Dict, Tuple with an image or grid in it        | mapping of part to array                       |
| Dict, Tuple without                            | vector, one part after the other               |
| images without bounds; text, graphs, sequences | refused                                        |

Never imports JAX: workers of host environments use it. In traced code, `xp` is jax.numpy.
"""

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

GRID_SIDE = 16  # a picture with a longer side is an image
LEAST_SIDE = 8  # of an image of three dims; below it, numbers in three dims are no picture
LEAST_FLAT_SIDE = 32  # of an image of two dims
WIDEST = 2**24  # bounds further apart say nothing about the numbers between them
IMAGE_SIZE = (64, 64)  # that images are resized to, unless another is asked for
LONGEST_STATE = 1 << 16  # numbers in a vector
FEW_CODES = 32  # whole numbers below this look like codes

Kind = Literal['image', 'grid', 'vector']


class EnvRefusedError(ValueError):
    """Mistake of the user's, found in a worker process; the parent raises it as UserError."""


class Form(NamedTuple):
    """One array of an observation: its kind, shape and dtype, and what it was made of."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    said: str
    convert: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Wishes:
    """Choices of the user about observations.

    obs: 'image' for the pictures alone, 'state' for one vector of everything, None for the table.
    keys: parts of a Dict or Tuple to keep; all if empty. codes: number of codes in a grid.
    size: (height, width) that images are resized to; None keeps theirs.
    """

    obs: Literal['image', 'state'] | None = None
    keys: tuple[str, ...] = ()
    codes: int | None = None
    size: tuple[int, ...] | None = None


def form_of(
    who: str,
    shape: tuple[int, ...],
    dtype: Any,
    low: Any,
    high: Any,
    wishes: Wishes = Wishes(),
    xp: ModuleType = np,
) -> Form:
    """Form of a Box. Raises EnvRefusedError for a picture without bounds, or an unfit `codes`."""
    dtype = np.dtype(dtype)
    low = float(np.asarray(low, np.float64).min(initial=np.inf))
    high = float(np.asarray(high, np.float64).max(initial=-np.inf))
    width = math.prod(shape)
    whole = dtype.kind in 'iub'
    picture = _arranged(shape)
    bounded = 0 < high - low <= WIDEST
    given = f'{dtype.name} {list(shape)} from {low:g} to {high:g}'
    if wishes.codes is not None:
        return _codes(who, given, picture, shape, whole, wishes.codes, xp)
    kind = None if wishes.obs == 'state' else _kind(shape, picture)
    if kind == 'image' and dtype == np.bool_:
        low, high, bounded = 0.0, 1.0, True
    if kind == 'image' and not bounded:
        raise EnvRefusedError(
            f"{who} has pictures without bounds, {given}; expected bounds, or obs='state' for a "
            'vector of numbers'
        )
    if kind == 'image':
        assert picture is not None
        return _image(given, picture, dtype, low, high, wishes.size, xp)
    if kind == 'grid' and (dtype == np.bool_ or (bounded and not (whole and high - low > 255))):
        assert picture is not None
        return _grid(given, picture, dtype, low, high, xp)
    if width > LONGEST_STATE:
        raise EnvRefusedError(
            f'{who} has observations {given}, a vector of {width:,}; expected at most '
            f'{LONGEST_STATE:,}'
        )
    flat: Callable[[Any], Any] = lambda x: xp.asarray(x).reshape(-1).astype(xp.float32)
    return Form('vector', (width,), 'float32', f'{given} -> vector [{width}]', flat)


class Picture(NamedTuple):
    """Arrangement of an array as [h, w, c]."""

    shape: tuple[int, int, int]
    axes: tuple[int, ...]  # transposes into [h, w, ...channels]
    said: str


def _arranged(shape: tuple[int, ...]) -> Picture | None:
    """An array of two to four dims as a picture; None for others.

    Channels are the smaller of the first and the last axis, on a tie the last; of four dims the
    first is a stack.
    """
    if len(shape) == 2:
        return Picture((shape[0], shape[1], 1), (0, 1), '')
    if len(shape) == 3:
        first = shape[0] < shape[1] and shape[0] < shape[2]
        axes = (1, 2, 0) if first else (0, 1, 2)
        h, w, c = (shape[i] for i in axes)
        return Picture((h, w, c), axes, 'channels moved to the end' if first else '')
    if len(shape) == 4:
        inner = _arranged(shape[1:])
        assert inner is not None
        h, w, c = inner.shape
        rows, columns, channels = (i + 1 for i in inner.axes)
        said = f'{shape[0]} stacked as channels'
        return Picture((h, w, c * shape[0]), (rows, columns, 0, channels), said)
    return None


def _kind(shape: tuple[int, ...], picture: Picture | None) -> Literal['image', 'grid'] | None:
    if picture is None:
        return None
    sides = picture.shape[:2]
    if len(shape) == 2:
        return 'image' if min(sides) >= LEAST_FLAT_SIDE else None
    if max(sides) <= GRID_SIDE:
        return 'grid'
    return 'image' if min(sides) >= LEAST_SIDE else None


def _image(
    given: str,
    picture: Picture,
    dtype: np.dtype,
    low: float,
    high: float,
    size: tuple[int, ...] | None,
    xp: ModuleType,
) -> Form:
    h, w, c = picture.shape
    height, width = size or (h, w)
    resize = area_resizer((h, w), (height, width), xp)
    as_it_is = dtype == np.uint8 and (low, high) == (0, 255)

    def convert(x: Any) -> Any:
        x = xp.asarray(x).transpose(picture.axes).reshape(h, w, c)
        return resize(x if as_it_is else _scaled(x, low, high, xp))

    said = _said(given, 'image', (height, width, c), [
        picture.said,
        '' if as_it_is else f'{low:g} to {high:g} as 0 to 255',
        '' if (h, w) == (height, width) else f'resized from {h} x {w}',
    ])  # fmt: skip
    return Form('image', (height, width, c), 'uint8', said, convert)


def _grid(
    given: str, picture: Picture, dtype: np.dtype, low: float, high: float, xp: ModuleType
) -> Form:
    def convert(x: Any) -> Any:
        x = xp.asarray(x).transpose(picture.axes).reshape(picture.shape)
        if dtype == np.bool_:
            return x.astype(bool)
        if dtype.kind == 'f':
            return ((x.astype(xp.float32) - low) / (high - low)).astype(xp.float32)
        return x.astype(xp.uint8) if (low, high) == (0, 255) else _scaled(x, low, high, xp)

    kept = 'bool' if dtype == np.bool_ else 'float32' if dtype.kind == 'f' else 'uint8'
    top = 1 if kept == 'float32' else 255
    plain = kept == 'bool' or (low, high) == (0, top)
    scaled = '' if plain else f'{low:g} to {high:g} as 0 to {top}'
    codes = int(high) + 1 if kept == 'uint8' and low == 0 and 1 < high < FEW_CODES else 0
    advice = f'(codes? obs=codes:{codes} makes one-hots)' if codes else ''
    said = _said(given, 'grid', picture.shape, [picture.said, scaled, advice])
    return Form('grid', picture.shape, kept, said, convert)


def _scaled(x: Any, low: float, high: float, xp: ModuleType) -> Any:
    scaled = (x.astype(xp.float32) - low) * (255.0 / (high - low))
    return xp.clip(xp.rint(scaled), 0, 255).astype(xp.uint8)


def _codes(
    who: str,
    given: str,
    picture: Picture | None,
    shape: tuple[int, ...],
    whole: bool,
    codes: int,
    xp: ModuleType,
) -> Form:
    if not whole or picture is None or max(picture.shape[:2]) > GRID_SIDE:
        raise EnvRefusedError(
            f'{who}: obs=codes:{codes} given for observations {given}; expected whole numbers in a '
            f'grid up to {GRID_SIDE} x {GRID_SIDE}'
        )
    h, w, c = picture.shape

    def convert(x: Any) -> Any:
        x = xp.asarray(x).transpose(picture.axes).reshape(h, w, c)
        if xp is np and (x.min() < 0 or x.max() >= codes):
            raise EnvRefusedError(
                f'{who}: obs=codes:{codes} given, but an observation has the numbers {x.min()} to '
                f'{x.max()}; expected 0 to {codes - 1}'
            )
        return (x[..., None] == xp.arange(codes)).reshape(h, w, c * codes)

    said = _said(given, 'grid', (h, w, c * codes), [picture.said, f'{codes} codes as one-hots'])
    return Form('grid', (h, w, c * codes), 'bool', said, convert)


def _said(given: str, kind: Kind, shape: tuple[int, ...], more: list[str]) -> str:
    return ', '.join([f'{given} -> {kind} {list(shape)}', *filter(None, more)])


def hint(dtype: str, highest: int) -> str | None:
    """A line about obs=codes:<n> for a grid of few whole numbers, of which `highest` is the largest
    that arrived; else None.
    """
    if dtype != 'uint8' or not 1 < highest < FEW_CODES:
        return None
    return (
        f'observations are a grid of the numbers 0 to {highest}, taken for brightness; if they are '
        f'codes, --env-options obs=codes:{highest + 1} makes one-hots of them'
    )


def area_resizer(
    source: tuple[int, int], target: tuple[int, int], xp: ModuleType = np
) -> Callable[[Any], Any]:
    """Function that resizes uint8 images [h, w, c] -> [*target, c]; a pixel is the mean of the area
    it covers.
    """
    if source == target:
        return lambda image: image
    rows, columns = _shares(source[0], target[0]), _shares(source[1], target[1])

    def resize(image: Any) -> Any:
        height, width, channels = image.shape
        flat = image.reshape(height, width * channels).astype(xp.float32)
        thin = (rows @ flat).reshape(-1, width, channels)
        return xp.rint(xp.matmul(columns, thin)).astype(xp.uint8)

    return resize


def _shares(source: int, target: int) -> np.ndarray:
    """Share of each source pixel in each target pixel, [target, source]."""
    edges = np.arange(target + 1) * (source / target)
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    shares: np.ndarray = np.clip(overlap, 0.0, None) * (target / source)
    return shares.astype(np.float32)
