"""Episodes as bytes: msgpack of a header and, per field, dtype, shape and little-endian bytes.

Everything in a record is a number, a string or bytes; nothing is executed when it is read. Sizes
are checked against the bytes that are really there before any array is made, so a record cannot
claim more memory than it occupies.
"""

import dataclasses
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import msgpack
import numpy as np

from reverie.data.pictures import compress, decompress
from reverie.types import ActionSpace, Step, UserError

VERSION = 1
DTYPES = ('bool', 'uint8', 'int8', 'int16', 'int32', 'float16', 'float32')
# Bits of `flags`.
FIRST = 1
LAST = 2
TERMINAL = 4


def index_dtype(size: int) -> str:
    """Return the smallest dtype of the indices -1 to size - 1."""
    return 'int8' if size <= 127 else 'int16' if size <= 32767 else 'int32'


@dataclasses.dataclass(frozen=True)
class Schema:
    """Shapes and dtypes that all records of a dataset share."""

    obs_shape: tuple[int, ...]
    obs_dtype: str
    actions: ActionSpace
    codec: str = ''  # of pictures in files, one of `CODECS`; '' for plain numbers

    @property
    def packed(self) -> bool:
        """True if observations are stored as bits."""
        return self.obs_dtype == 'bool'

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one stored frame: [bytes] if packed, else the observation's own."""
        return (math.ceil(math.prod(self.obs_shape) / 8),) if self.packed else self.obs_shape

    @property
    def stored_dtype(self) -> str:
        return 'uint8' if self.packed else self.obs_dtype

    @property
    def action_dtype(self) -> str:
        return index_dtype(self.actions.size) if self.actions.kind == 'discrete' else 'float32'

    @property
    def action_shape(self) -> tuple[int, ...]:
        if self.actions.kind == 'composite':
            return (len(self.actions.parts),)
        return (self.actions.size,) if self.actions.kind == 'continuous' else ()

    @property
    def no_action(self) -> np.ndarray:
        """Stored form of an action that is not there or not known."""
        if self.actions.kind == 'composite':
            return np.array([-1.0 if part.choices else 0.0 for part in self.actions.parts], 'f4')
        fill = -1 if self.actions.kind == 'discrete' else 0
        return np.full(self.action_shape, fill, self.action_dtype)


@dataclasses.dataclass(frozen=True)
class Record:
    """One episode in stored form: bits for boolean frames, indices for discrete actions."""

    kind: str
    complete: bool  # false for the tail of a stream that the collector cut
    has_action: bool
    has_reward: bool
    obs: np.ndarray  # [T, *stored_shape]
    action: np.ndarray  # [T, *action_shape], `no_action` at the first step or without has_action
    reward: np.ndarray  # [T] float32; zeros where has_reward is false
    flags: np.ndarray  # [T] uint8, bits FIRST, LAST, TERMINAL
    labelled: np.ndarray | None = None  # [T] frames with an action, where only some have one

    def __len__(self) -> int:
        return len(self.flags)

    @property
    def ret(self) -> float:
        """Undiscounted return."""
        return float(self.reward.sum(dtype=np.float64))


def pack(obs: np.ndarray, schema: Schema) -> np.ndarray:
    """Return observations [T, *obs_shape] in stored form [T, *stored_shape]."""
    if not schema.packed:
        return np.ascontiguousarray(obs)
    return np.packbits(obs.reshape(len(obs), -1), axis=-1)


def unpack(stored: np.ndarray, schema: Schema) -> np.ndarray:
    """Inverse of `pack`."""
    if not schema.packed:
        return stored
    obs: np.ndarray = unpack_bits(stored, schema.obs_shape)
    return obs


def unpack_bits(stored: Any, shape: Sequence[int], xp: ModuleType = np) -> Any:
    """Return booleans [..., *shape] from bytes [..., ceil(prod(shape) / 8)]. xp: jnp if traced."""
    bits = xp.unpackbits(stored, axis=-1, count=math.prod(shape))
    return bits.reshape(*stored.shape[:-1], *shape).astype(bool)


def from_step(
    kind: str,
    step: Step,
    schema: Schema,
    complete: bool,
    has_action: bool = True,
    has_reward: bool = True,
) -> Record:
    """Make the record of one episode, a `Step` of NumPy arrays with leading dim [T].

    Discrete `prev_action` may be one-hot [T, A] or indices [T], composite ones are [T, parts] as they
    are stored. Raises UserError if anything does
    not fit the schema.
    """
    first, last, terminal = (np.asarray(x) for x in (step.is_first, step.is_last, step.is_terminal))
    obs = np.asarray(step.obs)
    for name in ('prev_action', 'reward', 'is_first', 'is_last', 'is_terminal'):
        if np.shape(getattr(step, name))[:1] != obs.shape[:1]:
            given = np.shape(getattr(step, name))
            raise UserError(
                f'episode has {name} of shape {list(given)}, expected {len(obs)} steps as in obs'
            )
    if obs.shape[1:] != schema.obs_shape or obs.dtype.name != schema.obs_dtype:
        raise UserError(
            f'episode has observations {obs.dtype.name}{list(obs.shape[1:])}, '
            f'the dataset holds {schema.obs_dtype}{list(schema.obs_shape)}'
        )
    flags = first * np.uint8(FIRST) | last * np.uint8(LAST) | terminal * np.uint8(TERMINAL)
    if has_action:
        action = _stored_action(np.asarray(step.prev_action), first, schema)
    else:
        action = _no_action(len(obs), schema)
    reward = np.asarray(step.reward, np.float32) if has_reward else np.zeros(len(obs), np.float32)
    record = Record(
        kind,
        complete,
        has_action,
        has_reward,
        pack(obs, schema),
        action,
        reward,
        flags.astype(np.uint8),
    )
    check_record(record, schema, f'episode of kind {kind!r}')
    return record


