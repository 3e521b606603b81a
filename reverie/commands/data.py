"""`reverie data`: look into a dataset, or check it."""

import dataclasses
import pathlib
from typing import Literal

import tyro

from reverie.commands.terminal import say, show


@dataclasses.dataclass(frozen=True)
class Data:
    """Look into a dataset (inspect), or check every record of it (verify)."""

    action: tyro.conf.Positional[Literal['inspect', 'verify']]
    """inspect: print a summary. verify: read every record."""
    path: tyro.conf.Positional[pathlib.Path]
    """Folder of the dataset."""


def run(args: Data) -> None:
    """Print the summary of a dataset, or the counts of a sound one."""
    from reverie.data import inspect, render, verify

    if args.action == 'inspect':
        show(render(inspect(args.path)))
        return
    counts = [f'{n:,} {what}' for what, n in verify(args.path).items() if isinstance(n, int)]
    say(f'{args.path}: {", ".join(counts)}; all sound')
