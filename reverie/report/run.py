"""The files of a run folder, as a report reads them."""

import dataclasses
import json
import os
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from reverie.envs import device
from reverie.evaluation.statistics import recompute
from reverie.training import metrics
from reverie.training.legacy import read_config

# What files of other contents than a run writes raise when they are read or drawn.
DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, OSError, RecursionError, TypeError, ValueError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of a run; `notes` says what is missing or damaged, by file name."""

    folder: pathlib.Path
    config: dict[str, Any]
    metrics: dict[str, dict[int, dict[str, Any]]]  # phase -> step -> line
    scores: dict[str, Any]
    samples: dict[str, np.ndarray]
    notes: dict[str, str]
    other_tasks: tuple[dict[str, Any], ...] = ()  # scores of the tasks after the first

    @property
    def title(self) -> str:
        preset, env = self.config.get('preset', 'run'), self.config.get('env')
        return f'{preset} on {env or "an unnamed environment"}'


def read(folder: str | os.PathLike[str]) -> RunFiles:
    """Read what there is of a run. Raises UserError if `folder` is not a run."""
    folder = pathlib.Path(folder)
    config = read_config(folder)
    notes: dict[str, str] = {}
    found: dict[str, Any] = {}
    readers = {'metrics.jsonl': _metrics, 'scores.json': _scores, 'samples.npz': _samples}
    for name, reader in readers.items():
        try:
            found[name] = reader(folder / name, notes)
        except FileNotFoundError:
            notes[name] = f'This run has no {name} yet.'
        except DAMAGE:
            notes[name] = f'{name} of this run is damaged and could not be read.'
    lines, scores, samples = (found.get(name, {}) for name in readers)
    others = []
    for path in sorted(folder.glob('scores-*.json')):
        try:
            others.append(_scores(path, notes))
        except DAMAGE:
            notes[path.name] = f'{path.name} of this run is damaged and could not be read.'
    return RunFiles(folder, config, lines, scores, samples, notes, tuple(others))


def _json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8'))


def _metrics(path: pathlib.Path, notes: dict[str, str]) -> dict[str, dict[int, dict[str, Any]]]:
    """Lines by phase and step; of a repeated step the last one counts."""
    phases: dict[str, dict[int, dict[str, Any]]] = {}
    rows, bad = metrics.parse(path.read_bytes())  # bad: e.g. the torn last line of a killed run
    for row in rows:
        phases.setdefault(row['phase'], {})[int(row['step'])] = row
    if bad:
        lines, are = ('lines', 'are') if bad > 1 else ('line', 'is')
        notes['metrics.jsonl'] = (
            f'{bad} {lines} of metrics.jsonl could not be read and {are} left out.'
        )
    return phases


def _scores(path: pathlib.Path, notes: dict[str, str]) -> dict[str, Any]:
    return recompute(_json(path))  # a file of an older version has other intervals


def _samples(path: pathlib.Path, notes: dict[str, str]) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def labels(run: RunFiles, what: str) -> list[str]:
    """Names of the 'channels' or 'actions': from the config, else from the environment if it is one
    of ours.
    """
    given, env = run.config.get(what), str(run.config.get('env'))
    if not isinstance(given, list) and env in device.names():
        spec = device.make(env).spec
        given = list(spec.channels if what == 'channels' else spec.actions.meanings)
    return [str(x) for x in given] if isinstance(given, list) else []
