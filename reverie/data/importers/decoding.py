"""Decoding of foreign videos in a process that can take only so much memory and time."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from reverie.types import UserError

HEAD = struct.Struct('>cQ')  # as in `child`, which cannot be imported without its limits
CHILD = pathlib.Path(__file__).with_name('child.py')


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on what one file may take to decode."""

    pixels: int = 1 << 26
    """Most pixels of a picture."""
    frames: int = 1 << 24
    """Most frames of a file."""
    seconds: float = 120.0
    """Longest wait for the next frame."""
    bytes: int = 4 << 30
    """Most memory of the process that decodes."""


@dataclasses.dataclass(frozen=True)
class Footage:
    """One video: a file, or the frames of a folder in order."""

    path: pathlib.Path
    frames: tuple[pathlib.Path, ...] = ()  # empty for a file


@dataclasses.dataclass(frozen=True)
class Probe:
    """Facts about a video that was decoded once."""

    times: np.ndarray | None  # [T] seconds; None for frames of a folder
    sizes: tuple[tuple[int, int, int], ...]  # (frame from which it holds, height, width)
    count: int  # frames


class Decoder:
    """Reader of videos within limits; every fault is a UserError that names the file."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        if importlib.util.find_spec('av') is None:
            raise UserError("videos need the package av: pip install 'reverie[video]'")

    def probe(self, footage: Footage) -> Probe:
        """Decode a video once, for its times and sizes; nothing of it is kept."""
        sizes: list[list[int]] = []
        times = np.zeros(0)
        for kind, data in self._answers(footage, {'do': 'probe'}):
            if kind == b'J':
                sizes = json.loads(data).get('sizes', sizes)
            elif kind == b'T':
                times = np.frombuffer(data, np.float64)
        found = tuple((i, height, width) for i, height, width in sizes)
        known = not footage.frames and bool(np.isfinite(times).all())
        return Probe(np.maximum.accumulate(times) if known else None, found, len(times))

    def read(
        self,
        footage: Footage,
        probe: Probe,
        size: tuple[int, int] | None,
        fit: str,
        repeat: Sequence[int] | None = None,
        cursor: dict[int, tuple[float, float]] | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield frames [h, w, 3], the i-th as often as `repeat` says, by default once.

        size: of all frames, fitted as `fit` says; each as large as it is if not given. cursor: where
        an arrow is drawn, in pixels of a screen of 720 rows, by frame.
        """
        request = {'do': 'read', 'size': size, 'fit': fit, 'repeat': repeat, 'cursor': cursor}
        wanted = [i for i in range(probe.count) if repeat is None or repeat[i]]
        starts = np.array([i for i, *_ in probe.sizes])
        seen = 0
        for kind, data in self._answers(footage, request):
            if kind != b'F':
                continue
            if seen == len(wanted):
                raise UserError(f'{footage.path}: changed while it was read')
            i = wanted[seen]
            seen += 1
            height, width = size or probe.sizes[np.searchsorted(starts, i, 'right') - 1][1:]
            frame = np.frombuffer(data, np.uint8).reshape(height, width, 3)
            for _ in range(1 if repeat is None else repeat[i]):
                yield frame
        if seen != len(wanted):
            raise UserError(
                f'{footage.path}: {seen} of {len(wanted)} frames came when it was decoded again'
            )

    def _answers(self, footage: Footage, request: dict[str, Any]) -> Iterator[tuple[bytes, bytes]]:
        """Run the child on a request and yield its answers; it ends when the caller does."""
        limits = self.limits
        request |= {
            'path': os.fspath(footage.path.absolute()),
            'files': [os.fspath(frame) for frame in footage.frames],
            'pixels': limits.pixels,
            'frames': limits.frames,
            'bytes': limits.bytes,
        }
        # -P: the folder of the program holds modules that other packages must not see.
        process = subprocess.Popen(
            [sys.executable, '-P', os.fspath(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, 'OPENBLAS_NUM_THREADS': '1'},
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with process.stdin as pipe:
                pipe.write(json.dumps(request).encode())
            stream = _Timed(process.stdout, limits.seconds, footage.path)
            while head := stream.take(HEAD.size):
                kind, length = HEAD.unpack(head)
                data = stream.take(length)
                if kind == b'E':
                    raise UserError(f'{footage.path}: {data.decode()}')
                yield kind, data
            if code := process.wait():
                raise UserError(
                    f'{footage.path}: the decoder died of it (exit code {code}), expected a sound '
                    'video'
                )
        except BrokenPipeError as error:
            raise UserError(f'{footage.path}: the decoder did not start') from error
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


class _Timed:
    """Pipe whose reader waits only so long for the next bytes."""

    def __init__(self, pipe: IO[bytes], seconds: float, path: pathlib.Path) -> None:
        self.pipe, self.seconds, self.path = pipe, seconds, path
        self.selector = selectors.DefaultSelector()
        self.selector.register(pipe, selectors.EVENT_READ)

    def take(self, count: int) -> bytes:
        """Return `count` bytes; b'' if the pipe ends before them."""
        parts, missing = [], count
        until = time.monotonic() + self.seconds
        while missing:
            if not self.selector.select(max(0.0, until - time.monotonic())):
                raise UserError(
                    f'{self.path}: nothing was decoded for {self.seconds:g} s, expected a frame'
                )
            part = os.read(self.pipe.fileno(), min(missing, 1 << 20))
            if not part:
                return b''
            parts.append(part)
            missing -= len(part)
        return b''.join(parts)
