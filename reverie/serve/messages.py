"""Messages of the socket: orders of a page, checked before anything acts on them, and its frames.

An order is a small JSON object {"type": ...}. A frame is binary: the length of a JSON header (4
bytes, big-endian), the header, then the pictures it lists.
"""

import dataclasses
import json
import struct
from typing import Any, Literal, NoReturn

import numpy as np

from reverie.evaluation.video import colourise, jpeg, psnr
from reverie.io import plain
from reverie.serve import keys
from reverie.serve.frame import HostFrame
from reverie.types import ActionSpace, Component, EnvSpec

MAX_BYTES = 4096  # of one order
RAW_BYTES = 1 << 16  # pictures up to this size travel as they are, larger ones as JPEG
PACES = (0.5, 120.0)  # frames per second a page may ask for


class MalformedMessageError(ValueError):
    """Says in a few words why an order is not one of ours."""


@dataclasses.dataclass(frozen=True)
class Act:
    """Take this action from now on."""

    action: tuple[float, ...]  # one-hot if discrete
    id: int  # counts the page's orders; comes back with the first frame that obeys


@dataclasses.dataclass(frozen=True)
class Set:
    """Change a setting of play."""

    field: Literal['view', 'by_agent', 'paused', 'steps', 'pace', 'source']
    value: Any


@dataclasses.dataclass(frozen=True)
class Do:
    """Do something once.

    step: one frame while paused. reset: begin another episode. again: the same beginning. gif, mp4,
    episode: save.
    """

    what: Literal['step', 'reset', 'again', 'gif', 'mp4', 'episode']


Order = Act | Set | Do


@dataclasses.dataclass(frozen=True)
class Choices:
    """Choices of the pages of a session."""

    space: ActionSpace
    views: tuple[str, ...]
    steps: tuple[int, ...]
    sources: tuple[str, ...]
    has_policy: bool  # the agent can play


WHAT = ('step', 'reset', 'again', 'gif', 'mp4', 'episode')


def _refuse_constant(text: str) -> NoReturn:
    raise MalformedMessageError(f'{text} is not a number here')