def _no_action(length: int, schema: Schema) -> np.ndarray:
    return np.tile(schema.no_action, (length, *(1 for _ in schema.action_shape)))


def hide_actions(record: Record, schema: Schema, labelled: np.ndarray | None = None) -> Record:
    """Return an episode as unlabelled video, but for the frames [T] that stay labelled."""
    action = _no_action(len(record), schema)
    if labelled is None or not labelled.any():
        return dataclasses.replace(record, has_action=False, action=action)
    action[labelled] = record.action[labelled]
    return dataclasses.replace(record, action=action, labelled=labelled)


def _stored_action(action: np.ndarray, first: np.ndarray, schema: Schema) -> np.ndarray:
    if schema.actions.kind != 'discrete':
        return np.where(first[:, None], schema.no_action, action).astype(np.float32)
    if action.ndim == 2:
        if action.shape[1] != schema.actions.size:
            raise UserError(
                f'episode has {action.shape[1]} actions, the dataset has {schema.actions.size}'
            )
        action = np.where(action.any(-1), action.argmax(-1), -1)
    # Ranges are judged before the cast: 300 must not become a valid int8.
    action = np.where(first, -1, action)
    if np.any((action < -1) | (action >= schema.actions.size)):
        raise UserError(
            f'episode has action {int(action.max())}, expected 0 to {schema.actions.size - 1}'
        )
    return action.astype(schema.action_dtype)


def check_record(record: Record, schema: Schema, where: str, frames: bool = True) -> None:
    """Raise UserError, starting with `where`, if the record breaks a rule of the format; `frames` is
    false where its observations were not decoded.
    """
    length = len(record)
    if not length:
        raise UserError(f'{where}: has no steps, expected at least one')
    for name, array, shape in (
        ('obs', record.obs, schema.stored_shape if frames else record.obs.shape[1:]),
        ('action', record.action, schema.action_shape),
        ('reward', record.reward, ()),
    ):
        if array.shape != (length, *shape):
            raise UserError(
                f'{where}: {name} has shape {list(array.shape)}, expected {[length, *shape]}'
            )
        if array.dtype.kind == 'f' and not np.isfinite(array).all():
            raise UserError(f'{where}: {name} has NaN or infinity, expected numbers')
    if frames and len(schema.obs_shape) == 3 and not schema.packed:
        check_picture(record.obs, where)
    _check_flags(record, where)
    if schema.actions.kind == 'discrete':
        _check_actions(record, schema.actions.size, where)
    elif schema.actions.kind == 'composite':
        _check_parts(record, schema, where)
    if not record.has_reward and record.reward.any():
        raise UserError(f'{where}: has rewards and yet is marked as without')


def check_picture(obs: np.ndarray, where: str) -> None:
    """Raise UserError for pictures [T, h, w, c] that no agent can scale: models take uint8 as 0 to
    255, and other numbers as 0 to 1.
    """
    if obs.dtype != np.uint8 and (obs.min() < 0 or obs.max() > 1):
        raise UserError(
            f'{where}: pictures of {obs.dtype} with numbers from {obs.min():g} to {obs.max():g}, '
            'expected uint8, or 0 to 1'
        )


def _check_flags(record: Record, where: str) -> None:
    flags, end = record.flags, len(record) - 1
    terminal = flags[-1] & TERMINAL
    expected = np.zeros_like(flags)
    expected[0] = FIRST
    expected[-1] |= LAST | terminal
    if not np.array_equal(flags, expected):
        for name, bit, place in (
            ('is_first', FIRST, 0),
            ('is_last', LAST, end),
            ('is_terminal', TERMINAL, end),
        ):
            found = np.flatnonzero((flags ^ expected) & bit).tolist()
            if found:
                raise UserError(
                    f'{where}: {name} is wrong at steps {found[:5]}, expected only at {place}'
                )
        raise UserError(f'{where}: has unknown flags')
    if terminal and not record.complete:
        raise UserError(f'{where}: is terminal and yet marked incomplete')


def _check_actions(record: Record, size: int, where: str) -> None:
    low, high = (0, size - 1) if record.has_action else (-1, -1)
    first, rest = record.action[0], record.action[1:]
    if first != -1:
        raise UserError(f'{where}: action {int(first)} at the first step, expected -1 (none)')
    if len(rest) and (rest.min() < low or rest.max() > high):
        raise UserError(
            f'{where}: actions from {rest.min()} to {rest.max()}, expected {low} to {high}'
        )


