"""Recordings of play: GIF, MP4, and episodes in the native format."""

import collections
import concurrent.futures
import functools
import itertools
import logging
import math
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float

from reverie.evaluation.video import enlarge, gif
from reverie.serve.messages import rgb_of
from reverie.serve.players import Client, RecordedFrame
from reverie.text import number as number_of
from reverie.types import ActionSpace, EnvSpec, Step, UserError

log = logging.getLogger(__name__)
SIDE = 320  # pixels that the shorter side of a saved picture has at least
MOST = 200  # recordings of one server
MOST_BYTES = 2 * 10**9  # of a folder of recordings, unless its owner says otherwise
ASIDE = '.saving-'  # how folders begin that hold what is being written


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
    frames: list[RecordedFrame],
    kind: str,
    has_reward: bool,
    spec: EnvSpec,
    path: pathlib.Path,
    facts: dict[str, Any],
) -> None:
    """Write the frames as one episode of a native dataset; pictures as float32 in [0, 1]."""
    from reverie.data.writing import Writer

    def stack(name: str) -> np.ndarray:
        return np.stack([np.asarray(getattr(frame, name)) for frame in frames])

    image = stack('image')
    obs = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
    number, action = np.arange(len(frames)), stack('action').astype(np.float32)
    first, last = number == 0, number == len(frames) - 1
    arrived: dict[str, Any] = dict(
        obs=obs,
        prev_action=_stored(np.where(first[:, None], 0, action), spec.actions),
        reward=np.where(first, 0, stack('reward')).astype(np.float32),
        is_first=first,
        is_last=last,
        is_terminal=stack('is_terminal') & last,
    )
    shaped = EnvSpec(spec.name, tuple(obs.shape[1:]), spec.actions, spec.max_return, spec.channels)
    with Writer(path, shaped, facts) as writer:
        writer.add(kind, Step(**arrived), frames[-1].is_last, has_reward=has_reward)


def _stored(vectors: Float[np.ndarray, 'T A'], space: ActionSpace) -> Float[np.ndarray, 'T n']:
    """Actions as datasets keep them; the inverse of `ActionSpace.vector` for composite ones."""
    if space.kind != 'composite':
        return vectors
    columns = [np.zeros((len(vectors), 0), np.float32)]
    at = 0
    for part in space.parts:
        taken = vectors[:, at : at + part.size]
        if part.choices:
            known = taken.any(-1, keepdims=True)
            taken = np.where(known, taken.argmax(-1)[:, None], -1).astype(np.float32)
        columns.append(taken)
        at += part.size
    return np.concatenate(columns, -1)


class RecordingSaver:
    """Writes recordings into `folder`, one after another, away from the threads that play.

    files: what it wrote, by the name that pages ask for.

    Args:
        facts: provenance of episodes.
        most_bytes: that the folder may hold, with what was there before.
        places: each may have its part of them written.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        facts: dict[str, Any],
        most_bytes: int = MOST_BYTES,
        places: int = 1,
    ):
        self.folder, self.facts = folder, facts
        self.most_bytes, self.share = most_bytes, most_bytes // places
        self.files: dict[str, pathlib.Path] = {}
        self._written: collections.Counter[int] = collections.Counter()  # bytes, by place
        self._numbers = itertools.count(1)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, 'save')
        self._busy = False
        self._logged: set[str] = set()

    def save(
        self, what: str, player: Client, symbolic: bool, has_heads: bool, spec: EnvSpec
    ) -> None:
        """Begin to save the player's episode so far; tell the page when it is done, or why not.

        has_heads: rewards of a dream are said by the model; else they are not known.
        """
        # an episode needs rewards; of the newest frame it may not be known yet
        frames = [f for f in player.recording.frames if what != 'episode' or f.reward is not None]
        if len(frames) < 2 or self._busy:
            why = 'another recording is being saved' if self._busy else 'nothing to save yet'
            player.notify(type='notice', text=why)
            return
        self._busy = True
        facts = {**self.facts, 'view': player.view}
        has_reward = has_heads or player.view == 'real'
        write = functools.partial(
            write_recording, what, frames, player.pace, symbolic, has_reward, spec, facts
        )
        self._pool.submit(self._save, what, len(frames), player, write)

    def _save(
        self, what: str, count: int, player: Client, write: Callable[[pathlib.Path], None]
    ) -> None:
        try:
            path = self._place(what, player.slot, write)
            name = None if what == 'episode' else path.name
            if name is not None:
                self.files[name] = path
            text = f'{count} frames in {path}'
            player.notify(type='saved', what=what, text=text, id=name)
        except (UserError, OSError, subprocess.TimeoutExpired) as error:
            player.notify(type='notice', text=f'not saved: {error}')
        except Exception as error:
            log.exception('saving %s', what)
            player.notify(type='notice', text=f'not saved: {type(error).__name__}')
        finally:
            self._busy = False

    def _place(self, what: str, slot: int, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
        """Write a recording aside, and put it into the folder if there is room for it."""
        number = next(self._numbers)
        if number > MOST:
            self._refuse(f'{MOST} recordings were asked for already, as many as one server writes')
        for left in self.folder.glob(f'{ASIDE}*'):  # by a server that was killed
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
        room = self._room(slot, 1)
        name = f'{time.strftime("%Y%m%d-%H%M%S")}-{number}{"" if what == "episode" else f".{what}"}'
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=ASIDE, dir=self.folder) as aside:
            made = pathlib.Path(aside) / name
            write(made)
            size = size_of(made)
            if size > room:
                self._room(slot, size)
            os.replace(made, self.folder / name)
        self._written[slot] += size
        return self.folder / name

    def _room(self, slot: int, size: int) -> int:
        """Bytes that the place may still have written; raises UserError if it is less than size."""
        in_all, mine = self.most_bytes - size_of(self.folder), self.share - self._written[slot]
        if in_all < size:
            most = f'{number_of(self.most_bytes)}B, as many as --recordings allows'
            self._refuse(f'{self.folder} would have more than {most}')
        if mine < size:
            self._refuse(
                f"a player's recordings would have more than {number_of(self.share)}B, "
                'an equal part of --recordings'
            )
        return min(in_all, mine)

    def _refuse(self, why: str) -> NoReturn:
        """Raise UserError, and log its reason the first time."""
        if why not in self._logged:
            log.warning('a recording was not saved: %s', why)
            self._logged.add(why)
        raise UserError(why)


def write_recording(
    what: str,
    frames: list[RecordedFrame],
    pace: float,
    symbolic: bool,
    has_reward: bool,
    spec: EnvSpec,
    facts: dict[str, Any],
    path: pathlib.Path,
) -> None:
    """Write frames as `what` they were asked for: gif, mp4 or episode."""
    if what == 'episode':
        episode(frames, facts['view'], has_reward, spec, path, facts)
        return
    pictures = pictures_of(frames, symbolic)
    if what == 'gif':
        path.write_bytes(gif(pictures, pace))
    else:
        mp4(pictures, pace, path)


def size_of(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if there is none."""
    files = path.rglob('*') if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())
