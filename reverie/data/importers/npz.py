"""Import of episodes as NumPy archives: Dreamer V2's and V-D4RL's, and the replay of Dreamer V3.

Dreamer V2 and DrQ-v2 write the action that led to an observation beside it (arrival; their drivers
join the action of a step with the observation it returns). Dreamer V3 writes the action that its
policy chose at the observation (departure), in chunks of a stream that have a `stepid`; all of them
write rewards with the observation they arrived with.
"""

import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reverie.data.importers.arrays import (
    as_observations,
    check_length,
    cut,
    one_shape,
    refuse_video_options,
    stored_actions,
)
from reverie.data.importers.common import Imported, Options, Say
from reverie.types import ActionSpace, EnvSpec, UserError

OBSERVATIONS = ('image', 'obs', 'observation', 'observations', 'vector', 'state')
MOST_BYTES = 1 << 32  # of one array
FLAGS = ('is_first', 'is_last', 'is_terminal', 'discount')


class Archives:
    """Importer of a folder of npz files, or of one."""

    def __init__(self, source: pathlib.Path, name: str, options: Options, say: Say):
        refuse_video_options(options, 'npz')
        self.say = say
        self.paths = _find(source)
        self.key = options.key or _observation(self.paths[0])
        self.names: Sequence[str] = [path.name for path in self.paths]
        self.task = ''
        shapes, actions, chosen = [], [], []
        for path in self.paths:
            found = _headers(path)
            for key in (self.key, 'action', 'reward'):
                if key not in found:
                    raise UserError(f'{path}: has no {key}, only {", ".join(found):.200}')
            shapes.append((path.name, found[self.key][0][1:], str(found[self.key][1])))
            actions.append(_Kind(path, _load(path, 'action')))
            chosen.append('stepid' in found)
        one_shape(shapes)
        if not options.alignment and len(set(chosen)) > 1:
            raise UserError(
                f'{source}: some files are chunks of Dreamer V3 (stepid), expected all or none'
            )
        self.departure = options.alignment == 'departure' or (not options.alignment and chosen[0])
        space = _space(actions)
        self.spec = EnvSpec(name, self._observations(self.paths[0]).shape[1:], space)
        self.facts: dict[str, Any] = {
            'fps': options.fps, 'alignment': 'departure' if self.departure else 'arrival',
        }  # fmt: skip

    def _observations(self, path: pathlib.Path) -> np.ndarray:
        return as_observations(_load(path, self.key), f'{path}: {self.key}')

    def episodes(self, number: int) -> Iterator[Imported]:
        """Yield the episodes of a file."""
        path = self.paths[number]
        obs = self._observations(path)
        length = len(obs)
        action, reward = _load(path, 'action'), _load(path, 'reward')
        keys = _headers(path)
        flags = {key: _load(path, key) for key in FLAGS if key in keys}
        for key, array in ({'action': action, 'reward': reward} | flags).items():
            check_length(key, array, length, path)
        first, last, terminal = (
            flags[key].astype(bool) if key in flags else np.zeros(length, bool)
            for key in ('is_first', 'is_last', 'is_terminal')
        )
        if 'is_terminal' not in flags and 'discount' in flags:
            terminal = flags['discount'] == 0
            terminal[0] = False  # its discount says nothing
        if 'is_first' not in flags:
            first[0] = True
        if 'is_last' not in flags and not self.departure:
            last[-1] = True  # a file is an episode
        if self.departure:
            action = np.concatenate([np.zeros_like(action[:1]), action[:-1]])
        if self.spec.actions.kind == 'discrete' and action.ndim == 2:
            none = ~action.any(1)
            # Nothing may lead to the first step of an episode, and only there.
            action = np.where(none & _begins(first, last), 0, action.argmax(1))
        elif self.spec.actions.kind == 'continuous':
            action = action.reshape(length, -1).astype(np.float32)
        action = stored_actions(self.spec.actions, action, f'{path}')
        yield from cut(
            obs, action, reward.astype(np.float32).reshape(length), first, last, terminal, path,
            self.say,
        )  # fmt: skip


def _begins(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    begins: np.ndarray = first | np.concatenate([[True], last[:-1]])
    return begins


class _Kind:
    """Facts about the actions of one file."""

    def __init__(self, path: pathlib.Path, action: np.ndarray) -> None:
        self.path, self.width = path, action.shape[1] if action.ndim == 2 else 0
        if action.ndim not in (1, 2) or action.dtype.kind not in 'fiub' or not action.size:
            raise UserError(
                f'{path}: action is {action.dtype}{list(action.shape)}, expected [steps] or '
                '[steps, n] numbers'
            )
        ones = ((action == 0) | (action == 1)).all()
        whole = action.dtype.kind in 'iub'
        self.one_hot = action.ndim == 2 and self.width > 1 and bool(ones)
        self.one_hot &= bool((action.sum(1) <= 1).all()) if action.ndim == 2 else False
        self.index = action.ndim == 1 and whole
        self.high = int(action.max()) if self.index else 0


def _space(kinds: Sequence[_Kind]) -> ActionSpace:
    """Return the action space that all files share."""
    widths = {kind.width for kind in kinds}
    if len(widths) > 1:
        other = next(kind for kind in kinds if kind.width != kinds[0].width)
        raise UserError(
            f'{other.path}: action has {other.width} numbers, expected {kinds[0].width} as in '
            f'{kinds[0].path.name}'
        )
    if all(kind.index for kind in kinds):
        return ActionSpace('discrete', max(kind.high for kind in kinds) + 1)
    if all(kind.one_hot for kind in kinds):
        return ActionSpace('discrete', kinds[0].width)
    return ActionSpace('continuous', max(1, kinds[0].width))


def _find(source: pathlib.Path) -> list[pathlib.Path]:
    if source.is_file():
        return [source]
    found = sorted(source.glob('*.npz')) or sorted(source.rglob('*.npz'))
    if not found:
        raise UserError(f'{source}: has no .npz file, expected episodes')
    return found


def _headers(path: pathlib.Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return {key: (shape, dtype)} of an archive without reading its arrays.

    Raises UserError for what is none, or holds objects, which only unpickling would read.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    read = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, _, dtype = read(file)
                found[member.filename.removesuffix('.npy')] = (shape, dtype)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(
            f'{path}: is no NumPy archive ({type(error).__name__}), expected arrays'
        ) from error
    return found


def _load(path: pathlib.Path, key: str) -> np.ndarray:
    """Read one array of an archive, never by unpickling."""
    shape, dtype = _headers(path)[key]
    if dtype.hasobject:
        raise UserError(f'{path}: {key} holds pickled objects, expected numbers')
    size = int(np.prod(shape, dtype=np.float64)) * dtype.itemsize
    if size > MOST_BYTES or not shape:
        raise UserError(
            f'{path}: {key} is {dtype}{list(shape)}, expected at most {MOST_BYTES:,} bytes'
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: np.ndarray = archive[key]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f'{path}: {key} cannot be read ({error!s:.80})') from error
    return array


def _observation(path: pathlib.Path) -> str:
    keys = _headers(path)
    found = next((key for key in OBSERVATIONS if key in keys), None)
    if found is None:
        raise UserError(f'{path}: has {", ".join(keys):.200}; --key names the observation')
    return found
