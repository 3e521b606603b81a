"""Recordings of play: GIF, MP4, and episodes in the native format."""

import concurrent.futures
import functools
import itertools
import logging
import math
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from reverie.evaluation.video import enlarge, gif
from reverie.serve.messages import rgb_of
from reverie.serve.players import Client, RecordedFrame
from reverie.types import EnvSpec, Step, UserError

log = logging.getLogger(__name__)
SIDE = 320  # pixels that the shorter side of a saved picture has at least
MOST = 200  # files one server writes


def pictures_of(frames: list[RecordedFrame], symbolic: bool) -> np.ndarray:
    """RGB [T, h, w, 3], enlarged by a whole factor. Raises UserError if there are no pictures."""
    if frames[0].image.ndim != 3:
        raise UserError('this environment has no pictures to save; save the episode instead')
    rgb = rgb_of(np.stack([frame.image for frame in frames]), symbolic)
    return enlarge(rgb, max(1, math.ceil(SIDE / min(rgb.shape[1:3]))))


def mp4(frames: np.ndarray, fps: float, path: pathlib.Path) -> None:
    """Write H.264 through ffmpeg. Raises UserError if the package that brings it is missing."""
    try:
        import imageio_ffmpeg
    except ImportError:
        raise UserError(
            "MP4 needs the package imageio-ffmpeg: pip install 'reverie[video]'"
        ) from None
    _, h, w, _ = frames.shape
    frames = frames[:, : h - h % 2, : w - w % 2]  # H.264 has colours for every other pixel
    size = f'{frames.shape[2]}x{frames.shape[1]}'
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), '-y', '-loglevel', 'error',
        '-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', size, '-r', str(fps), '-i', '-',
        '-c:v', 'libx264', '-pix_fmt', 'yuv420p', '-crf', '14', str(path),
    ]  # fmt: skip
    done = subprocess.run(command, input=frames.tobytes(), capture_output=True, timeout=300)
    if done.returncode:
        raise UserError(f'ffmpeg failed: {done.stderr.decode(errors="replace").strip()[-200:]}')


def episode(
    frames: list[RecordedFrame], kind: str, spec: EnvSpec, path: pathlib.Path, facts: dict[str, Any]
) -> None:
    """Write the frames as one episode of a native dataset; pictures as float32 in [0, 1]."""
    from reverie.data.writing import Writer

    def stack(name: str) -> np.ndarray:
        return np.stack([np.asarray(getattr(frame, name)) for frame in frames])

    image = stack('image')
    obs = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
    number = np.arange(len(frames))
    first, last = number == 0, number == len(frames) - 1
    arrived: dict[str, Any] = dict(
        obs=obs,
        prev_action=np.where(first[:, None], 0, stack('action')).astype(np.float32),
        reward=np.where(first, 0, stack('reward')).astype(np.float32),
        is_first=first,
        is_last=last,
        is_terminal=stack('is_terminal') & last,
    )
    shaped = EnvSpec(spec.name, tuple(obs.shape[1:]), spec.actions, spec.max_return, spec.channels)
    with Writer(path, shaped, facts) as writer:
        writer.add(kind, Step(**arrived), complete=frames[-1].is_last)


class RecordingSaver:
    """Writes recordings into `folder`, one after another, away from the threads that play.

    files: what it wrote, by the name that pages ask for.
    """

    def __init__(self, folder: pathlib.Path, facts: dict[str, Any]):
        self.folder, self.facts = folder, facts
        self.files: dict[str, pathlib.Path] = {}
        self._numbers = itertools.count(1)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, 'save')
        self._busy = False

    def save(self, what: str, player: Client, symbolic: bool, spec: EnvSpec) -> None:
        """Begin to save the player's episode so far; tell the page when it is done, or why not."""
        # an episode needs rewards; of the newest frame it may not be known yet
        frames = [f for f in player.recording.frames if what != 'episode' or f.reward is not None]
        if refusal := self._refusal(frames):
            player.notify(type='notice', text=refusal)
            return
        self._busy = True
        write = functools.partial(self._write, what, frames, player.pace, player.view)
        self._pool.submit(self._save, what, player, functools.partial(write, symbolic, spec))

    def _refusal(self, frames: list[RecordedFrame]) -> str | None:
        if len(frames) < 2:
            return 'nothing to save yet'
        if self._busy:
            return 'another recording is being saved'
        if len(self.files) >= MOST:
            return f'{MOST} recordings were saved already'
        return None

    def _write(
        self,
        what: str,
        frames: list[RecordedFrame],
        pace: float,
        view: str,
        symbolic: bool,
        spec: EnvSpec,
    ) -> dict[str, Any]:
        """Write one recording; return the notice of it."""
        name = f'{time.strftime("%Y%m%d-%H%M%S")}-{next(self._numbers)}'
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / (name if what == 'episode' else f'{name}.{what}')
        text = f'{len(frames)} frames in {path}'
        if what == 'episode':
            episode(frames, view, spec, path, {**self.facts, 'view': view})
            return {'text': text, 'id': None}
        pictures = pictures_of(frames, symbolic)
        if what == 'gif':
            path.write_bytes(gif(pictures, pace))
        else:
            mp4(pictures, pace, path)
        self.files[path.name] = path
        return {'text': text, 'id': path.name}

    def _save(self, what: str, player: Client, write: Callable[[], dict[str, Any]]) -> None:
        try:
            player.notify(type='saved', what=what, **write())
        except (UserError, OSError, subprocess.TimeoutExpired) as error:
            player.notify(type='notice', text=f'not saved: {error}')
        except Exception as error:
            log.exception('saving %s', what)
            player.notify(type='notice', text=f'not saved: {type(error).__name__}')
        finally:
            self._busy = False
