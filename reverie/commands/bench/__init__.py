"""`reverie bench`: speed of training and of play on this device."""

import dataclasses
import pathlib
from typing import Literal

import tyro

from reverie.commands.programs import Compiling, keep_programs
from reverie.commands.terminal import command_line, show


@dataclasses.dataclass(frozen=True)
class Bench(Compiling):
    """Measure speed on this device: of training (phases), or of play at the paper's shape (fps)."""

    what: tyro.conf.Positional[Literal['phases', 'fps']] = 'phases'
    """phases: updates of a preset, and imagination with the cache against recomputing the context.
    fps: frames of play."""
    preset: str = 'dreamer4'
    """phases: which preset."""
    model: str = 'dreamer4_paper'
    """fps: dreamer4_paper, dreamer4_600m, dreamer4_200m or dreamer4_tiny, with random weights."""
    players: int = 1
    """fps: how many play at once."""
    frames: int = 200
    """fps: how many are timed."""
    steps: int = 4
    """fps: K, denoising steps of a frame."""
    softcap: float | None = None
    """fps: another soft cap of the attention's logits; 0 leaves it out."""
    attention: Literal['xla', 'tokamax', 'auto'] = 'xla'
    """fps: implementation of attention."""
    cache: bool = True
    """phases: keep compiled programs for the next command. fps times compiling and keeps none."""
    out: pathlib.Path | None = None
    """Results file to write."""


def run(args: Bench) -> None:
    """Measure, print the record, and write it if a file is given."""
    from reverie.evaluation.results import save

    keep_programs(args.cache and args.what != 'fps')
    if args.what == 'fps':
        from reverie.commands.bench import fps

        record = fps.measure(
            args.model,
            command_line(),
            players=args.players,
            frames=args.frames,
            steps=args.steps,
            softcap=args.softcap,
            kernel=args.attention,
        )
    else:
        from reverie.commands.bench import phases

        record = phases.measure(args.preset, command_line())
    show(record)
    if args.out:
        save(args.out, record)
