"""`reverie report`: write a run's page again."""

import dataclasses
import pathlib

import tyro

from reverie.commands.terminal import say


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a run's report.html: scores, curves, reconstructions, dreams."""

    run: tyro.conf.Positional[pathlib.Path]
    """Run folder."""


def run(args: Report) -> None:
    """Write the page from the files of the run folder."""
    from reverie.report import write

    say(f'report: {write(args.run)}')
