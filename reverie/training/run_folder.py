"""A run folder: config.json, which says what the run is, and its checkpoints.

runs/dreamer4-breakout/
  config.json     seeds, outline of the phases, and the run's own config
  metrics.jsonl   a record every few seconds
  checkpoints/    see `checkpoint`
  faults/         batches of skipped updates, see `faults`
  lock            the process that trains here, see `lock`
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from reverie.errors import BusyError
from reverie.io import warn, write_json
from reverie.training import checkpoint
from reverie.training.checkpoint import flatten
from reverie.training.legacy import modernise, read_config
from reverie.training.progress import Clock
from reverie.training.setup import TrainSetup
from reverie.training.signals import EXIT
from reverie.training.state import TrainState
from reverie.training.update import finite
from reverie.types import Params, Phase, UserError

CADENCE = ('checkpoint_every_s', 'log_every_s')


def fingerprint(
    phases: Sequence[Phase],
    config: Any,
    seed: int,
    seeds: int,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return config.json: the config, the seeds, the outline of the phases, and the warm start that
    `record` describes.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    outline = {
        p.name: dict(trains=sorted(p.trains), steps=p.steps, batch=p.batch, length=p.length)
        for p in phases
    }
    value = {'seed': seed, 'seeds': seeds, 'phases': outline, **dict(config or {})}
    value |= {'from': record} if record else {}
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain


def check_run_config(folder: pathlib.Path, config: dict[str, Any], safe: Sequence[str]) -> None:
    """Raise UserError naming each differing key if the folder was made with another config; keys in
    `safe` (dotted paths) may differ.
    """
    if not (folder / 'config.json').exists():
        return
    saved = read_config(folder)
    if differences(saved, config, (*safe, *lengthened(saved, config)), 'given'):
        differing = differences(saved, config, safe, 'given')
        raise UserError(
            f'{folder} was made with another config; {"; ".join(differing)}; use another folder'
        )


def save_run_config(folder: pathlib.Path, config: dict[str, Any], safe: Sequence[str]) -> None:
    """Save `config` in a run folder; raises UserError as `check_run_config` does."""
    check_run_config(folder, config, safe)
    write_json(folder / 'config.json', config)


def lengthened(saved: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys that differ because the last phase is given more updates, as a finished run may be."""
    first, second = flatten(saved), flatten(given)
    outline = given.get('phases')
    last = list(outline)[-1] if isinstance(outline, Mapping) and outline else ''
    steps = f'phases.{last}.steps'
    keys = (steps, 'env_frames', 'config.steps', f'config.{last}_phase.steps')
    more = tuple(k for k in keys if _number(second.get(k)) > _number(first.get(k)))
    return more if steps in more else ()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def differences(
    saved: Mapping[str, Any], other: Mapping[str, Any], safe: Sequence[str], name: str
) -> list[str]:
    """Lines about the keys in which two configs differ, but for those in `safe`; `name` says what
    the other is.
    """
    first, second = flatten(saved), flatten(other)
    missing = '(absent)'
    return [
        f'{key}: saved {first.get(key, missing)!r}, {name} {second.get(key, missing)!r}'
        for key in sorted(set(first) | set(second))
        if first.get(key, missing) != second.get(key, missing)
        and not any(key == s or key.startswith(f'{s}.') for s in safe)
    ]


def check_unedited(folder: pathlib.Path, safe: Sequence[str]) -> None:
    """Raise UserError naming the keys of config.json that are not as the newest checkpoint has
    them, which is under a checksum; keys in `safe` may differ.
    """
    steps = checkpoint.steps(folder / 'checkpoints')
    if not steps:
        return
    try:
        trained = modernise(json.loads((steps[-1] / 'meta.json').read_text())['config'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # a damaged checkpoint is told from its checksums where its arrays are read
    found = read_config(folder)
    if differing := differences(
        trained, found, (*safe, *lengthened(trained, found)), 'config.json'
    ):
        raise UserError(
            f'{folder / "config.json"} is not what the run was trained with; '
            f'{"; ".join(differing)}; put the saved values back'
        )


@contextlib.contextmanager
def lock(folder: pathlib.Path, wait_s: float | None = None) -> Iterator[None]:
    """Hold a run folder against other processes; its file `lock` says who does.

    wait_s: seconds to wait for another process. The kernel lets go of the lock when a process ends,
    however it ends, so a dead one never blocks.

    Raises UserError if another process holds the folder; BusyError, which asks a scheduler to try
    again, if the caller waits or SLURM restarted this job.
    """
    path = folder / 'lock'
    requeue = wait_s is not None or 'SLURM_RESTART_COUNT' in os.environ
    limit = time.monotonic() + (wait_s or 0.0)
    with open(path, 'a+', encoding='utf-8', errors='replace') as file:
        while not _locked(file):
            if time.monotonic() >= limit:
                file.seek(0)
                holder = ' '.join(file.read(200).split()) or 'another process'
                error = BusyError if requeue else UserError
                raise error(f'{folder} is in use by {holder}; wait for it, or use another folder')
            time.sleep(min(1.0, max(0.05, limit - time.monotonic())))
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _locked(file: IO[str]) -> bool:
    """Take the lock of an open file, if nobody has it; a file system without locks is said."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn(f'{file.name}: {error}; nothing keeps a second process out of this folder')
    return True


@dataclasses.dataclass
class Saver:
    """Saves checkpoints when they are due, and ends the process after one if a signal asks for it."""

    setup: TrainSetup
    checkpoints: checkpoint.CheckpointManager
    config: dict[str, Any]
    clock: Clock
    signals: list[signal.Signals]
    every_s: float
    saved_at: float  # time.monotonic()

    @property
    def due(self) -> bool:
        return bool(self.signals) or time.monotonic() - self.saved_at >= self.every_s

    def save(self, index: int, params: Params, train: TrainState | None, step: int) -> None:
        """Save a step of a phase; `train` may be None at the phase's end.

        Raises UserError if a weight is not finite, and SystemExit if a signal was caught.
        """
        setup, phase = self.setup, self.setup.phases[index]
        if not finite((params, train and train._replace(live=()))):
            raise UserError(
                f'phase {phase.name} step {step}: weights or optimiser are not finite; nothing was saved'
            )
        rest = None
        if train is not None:
            rest = train._asdict() | {'host': setup.source.arrays()}
            rest.pop('params')
        complete = step == phase.steps
        meta: checkpoint.Meta = dict(
            phase=phase.name,
            phase_index=index,
            step=step,
            complete=complete,
            gradient_steps=setup.gradient_steps(index, step),
            env_frames=setup.env_frames(index, step),
            seconds=self.clock.seconds,
            seeds=setup.seeds,
            config=self.config,
            source=setup.source.get_state(),
        )
        last = bool(self.signals) or (complete and index == len(setup.phases) - 1)
        self.checkpoints.save(meta['gradient_steps'], params, rest, meta, last=last)
        self.saved_at = time.monotonic()
        if self.signals:
            warn(
                f'{self.signals[0].name}: saved at {phase.name}/{step}; run the same command to continue'
            )
            raise SystemExit(EXIT[self.signals[0]])
