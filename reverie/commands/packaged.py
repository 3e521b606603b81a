"""The demo's model, which comes with the package: `demo` where a run folder is expected.

    demo/
      weights.npz    every parameter of a finished run of one seed, half precision, by number
      run.json       the run's config.json and scores.json, and meta.json of its last checkpoint
      recordings/    a small dataset: episodes of the one that it was trained on, to begin dreams from

It is unpacked once, as an ordinary run folder, so that every command that takes one takes it too.
"""

import hashlib
import importlib.resources
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from reverie.commands.programs import user_cache
from reverie.data.episodes import Episodes, Writer
from reverie.errors import UserError
from reverie.io import file_hash, write_json
from reverie.training import checkpoint
from reverie.training.legacy import read_config

NAME = 'demo'
RECORDINGS = 'demo-recordings'  # the dataset beside the run, which its config.json names
EPISODES = 24  # of it
FILES = ('weights.npz', 'run.json')


def home() -> pathlib.Path:
    """Folder of the package's model."""
    return pathlib.Path(str(importlib.resources.files('reverie'))) / NAME


def run_folder(name: str | os.PathLike[str]) -> pathlib.Path:
    """The run folder that a command was given; `demo` is the model of the package, unpacked, unless
    there is a run of this name.
    """
    path = pathlib.Path(name)
    if path != pathlib.Path(NAME) or (path / 'config.json').exists():
        return path
    return unpack(home(), user_cache())


def unpack(packed: pathlib.Path, into: pathlib.Path) -> pathlib.Path:
    """Unpack a model into a run folder whose name holds its checksum; return it.

    Raises UserError if files of the package are missing.
    """
    missing = [name for name in FILES if not (packed / name).is_file()]
    if missing:
        raise UserError(
            f'{packed}: {", ".join(missing)} missing; expected the files of the package'
        )
    folder = into / f'{NAME}-{checksum(packed)[:12]}'
    run = folder / NAME
    if run.exists():
        return run
    into.mkdir(parents=True, exist_ok=True)
    saved = json.loads((packed / 'run.json').read_text(encoding='utf-8'))
    with tempfile.TemporaryDirectory(dir=into) as temporary:
        made = pathlib.Path(temporary) / 'whole'
        (made / NAME).mkdir(parents=True)
        for name in ('config', 'scores'):
            write_json(made / NAME / f'{name}.json', saved[name])
        (made / NAME / 'metrics.jsonl').touch()
        meta = saved['meta']
        with np.load(packed / 'weights.npz', allow_pickle=False) as arrays:
            params = _tree(meta['arrays']['params'], arrays)
        checkpoint.save(made / NAME / 'checkpoints', meta['gradient_steps'], params, None, meta)
        shutil.copytree(packed / 'recordings', made / RECORDINGS)
        try:
            os.rename(made, folder)
        except OSError:
            if not run.exists():  # else another command was faster
                raise
    return run


def _tree(described: list[dict[str, Any]], arrays: Any) -> dict[str, Any]:
    """Parameters as meta.json describes them."""
    found: dict[str, Any] = {}
    for i, leaf in enumerate(described):
        node = found
        for key in leaf['path'][:-1]:
            node = node.setdefault(key, {})
        node[leaf['path'][-1]] = arrays[f'{i:05d}'].astype(leaf['dtype'])
    return found


def pack(run: pathlib.Path, packed: pathlib.Path) -> None:
    """Pack a finished run of one seed; its scores are those of `run`, so score what was unpacked.

    Raises UserError for a run of several seeds, or one that has no dataset of its own.
    """
    config = read_config(run)
    if config['seeds'] != 1 or not isinstance(config.get('data'), str):
        raise UserError(f'{run}: expected a run of one seed on one dataset')
    params, meta = checkpoint.load(run)
    if not meta['complete']:
        raise UserError(f'{run} is in the middle of phase {meta["phase"]}; expected a finished run')
    packed.mkdir(parents=True, exist_ok=True)
    arrays = {f'{i:05d}': _half(x) for i, x in enumerate(jax.tree.leaves(jax.device_get(params)))}
    np.savez_compressed(packed / 'weights.npz', **arrays)  # type: ignore[arg-type]
    _recordings(pathlib.Path(config['data']), packed / 'recordings')
    repack(run, packed, meta)


def repack(run: pathlib.Path, packed: pathlib.Path, meta: dict[str, Any] | None = None) -> None:
    """Pack configuration and scores of a run alone."""
    meta = checkpoint.load(run)[1] if meta is None else meta
    config = {**read_config(run), 'data': RECORDINGS}
    meta = {**meta, 'config': {**meta['config'], 'data': RECORDINGS}, 'source': {}}
    scores = json.loads((run / 'scores.json').read_text(encoding='utf-8'))
    write_json(packed / 'run.json', {'config': config, 'scores': scores, 'meta': meta})


def _half(x: np.ndarray) -> np.ndarray:
    """Half precision of numbers with a point. Raises UserError for one that is too large for it."""
    if x.dtype != np.float32:
        return x
    largest = float(np.abs(x).max(initial=0.0))
    if not largest <= float(np.finfo(np.float16).max):
        raise UserError(f'a weight of {largest:g}: expected at most 65504, for half precision')
    return x.astype(np.float16)


def _recordings(data: pathlib.Path, out: pathlib.Path) -> None:
    """Episodes of a dataset, spread over it, as a dataset."""
    episodes = Episodes(data)
    every = max(1, len(episodes) // EPISODES)
    chosen = itertools.islice(itertools.islice(episodes.records(), 0, None, every), EPISODES)
    provenance = {k: x for k, x in episodes.provenance.items() if k not in ('ppo', 'players')}
    with Writer(out, episodes.spec, provenance, overwrite=True, schema=episodes.schema) as writer:
        for record in chosen:
            writer.add_record(record)


def checksum(packed: pathlib.Path) -> str:
    """SHA-256 over the files of a packed model."""
    files = sorted(path for path in packed.rglob('*') if path.is_file())
    lines = [f'{path.relative_to(packed).as_posix()} {file_hash(path)}' for path in files]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()
