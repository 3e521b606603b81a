"""What a report page is made from: the files of a run, and the fragments of HTML its sections
share.
"""

import base64
import dataclasses
import html
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from reverie.envs import device
from reverie.evaluation import video
from reverie.evaluation.statistics import recompute
from reverie.types import UserError

escape = html.escape


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a run; `notes` says what is missing or damaged, by file name."""

    folder: pathlib.Path
    config: dict[str, Any]
    metrics: dict[str, dict[int, dict[str, Any]]]  # phase -> step -> line
    scores: dict[str, Any]
    samples: dict[str, np.ndarray]
    notes: dict[str, str]


def _json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8'))


def _metrics(path: pathlib.Path, notes: dict[str, str]) -> dict[str, dict[int, dict[str, Any]]]:
    phases: dict[str, dict[int, dict[str, Any]]] = {}
    bad = 0
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            row = json.loads(line)
            phases.setdefault(str(row['phase']), {})[int(row['step'])] = (
                row  # of a repeated step the last one counts
            )
        except (ValueError, KeyError, TypeError):
            bad += 1  # e.g. the half-written last line of a killed run
    if bad:
        notes['metrics.jsonl'] = (
            f'{bad} line{"s" * (bad > 1)} of metrics.jsonl could not be read and {"are" if bad > 1 else "is"} left out.'
        )
    return phases


def read(folder: str | os.PathLike[str]) -> Run:
    """Reads what there is of a run. Raises UserError if `folder` is not a run."""
    folder = pathlib.Path(folder)
    try:
        config = _json(folder / 'config.json')
    except OSError as error:
        raise UserError(
            f'report: {folder} is not a run folder, expected a config.json in it'
        ) from error
    except ValueError as error:
        raise UserError(
            f'report: {folder / "config.json"} is not readable JSON, expected the config of a run'
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f'report: {folder / "config.json"} holds a {type(config).__name__}, expected an object'
        )
    notes: dict[str, str] = {}
    metrics, samples = {}, {}
    scores: dict[str, Any] = {}
    for name in ('metrics.jsonl', 'scores.json', 'samples.npz'):
        path = folder / name
        try:
            if name == 'metrics.jsonl':
                metrics = _metrics(path, notes)
            elif name == 'scores.json':
                scores = recompute(_json(path))  # a file of an older version has other intervals
            else:
                with np.load(path, allow_pickle=False) as arrays:
                    samples = dict(arrays)
        except FileNotFoundError:
            notes[name] = f'This run has no {name} yet.'
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
            notes[name] = f'{name} of this run is damaged and could not be read.'
    return Run(folder, config, metrics, scores, samples, notes)


def missing(run: Run, name: str, what: str) -> str:
    note = run.notes.get(name, f'{name} of this run does not hold them.')
    return f'<p class="missing">No {escape(what)}. {escape(note)}</p>'


def image(data: bytes, alt: str, kind: str = '') -> str:
    uri = base64.b64encode(data).decode()
    return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/png;base64,{uri}">'


def figure(title: str, value: str, chart: str) -> str:
    return f'<figure><figcaption><b>{escape(title)}</b><span>{escape(value)}</span></figcaption>{chart}</figure>'


def line_key(*items: tuple[str, str]) -> str:
    """What the lines of the charts below are."""
    return (
        '<div class="key">'
        + ''.join(f'<span><i class="{k}"></i>{escape(v)}</span>' for k, v in items)
        + '</div>'
    )


def labels(run: Run, what: str) -> list[str]:
    """Names of the 'channels' or 'actions': from the config, else from the environment if it is one
    of ours.
    """
    given, env = run.config.get(what), str(run.config.get('env'))
    if not isinstance(given, list) and env in device.names():
        spec = device.make(env).spec
        given = list(spec.channels if what == 'channels' else spec.actions.meanings)
    return [str(x) for x in given] if isinstance(given, list) else []


def legend(run: Run, channels: int) -> str:
    """Which colour is which channel of a symbolic grid."""
    if channels in (1, 3):
        return ''
    names = labels(run, 'channels')
    names += [f'channel {i}' for i in range(len(names), channels)]
    colours = [
        f'rgb{tuple(int(x) for x in video.PALETTE[i % len(video.PALETTE)])}'
        for i in range(channels)
    ]
    cells = [
        f'<span><i class="cell" style="background:{c}"></i>{escape(n)}</span>'
        for c, n in zip(colours, names, strict=False)
    ]
    return f'<div class="key">{"".join(cells)}<span><i class="cell" style="background:#000"></i>empty</span></div>'
