"""Writer of datasets, and the cutting of streams of steps into episodes.

A dataset appears under its name only when it is whole: shards are written into a hidden sibling
folder, synced, the manifest goes last, then the folder is renamed.
"""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from reverie.data.manifest import MANIFEST, Tally, check_shard, make_manifest
from reverie.data.pictures import codec_for
from reverie.data.records import DTYPES, Record, Schema, encode, from_step
from reverie.io import file_hash, sync
from reverie.types import EnvSpec, Step, UserError


class Writer:
    """Context manager that writes a dataset; an exception inside it leaves nothing behind.

    path: folder to create. Raises UserError if it exists, unless `overwrite` and it is a dataset.
    spec: environment of the episodes.
    provenance: what JSON can hold (command, seed, versions, curve of the players' training).
    shard_bytes: bytes of records after which a new shard begins.
    task: name of the task that the episodes show; the environment's if not given.
    compressed: keep pictures as files (lossless WebP, JPEG from 128 x 128 pixels on).
    lossy: keep small ones too as JPEG.
    schema: of `add_record`, where no episode was added before.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: EnvSpec,
        provenance: dict[str, Any] | None = None,
        overwrite: bool = False,
        shard_bytes: int = 64 << 20,
        task: str = '',
        compressed: bool = False,
        lossy: bool = False,
        schema: Schema | None = None,
    ):
        self.path = pathlib.Path(path).absolute()
        self.spec = spec
        self.provenance = provenance if provenance is not None else {}
        self.shard_bytes = shard_bytes
        self.overwrite = overwrite
        self.task, self.compressed, self.lossy = task, compressed, lossy
        self.held_out: list[int] = []  # numbers of the episodes that nothing is trained on
        refuse_existing(self.path, overwrite)
        # What cannot be written should fail before a day of collecting.
        json.dumps(self.provenance, allow_nan=False)
        self._schema = schema
        self._tallies: dict[str, Tally] = {}
        self._shards: list[dict[str, Any]] = []
        self._writer: Any = None  # of the shard being written
        self._records = self._bytes = 0
        self._folder: Any = None  # the hidden folder, while open

    def __enter__(self) -> 'Writer':
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.path)
        prefix = f'{_partial_prefix(self.path)}{socket.gethostname()}-{os.getpid()}-'
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=self.path.parent))
        self._folder.chmod(0o755)
        return self

    def add(
        self,
        kind: str,
        episode: Step,
        complete: bool = True,
        has_action: bool = True,
        has_reward: bool = True,
        held_out: bool = False,
    ) -> None:
        """Append one episode, arrays with leading dim [T]; `complete` is false if it was cut,
        `held_out` true if nothing is to be trained on it.

        Discrete prev_action may be one-hot [T, A] or indices [T] (-1: none), composite ones are
        [T, parts] as `ActionSpace` says. Raises UserError if the episode does not fit the dataset.
        """
        if self._schema is None:
            dtype = np.asarray(episode.obs).dtype.name
            if dtype not in DTYPES:
                raise UserError(f'observations are {dtype}, expected one of {", ".join(DTYPES)}')
            if isinstance(self.spec.obs_shape, Mapping):
                raise UserError(
                    f'observations are {sorted(self.spec.obs_shape)}, expected one array'
                )
            shape = tuple(self.spec.obs_shape)
            codec = codec_for(shape, dtype, self.lossy) if self.compressed else ''
            self._schema = Schema(shape, dtype, self.spec.actions, codec)
        if held_out:
            self.held_out.append(sum(tally.episodes for tally in self._tallies.values()))
        self.add_record(from_step(kind, episode, self._schema, complete, has_action, has_reward))

    def add_record(self, record: Record) -> None:
        """Append an episode that is in stored form already."""
        if self._folder is None:
            raise UserError('Writer is not open, expected `with Writer(...) as writer`')
        data = encode(record, '' if self._schema is None else self._schema.codec)
        if self._writer is None:
            # One record per group: a reader that wants one episode decompresses only that one.
            name = str(self._folder / f'shard-{len(self._shards):05d}.array_record')
            self._writer = ArrayRecordWriter(name, 'group_size:1')
            self._shards.append({'file': pathlib.Path(name).name})
            self._records = self._bytes = 0
        with _as_os_error():
            self._writer.write(data)
        self._records += 1
        self._bytes += len(data)
        self._tallies.setdefault(record.kind, Tally()).add(record)
        if self._bytes >= self.shard_bytes:
            self._end_shard()

    def attach(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Write `arrays` beside the shards as the NumPy archive `name`; return file, bytes and
        sha256 for the provenance.
        """
        if self._folder is None:
            raise UserError('Writer is not open, expected `with Writer(...) as writer`')
        path = self._folder / name
        with path.open('xb') as file:
            # NumPy's stub takes them for allow_pickle
            np.savez(file, **arrays)  # type: ignore[arg-type]
        sync(path)
        return {'file': name, 'bytes': path.stat().st_size, 'sha256': file_hash(path)}

    def _end_shard(self) -> None:
        if self._writer is None:
            return
        with _as_os_error():
            self._writer.close()
        self._writer = None
        path = self._folder / self._shards[-1]['file']
        sync(path)
        self._shards[-1] |= {
            'records': self._records,
            'bytes': path.stat().st_size,
            'sha256': file_hash(path),
        }
        check_shard(path, self._shards[-1])  # a full disk shows here

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if self._writer is not None and self._writer.is_open():
                # It goes anyway, and the first error says more.
                with contextlib.suppress(RuntimeError):
                    self._writer.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _publish(self) -> None:
        if self._schema is None or not self._tallies:
            raise UserError(f'{self.path}: no episode was added, expected at least one')
        self._end_shard()
        manifest = make_manifest(
            self.spec,
            self._schema,
            self._tallies,
            self._shards,
            self.provenance,
            self.held_out,
            self.task,
        )
        target = self._folder / MANIFEST
        target.write_text(json.dumps(manifest, indent=1, allow_nan=False))
        sync(target)
        sync(self._folder)
        refuse_existing(self.path, self.overwrite)
        old = None
        if self.path.exists():
            aside = tempfile.mkdtemp(prefix=_partial_prefix(self.path), dir=self.path.parent)
            old = pathlib.Path(aside) / 'old'
            self.path.rename(old)
        self._folder.rename(self.path)
        sync(self.path.parent)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn ArrayRecord's error for a full disk into Python's."""
    try:
        yield
    except RuntimeError as error:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(code) in str(error):
                raise OSError(code, f'{os.strerror(code)}: {str(error)[:200]}') from error
        raise


def _partial_prefix(path: pathlib.Path) -> str:
    return f'.{path.name}.partial-'


def _remove_stale(path: pathlib.Path) -> None:
    """Remove what a killed writer of the same dataset left on this machine."""
    for folder in path.parent.glob(f'{_partial_prefix(path)}{socket.gethostname()}-*'):
        pid = folder.name.rsplit('-', 2)[1]
        if (
            pid.isdigit()
            and not pathlib.Path(f'/proc/{pid}').exists()
            and pathlib.Path('/proc/self').exists()
        ):
            shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(path: pathlib.Path, overwrite: bool) -> None:
    """Raise UserError if a dataset cannot be written to `path`."""
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise UserError(
            f'{path} exists already, expected a new path for the dataset (or overwrite)'
        )
    if not (path / MANIFEST).is_file():
        raise UserError(
            f'{path} exists and is not a dataset, expected a new path or a dataset to overwrite'
        )


class Splitter:
    """Cutter of N parallel streams of arriving steps into episodes, which may span several chunks.

    `push` takes a chunk [T, N] and yields the episodes that ended in it, `flush` the unfinished
    tails: their last step gets is_last, never is_terminal, and `complete` is false.
    """

    def __init__(self) -> None:
        self._open: list[list[Step]] = []

    def push(self, steps: Step) -> Iterator[tuple[Step, bool]]:
        """Take steps [T, N, ...]; yield (episode [T', ...], complete)."""
        steps = jax.tree.map(np.asarray, steps)
        envs = steps.is_first.shape[1]
        self._open = self._open or [[] for _ in range(envs)]
        if envs != len(self._open):
            raise UserError(f'chunk has {envs} streams, expected {len(self._open)} as before')
        for env in range(envs):
            stream = jax.tree.map(lambda x, env=env: x[:, env], steps)
            starts = np.flatnonzero(stream.is_first).tolist()
            if not self._open[env] and (not starts or starts[0] != 0):
                raise UserError(
                    f'stream {env} begins inside an episode, expected is_first at its first step'
                )
            edges = sorted({0, *starts, len(stream.is_first)})
            for begin, end in itertools.pairwise(edges):
                if stream.is_first[begin] and self._open[env]:
                    # An episode that a new one follows without is_last was cut.
                    yield self._close(env)
                self._open[env].append(jax.tree.map(lambda x, a=begin, b=end: x[a:b], stream))
                if stream.is_last[end - 1]:
                    yield self._close(env)
            if self._open[env]:  # copied, or a few long episodes would keep whole chunks alive
                self._open[env][-1] = jax.tree.map(np.array, self._open[env][-1])

    def flush(self) -> Iterator[tuple[Step, bool]]:
        """Yield the unfinished tails, (episode, False) each."""
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