def _check_parts(record: Record, schema: Schema, where: str) -> None:
    """Raise UserError for composite actions out of range; a choice that is not known is -1."""
    for i, part in enumerate(schema.actions.parts):
        values = record.action[:, i]
        low, high = (-1, len(part.choices) - 1) if part.choices else (-1, 1)
        whole = not part.choices or np.array_equal(values, np.round(values))
        if values.min() < low or values.max() > high or not whole:
            raise UserError(
                f'{where}: action {part.name} from {values.min():g} to {values.max():g}, expected '
                f'{"whole numbers" if part.choices else "numbers"} from {low} to {high}'
            )
    nothing = np.broadcast_to(schema.no_action, record.action.shape)
    there = record.action[:1] if record.has_action else record.action
    if not np.array_equal(there, nothing[: len(there)]):
        raise UserError(f'{where}: has an action where there is none, expected {schema.no_action}')


def encode(record: Record, codec: str = '') -> bytes:
    """Encode a record as bytes, its pictures as files if a codec is given; unlabelled actions and
    rewards take no space.
    """
    arrays = {'flags': record.flags} if codec else {'obs': record.obs, 'flags': record.flags}
    if record.has_action:
        arrays['action'] = record.action
    if record.has_reward:
        arrays['reward'] = record.reward
    fields: dict[str, Any] = {
        name: {'dtype': x.dtype.name, 'shape': list(x.shape), 'data': _little(x).tobytes()}
        for name, x in arrays.items()
    }
    if codec:
        shape = list(record.obs.shape)
        fields['obs'] = {'dtype': codec, 'shape': shape, 'data': compress(record.obs, codec)}
    head = {
        'version': VERSION,
        'kind': record.kind,
        'length': len(record),
        'complete': record.complete,
        'has_action': record.has_action,
        'has_reward': record.has_reward,
    }
    packed: bytes = msgpack.packb(head | {'fields': fields})
    return packed


def _little(x: np.ndarray) -> np.ndarray:
    return x.astype(x.dtype.newbyteorder('<'), copy=False)


HEADER = {
    'version': int,
    'kind': str,
    'length': int,
    'complete': bool,
    'has_action': bool,
    'has_reward': bool,
}


def decode(data: bytes, schema: Schema, where: str, frames: bool = True) -> Record:
    """Decode a record from bytes and check it against the schema; without its observations if
    `frames` is false.

    Raises UserError, starting with `where`, for anything else.
    """
    try:
        head = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise UserError(
            f'{where}: not a msgpack record ({type(error).__name__}), expected one'
        ) from error
    if not isinstance(head, dict) or not isinstance(head.get('fields'), dict):
        raise UserError(f'{where}: not an episode record, expected a map with a header and fields')
    for name, kind in HEADER.items():
        if type(head.get(name)) is not kind:
            raise UserError(
                f'{where}: header {name} is {str(head.get(name))[:40]!r}, expected {kind.__name__}'
            )
    if head['version'] != VERSION:
        raise UserError(f'{where}: record version {head["version"]}, expected {VERSION}')
    fields, length = head['fields'], head['length']
    if not frames:
        obs = np.zeros((length, *(0 for _ in schema.stored_shape)), schema.stored_dtype)
    elif schema.codec:
        obs = decompress(fields.get('obs'), schema.codec, (length, *schema.obs_shape), where)
    else:
        obs = _field(fields, 'obs', schema.stored_dtype, (length, *schema.stored_shape), where)
    flags = _field(fields, 'flags', 'uint8', (length,), where)
    # From here on `length` is backed by real bytes, so arrays of that length are safe to make.
    if head['has_action']:
        action = _field(
            fields, 'action', schema.action_dtype, (length, *schema.action_shape), where
        )
    else:
        action = _no_action(length, schema)
    if head['has_reward']:
        reward = _field(fields, 'reward', 'float32', (length,), where)
    else:
        reward = np.zeros(length, np.float32)
    names = ('kind', 'complete', 'has_action', 'has_reward')
    record = Record(
        **{name: head[name] for name in names}, obs=obs, action=action, reward=reward, flags=flags
    )
    check_record(record, schema, where, frames)
    return record


def _field(
    fields: dict[str, Any], name: str, dtype: str, shape: tuple[int, ...], where: str
) -> np.ndarray:
    field = fields.get(name)
    if not isinstance(field, dict) or not isinstance(field.get('data'), bytes):
        raise UserError(
            f'{where}: field {name} is missing or malformed, expected {dtype}{list(shape)}'
        )
    if field.get('dtype') != dtype or field.get('shape') != list(shape):
        given = f'{str(field.get("dtype"))[:40]}{str(field.get("shape"))[:60]}'
        raise UserError(f'{where}: field {name} is {given}, expected {dtype}{list(shape)}')
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if len(field['data']) != size:
        raise UserError(
            f'{where}: field {name} has {len(field["data"])} bytes, expected {size} for its shape'
        )
    return np.frombuffer(field['data'], np.dtype(dtype).newbyteorder('<')).reshape(shape)
