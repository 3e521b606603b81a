"""Manifest of a dataset: what a reader needs before it opens a shard, and what shards must match.

It holds schema, alignment, counts, return statistics per kind of player, free-form provenance, and
size, record count and SHA-256 of every shard, and the checksum of all that.

Alignment 'arrival': prev_action led to this observation, reward was earned by prev_action.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from reverie.data.fields import Declared, misfit
from reverie.data.records import DTYPES, Record, Schema
from reverie.types import ActionSpace, EnvSpec, UserError

FORMAT = 'reverie-episodes'
VERSION = 1
ALIGNMENT = 'arrival'
MANIFEST = 'manifest.json'

RETURNS: dict[Any, Declared] = {
    'count': int,
    **{f'{name}?': float for name in ('mean', 'std', 'min', 'max', 'q25', 'median', 'q75')},
}
SUMMARY: dict[Any, Declared] = {
    'episodes': int, 'frames': int, 'complete': int, 'labelled_frames': int, 'rewarded_steps': int,
    'mean_length': float | None, 'returns': RETURNS,
}  # fmt: skip
FIELDS: dict[Any, Declared] = {
    'env': str,
    'obs': {'shape': [int], 'dtype': str, 'channels': [str]},
    'actions': {'kind': str, 'size': int, 'meanings': [str]},
    'max_return': float | None,
    'counts': SUMMARY | {'kinds': {str: SUMMARY}},
    'shards': [{'file': str, 'records': int, 'bytes': int, 'sha256': str}],
    'provenance': dict,
}


class Tally:
    """Running counts and returns of one kind of episodes."""

    def __init__(self) -> None:
        self.episodes = self.frames = self.labelled = self.rewarded = 0
        self.returns: list[float] = []
        self.lengths: list[int] = []

    def add(self, record: Record) -> None:
        self.episodes += 1
        self.frames += len(record)
        self.labelled += len(record) if record.has_action else 0
        self.rewarded += int((record.reward > 0).sum())
        if record.complete:
            self.lengths.append(len(record))
            if record.has_reward:
                self.returns.append(record.ret)

    def summary(self) -> dict[str, Any]:
        """Return counts and statistics of the undiscounted returns of complete episodes; that of a
        cut episode is only a lower bound.
        """
        return {
            'episodes': self.episodes,
            'frames': self.frames,
            'complete': len(self.lengths),
            'labelled_frames': self.labelled,
            'rewarded_steps': self.rewarded,
            'mean_length': float(np.mean(self.lengths)) if self.lengths else None,
            'returns': _statistics(self.returns),
        }


def _statistics(values: list[float]) -> dict[str, Any]:
    if not values:
        return {'count': 0}
    x = np.asarray(values, np.float64)
    quartiles = dict(
        zip(('q25', 'median', 'q75'), np.percentile(x, (25, 50, 75)).tolist(), strict=True)
    )
    return {
        'count': len(x),
        'mean': float(x.mean()),
        'std': float(x.std()),
        'min': float(x.min()),
        'max': float(x.max()),
        **quartiles,
    }


def summarise(tallies: dict[str, Tally]) -> dict[str, Any]:
    """Return counts and return statistics of a dataset, in total and per kind."""
    total = Tally()
    for tally in tallies.values():
        total.episodes += tally.episodes
        total.frames += tally.frames
        total.labelled += tally.labelled
        total.rewarded += tally.rewarded
        total.returns += tally.returns
        total.lengths += tally.lengths
    return total.summary() | {'kinds': {kind: tally.summary() for kind, tally in tallies.items()}}


def make_manifest(
    spec: EnvSpec,
    schema: Schema,
    tallies: dict[str, Tally],
    shards: list[dict[str, Any]],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Return the manifest of a dataset."""
    actions = {
        'kind': spec.actions.kind,
        'size': spec.actions.size,
        'meanings': list(spec.actions.meanings),
    }
    body = {
        'format': FORMAT,
        'version': VERSION,
        'env': spec.name,
        'obs': {
            'shape': list(schema.obs_shape),
            'dtype': schema.obs_dtype,
            'channels': list(spec.channels),
        },
        'actions': actions,
        'max_return': spec.max_return,
        'alignment': ALIGNMENT,
        'counts': summarise(tallies),
        'shards': shards,
        'provenance': provenance,
    }
    return body | {'checksum': checksum(body)}


