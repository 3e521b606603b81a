"""`reverie report`: write a run's page again."""

import dataclasses
import pathlib

import tyro

from reverie.commands.terminal import say


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a run's report.html: scores, curves, reconstructions, dreams."""

    run: tyro.conf.Positional[pathlib.Path]
    """Run folder; `demo` is the model that comes with the package."""


def run(args: Report) -> None:
    """Write the page from the files of the run folder."""
    from reverie.commands.experiment import SAFE
    from reverie.commands.packaged import run_folder
    from reverie.report import write
    from reverie.training.run_folder import check_unedited

    folder = run_folder(args.run)
    check_unedited(folder, SAFE)
    say(f'report: {write(folder)}')
