"""Checkpoints that are whole or not there: Orbax arrays, JSON meta, and a SHA-256 of every file.

A step folder is written under a temporary name and renamed last, so a kill at any moment leaves the
older ones as they were. Orbax alone reads flipped bits without complaint; the manifest catches
them.

    checkpoints/000001200/
      params/        every parameter group, leading axis [seeds]; all that evaluation needs
      train/         optimiser state, running means and counters; at the end of a phase only where phase ends are kept
      meta.json      phase, step, config, versions, the path, shape and dtype of each array
      manifest.json  {file: SHA-256}
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from reverie.data.fields import Declared, misfit
from reverie.io import file_hash, sync, warn, write_json
from reverie.training import legacy
from reverie.types import Params, UserError

FORMAT = 1
MANIFEST = 'manifest.json'
FIELDS: dict[Any, Declared] = {
    'phase?': str, 'phase_index?': int, 'step?': int, 'complete?': bool, 'gradient_steps?': int,
    'env_frames?': int, 'seconds?': float, 'seeds?': int, 'config?': dict, 'source?': dict,
    'versions': dict, 'arrays': {'params': list},
}  # fmt: skip
Meta = dict[str, Any]
# meta -> (shapes, dtypes and shardings of params, of the train state or None)
Target = Callable[[Meta], tuple[PyTree, PyTree]]


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Turn nested dicts into {dotted path: leaf}."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    parts = [
        flatten(value, f'{prefix}.{name}' if prefix else str(name)) for name, value in tree.items()
    ]
    return {name: value for part in parts for name, value in part.items()}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.rglob('*') if p.is_file() and p.name != MANIFEST)


# Arrays are stored under their number: names with dots, slashes or integer keys then survive on
# every Orbax version.
def _numbered(leaves: list[Any]) -> dict[str, Any]:
    return {f'{i:05d}': x for i, x in enumerate(leaves)}


def describe(tree: PyTree) -> list[dict[str, Any]]:
    """Return path, shape and dtype of each array, as meta.json has them."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [
        dict(path=[key_name(k) for k in path], shape=list(x.shape), dtype=str(x.dtype))
        for path, x in paths
    ]


def key_name(entry: Any) -> str | int:
    """Return the name of one entry of a JAX key path."""
    for name in ('key', 'name', 'idx'):
        if hasattr(entry, name):
            value = getattr(entry, name)
            return value if isinstance(value, int) else str(value)
    return str(entry)


@contextlib.contextmanager
def _plain(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name of `path` without special characters, by a link where it has some: Orbax takes
    [ ] * ? for patterns, finds none of the parts it wrote, and leaves a checkpoint without arrays.
    """
    if re.fullmatch(r'[\w./+=-]+', str(path.absolute()), re.ASCII):
        yield path.absolute()
        return
    with tempfile.TemporaryDirectory(prefix='reverie-') as folder:
        link = pathlib.Path(folder) / 'checkpoint'
        link.symlink_to(path.absolute().parent)
        yield link / path.name


def _write_arrays(path: pathlib.Path, tree: PyTree) -> None:
    """Write the arrays of a tree, and open them again; raise OSError if they are not there."""
    arrays = _numbered(jax.tree.leaves(tree))
    with _plain(path) as plain:
        ocp.Checkpointer(ocp.StandardCheckpointHandler()).save(plain, arrays)
        _check_written(plain, arrays)


def _check_written(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Raise OSError unless the names and shapes on the disk, and the smallest array, are right."""
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    found = getattr(handler.metadata(path), 'item_metadata', None)
    shapes = {name: tuple(x.shape) for name, x in dict(found or {}).items()}
    expected = {name: tuple(x.shape) for name, x in arrays.items()}
    if shapes != expected:
        raise OSError(f'{len(shapes)} of {len(expected)} arrays can be read again')
    if not arrays:
        return
    name = min(arrays, key=lambda name: arrays[name].size)
    x = arrays[name]
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype)}
    args = ocp.args.PyTreeRestore(item=like, restore_args=as_numpy, partial_restore=True)
    read = handler.restore(path, args=args)[name]
    if np.asarray(read).tobytes() != np.asarray(x).tobytes():
        raise OSError(f'array {name} is not what was written')


