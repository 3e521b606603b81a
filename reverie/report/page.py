"""A run as one self-contained HTML page: scores, curves, reconstructions, dreams, configuration.

The page is made from four files of the run folder alone (`config.json`, `metrics.jsonl`,
`scores.json`, `samples.npz`) and asks nothing of the network: charts are inline SVG, images are
data URIs. Sections say in their place what a run does not have yet.
"""

import os
import pathlib
from collections.abc import Callable

import reverie
from reverie.io import atomic, warn
from reverie.report import (
    attention,
    dreams,
    provenance,
    recordings,
    scores,
    tokenizer,
    training,
    trust,
)
from reverie.report.html import escape
from reverie.report.run import DAMAGE, RunFiles, read

SECTIONS = (
    scores.head,
    scores.section,
    trust.section,
    recordings.section,
    training.section,
    tokenizer.section,
    dreams.section,
    attention.section,
    provenance.origin,
    provenance.section,
)
# Makes the browser itself refuse anything from the network, should a hostile name slip through.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(run: RunFiles) -> str:
    """The page as text."""
    style = pathlib.Path(__file__).with_name('report.css').read_text(encoding='utf-8')
    footer = f'Made by reverie {escape(reverie.__version__)} from the files of this run alone.'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<title>{escape(run.title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{style}</style></head>\n<body>'
        + '\n'.join(shown(section, run) for section in SECTIONS)
        + f'\n<footer>{footer}</footer></body></html>\n'
    )


def shown(section: Callable[[RunFiles], str], run: RunFiles) -> str:
    """A section, or in its place what in the files of the run stands in its way."""
    try:
        return section(run)
    except DAMAGE as error:
        part = section.__module__.rpartition('.')[2]
        what = f'{type(error).__name__}: {error}'[:200]
        warn(f'{run.folder}: the report goes without its part {part} ({what})')
        return (
            f'<section><p class="missing">The part {escape(part)} cannot be shown: the files of this '
            f'run hold something else than expected ({escape(what)}).</p></section>'
        )


def write(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Write `report.html` into a run folder; return its path.

    Raises UserError if `folder` is not a run.
    """
    run = read(folder)
    path = run.folder / 'report.html'
    with atomic(path) as file:
        file.write(render(run))
    return path
