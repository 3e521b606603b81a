"""Native dataset on disk: a folder of ArrayRecord shards, one episode per record, and a manifest.

`writing` makes such folders; `Episodes` opens one, `verify` reads every byte of it.
"""

import copy
import hashlib
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from reverie.data.manifest import (
    MANIFEST,
    Tally,
    check_shard,
    open_shard,
    read_manifest,
    read_schema,
    summarise,
    words,
)
from reverie.data.records import Record, decode
from reverie.data.writing import Splitter, Writer, split_stream
from reverie.io import file_hash
from reverie.types import EnvSpec, UserError

__all__ = ['Episodes', 'Splitter', 'Writer', 'split_stream', 'verify']
log = logging.getLogger(__name__)
READ_AT_ONCE = 512  # records per read call: bounds the memory that undecoded bytes take
Part = Literal['all', 'train', 'held_out']


class Episodes:
    """A dataset opened for reading, which compares sizes and record counts.

    Raises UserError if it is missing, empty, damaged or of another version. max_lost: share of the
    episodes that may be damaged; a warning names them, `lost` holds their numbers, and `records`
    yields all others. The files stay as they are. part: yield only episodes to train on, or only
    those held out.
    """

    def __init__(self, path: str | os.PathLike[str], max_lost: float = 0.0, part: Part = 'all'):
        self.path, self.max_lost, self.part = pathlib.Path(path), max_lost, part
        self.manifest = read_manifest(self.path)
        self.schema, self.spec = read_schema(self.path / MANIFEST, self.manifest)
        self.counts: dict[str, Any] = self.manifest['counts']
        self.held_out = frozenset[int](self.manifest.get('held_out', ()))
        self.task: str = self.manifest.get('task') or self.spec.name
        self.shards = [self.path / shard['file'] for shard in self.manifest['shards']]
        sizes = [shard['records'] for shard in self.manifest['shards']]
        self.first = np.cumsum([0, *sizes])  # number of each shard's first record
        self.lost: set[int] = set()
        self.sound: list[int] = []  # shards that can be opened
        for i, shard in enumerate(self.manifest['shards']):
            try:
                check_shard(self.shards[i], shard)
                self.sound.append(i)
            except UserError as error:
                self.lose(range(self.first[i], self.first[i + 1]), error)

    def only(self, part: Part) -> 'Episodes':
        """Return a view of the same dataset that yields a part of its episodes."""
        view = copy.copy(self)
        view.part = part
        return view

    @property
    def numbers(self) -> list[int]:
        """Numbers of the sound episodes of `part`."""
        sound = (n for i in self.sound for n in range(self.first[i], self.first[i + 1]))
        return [n for n in sound if self.wants(n) and n not in self.lost]

    def wants(self, number: int) -> bool:
        """Tell if an episode is of `part`."""
        return self.part == 'all' or (number in self.held_out) == (self.part == 'held_out')

    def lose(self, numbers: Iterable[int], fault: UserError) -> None:
        """Leave damaged episodes out.

        Raises UserError if they and those lost before are more than `max_lost`.
        """
        if self.max_lost <= 0:
            raise fault
        if self.lost.issuperset(numbers := set(map(int, numbers))):
            return
        self.lost |= numbers
        share = len(self.lost) / len(self)
        known = f'{len(self.lost):,} of {len(self):,} episodes ({share:.2%}) are damaged'
        if share > self.max_lost:
            raise UserError(f'{fault}; {known}, expected at most {self.max_lost:.2%}') from fault
        log.warning('%s; left out, %s', fault, known)

    def __len__(self) -> int:
        """Return the number of episodes, lost ones included."""
        count: int = self.counts['episodes']
        return count

    @property
    def frames(self) -> int:
        frames: int = self.counts['frames']
        return frames

    @property
    def bytes_per_frame(self) -> int:
        """Bytes that one frame takes on the device."""
        frame = math.prod(self.schema.stored_shape) * np.dtype(self.schema.stored_dtype).itemsize
        action = math.prod(self.schema.action_shape) * np.dtype(self.schema.action_dtype).itemsize
        return frame + action + 4 + 1

    @property
    def total_bytes(self) -> int:
        """Bytes that all frames take on the device."""
        return self.frames * self.bytes_per_frame

    @property
    def fingerprint(self) -> str:
        """Hash of the shards and of the numbers of the lost episodes."""
        known = ' '.join(shard['sha256'] for shard in self.manifest['shards'])
        known += f' without {sorted(self.lost)}' if self.lost else ''
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    @property
    def mean_return(self) -> float | None:
        mean: float | None = self.counts['returns'].get('mean')
        return mean

    @property
    def provenance(self) -> dict[str, Any]:
        """Origin of the data, as the writer gave it."""
        provenance: dict[str, Any] = self.manifest['provenance']
        return provenance

    def game_options(self, name: str) -> dict[str, Any] | None:
        """Return the options that the game called `name` was recorded with; None if not known.

        Raises UserError if provenance has something else there.
        """
        recorded = self.provenance.get('env')
        if not isinstance(recorded, dict) or recorded.get('name') != name:
            return None
        options = recorded.get('options') or {}
        if not isinstance(options, dict):
            raise UserError(
                f'{self.path}: options of the game are {options!a:.60}, expected a mapping'
            )
        return dict(options)

    def returns(self) -> dict[str, list[float]]:
        """Return the undiscounted returns of each kind's complete episodes; reads every record."""
        found: dict[str, list[float]] = {kind: [] for kind in self.counts['kinds']}
        for record in self.records():
            if record.kind not in found:
                raise UserError(
                    f'{self.path}: an episode is of kind {record.kind!a:.40}, expected one of '
                    f'{", ".join(found)}'
                )
            if record.complete and record.has_reward:
                found[record.kind].append(float(np.sum(record.reward, dtype=np.float64)))
        return found

    def check(self, spec: EnvSpec, name: str | None = None) -> None:
        """Raise UserError if the dataset is of another game, observation or action space.

        name: of the game that was asked for, if it is not that of `spec`.
        """
        for what, given, expected in (
            ('environment', self.spec.name, name or spec.name),
            ('observation shape', list(self.spec.obs_shape), list(spec.obs_shape)),
            ('action space', words(self.spec.actions), words(spec.actions)),
        ):
            if given != expected:
                raise UserError(f'{self.path}: dataset has {what} {given}, expected {expected}')

    def records(self) -> Iterator[Record]:
        """Yield every sound record of `part` in file order, decoded and checked.

        Raises UserError naming one that is wrong.
        """
        return (record for _, record in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Record]]:
        """Yield every sound record of `part` as (its number in the dataset, record)."""
        for i in self.sound:
            path, count = self.shards[i], self.manifest['shards'][i]['records']
            for begin in range(0, count, READ_AT_ONCE):
                indices = [
                    index
                    for index in range(begin, min(begin + READ_AT_ONCE, count))
                    if self.wants(int(self.first[i]) + index)
                ]
                found = self._read(path, indices) if indices else []
                for index, data in zip(indices, found, strict=True):
                    number = int(self.first[i]) + index
                    try:
                        if isinstance(data, UserError):
                            raise data
                        record = decode(data, self.schema, f'{path} record {index}')
                    except UserError as fault:
                        self.lose([number], fault)
                        continue
                    yield number, record

    def _read(self, path: pathlib.Path, indices: list[int]) -> list[bytes | UserError]:
        """Read records at once, or one by one if that fails, so that damage costs no others."""
        try:
            with open_shard(path) as reader:
                records: list[bytes | UserError] = reader.read(indices)
                return records
        except UserError as fault:
            if len(indices) == 1 or self.max_lost <= 0:
                return [fault] * len(indices)
        return [data for index in indices for data in self._read(path, [index])]


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Hash every shard, parse every record and recount.

    Returns the counts; raises UserError with what is wrong.
    """
    episodes = Episodes(path)
    for file, shard in zip(episodes.shards, episodes.manifest['shards'], strict=True):
        found = file_hash(file)
        if found != shard['sha256']:
            raise UserError(f'{file}: SHA-256 is {found}, expected {shard["sha256"]}')
    episodes.game_options(episodes.spec.name)
    tallies: dict[str, Tally] = {}
    for record in episodes.records():
        tallies.setdefault(record.kind, Tally()).add(record)
    counts = summarise(tallies)
    wrong = _difference(counts, episodes.counts)
    if wrong:
        raise UserError(f'{path}: records and manifest disagree about {wrong}')
    return {'path': str(path), 'shards': len(episodes.shards)} | counts


def _difference(found: Any, expected: Any, name: str = '') -> str:
    """Return the first difference of two nested summaries in words, or ''; floats may differ in
    their last digits.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        names = sorted(found.keys() | expected.keys())
        inner = (
            _difference(found.get(n), expected.get(n), f'{name}.{n}' if name else n) for n in names
        )
        return next(filter(None, inner), '')
    if isinstance(found, float) and isinstance(expected, float | int):
        same = math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9)
    else:
        same = found == expected
    return '' if same else f'{name}: {found}, expected {expected}'