def _read_arrays(path: pathlib.Path, target: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(target)
    handler = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    with _plain(path) as plain:
        arrays = handler.restore(plain, _numbered(leaves))
    return jax.tree.unflatten(treedef, [arrays[name] for name in _numbered(leaves)])


def versions() -> dict[str, Any]:
    """Return the versions of the format and of what writes it."""
    from reverie import __version__

    return dict(format=FORMAT, reverie=__version__, jax=jax.__version__, orbax=ocp.__version__)


def save(
    folder: pathlib.Path, number: int, params: Params, train: PyTree | None, meta: Meta
) -> pathlib.Path:
    """Write checkpoint `number` (gradient steps) into `folder`.

    Raises what the disk raises; leaves no half step.
    """
    final = folder / f'{number:09d}'
    temporary = folder / f'tmp-{number:09d}'
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_arrays(temporary / 'params', params)
        if train is not None:
            _write_arrays(temporary / 'train', train)
        arrays = dict(params=describe(params), train=None if train is None else describe(train))
        write_json(temporary / 'meta.json', {**meta, 'versions': versions(), 'arrays': arrays})
        write_json(
            temporary / MANIFEST,
            {p.relative_to(temporary).as_posix(): file_hash(p) for p in _files(temporary)},
        )
        for path in _files(temporary):
            sync(path)
        doomed = folder / f'tmp-old-{number:09d}'
        if final.exists():
            os.rename(final, doomed)
        os.rename(temporary, final)
        sync(folder)
        shutil.rmtree(doomed, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def remove(path: pathlib.Path) -> None:
    """Delete a step folder, renamed first, so that a kill leaves nothing that looks corrupt."""
    if path.exists():
        doomed = path.with_name(f'tmp-delete-{path.name}')
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the complete step folders, oldest gradient step first."""
    return sorted(
        (p for p in folder.glob('*') if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name)
    )


def clean(folder: pathlib.Path) -> None:
    """Remove what an interrupted save or deletion left behind."""
    for path in folder.glob('tmp-*'):
        shutil.rmtree(path, ignore_errors=True)


def fault_of(step: pathlib.Path) -> str | None:
    """Say what is wrong with a step folder: a file missing or added, or a checksum; else None."""
    try:
        manifest = json.loads((step / MANIFEST).read_text())
        if not isinstance(manifest, dict) or 'meta.json' not in manifest:
            return f'{MANIFEST} names no meta.json'
        found = {p.relative_to(step).as_posix(): p for p in _files(step)}
        if set(manifest) != set(found):
            return f'files missing {sorted(set(manifest) - set(found))}, unknown {sorted(set(found) - set(manifest))}'
        return next(
            (
                f'checksum of {name}'
                for name, path in found.items()
                if file_hash(path) != manifest[name]
            ),
            None,
        )
    except (OSError, ValueError) as error:
        return f'{MANIFEST}: {error}'


def meta_of(step: pathlib.Path) -> Meta:
    """Return meta.json of a step folder.

    Raises UserError if its format is not the one that this version reads.
    """
    meta = json.loads((step / 'meta.json').read_text())
    if wrong := misfit(meta, FIELDS):
        raise UserError(f'{step / "meta.json"}: {wrong}')
    written = meta['versions'].get('format')
    if written != FORMAT:
        raise UserError(
            f'{step} has checkpoint format {written!a:.40}; this version reads format {FORMAT}'
        )
    return legacy.modernise_meta(meta, step)


def _newest_sound(folder: pathlib.Path) -> tuple[pathlib.Path, Meta] | None:
    """Return the newest step that passes its checksums; rename those that do not to corrupt-*."""
    for step in reversed(steps(folder)):
        fault = fault_of(step)
        if fault is None:
            return step, meta_of(step)
        aside = step.with_name(f'corrupt-{step.name}-{time.time_ns()}')
        os.rename(step, aside)
        warn(
            f'checkpoint {step} is damaged ({fault}); moved to {aside.name}, going back to the one before'
        )
    damaged = sorted(p.name for p in folder.glob('corrupt-*'))
    if damaged:
        raise UserError(
            f'no sound checkpoint is left in {folder} (damaged: {damaged}); delete the folder to start afresh'
        )
    return None


def _check(step: pathlib.Path, saved: list[dict[str, Any]], target: PyTree) -> None:
    """Raise UserError naming the first array whose path, shape or dtype is not the expected one."""
    expected = describe(target)
    for a, b in zip(saved, expected, strict=False):
        if a != b:
            raise UserError(f'{step}: saved array {a} does not match the expected {b}')
    if len(saved) != len(expected):
        raise UserError(f'{step} holds {len(saved)} arrays, but {len(expected)} are expected')


def restore_latest(
    folder: pathlib.Path, target: Target, left: Callable[[Meta], bool] = lambda meta: False
) -> tuple[Params, PyTree | None, Meta] | None:
    """Restore the newest sound checkpoint as (params, train, meta); None if there never was one.

    target: meta -> the shapes, dtypes and shardings to restore to. left: whether the train state is
    read at the end of a phase too, where it was kept. Raises UserError if every checkpoint is
    damaged, or if the arrays are not those of `target`.
    """
    found = _newest_sound(folder)
    if found is None:
        return None
    step, meta = found
    params, train = target(meta)
    saved = _described(meta, jax.devices()[0])
    extra = {name: saved[name] for name in legacy.gone_groups(saved, params)}
    _check(step, meta['arrays']['params'], params | extra)
    params = _read_arrays(step / 'params', params | extra)
    params = {name: x for name, x in params.items() if name not in extra}
    wanted = not meta['complete'] or (left(meta) and meta['arrays']['train'] is not None)
    return params, read_train(step, meta, train) if wanted else None, meta


def load(folder: str | os.PathLike[str], device: jax.Device | None = None) -> tuple[Params, Meta]:
    """Read parameters [seeds, ...] and meta of a run's newest sound checkpoint, onto one device.

    It takes neither agent nor optimiser. In the middle of a phase with `ema_decay` these are the last
    weights, not the mean. Raises UserError if the folder holds no checkpoint, or one whose meta is
    not true.
    """
    found = _newest_sound(pathlib.Path(folder) / 'checkpoints')
    if found is None:
        raise UserError(
            f'no checkpoint in {folder}; expected a run folder written by `reverie train`'
        )
    step, meta = found
    return read(step, meta, device), meta


def read(step: pathlib.Path, meta: Meta, device: jax.Device | None = None) -> Params:
    """Read the parameters [seeds, ...] of a step folder whose checksums are right.

    Raises UserError if its meta is not true.
    """
    try:
        params: Params = _read_arrays(step / 'params', _described(meta, device or jax.devices()[0]))
        return params
    except (
        AttributeError,
        LookupError,
        OverflowError,
        SystemError,
        TypeError,
        ValueError,
    ) as error:
        what = f'{type(error).__name__}: {str(error).splitlines()[0][:120]}'
        raise UserError(
            f'{step}: meta.json does not describe the arrays that are there ({what})'
        ) from error


def read_train(step: pathlib.Path, meta: Meta, target: PyTree) -> PyTree:
    """Read the train state of a step folder.

    Raises UserError if its arrays are not those of `target`.
    """
    _check(step, meta['arrays']['train'], target)
    return _read_arrays(step / 'train', target)


def _described(meta: Meta, device: jax.Device) -> Params:
    """Return the shapes and dtypes of parameters that meta names, on one device."""
    sharding, target = SingleDeviceSharding(device), Params()
    for leaf in meta['arrays']['params']:
        node = target
        for key in leaf['path'][:-1]:
            node = node.setdefault(key, {})
        node[leaf['path'][-1]] = jax.ShapeDtypeStruct(
            leaf['shape'], leaf['dtype'], sharding=sharding
        )
    return target


@dataclasses.dataclass
class CheckpointManager:
    """Manager of the steps in a folder: saves, keeps the newest, counts failures."""

    folder: pathlib.Path
    max_to_keep: int = 2  # newest steps
    keep_phase_ends: bool = False  # also the last step of every phase
    max_failures: int = 3  # in a row, before training stops with exit code 74
    failures: int = 0

    def save(
        self, number: int, params: Params, train: PyTree | None, meta: Meta, last: bool = False
    ) -> bool:
        """Save and prune; return False for a failure, which is reported and survived.

        With `last` it is retried at once instead. Raises SystemExit(74) (sysexits: input/output
        error) after `max_failures` in a row.
        """
        while True:
            try:
                save(self.folder, number, params, train, meta)
                self.failures = 0
                break
            except Exception as error:  # whatever disk, Orbax or TensorStore raise
                self.failures += 1
                line = ' '.join(str(error).split())
                line = line if len(line) < 300 else f'{line[:120]} ... {line[-170:]}'
                warn(f'SAVING FAILED ({self.failures} in a row) at gradient step {number}: {line}')
            if self.failures >= self.max_failures:
                warn(
                    f'giving up after {self.failures} failed saves; free space in {self.folder}, run the same command'
                )
                raise SystemExit(74)
            if not last:
                return False
            time.sleep(0.5 * self.failures)
        self.prune()
        return True

    def prune(self) -> None:
        """Delete the steps that need not be kept."""
        for step in steps(self.folder)[: -self.max_to_keep]:
            if self.keep_phase_ends and json.loads((step / 'meta.json').read_text())['complete']:
                continue
            remove(step)
