"""Sinks of metrics.

A record is a flat dict. With one seed `loss/flow` is a float; with several it is their mean and
`loss/flow/seeds` the list. Every record carries phase, step (in the phase), gradient_steps and
env_frames (in all), and seconds.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from reverie.io import atomic, plain, warn
from reverie.text import duration
from reverie.types import Phase, UserError

if TYPE_CHECKING:
    from rich.progress import Progress

Record = dict[str, Any]
COORDINATES = ('phase', 'step', 'gradient_steps', 'env_frames', 'seconds')


@runtime_checkable
class Sink(Protocol):
    """Receiver of records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def scalars(record: Record) -> dict[str, float]:
    """Return the metrics of a record that are single finite numbers."""
    return {
        name: value
        for name, value in record.items()
        if name not in COORDINATES and isinstance(value, int | float) and math.isfinite(value)
    }


class Jsonl:
    """Sink of one JSON object per line, appended and flushed.

    A full disk costs lines, with one warning, never the run.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.warned = path, False

    def write(self, record: Record) -> None:
        line = json.dumps(plain(record), allow_nan=False)
        try:
            with open(self.path, 'a') as f:
                f.write(line + '\n')
        except OSError as error:
            if not self.warned:
                warn(f'CANNOT WRITE METRICS to {self.path}: {error}')
            self.warned = True

    def close(self) -> None:
        """Nothing is kept open between lines."""

    def drop_after(self, gradient_steps: int) -> None:
        """Remove lines later than a resumed step, and a torn last line, so that a curve has no
        point twice.
        """
        try:
            found = self.path.read_bytes()
            records, damaged = parse(found)
            kept = [json.dumps(r) for r in records if r['gradient_steps'] <= gradient_steps]
            with atomic(self.path) as file:
                file.write(''.join(f'{line}\n' for line in kept))
        except FileNotFoundError:
            return
        except OSError as error:
            warn(f'{self.path} cannot be continued: {error}')
            return
        # A kill tears the last line, which is no news.
        if damaged - (not found.endswith(b'\n')) > 0:
            warn(f'{self.path}: {damaged} damaged lines were left out')


def parse(text: bytes) -> tuple[list[Record], int]:
    """Read the lines of a metrics.jsonl; return the sound records and how many lines are none."""
    lines = [line for line in text.splitlines() if line.strip()]
    records = [record for line in lines if (record := _record(line)) is not None]
    return records, len(lines) - len(records)


def _record(line: bytes) -> Record | None:
    """A line as a record; None if it is not JSON, or lacks a coordinate."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get('phase'), str):
        return None
    numbers: list[Any] = [record.get(name) for name in COORDINATES if name != 'phase']
    sound = all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
    return record if sound else None


