"""Import of videos: files or folders of frames, with or without actions beside them."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reverie.data.importers import sidecars
from reverie.data.importers.common import (
    SHORTEST,
    Imported,
    Options,
    Say,
    longest_episode,
    make_step,
    no_actions,
    pieces,
)
from reverie.data.importers.decoding import Decoder, Footage, Probe
from reverie.data.importers.timing import rate_of, same_rate, shown, ticks
from reverie.types import ActionSpace, EnvSpec, UserError

FILES = ('.mp4', '.m4v', '.mov', '.webm', '.mkv', '.avi', '.gif', '.mpg', '.mpeg', '.ogv', '.ts')
FRAMES = ('.png', '.jpg', '.jpeg')


@dataclasses.dataclass(frozen=True)
class Video:
    """One video that was looked through."""

    name: str
    footage: Footage
    sidecar: pathlib.Path | None
    probe: Probe
    fps: float | None  # of the stored frames
    constant: bool

    @property
    def where(self) -> pathlib.Path:
        return self.footage.path


class Videos:
    """Importer of a folder of videos, or of one."""

    def __init__(self, source: pathlib.Path, name: str, options: Options, say: Say):
        self.options, self.say = options, say
        self.decoder = Decoder(options.limits)
        found = find(source)
        root = found[0][1].path.parent
        stems = [stem for stem, _ in found]
        self.declaration, beside = self.companions(root, stems, source == root)
        videos = []
        for stem, footage in found:
            video = self._look(footage, beside.get(stem))
            if video.probe.count < SHORTEST:
                say(f'{footage.path}: left out, {video.probe.count} frames, expected {SHORTEST}')
            else:
                videos.append(video)
        if not videos:
            raise UserError(f'{source}: no video has {SHORTEST} frames, expected one that has')
        self.videos = self._at_one_rate(videos)
        self.shape = (*_one_size(self.videos, options.size), 3)
        if options.size and any(set(_sizes(video)) != {options.size} for video in self.videos):
            say(f'frames are brought to {options.size[0]}x{options.size[1]} by {options.fit}')
        self.names: Sequence[str] = [video.name for video in self.videos]
        self.task = self.declaration.task if self.declaration else ''
        unknown = [self._unknown(video) for video in self.videos if video.sidecar]
        self.spec = EnvSpec(name, self.shape, self._space(any(unknown)))
        self.facts: dict[str, Any] = {
            'fps': self.videos[0].fps, 'size': list(self.shape[:2]), 'fit': options.fit,
        }  # fmt: skip
        unlabelled = len(self.videos) - len(unknown)
        if unknown and unlabelled:
            say(f'{unlabelled} of {len(self.videos)} videos have no actions')

    def companions(
        self, root: pathlib.Path, stems: Sequence[str], whole: bool
    ) -> tuple[sidecars.Declaration | None, dict[str, pathlib.Path]]:
        """Return what the actions are, and the sidecar of each video that has one; whole: every
        sidecar of the folder must belong to a video.
        """
        beside = _sidecars(root, stems, whole)
        return _declaration(root, beside), beside

    def labels(self, video: Video) -> sidecars.Labels | None:
        """Read the sidecar of a video; None if it has none."""
        if video.sidecar is None or self.declaration is None:
            return None
        return sidecars.read_labels(video.sidecar, self.declaration.parts, video.probe.count)

    def cursor(self, video: Video) -> dict[int, tuple[float, float]] | None:
        """Return where a cursor is to be drawn, by frame; the videos show their own."""
        return None

    def _look(self, footage: Footage, sidecar: pathlib.Path | None) -> Video:
        probe = self.decoder.probe(footage)
        rate, constant = rate_of(probe)
        return Video(footage.path.name, footage, sidecar, probe, rate, constant)

    def _unknown(self, video: Video) -> bool:
        """Check the sidecar of a video; return whether a step of it has no action."""
        labels = self.labels(video)
        assert labels is not None
        return not labels.known[: video.probe.count - 1].all()

    def _space(self, unknown: bool) -> ActionSpace:
        if self.declaration is None:
            return ActionSpace.composite(())
        return self.declaration.space(unknown)

    def _at_one_rate(self, videos: list[Video]) -> list[Video]:
        """Return the videos with the rate that their frames are stored at."""
        fps = self.options.fps
        for video in videos:
            if video.sidecar and not video.constant:
                raise UserError(
                    f'{video.where}: has a variable rate (median {video.fps:.4g} fps) and actions, '
                    'expected a constant rate'
                )
            if video.sidecar and fps and video.fps and not same_rate(fps, video.fps):
                raise UserError(
                    f'{video.where}: has {video.fps:.4g} fps and actions, --fps {fps:g} would mix '
                    'them; expected the same rate'
                )
            if not video.constant and not fps:
                self.say(f'{video.where}: variable rate, brought to its median {video.fps:.4g} fps')
        if fps:
            return [self._capped(dataclasses.replace(video, fps=fps)) for video in videos]
        rates = [video.fps for video in videos if video.fps]
        if rates and not same_rate(min(rates), max(rates)):
            different = sorted({f'{rate:.4g}' for rate in rates}, key=float)
            raise UserError(
                f'{videos[0].where.parent}: videos of {", ".join(different):.80} fps, expected one '
                'rate; --fps brings them to one'
            )
        if videos[0].fps is None and rates:
            videos[0] = dataclasses.replace(videos[0], fps=rates[0])
        return [self._capped(video) for video in videos]

    def _capped(self, video: Video) -> Video:
        """Refuse times that would make millions of frames of a few."""
        times, most = video.probe.times, self.options.limits.frames
        if times is not None and video.fps and ticks(times, video.fps) > most:
            raise UserError(
                f'{video.where}: {times[-1] - times[0]:.4g} s at {video.fps:g} fps, expected at most '
                f'{most:,} frames'
            )
        return video

    def episodes(self, number: int) -> Iterator[Imported]:
        """Yield the episodes of a video: one, unless its size changes, it ends or it is long."""
        video = self.videos[number]
        repeat = self._repeat(video)
        size, fit = self.options.size, self.options.fit
        cursor = self.cursor(video)
        frames = self.decoder.read(video.footage, video.probe, size, fit, repeat, cursor)
        rows = self.labels(video)
        labels = rows and rows.arrived(video.probe.count)
        lengths = _lengths(video, repeat, labels, longest_episode(self.shape))
        at = 0
        for length in lengths:
            obs = np.empty((length, *self.shape), np.uint8)
            for i in range(length):
                obs[i] = next(frames)
            if length >= SHORTEST:
                yield self._episode(obs, labels, at)
            else:
                self.say(f'{video.where}: left out {length} frames from {at} on, too few')
            at += length
        assert next(frames, None) is None

    def _repeat(self, video: Video) -> list[int] | None:
        """How often each frame is stored; None where each is, once."""
        times, fps = video.probe.times, video.fps
        if times is None or fps is None or (video.constant and video.sidecar):
            return None
        rate, constant = rate_of(video.probe)
        if constant and rate is not None and same_rate(rate, fps):
            return None
        repeat: list[int] = shown(times, fps).tolist()
        return repeat

    def _episode(self, obs: np.ndarray, labels: sidecars.Labels | None, at: int) -> Imported:
        action = no_actions(self.spec, len(obs))
        reward = np.zeros(len(obs), np.float32)
        if labels is None:
            return Imported(make_step(obs, action, reward, False), False, False, False)
        here = slice(at + 1, at + len(obs))  # what led to the first frame is another episode's
        known = labels.action[here]
        if self.spec.actions.kind == 'discrete':
            action[1:] = known[:, 0].astype(action.dtype)
        else:
            action[1:] = known
        reward[1:] = labels.reward[here]
        terminal = bool(labels.done[here][-1])
        step = make_step(obs, action, reward, terminal)
        return Imported(step, terminal, True, labels.has_reward)


def find(source: pathlib.Path) -> list[tuple[str, Footage]]:
    """Return (name without suffix, footage) of the videos in a folder, or of one, by name.

    Raises UserError if there is none.
    """
    if source.is_file():
        if source.suffix.lower() not in FILES:
            raise UserError(f'{source}: expected a video ({" ".join(FILES)}) or a folder')
        return [(source.stem, Footage(source))]
    if not source.is_dir():
        raise UserError(f'{source}: no such file or folder, expected videos')
    if frames := _frames(source):
        return [(source.name, Footage(source, frames))]
    found = []
    for path in sorted(source.iterdir(), key=_natural):
        if path.name.startswith('.'):
            continue
        if path.is_file() and path.suffix.lower() in FILES:
            found.append((path.stem, Footage(path)))
        elif path.is_dir() and (frames := _frames(path)):
            found.append((path.name, Footage(path, frames)))
    if not found:
        raise UserError(
            f'{source}: has no video, expected files ({" ".join(FILES)}) or folders of frames '
            f'({" ".join(FRAMES)})'
        )
    return found


def _frames(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Pictures of a folder in natural order; none if it has videos as well."""
    files = [path for path in folder.iterdir() if path.is_file()]
    if any(path.suffix.lower() in FILES for path in files):
        return ()
    pictures = [path for path in files if path.suffix.lower() in FRAMES]
    return tuple(sorted(pictures, key=_natural))


