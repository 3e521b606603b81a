"""Compiled programs kept on disk, so that a command does not compile what another one has."""

import dataclasses
import os
import pathlib
from typing import Any

from reverie.commands.terminal import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiling:
    """Option of a command that compiles."""

    cache: bool = True
    """Keep compiled programs for the next command, in JAX_COMPILATION_CACHE_DIR or the user's cache
    folder."""


def user_cache() -> pathlib.Path:
    """Folder that is kept for the user between commands."""
    home = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
    return home / 'reverie'


def keep_programs(cache: bool) -> None:
    """Load what was compiled before, and keep what takes a second to compile; say where, once.

    JAX's key of a program holds its version, its flags and the processor's instruction sets, so one
    home can serve several machines. JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE are
    the user's word, and nothing is said.
    """
    import jax

    chosen: Any = jax.config  # its fields are unknown to mypy
    if not cache:
        jax.config.update('jax_enable_compilation_cache', False)
    elif chosen.jax_enable_compilation_cache and chosen.jax_compilation_cache_dir is None:
        folder = user_cache() / 'programs'
        jax.config.update('jax_compilation_cache_dir', str(folder))
        say(f'compiled programs are kept in {folder}; not with --no-cache')