def read(path: str | os.PathLike[str]) -> list[Record]:
    """Return the sound records of a metrics.jsonl, none where there is no file; say on standard
    error what cannot be read.
    """
    try:
        records, damaged = parse(pathlib.Path(path).read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        warn(f'{path} cannot be read: {error}')
        return []
    if damaged:
        warn(f'{path}: {damaged} damaged lines were left out')
    return records


class Terminal:
    """Progress on the terminal: phase, step, losses, speed, time left; without a terminal, a plain
    line every `every_s` seconds.

    The time left in all assumes that later phases process frames as fast as this one; it is a
    guess, hence the '~'.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        every_s: float = 10.0,
        file: Any = None,
        live: bool | None = None,
    ):
        self.phases, self.every_s = phases, every_s
        self.file = file or sys.stdout
        self.index = {phase.name: i for i, phase in enumerate(phases)}
        self.live = self.file.isatty() if live is None else live
        self.last: tuple[str, float] = ('', -math.inf)
        self.progress: Progress | None = None

    def left(self, record: Record) -> tuple[float, float]:
        """Return the seconds left in this phase, and in all."""
        i = self.index[record['phase']]
        phase = self.phases[i]
        if not record.get('time/updates_per_s'):
            return math.inf, math.inf
        in_phase = (phase.steps - record['step']) / record['time/updates_per_s']
        frames = sum(p.steps * p.batch * p.length for p in self.phases[i + 1 :])
        return in_phase, in_phase + frames / (
            record['time/updates_per_s'] * phase.batch * phase.length
        )

    def line(self, record: Record) -> str:
        """Return a record as the line that both the live and the plain output show."""
        phase = self.phases[self.index[record['phase']]]
        losses = '  '.join(
            f'{k.removeprefix("loss/")} {v:.4g}'
            for k, v in list(scalars(record).items())
            if k.startswith('loss/') and not k.endswith('/seeds')
        )
        if 'score/return' in record:
            losses += f'  score {record["score/return"]:.4g}'
        in_phase, in_all = self.left(record)
        skipped = record.get('opt/skipped', 0)
        speed = (
            f'{record["time/frames_per_s"]:.3g} frames/s'
            if 'time/frames_per_s' in record
            else 'first call'
        )
        return (
            f'{self.index[phase.name] + 1}/{len(self.phases)} {phase.name}  {record["step"]}/{phase.steps}  {losses}  '
            f'{speed}  left {duration(in_phase)}, in all ~{duration(in_all)}'
            + (f'  SKIPPED {skipped:g}' if skipped else '')
        )

    def write(self, record: Record) -> None:
        if self.live:
            self._draw(record)
            return
        name, at = self.last
        done = record['step'] >= self.phases[self.index[record['phase']]].steps
        if (
            name != record['phase']
            or done
            or 'score/return' in record
            or time.monotonic() - at >= self.every_s
        ):
            with contextlib.suppress(OSError):  # a closed pipe or a full disk must not end a run
                print(self.line(record), file=self.file, flush=True)
            self.last = (record['phase'], time.monotonic())

    def _draw(self, record: Record) -> None:
        from rich import console
        from rich.progress import BarColumn, Progress, TextColumn

        if self.progress is None:
            columns = (
                BarColumn(bar_width=24),
                TextColumn('{task.percentage:>3.0f}%'),
                TextColumn('{task.description}'),
            )
            self.progress = Progress(*columns, console=console.Console(file=self.file))
            self.tasks: dict[str, Any] = {}
            self.progress.start()
        phase = self.phases[self.index[record['phase']]]
        if phase.name not in self.tasks:
            self.tasks[phase.name] = self.progress.add_task('', total=phase.steps)
        self.progress.update(
            self.tasks[phase.name], completed=record['step'], description=self.line(record)
        )

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class TensorBoard:
    """Sink of scalars over gradient steps; the first write purges points after a resumed step."""

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(
                "TensorBoard was asked for; install it with: pip install 'reverie[tensorboard]'"
            ) from error
        self.open: Callable[[int], Any] = lambda step: SummaryWriter(str(folder), purge_step=step)
        self.writer: Any = None

    def write(self, record: Record) -> None:
        step = record['gradient_steps']
        if self.writer is None:
            self.writer = self.open(step)
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, step)
        for name in ('env_frames', 'seconds'):
            self.writer.add_scalar(f'time/{name}', record[name], step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB:
    """Sink to Weights & Biases; WANDB_MODE=offline needs neither account nor network.

    The W&B run begins with the first record, so that a refused run folder leaves none there; its id
    is kept in the folder, so that a resumed run goes on in it. Raises UserError at once if wandb is
    not installed, or not logged in.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        project: str,
        name: str | None = None,
        config: Any = None,
    ):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "Weights & Biases was asked for; install it with: pip install 'reverie[wandb]'"
            ) from error
        self.folder, self.error = pathlib.Path(folder), wandb.errors.Error
        self.run: Any = None
        self.open = functools.partial(
            wandb.init, project=project, name=name, config=config, dir=str(folder)
        )
        if wandb.setup().settings.mode == 'online':
            with self._named():
                # asks for a key or complains now, not when the first updates are done
                wandb.login()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except self.error as error:
            what = ' '.join(str(error).split())[:200]
            raise UserError(
                f'Weights & Biases: {what}; log in, or set WANDB_MODE=offline and sync later'
            ) from error

    def write(self, record: Record) -> None:
        if self.run is None:
            known = self.folder / 'wandb-id.txt'
            if not known.exists():
                known.write_text(uuid.uuid4().hex[:12])
            with self._named():
                self.run = self.open(id=known.read_text(), resume='allow')
        values = {
            **scalars(record),
            'env_frames': record['env_frames'],
            'seconds': record['seconds'],
        }
        self.run.log(values, step=record['gradient_steps'])

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
