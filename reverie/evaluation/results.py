"""Results files: the scores of one preset on one environment, their figures and provenance."""

import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import reverie
from reverie.evaluation.returns import Scores
from reverie.evaluation.statistics import Returns, derive
from reverie.io import atomic, plain


def device_name() -> str:
    """The accelerator, or the processor's model with its number of cores."""
    device = jax.devices()[0]
    if device.platform != 'cpu':
        kind: str = device.device_kind
        return kind
    cpuinfo = pathlib.Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    name = model[0] if model else platform.processor() or platform.machine()
    return f'{name}, {os.cpu_count()} cores'


def commit_name() -> str:
    """The commit this package runs from (-dirty if files were changed); its version outside a
    checkout.
    """
    package = pathlib.Path(reverie.__file__).resolve().parent
    git = functools.partial(subprocess.run, cwd=package, capture_output=True, text=True, timeout=10)
    try:
        top = git(['git', 'rev-parse', '--show-toplevel'])
        # an environment inside somebody's own repository must not be quoted as ours
        if top.returncode == 0 and pathlib.Path(top.stdout.strip()).resolve() == package.parent:
            name = git(['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'])
            if name.returncode == 0:
                return name.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return f'v{reverie.__version__}'
    return f'v{reverie.__version__}'


def provenance() -> dict[str, Any]:
    """Provenance of a figure: `device, date, commit, versions`."""
    names = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    versions = {'python': platform.python_version(), 'reverie': reverie.__version__}
    versions |= {name: importlib.metadata.version(name) for name in names}
    date = datetime.date.today().isoformat()
    return {'device': device_name(), 'date': date, 'commit': commit_name(), 'versions': versions}


def _rows(scores: Any) -> Returns:
    """Returns [seeds][episodes] of Scores, or of returns with or without the seeds."""
    rows = scores.returns if isinstance(scores, Scores) else scores
    rows = [rows] if np.ndim(rows[0]) == 0 else rows
    return [np.asarray(row, float) for row in rows]


def record(*, preset: str, env: str, command: str, seeds: Sequence[int], env_frames: int,
           gradient_steps: Mapping[str, int], seconds: float | int, scores: Mapping[str, Any],
           reference: float | int | None = None,
           curve: Mapping[str, Any] | None = None, **extra: Any) -> dict[str, Any]:  # fmt: skip
    """The results file of one preset on one environment.

    Args:
        scores: read-out -> Scores or returns [seeds][episodes] or [episodes]; or {'sampled': ...,
            'greedy': ...}, of which the sampled one takes the main keys and the greedy one a
            sub-dictionary.
        reference: score of PPO at 10M frames, 1 on the normalised scale; the mean of
            `scores['ppo']` if not given.
        curve: {'env_frames': [...], 'seconds': [...], 'return_per_seed': [[...], ...]}.
        extra: more entries, e.g. of the dataset.
    """
    played = {}
    for name, found in scores.items():
        modes = found if isinstance(found, Mapping) else {'sampled': found}
        played[name] = {mode: _rows(rows) for mode, rows in modes.items()}
    if reference is None and 'ppo' in played:
        reference = float(np.mean([np.mean(row) for row in played['ppo']['sampled']]))
    return {
        'preset': preset,
        'env': env,
        'command': command,
        **provenance(),
        'seeds': [int(x) for x in seeds],
        'env_frames': int(env_frames),
        'gradient_steps': {k: int(v) for k, v in gradient_steps.items()},
        'seconds': float(seconds),
        'reference': reference,
        **derive(played, reference),
        'curve': dict(curve or {'env_frames': [], 'seconds': [], 'return_per_seed': []}),
        **extra,
    }


def save(path: str | os.PathLike[str], record: Mapping[str, Any]) -> pathlib.Path:
    """Write a results file, whole or not at all; return its path.

    Raises ValueError naming the first number that is not finite.
    """
    path = pathlib.Path(path)
    text = json.dumps(plain(record, 'results'), allow_nan=False, indent=1) + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(text)
    return path
