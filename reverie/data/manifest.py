"""Manifest of a dataset: what a reader needs before it opens a shard, and what shards must match.

It holds schema, alignment, counts, return statistics per kind of player, free-form provenance, and
size, record count and SHA-256 of every shard, and the checksum of all that.

Alignment 'arrival': prev_action led to this observation, reward was earned by prev_action.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from reverie.data.fields import Declared, misfit
from reverie.data.pictures import CODECS, codec_for
from reverie.data.records import DTYPES, Record, Schema
from reverie.types import ActionSpace, Component, EnvSpec, UserError

FORMAT = 'reverie-episodes'
VERSION = 2  # of a dataset with pictures as files, composite actions, a task or held-out episodes
PLAIN = 1  # of all others
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
COMPONENT: dict[Any, Declared] = {
    'name': str, 'choices': [str], 'low': float, 'high': float, 'rest': float, 'keys': [[str]],
    'camera': str,
}  # fmt: skip
FIELDS: dict[Any, Declared] = {
    'env': str,
    'task?': str,
    'obs': {'shape': [int], 'dtype': str, 'channels': [str], 'codec?': str},
    'actions': {'kind': str, 'size': int, 'meanings': [str], 'parts?': [COMPONENT]},
    'held_out?': [int],
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
    held_out: Sequence[int] = (),
    task: str = '',
) -> dict[str, Any]:
    """Return the manifest of a dataset; held_out: numbers of the episodes nothing is trained on."""
    actions: dict[str, Any] = {
        'kind': spec.actions.kind,
        'size': spec.actions.size,
        'meanings': list(spec.actions.meanings),
    }
    if spec.actions.kind == 'composite':
        actions['parts'] = [dataclasses.asdict(part) for part in spec.actions.parts]
    obs: dict[str, Any] = {
        'shape': list(schema.obs_shape),
        'dtype': schema.obs_dtype,
        'channels': list(spec.channels),
    }
    newer: dict[str, Any] = {'task': task} if task else {}
    if held_out:
        newer['held_out'] = list(held_out)
    if schema.codec:
        obs['codec'] = schema.codec
    body = {
        'format': FORMAT,
        'version': VERSION if newer or schema.codec or 'parts' in actions else PLAIN,
        **newer,
        'env': spec.name,
        'obs': obs,
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
    if manifest.get('version') not in (PLAIN, VERSION):
        given = ascii(manifest.get('version'))
        raise UserError(f'{file}: dataset version {given:.40}, expected {PLAIN} or {VERSION}')
    if manifest.get('checksum') != checksum(manifest):
        raise UserError(
            f'{file}: changed since it was written, expected checksum {manifest.get("checksum")}'
        )
    if manifest.get('alignment') != ALIGNMENT:
        given = ascii(manifest.get('alignment'))
        raise UserError(f'{file}: alignment {given:.40}, expected {ALIGNMENT!r}')
    if wrong := misfit(manifest, FIELDS):
        raise UserError(f'{file}: {wrong}, in version {manifest["version"]}')
    if not manifest['counts']['episodes'] or not manifest['shards']:
        raise UserError(f'{path}: dataset is empty, expected at least one episode')
    return manifest


def read_schema(file: pathlib.Path, manifest: dict[str, Any]) -> tuple[Schema, EnvSpec]:
    """Return schema and environment of a manifest; raise UserError if a field is wrong."""
    try:
        obs, a = manifest['obs'], manifest['actions']
        kind: Any = str(a['kind'])
        parts = tuple(_component(part) for part in a.get('parts', ()))
        actions = ActionSpace(kind, int(a['size']), tuple(a['meanings']), parts)
        shape = tuple(int(n) for n in obs['shape'])
        schema = Schema(shape, str(obs['dtype']), actions, str(obs.get('codec', '')))
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
    if schema.codec and codec_for(schema.obs_shape, schema.obs_dtype) == '':
        raise UserError(
            f'{file}: observations {schema.obs_dtype}{list(shape)} as {schema.codec} files, expected '
            'uint8 pictures of one or three colours'
        )
    if schema.codec not in ('', *CODECS):
        raise UserError(
            f'{file}: pictures are {schema.codec} files, expected one of {", ".join(CODECS)}'
        )
    if actions.kind == 'composite' and actions != ActionSpace.composite(actions.parts):
        raise UserError(f'{file}: {words(actions)}, expected a size of all parts together')
    held_out, count = manifest.get('held_out', ()), manifest['counts']['episodes']
    if max(held_out, default=0) >= count or len(set(held_out)) == count:
        raise UserError(
            f'{file}: episodes {held_out!s:.60} are held out, expected some but not all of {count}'
        )
    if (
        actions.kind not in ('discrete', 'continuous', 'composite')
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


def _component(part: Mapping[str, Any]) -> Component:
    fields = dict(part) | {
        'choices': tuple(part['choices']),
        'keys': tuple(map(tuple, part['keys'])),
    }
    if not fields['choices'] and not fields['low'] < fields['high']:
        raise ValueError(f'{part["name"]} from {part["low"]} to {part["high"]}')
    return Component(**fields)


def words(actions: ActionSpace) -> str:
    if actions.kind == 'composite':
        parts = ', '.join(f'{p.name} ({len(p.choices) or "number"})' for p in actions.parts)
        return f'composite of {parts or "no parts"}'
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