def _number(value: Any, low: float, high: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise MalformedMessageError(f'{what}: expected a number')
    if not low <= value <= high:  # also of whole numbers too large for a float
        raise MalformedMessageError(f'{what}: expected {low:g} to {high:g}')
    return float(value)


def _whole(value: Any, low: int, high: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise MalformedMessageError(f'{what}: expected a whole number from {low} to {high}')
    return value


def _one_of(value: Any, choices: tuple[Any, ...], what: str) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise MalformedMessageError(f'{what}: expected one of {", ".join(map(str, choices))}')
    return value


def _keys(order: dict[str, Any], *names: str) -> None:
    if set(order) != {'type', *names}:
        raise MalformedMessageError(
            f'{order["type"]}: expected the fields {", ".join(("type", *names))}'
        )


def _action(value: Any, space: ActionSpace) -> tuple[float, ...]:
    if space.kind == 'discrete':
        return keys.vector(space, _whole(value, 0, space.size - 1, 'action'))
    count = len(space.parts) if space.kind == 'composite' else space.size
    if not isinstance(value, list) or len(value) != count:
        raise MalformedMessageError(f'action: expected a list of {count} numbers')
    if space.kind == 'composite':
        return keys.vector(space, tuple(map(_part, value, space.parts)))
    return tuple(_number(x, -1.0, 1.0, 'action') for x in value)


def _part(value: Any, part: Component) -> float:
    if part.choices:
        return float(_whole(value, 0, len(part.choices) - 1, 'action'))
    return _number(value, part.low, part.high, 'action')


def parse(text: str, allowed: Choices) -> Order:
    """Parse an order of a page; raises MalformedMessageError for anything that is none."""
    try:
        order = json.loads(text, parse_constant=_refuse_constant)
    except MalformedMessageError:
        raise
    # RecursionError: nested a thousand deep; ValueError: a number with thousands of digits, too
    except (ValueError, RecursionError):
        raise MalformedMessageError('not JSON') from None
    if not isinstance(order, dict) or not isinstance(order.get('type'), str):
        raise MalformedMessageError('expected an object with a type')
    kind = order['type']
    if kind == 'act':
        _keys(order, 'action', 'id')
        return Act(_action(order['action'], allowed.space), _whole(order['id'], 0, 2**53, 'id'))
    if kind in WHAT:
        _keys(order)
        return Do(kind)
    if kind != 'set':
        raise MalformedMessageError('unknown type')
    _keys(order, 'field', 'value')
    field, value = order['field'], order['value']
    if field == 'pace':
        return Set('pace', _number(value, *PACES, 'pace'))
    if field == 'by_agent' and not allowed.has_policy:
        raise MalformedMessageError('by_agent: this model has no policy, expected a person to play')
    choices = {
        'view': allowed.views,
        'by_agent': (False, True),
        'paused': (False, True),
        'steps': allowed.steps,
        'source': allowed.sources,
    }
    if not isinstance(field, str) or field not in choices:
        raise MalformedMessageError('unknown field')
    # a key of `choices`
    return Set(field, _one_of(value, choices[field], field))  # type: ignore[arg-type]


def picture(image: np.ndarray, symbolic: bool) -> tuple[dict[str, Any], bytes]:
    """A picture's entry in the header, and its bytes: RGB raw or as JPEG, none for a vector.

    image: uint8 [h, w, c], or float32 [n].
    """
    if image.ndim == 1:
        numbers = [round(float(x), 4) for x in np.nan_to_num(image)]
        return {'kind': 'numbers', 'numbers': numbers}, b''
    rgb = rgb_of(image, symbolic)
    size = {'h': rgb.shape[0], 'w': rgb.shape[1]}
    if rgb.nbytes <= RAW_BYTES:
        return {'kind': 'raw', **size}, rgb.tobytes()
    return {'kind': 'jpeg', **size}, jpeg(rgb)


def is_symbolic(spec: EnvSpec) -> bool:
    """Whether pictures are grids of symbols rather than grey or colour images."""
    shape = spec.obs_shape
    if not isinstance(shape, tuple) or len(shape) != 3:
        return False
    return bool(spec.channels) or shape[-1] not in (1, 3)


def rgb_of(image: np.ndarray, symbolic: bool) -> np.ndarray:
    """uint8 [*n, h, w, c] -> RGB; grids of symbols get a colour for each channel, as in reports."""
    channels = image.shape[-1]
    if not symbolic and channels in (1, 3):
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:-1], 3)))
    return colourise(image.astype(np.float32) / 255, symbolic=True)


def frame_message(
    header: dict[str, Any], image: np.ndarray, frame: HostFrame, symbolic: bool
) -> bytes:
    """The message of one player's `frame`; `image` is what is shown of it."""
    header |= {
        'cont': float(frame.cont),
        'value': None if frame.value is None else float(frame.value),
        'probs': None if frame.probs is None else [round(float(p), 4) for p in frame.probs],
        'action': [round(float(x), 3) for x in frame.action],
    }
    pictures = [picture(image, symbolic)]
    if frame.real is not None:
        pictures.append(picture(frame.real, symbolic))
        if frame.image.ndim == 3:
            header['psnr'] = float(psnr(frame.real[None] / 255, frame.image[None] / 255)[0])
    return pack(header, pictures)


def pack(header: dict[str, Any], pictures: list[tuple[dict[str, Any], bytes]]) -> bytes:
    """Pack a frame into one binary message; numbers that are not finite become null."""
    header = plain(header) | {'pictures': [{**what, 'bytes': len(x)} for what, x in pictures]}
    text = json.dumps(header, allow_nan=False, separators=(',', ':')).encode()
    return b''.join([struct.pack('>I', len(text)), text, *(data for _, data in pictures)])


def unpack(message: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Unpack what `pack` made: the header, and the bytes of each picture."""
    (length,) = struct.unpack('>I', message[:4])
    at, parts = 4 + length, []
    header = json.loads(message[4:at])
    for what in header['pictures']:
        parts.append(message[at : at + what['bytes']])
        at += what['bytes']
    return header, parts
