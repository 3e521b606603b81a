"""The native dataset on disk: a folder of ArrayRecord shards, one episode per record, and `manifest.json`.

`writing` makes such folders; `Episodes` opens one, `verify` reads every byte of it.
"""

import hashlib
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from reverie.data.manifest import (
    MANIFEST,
    Tally,
    check_shard,
    file_hash,
    open_shard,
    read_manifest,
    read_schema,
    summarise,
    words,
)
from reverie.data.records import Record, decode
from reverie.data.writing import Splitter, Writer, split_stream
from reverie.types import EnvSpec, UserError

__all__ = ['Episodes', 'Splitter', 'Writer', 'split_stream', 'verify']
READ_AT_ONCE = 512  # records per read call: bounds the memory that undecoded bytes take


class Episodes:
    """A dataset opened for reading. Raises UserError if it is missing, empty, damaged or of another version.

    Opening compares sizes and record counts; only `verify` reads every byte.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.manifest = read_manifest(self.path)
        self.schema, self.spec = read_schema(self.path / MANIFEST, self.manifest)
        self.counts: dict[str, Any] = self.manifest['counts']
        self.shards = [self.path / shard['file'] for shard in self.manifest['shards']]
        for shard in self.manifest['shards']:
            check_shard(self.path / shard['file'], shard)

    def __len__(self) -> int:
        return self.counts['episodes']

    @property
    def frames(self) -> int:
        return self.counts['frames']

    @property
    def bytes_per_frame(self) -> int:
        """Of the stored form: what one frame takes on the device."""
        frame = math.prod(self.schema.stored_shape) * np.dtype(self.schema.stored_dtype).itemsize
        action = math.prod(self.schema.action_shape) * np.dtype(self.schema.action_dtype).itemsize
        return frame + action + 4 + 1

    @property
    def fingerprint(self) -> str:
        """Changes whenever any shard does."""
        return hashlib.sha256(' '.join(shard['sha256'] for shard in self.manifest['shards']).encode()).hexdigest()[:16]

    @property
    def mean_return(self) -> float | None:
        return self.counts['returns'].get('mean')

    @property
    def provenance(self) -> dict[str, Any]:
        """What the writer said of where the data come from."""
        return self.manifest['provenance']

    def returns(self) -> dict[str, list[float]]:
        """Undiscounted returns of the complete episodes of each kind. Reads every record."""
        found: dict[str, list[float]] = {kind: [] for kind in self.counts['kinds']}
        for record in self.records():
            if record.complete and record.has_reward:
                found[record.kind].append(float(np.sum(record.reward, dtype=np.float64)))
        return found

    def check(self, spec: EnvSpec) -> None:
        """Raises UserError, naming both, if the dataset is of another game, observation or action space."""
        for what, given, expected in (
            ('environment', self.spec.name, spec.name),
            ('observation shape', list(self.spec.obs_shape), list(spec.obs_shape)),
            ('action space', words(self.spec.actions), words(spec.actions)),
        ):
            if given != expected:
                raise UserError(f'{self.path}: dataset has {what} {given}, expected {expected}')

    def records(self) -> Iterator[Record]:
        """Every record in file order, decoded and checked. Raises UserError naming the record that is wrong."""
        for path, shard in zip(self.shards, self.manifest['shards'], strict=True):
            with open_shard(path) as reader:
                for begin in range(0, shard['records'], READ_AT_ONCE):
                    indices = list(range(begin, min(begin + READ_AT_ONCE, shard['records'])))
                    for i, data in zip(indices, reader.read(indices), strict=True):
                        yield decode(data, self.schema, f'{path} record {i}')


def verify(path: str | os.PathLike) -> dict[str, Any]:
    """Hash every shard, parse every record and recount. Returns the counts; raises UserError with what is wrong."""
    episodes = Episodes(path)
    for file, shard in zip(episodes.shards, episodes.manifest['shards'], strict=True):
        found = file_hash(file)
        if found != shard['sha256']:
            raise UserError(f'{file}: SHA-256 is {found}, expected {shard["sha256"]}')
    tallies: dict[str, Tally] = {}
    for record in episodes.records():
        tallies.setdefault(record.kind, Tally()).add(record)
    counts = summarise(tallies)
    wrong = _difference(counts, episodes.counts)
    if wrong:
        raise UserError(f'{path}: records and manifest disagree about {wrong}')
    return {'path': str(path), 'shards': len(episodes.shards)} | counts


def _difference(found: Any, expected: Any, name: str = '') -> str:
    """First difference of two nested summaries in words, or nothing. Floats may differ in their last digits."""
    if isinstance(found, dict) and isinstance(expected, dict):
        names = sorted(found.keys() | expected.keys())
        inner = (_difference(found.get(n), expected.get(n), f'{name}.{n}' if name else n) for n in names)
        return next(filter(None, inner), '')
    if isinstance(found, float) and isinstance(expected, float | int):
        same = math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9)
    else:
        same = found == expected
    return '' if same else f'{name}: {found}, expected {expected}'