def _natural(path: pathlib.Path) -> list[tuple[int, int | str]]:
    """Order in which frame 10 comes after frame 9."""
    words = re.split(r'(\d+)', path.name)
    return [(0, int(word)) if word.isdecimal() else (1, word) for word in words]


def _sidecars(root: pathlib.Path, stems: Sequence[str], whole: bool) -> dict[str, pathlib.Path]:
    """Return the sidecar of each video that has one; whole: every sidecar of the folder must belong
    to a video.
    """
    found: dict[str, pathlib.Path] = {}
    for path in sorted(root.iterdir()):
        ending = next((end for end in sidecars.ENDINGS if path.name.endswith(end)), None)
        if ending is None:
            continue
        stem = path.name.removesuffix(ending)
        if stem not in stems:
            if whole:
                raise UserError(f'{path}: has no video, expected one that is called {stem}')
            continue
        if stem in found or stems.count(stem) > 1:
            raise UserError(f'{path}: several sidecars or videos are called {stem}, expected one')
        found[stem] = path
    return found


def _declaration(
    root: pathlib.Path, beside: dict[str, pathlib.Path]
) -> sidecars.Declaration | None:
    path = root / sidecars.DECLARATION
    if path.is_file():
        return sidecars.read_declaration(path)
    if beside:
        first = next(iter(beside.values()))
        raise UserError(f'{path}: is missing, expected the components of {first.name}')
    return None


def _sizes(video: Video) -> list[tuple[int, int]]:
    return [(height, width) for _, height, width in video.probe.sizes]


def _one_size(videos: Sequence[Video], size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the size of all frames; raise UserError if it is not given and they differ."""
    if size:
        return size
    first = _sizes(videos[0])[0]
    for video in videos:
        for other in _sizes(video):
            if other != first:
                raise UserError(
                    f'{videos[0].where.name} is {first[0]}x{first[1]}, {video.where.name} is '
                    f'{other[0]}x{other[1]}; expected one size, --size HxW brings them to it'
                )
    return first


def _lengths(
    video: Video, repeat: list[int] | None, labels: sidecars.Labels | None, longest: int
) -> list[int]:
    """Return the lengths of a video's episodes, which add up to all of its stored frames."""
    count = video.probe.count
    stored = np.cumsum([0, *(repeat or [1] * count)])  # frames before each
    edges = {0, int(stored[-1]), *(int(stored[i]) for i, *_ in video.probe.sizes)}
    if labels is not None:
        edges |= {int(t) + 1 for t in np.flatnonzero(labels.done)}
        edges |= set(np.flatnonzero(labels.gap).tolist())
    return pieces(sorted(edges), longest)
