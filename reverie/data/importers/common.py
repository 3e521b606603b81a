"""Parts that all importers share: options, the split, and the writing of what they yield."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from reverie.data.importers.decoding import Limits
from reverie.data.labels import numbers_of
from reverie.data.records import Schema
from reverie.data.writing import Writer
from reverie.types import EnvSpec, Step, UserError

LONGEST = 16_384  # frames of an episode; longer files are cut
LARGEST = 1 << 28  # bytes of an episode's frames, which are in memory at once
SHORTEST = 4  # frames; nothing can be learnt of fewer

Fit = Literal['crop', 'pad', 'stretch']
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices of an import."""

    fps: float | None = None
    size: tuple[int, int] | None = None  # height, width
    fit: Fit = 'crop'
    key: str = ''  # observation to take where there are several
    alignment: Literal['', 'arrival', 'departure'] = ''
    limits: Limits = dataclasses.field(default_factory=Limits)


@dataclasses.dataclass(frozen=True)
class Imported:
    """One episode of foreign data, in the arrival convention."""

    step: Step
    complete: bool
    has_action: bool
    has_reward: bool


@runtime_checkable
class Importer(Protocol):
    """Foreign data, looked through before anything of it is written."""

    spec: EnvSpec
    task: str  # that the data names; '' if none
    names: Sequence[str]  # of its files
    facts: dict[str, Any]  # for the provenance: fps and whatever else is known

    def episodes(self, number: int) -> Iterator[Imported]:
        """Yield the episodes of one file."""
        ...


def write(
    importer: Importer,
    kind: str,
    out: str | os.PathLike[str],
    *,
    holdout: Sequence[str] = (),
    seed: int = 0,
    task: str = '',
    overwrite: bool = False,
    lossy: bool = False,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write what an importer yields as a dataset, in which whole files are held out; return the
    provenance.
    """
    files: list[str] = []
    split = held_out(importer.names, holdout, seed)
    facts = {'importer': kind, **importer.facts, **(facts or {}), 'files': files}
    task = task or importer.task
    with Writer(
        out, importer.spec, facts, overwrite, task=task, compressed=True, lossy=lossy
    ) as writer:
        for number, name in enumerate(importer.names):
            for episode in importer.episodes(number):
                writer.add(
                    kind,
                    episode.step,
                    episode.complete,
                    episode.has_action,
                    episode.has_reward,
                    held_out=number in split,
                )
                files.append(name)
    return facts


def held_out(names: Sequence[str], holdout: Sequence[str], seed: int) -> set[int]:
    """Return the numbers of the files to hold out: a share of them, at least one, drawn by the seed,
    or those whose names without suffix are given.

    Raises UserError if there is no such file, or if none is left to train on.
    """
    if not holdout:
        return set()
    if len(holdout) == 1 and _share(holdout[0]) is not None:
        share = _share(holdout[0])
        assert share is not None
        if not 0 < share < 1:
            raise UserError(f'--holdout {holdout[0]}: expected a share between 0 and 1, or names')
        count = min(max(1, round(share * len(names))), max(1, len(names) - 1))
        chosen = set(np.random.default_rng(seed).permutation(len(names))[:count].tolist())
    else:
        chosen = numbers_of(names, holdout, '--holdout', 'expected a share or some of')
    if len(chosen) == len(names):
        raise UserError(
            f'--holdout {" ".join(holdout)}: holds out {len(names)} of {len(names)} files, expected '
            'some left to train on'
        )
    return chosen


def _share(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def longest_episode(shape: Sequence[int], item: int = 1) -> int:
    """Frames of a shape, of `item` bytes a number, that one episode may have."""
    return max(SHORTEST, min(LONGEST, LARGEST // max(1, item * int(np.prod(shape)))))


def pieces(edges: Sequence[int], longest: int) -> list[int]:
    """Return the lengths of the spans between sorted edges, cut where one is longer than `longest`.

    The pieces of a span are equal, so that none is too short to learn from.
    """
    lengths: list[int] = []
    for begin, end in itertools.pairwise(edges):
        parts = -(-(end - begin) // longest)
        lengths += [len(part) for part in np.array_split(np.empty(end - begin), parts)]
    return lengths


def make_step(obs: Any, action: Any, reward: Any, terminal: bool) -> Step:
    """Return the steps of one episode, arrays [T, ...] that arrived together."""
    place = np.arange(len(obs))
    last = place == len(obs) - 1
    return Step(obs, action, reward, place == 0, last, last & terminal)


def no_actions(spec: EnvSpec, length: int) -> np.ndarray:
    """Return the actions [T, ...] of steps whose action is not there or not known."""
    nothing = Schema((), 'uint8', spec.actions).no_action
    return np.repeat(nothing[None], length, axis=0)