def checksum(body: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its checksum."""
    text = json.dumps(
        {k: v for k, v in body.items() if k != 'checksum'}, sort_keys=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Read the manifest of a dataset folder; raise UserError if it is damaged or of another version."""
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(f'{path}: not a dataset, expected a folder with {MANIFEST}')
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file}: not JSON, expected the manifest of a dataset') from error
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
        raise UserError(f'{file}: not the manifest of a dataset, expected format {FORMAT!r}')
    if manifest.get('version') != VERSION:
        given = ascii(manifest.get('version'))
        raise UserError(f'{file}: dataset version {given:.40}, expected {VERSION}')
    if manifest.get('checksum') != checksum(manifest):
        raise UserError(
            f'{file}: changed since it was written, expected checksum {manifest.get("checksum")}'
        )
    if manifest.get('alignment') != ALIGNMENT:
        given = ascii(manifest.get('alignment'))
        raise UserError(f'{file}: alignment {given:.40}, expected {ALIGNMENT!r}')
    if wrong := misfit(manifest, FIELDS):
        raise UserError(f'{file}: {wrong}, in version {VERSION}')
    if not manifest['counts']['episodes'] or not manifest['shards']:
        raise UserError(f'{path}: dataset is empty, expected at least one episode')
    return manifest


def read_schema(file: pathlib.Path, manifest: dict[str, Any]) -> tuple[Schema, EnvSpec]:
    """Return schema and environment of a manifest; raise UserError if a field is wrong."""
    try:
        obs, a = manifest['obs'], manifest['actions']
        kind: Any = str(a['kind'])
        actions = ActionSpace(kind, int(a['size']), tuple(a['meanings']))
        schema = Schema(tuple(int(n) for n in obs['shape']), str(obs['dtype']), actions)
        shards = [
            (str(s['file']), int(s['records']), int(s['bytes']), str(s['sha256']))
            for s in manifest['shards']
        ]
        spec = EnvSpec(
            manifest['env'],
            schema.obs_shape,
            actions,
            None if manifest['max_return'] is None else float(manifest['max_return']),
            tuple(obs['channels']),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{file}: {type(error).__name__} at {error}, expected the fields of version {VERSION}'
        ) from error
    if schema.obs_dtype not in DTYPES:
        raise UserError(
            f'{file}: observations are {schema.obs_dtype}, expected one of {", ".join(DTYPES)}'
        )
    if (
        actions.kind not in ('discrete', 'continuous')
        or actions.size < 1
        or min(schema.obs_shape, default=1) < 1
    ):
        raise UserError(
            f'{file}: {words(actions)} and shape {list(schema.obs_shape)}, expected positive sizes'
        )
    if sum(records for _, records, _, _ in shards) != manifest['counts']['episodes']:
        raise UserError(
            f'{file}: shards do not add up to {manifest["counts"]["episodes"]} episodes'
        )
    return schema, spec


def words(actions: ActionSpace) -> str:
    return f'{actions.kind} of size {actions.size}'


def check_shard(path: pathlib.Path, shard: dict[str, Any]) -> None:
    """Raise UserError unless a shard has the bytes and records that the manifest says."""
    if pathlib.Path(shard['file']).name != shard['file']:
        raise UserError(f'{path}: shard outside the dataset, expected a plain file name')
    if not path.is_file():
        raise UserError(
            f'{path}: shard is missing, expected {shard["bytes"]} bytes with {shard["records"]} records'
        )
    size = path.stat().st_size
    if size != shard['bytes']:
        raise UserError(f'{path}: shard has {size} bytes, expected {shard["bytes"]}')
    with open_shard(path) as reader:
        # A damaged file opens without an exception, with ok() false and no records.
        records = reader.num_records() if reader.ok() else 0
        if records != shard['records']:
            raise UserError(
                f'{path}: shard has {records} readable records, expected {shard["records"]}'
            )


@contextlib.contextmanager
def open_shard(path: pathlib.Path) -> Iterator[ArrayRecordReader]:
    """Open a reader of one shard; damage found in reading or closing is a UserError naming it."""
    try:
        reader = ArrayRecordReader(str(path))
        try:
            yield reader
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error says more than closing does
                reader.close()
            raise
        reader.close()
    except (RuntimeError, IndexError) as error:
        raise UserError(
            f'{path}: shard cannot be read ({str(error).splitlines()[0][:120]})'
        ) from error
