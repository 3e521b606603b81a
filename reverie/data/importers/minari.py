"""Import of Minari's HDF5 datasets; actions[t] leads to observations[t + 1], of which there is one
more.
"""

import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from reverie.data.importers.arrays import (
    as_observations,
    check_length,
    component,
    cut,
    one_shape,
    refuse_video_options,
    stored_actions,
)
from reverie.data.importers.common import Imported, Options, Say
from reverie.data.pictures import decompress
from reverie.types import ActionSpace, EnvSpec, UserError

METADATA = 'metadata.json'
MOST_BYTES = 1 << 32  # of one episode's observations
ENDINGS = ('.hdf5', '.h5')


class Hdf5:
    """Importer of one HDF5 file of Minari, or of the folder that it and its metadata are in."""

    def __init__(self, source: pathlib.Path, name: str, options: Options, say: Say):
        refuse_video_options(options, 'minari')
        if importlib.util.find_spec('h5py') is None:
            raise UserError("Minari needs the package h5py: pip install 'reverie[minari]'")
        self.path, self.key, self.say = _find(source), options.key, say
        metadata = _metadata(self.path.parent / METADATA)
        self.task = ''
        self.low = self.high = np.zeros(0)
        self.start = 0
        with self._open() as file:
            self.names: Sequence[str] = sorted(
                (key for key in file if re.fullmatch(r'episode_\d+', key)),
                key=lambda key: int(key.removeprefix('episode_')),
            )
            if not self.names:
                raise UserError(f'{self.path}: has no group episode_0, expected some')
            self.jpeg = self._jpeg_shape(metadata)
            shapes = [self._shape(file, episode) for episode in self.names]
            action = self._array(file[self.names[0]], 'actions')
        one_shape(shapes)
        space = self._space(_space_of(metadata.get('action_space')), action)
        first = next(self._raw(self.names[0]))
        self.spec = EnvSpec(name, as_observations(first, str(self.path)).shape[1:], space)
        self.facts: dict[str, Any] = {
            'fps': options.fps, 'dataset_id': str(metadata.get('dataset_id', '')),
        }  # fmt: skip

    def _open(self) -> Any:
        import h5py

        try:
            return h5py.File(self.path, 'r')
        except OSError as error:
            raise UserError(
                f'{self.path}: is no sound HDF5 file ({error!s:.80}), expected one'
            ) from error

    def _observations(self, group: Any) -> Any:
        """The dataset of an episode that --key chooses, if there are several."""
        import h5py

        where = f'{self.path}: {group.name.strip("/")}'
        at = group.get('observations')
        for key in filter(None, self.key.split('/')):
            at = at.get(key) if isinstance(at, h5py.Group) else None
        if isinstance(at, h5py.Group):
            keys = ', '.join(at)
            raise UserError(f'{where} observes {keys:.200}, expected one; --key NAME chooses')
        if at is None:
            raise UserError(f'{where} has no observations {self.key}'.rstrip() + ', expected some')
        return at

    def _jpeg_shape(self, metadata: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Shape of pictures that are kept as JPEG files; None if the metadata does not say."""
        space = _space_of(metadata.get('observation_space'))
        for key in filter(None, self.key.split('/')):
            space = space.get('subspaces', {}).get(key, {})
        shape = space.get('shape')
        picture = isinstance(shape, list) and len(shape) == 3 and space.get('dtype') == 'uint8'
        return tuple(int(n) for n in shape) if isinstance(shape, list) and picture else None

    def _is_jpeg(self, data: Any) -> bool:
        return self.jpeg is not None and (data.dtype.hasobject or data.ndim == 2)

    def _shape(self, file: Any, episode: str) -> tuple[str, tuple[int, ...], str]:
        data = self._observations(file[episode])
        if self._is_jpeg(data):
            assert self.jpeg is not None
            return episode, self.jpeg, 'uint8'
        return episode, data.shape[1:], data.dtype.name

    def _array(self, group: Any, key: str) -> np.ndarray:
        import h5py

        where = f'{self.path}: {group.name.strip("/")} {key}'
        data = group.get(key)
        if not isinstance(data, h5py.Dataset):
            inner = ', '.join(data) if isinstance(data, h5py.Group) else 'nothing'
            raise UserError(f'{where} has {inner:.100}, expected one array')
        return self._read(data, where)

    def _read(self, data: Any, where: str) -> np.ndarray:
        """Read an array of numbers, at most MOST_BYTES of them."""
        if data.dtype.kind not in 'fiub':
            raise UserError(f'{where}: is of {data.dtype}, expected numbers')
        if data.size * data.dtype.itemsize > MOST_BYTES:
            raise UserError(
                f'{where}: is {data.dtype}{list(data.shape)}, expected at most {MOST_BYTES:,} bytes'
            )
        try:
            array: np.ndarray = data[()]
        except OSError as error:
            raise UserError(f'{where}: cannot be read ({error!s:.80})') from error
        return array

    def _space(self, space: Mapping[str, Any], action: np.ndarray) -> ActionSpace:
        """Return the action space of the metadata or, without any, as the actions look."""
        kind = space.get('type')
        try:
            if kind == 'Discrete':
                self.start = int(space.get('start', 0))
                return ActionSpace('discrete', int(space['n']))
            if kind == 'MultiDiscrete':
                return ActionSpace.composite(
                    [component(i, int(n)) for i, n in enumerate(np.ravel(space['nvec']))]
                )
            if kind == 'MultiBinary':
                count = int(np.prod(space['n']))
                return ActionSpace.composite([component(i, 2) for i in range(count)])
            if kind == 'Box':
                self.low, self.high = (
                    np.ravel(np.asarray(space[side], np.float64)) for side in ('low', 'high')
                )
                if np.isfinite(self.high - self.low).all() and (self.low < self.high).all():
                    return ActionSpace('continuous', len(self.low))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'{self.path}: action space {space!s:.100} is malformed') from error
        if kind is None and action.dtype.kind == 'f':
            size = int(np.prod(action.shape[1:]))
            self.low, self.high = np.full(size, -1.0), np.full(size, 1.0)
            return ActionSpace('continuous', size)
        raise UserError(
            f'{self.path}: action space {space!s:.100}, expected Discrete, MultiDiscrete, MultiBinary '
            f'or a Box with bounds, in {METADATA}'
        )

    def _raw(self, episode: str) -> Iterator[np.ndarray]:
        """Yield the observations of an episode as they are, then actions, rewards, terminations and
        truncations.
        """
        with self._open() as file:
            group = file[episode]
            data = self._observations(group)
            where = f'{self.path}: {episode}'
            if self._is_jpeg(data):
                assert self.jpeg is not None
                files = [bytes(np.asarray(x, np.uint8)) for x in data[()]]
                shape = (len(files), *self.jpeg)
                field = {'dtype': 'jpeg', 'shape': list(shape), 'data': files}
                yield decompress(field, 'jpeg', shape, where)
            else:
                yield self._read(data, where)
            for key in ('actions', 'rewards', 'terminations', 'truncations'):
                yield self._array(group, key)

    def episodes(self, number: int) -> Iterator[Imported]:
        """Yield an episode."""
        name = self.names[number]
        where = f'{self.path}: {name}'
        obs, action, reward, terminal, truncated = self._raw(name)
        obs = as_observations(obs, where)
        steps = len(obs) - 1
        for key, array in (
            ('actions', action), ('rewards', reward), ('terminations', terminal),
            ('truncations', truncated),
        ):  # fmt: skip
            check_length(key, array, steps, where)
        if not steps:
            self.say(f'{where}: left out, it has one observation')
            return
        action = stored_actions(self.spec.actions, self._scaled(action), where)

        def arrived(x: np.ndarray) -> np.ndarray:
            return np.concatenate([np.zeros_like(x[:1]), x])

        ended = arrived((terminal | truncated).astype(bool))
        first = np.arange(len(obs)) == 0
        yield from cut(
            obs, arrived(action), arrived(reward.astype(np.float32)), first, ended,
            arrived(terminal.astype(bool)), where, self.say,
        )  # fmt: skip

    def _scaled(self, action: np.ndarray) -> np.ndarray:
        kind = self.spec.actions.kind
        if kind == 'discrete':
            return action.reshape(len(action)) - self.start
        action = action.reshape(len(action), -1)
        if kind == 'composite':
            return action.astype(np.float32)
        if action.shape[1] != len(self.low):
            raise UserError(
                f'{self.path}: actions have {action.shape[1]} numbers, expected {len(self.low)}'
            )
        scaled = 2 * (action - self.low) / (self.high - self.low) - 1
        close = np.abs(scaled) <= 1 + 1e-5  # rounding of bounds in 32 bits
        found: np.ndarray = np.where(close, np.clip(scaled, -1, 1), scaled).astype(np.float32)
        return found


def _find(source: pathlib.Path) -> pathlib.Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f'{source}: no such file or folder, expected HDF5 of Minari')
    found = sorted(path for end in ENDINGS for path in source.rglob(f'*{end}'))
    if len(found) != 1:
        names = ', '.join(str(path.relative_to(source)) for path in found)
        raise UserError(f'{source}: has {names or "no HDF5 file"}, expected one')
    return found[0]


def _metadata(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: is not JSON, expected the metadata of Minari') from error
    if not isinstance(found, dict):
        raise UserError(f'{path}: is not a mapping, expected the metadata of Minari')
    return found


def _space_of(text: Any) -> dict[str, Any]:
    """Return a space of the metadata, which is JSON inside JSON; {} if it is not there."""
    try:
        space = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return {}
    return space if isinstance(space, dict) else {}
