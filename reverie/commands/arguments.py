"""Parsing of the command line's arguments, shared by all commands."""

import ast
import contextlib
import io
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tyro

from reverie.errors import UserError

SEEDS = 2**32


def parse(options: type, args: Sequence[str], prog: str, **more: Any) -> Any:
    """An `options` value from `args`, by tyro.

    Raises UserError, in one line, for an option it does not know or a value that is none.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(
                options, args=list(args), prog=prog, return_unknown_args=True, **more
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f'{prog}: {_first_part(said.getvalue())}; see {prog} --help') from None
    if unknown:
        raise UserError(
            f'{prog}: unknown option {unknown[0]!r}; {prog} --help lists the known ones'
        )
    return parsed


def _first_part(box: str) -> str:
    """The first part of a box with several that tyro draws, as one line."""
    lines = [line.strip('╭╮╰╯│ ') for line in box.splitlines()]
    inner = [line for line in lines if line and not line.startswith('─ ')]
    part = list(itertools.takewhile(lambda line: not line.startswith('──'), inner))
    return ' '.join(' '.join(part).split()) or 'the options cannot be read'


def options_of(pairs: Sequence[str]) -> dict[str, Any]:
    """'sticky=0.0' -> {'sticky': 0.0}; raises UserError for anything but name=value."""
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition('=')
        if not equals or not name:
            raise UserError(f'environment option {pair!r}: expected name=value')
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


def whole(name: str, value: float | int) -> int:
    """1e6 -> 1000000; raises UserError unless it is a positive whole number below 2^31."""
    if not 1 <= value < 2**31 or value != int(value):
        raise UserError(f'--{name} {value:g}: expected a positive whole number below 2^31')
    return int(value)


def check_seed(name: str, seed: int, count: int = 1) -> None:
    """Raise UserError unless `count` seeds from `seed` on lie in 0 .. 2^32 - 1, which random keys
    take without cutting them.
    """
    if not 0 <= seed <= SEEDS - count:
        raise UserError(f'--{name} {seed}: expected 0 to {SEEDS - count}')


def check_file(name: str, path: pathlib.Path | None) -> None:
    """Raise UserError unless a file can be written at `path`, whose folders may be missing."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f'--{name} {path}: is a folder, expected a file')
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f'--{name} {path}: no file can be written in {above}')


def slug(env: str) -> str:
    """'minatar/breakout' -> 'minatar_breakout', as part of a file's name."""
    return env.replace('/', '_').replace(':', '.')


def score_paths(results: pathlib.Path | None, run: pathlib.Path | None) -> list[pathlib.Path]:
    """Files to write scores to: `results` if given, and scores.json of the run folder if given."""
    return [path for path in (results, run and run / 'scores.json') if path]
