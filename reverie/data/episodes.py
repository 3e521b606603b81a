"""The native dataset on disk: a folder of ArrayRecord shards, one episode per record, and `manifest.json`.

A dataset appears under its name only when it is whole: shards are written into a hidden sibling folder, synced, the
manifest goes last, then the folder is renamed. The manifest carries what a reader must know before it opens a shard:
schema, alignment, counts, return statistics per kind of player, and size, record count and SHA-256 of every shard.

Alignment 'arrival': prev_action led to this observation, reward was earned by prev_action.
"""

import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from reverie.data.records import DTYPES, Record, Schema, decode, encode, from_step
from reverie.types import ActionSpace, EnvSpec, Step, UserError

FORMAT = 'reverie-episodes'
VERSION = 1
ALIGNMENT = 'arrival'
MANIFEST = 'manifest.json'
READ_AT_ONCE = 512  # records per read call: bounds the memory that undecoded bytes take


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
        """Returns are undiscounted and over complete episodes only: a cut episode's return is a lower bound."""
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
    quartiles = dict(zip(('q25', 'median', 'q75'), np.percentile(x, (25, 50, 75)).tolist(), strict=True))
    return {
        'count': len(x),
        'mean': float(x.mean()),
        'std': float(x.std()),
        'min': float(x.min()),
        'max': float(x.max()),
        **quartiles,
    }


def summarise(tallies: dict[str, Tally]) -> dict[str, Any]:
    """Counts and return statistics of a dataset, in total and per kind."""
    total = Tally()
    for tally in tallies.values():
        total.episodes += tally.episodes
        total.frames += tally.frames
        total.labelled += tally.labelled
        total.rewarded += tally.rewarded
        total.returns += tally.returns
        total.lengths += tally.lengths
    return total.summary() | {'kinds': {kind: tally.summary() for kind, tally in tallies.items()}}


