"""Files that are whole or absent, values as JSON takes them, and lines on standard error."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any


def warn(line: str) -> None:
    """Print one line on standard error; a full disk or a closed pipe must not end a run."""
    with contextlib.suppress(OSError):
        print(f'reverie: {line}', file=sys.stderr, flush=True)


def file_hash(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def sync(path: pathlib.Path) -> None:
    """Ask the disk to keep what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str], mode: str = 'w') -> Iterator[IO[Any]]:
    """Open a file to be written whole: `path` keeps its old content until the block ends.

    It is on the disk before it takes the name. If the block raises, nothing is left of it.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    encoding = None if 'b' in mode else 'utf-8'
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic(path) as file:
        json.dump(value, file, indent=1)


def plain(value: Any, name: str | None = None) -> Any:
    """`value` as JSON takes it: arrays as lists, numbers that are not finite as null.

    name: of the value; if given, such a number raises ValueError with its path instead.
    """

    def at(key: str) -> str | None:
        return None if name is None else f'{name}{key}'

    if isinstance(value, Mapping):
        dot = '.' if name else ''
        return {str(k): plain(v, at(f'{dot}{k}')) for k, v in value.items()}
    if hasattr(value, '__array__'):
        value = value.__array__().tolist()
    if isinstance(value, list | tuple):
        return [plain(v, at(f'[{i}]')) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if name is not None:
            raise ValueError(f'{name} is {value}, expected a finite number')
        return None
    return value