class Writer:
    """Writes a dataset; a context manager. An exception inside it leaves nothing behind.

    path: folder to create; refused with UserError if it exists, unless `overwrite` and it is a dataset.
    spec: the environment the episodes come from.
    provenance: anything that JSON can hold (command, seed, versions, curve of the players' training).
    shard_bytes: a new shard is begun after this many bytes of records.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        spec: EnvSpec,
        provenance: dict[str, Any] | None = None,
        overwrite: bool = False,
        shard_bytes: int = 64 << 20,
    ):
        self.path = pathlib.Path(path).absolute()
        self.spec = spec
        self.provenance = provenance if provenance is not None else {}
        self.shard_bytes = shard_bytes
        self.overwrite = overwrite
        _refuse_existing(self.path, overwrite)
        json.dumps(self.provenance, allow_nan=False)  # what cannot be written should fail before a day of collecting
        self._schema: Schema | None = None
        self._tallies: dict[str, Tally] = {}
        self._shards: list[dict[str, Any]] = []
        self._writer = None
        self._records = self._bytes = 0
        self._folder: pathlib.Path | None = None

    def __enter__(self) -> 'Writer':
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.path)
        prefix = f'{_partial_prefix(self.path)}{socket.gethostname()}-{os.getpid()}-'
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=self.path.parent))
        self._folder.chmod(0o755)
        return self

    def add(
        self, kind: str, episode: Step, complete: bool = True, has_action: bool = True, has_reward: bool = True
    ) -> None:
        """Append one episode, arrays with leading dim [T]. `complete` is false where the collector cut a stream.

        Discrete prev_action may be one-hot [T, A] or indices [T] (-1: none). Raises UserError if it does not fit.
        """
        if self._schema is None:
            dtype = np.asarray(episode.obs).dtype.name
            if dtype not in DTYPES:
                raise UserError(f'observations are {dtype}, expected one of {", ".join(DTYPES)}')
            self._schema = Schema(tuple(self.spec.obs_shape), dtype, self.spec.actions)
        self.add_record(from_step(kind, episode, self._schema, complete, has_action, has_reward))

    def add_record(self, record: Record) -> None:
        """Append an episode that is in stored form already."""
        if self._folder is None:
            raise UserError('Writer is not open, expected `with Writer(...) as writer`')
        data = encode(record)
        if self._writer is None:
            # One record per group: a reader that wants one episode decompresses only that one.
            name = str(self._folder / f'shard-{len(self._shards):05d}.array_record')
            self._writer = ArrayRecordWriter(name, 'group_size:1')
            self._shards.append({'file': pathlib.Path(name).name})
            self._records = self._bytes = 0
        self._writer.write(data)
        self._records += 1
        self._bytes += len(data)
        self._tallies.setdefault(record.kind, Tally()).add(record)
        if self._bytes >= self.shard_bytes:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        path = self._folder / self._shards[-1]['file']
        _sync(path)
        self._shards[-1] |= {'records': self._records, 'bytes': path.stat().st_size, 'sha256': file_hash(path)}
        _check_shard(path, self._shards[-1])  # a full disk shows here

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if self._writer is not None and self._writer.is_open():
                self._writer.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _publish(self) -> None:
        if self._schema is None or not self._tallies:
            raise UserError(f'{self.path}: no episode was added, expected at least one')
        self._end_shard()
        manifest = _manifest(self.spec, self._schema, self._tallies, self._shards, self.provenance)
        target = self._folder / MANIFEST
        target.write_text(json.dumps(manifest, indent=1, allow_nan=False))
        _sync(target)
        _sync(self._folder)
        _refuse_existing(self.path, self.overwrite)
        old = None
        if self.path.exists():
            old = pathlib.Path(tempfile.mkdtemp(prefix=_partial_prefix(self.path), dir=self.path.parent)) / 'old'
            self.path.rename(old)
        self._folder.rename(self.path)
        _sync(self.path.parent)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)


def _manifest(spec: EnvSpec, schema: Schema, tallies: dict, shards: list, provenance: dict) -> dict[str, Any]:
    actions = {'kind': spec.actions.kind, 'size': spec.actions.size, 'meanings': list(spec.actions.meanings)}
    body = {
        'format': FORMAT,
        'version': VERSION,
        'env': spec.name,
        'obs': {'shape': list(schema.obs_shape), 'dtype': schema.obs_dtype, 'channels': list(spec.channels)},
        'actions': actions,
        'max_return': spec.max_return,
        'alignment': ALIGNMENT,
        'counts': summarise(tallies),
        'shards': shards,
        'provenance': provenance,
    }
    return body | {'checksum': checksum(body)}


def checksum(body: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its checksum."""
    text = json.dumps({k: v for k, v in body.items() if k != 'checksum'}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: pathlib.Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _partial_prefix(path: pathlib.Path) -> str:
    return f'.{path.name}.partial-'


def _remove_stale(path: pathlib.Path) -> None:
    """Remove what a killed writer of the same dataset left on this machine."""
    for folder in path.parent.glob(f'{_partial_prefix(path)}{socket.gethostname()}-*'):
        pid = folder.name.rsplit('-', 2)[1]
        if pid.isdigit() and not pathlib.Path(f'/proc/{pid}').exists() and pathlib.Path('/proc/self').exists():
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(path: pathlib.Path, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise UserError(f'{path} exists already, expected a new path for the dataset (or overwrite)')
    if not (path / MANIFEST).is_file():
        raise UserError(f'{path} exists and is not a dataset, expected a new path or a dataset to overwrite')


class Splitter:
    """Cuts N parallel streams of arriving steps into episodes; episodes may span several chunks.

    `push` takes a chunk [T, N] and yields the episodes that ended in it, `flush` the unfinished tails: their last
    step gets is_last, never is_terminal, and `complete` is false.
    """

    def __init__(self) -> None:
        self._open: list[list[Step]] = []

    def push(self, steps: Step) -> Iterator[tuple[Step, bool]]:
        """steps: arrays [T, N, ...]. Yields (episode with arrays [T', ...], complete)."""
        steps = jax.tree.map(np.asarray, steps)
        envs = steps.is_first.shape[1]
        self._open = self._open or [[] for _ in range(envs)]
        if envs != len(self._open):
            raise UserError(f'chunk has {envs} streams, expected {len(self._open)} as before')
        for env in range(envs):
            stream = jax.tree.map(lambda x, env=env: x[:, env], steps)
            starts = np.flatnonzero(stream.is_first).tolist()
            if not self._open[env] and (not starts or starts[0] != 0):
                raise UserError(f'stream {env} begins inside an episode, expected is_first at its first step')
            edges = sorted({0, *starts, len(stream.is_first)})
            for begin, end in itertools.pairwise(edges):
                if stream.is_first[begin] and self._open[env]:
                    yield self._close(env)  # an episode that a new one follows without is_last was cut
                self._open[env].append(jax.tree.map(lambda x, a=begin, b=end: x[a:b], stream))
                if stream.is_last[end - 1]:
                    yield self._close(env)
            if self._open[env]:  # copied, or a few long episodes would keep whole chunks alive
                self._open[env][-1] = jax.tree.map(np.array, self._open[env][-1])

    def flush(self) -> Iterator[tuple[Step, bool]]:
        """The unfinished tails, (episode, False) each."""
        for env in range(len(self._open)):
            if self._open[env]:
                yield self._close(env)

    def _close(self, env: int) -> tuple[Step, bool]:
        parts, self._open[env] = self._open[env], []
        episode = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        complete = bool(episode.is_last[-1])
        if not complete:
            is_last = episode.is_last.copy()
            is_last[-1] = True
            episode = episode._replace(is_last=is_last)
        return episode, complete


def split_stream(steps: Step) -> Iterator[tuple[Step, bool]]:
    """Cut N parallel streams [T, N, ...] into (episode [T', ...], complete)."""
    splitter = Splitter()
    yield from splitter.push(steps)
    yield from splitter.flush()


class Episodes:
    """A dataset opened for reading. Raises UserError if it is missing, empty, damaged or of another version.

    Opening compares sizes and record counts; only `verify` reads every byte.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.manifest = _read_manifest(self.path)
        self.schema, self.spec = _read_schema(self.path / MANIFEST, self.manifest)
        self.counts: dict[str, Any] = self.manifest['counts']
        self.shards = [self.path / shard['file'] for shard in self.manifest['shards']]
        for shard in self.manifest['shards']:
            _check_shard(self.path / shard['file'], shard)

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

    def check(self, spec: EnvSpec) -> None:
        """Raises UserError, naming both, if the dataset is of another game, observation or action space."""
        for what, given, expected in (
            ('environment', self.spec.name, spec.name),
            ('observation shape', list(self.spec.obs_shape), list(spec.obs_shape)),
            ('action space', _words(self.spec.actions), _words(spec.actions)),
        ):
            if given != expected:
                raise UserError(f'{self.path}: dataset has {what} {given}, expected {expected}')

    def records(self) -> Iterator[Record]:
        """Every record in file order, decoded and checked. Raises UserError naming the record that is wrong."""
        for path, shard in zip(self.shards, self.manifest['shards'], strict=True):
            reader = ArrayRecordReader(str(path))
            try:
                for begin in range(0, shard['records'], READ_AT_ONCE):
                    indices = list(range(begin, min(begin + READ_AT_ONCE, shard['records'])))
                    for i, data in zip(indices, _read(reader, indices, path), strict=True):
                        yield decode(data, self.schema, f'{path} record {i}')
            finally:
                reader.close()


def _words(actions: ActionSpace) -> str:
    return f'{actions.kind} of size {actions.size}'


def _read(reader: ArrayRecordReader, indices: list[int], path: pathlib.Path) -> list[bytes]:
    try:
        return reader.read(indices)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f'{path}: records {indices[0]} to {indices[-1]} cannot be read ({reason})') from error


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
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
        raise UserError(f'{file}: dataset version {manifest.get("version")}, expected {VERSION}')
    if manifest.get('checksum') != checksum(manifest):
        raise UserError(f'{file}: changed since it was written, expected checksum {manifest.get("checksum")}')
    if manifest.get('alignment') != ALIGNMENT:
        raise UserError(f'{file}: alignment {manifest.get("alignment")!r}, expected {ALIGNMENT!r}')
    if not manifest.get('counts', {}).get('episodes') or not manifest.get('shards'):
        raise UserError(f'{path}: dataset is empty, expected at least one episode')
    return manifest


def _read_schema(file: pathlib.Path, manifest: dict[str, Any]) -> tuple[Schema, EnvSpec]:
    try:
        obs, a = manifest['obs'], manifest['actions']
        actions = ActionSpace(str(a['kind']), int(a['size']), tuple(a['meanings']))
        schema = Schema(tuple(int(n) for n in obs['shape']), str(obs['dtype']), actions)
        shards = [(str(s['file']), int(s['records']), int(s['bytes']), str(s['sha256'])) for s in manifest['shards']]
        spec = EnvSpec(manifest['env'], schema.obs_shape, actions, manifest['max_return'], tuple(obs['channels']))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{file}: {type(error).__name__} at {error}, expected the fields of version {VERSION}'
        ) from error
    if schema.obs_dtype not in DTYPES:
        raise UserError(f'{file}: observations are {schema.obs_dtype}, expected one of {", ".join(DTYPES)}')
    if actions.kind not in ('discrete', 'continuous') or actions.size < 1 or min(schema.obs_shape, default=1) < 1:
        raise UserError(f'{file}: {_words(actions)} and shape {list(schema.obs_shape)}, expected positive sizes')
    if sum(records for _, records, _, _ in shards) != manifest['counts']['episodes']:
        raise UserError(f'{file}: shards do not add up to {manifest["counts"]["episodes"]} episodes')
    return schema, spec


def _check_shard(path: pathlib.Path, shard: dict[str, Any]) -> None:
    if pathlib.Path(shard['file']).name != shard['file']:
        raise UserError(f'{path}: shard outside the dataset, expected a plain file name')
    if not path.is_file():
        raise UserError(f'{path}: shard is missing, expected {shard["bytes"]} bytes with {shard["records"]} records')
    size = path.stat().st_size
    if size != shard['bytes']:
        raise UserError(f'{path}: shard has {size} bytes, expected {shard["bytes"]}')
    # A damaged file opens without an exception, with ok() false and no records.
    reader = ArrayRecordReader(str(path))
    try:
        records = reader.num_records() if reader.ok() else 0
    finally:
        reader.close()
    if records != shard['records']:
        raise UserError(f'{path}: shard has {records} readable records, expected {shard["records"]}')


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
    found = summarise(tallies)
    wrong = _difference(found, episodes.counts)
    if wrong:
        raise UserError(f'{path}: records and manifest disagree about {wrong}')
    return {'path': str(path), 'shards': len(episodes.shards)} | found


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
