"""Latents of a dataset's frames by a frozen tokenizer, in files that are made once.

RUN/latents/train.json       fingerprints of the dataset and of each seed's tokenizer
RUN/latents/train-0.npy      seed 0: float16 [F, Z, b], episodes in the order of their numbers
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from reverie.data.episodes import Episodes
from reverie.data.records import FIRST, unpack
from reverie.errors import UserError
from reverie.io import write_json

CHUNK_BYTES = 1 << 26  # of the frames that are encoded at once
MOST_FRAMES = 512
MEASURED = 1 << 16  # frames

# (observations [B, T, ...], is_first [B, T]) -> latents [B, T, Z, b]
Encode = Callable[[np.ndarray, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Latents:
    """Latents of every sound episode, one file for each seed."""

    files: Sequence[Float[np.ndarray, 'F Z b']]  # mapped, not read
    begin: dict[int, int]  # of an episode by its number: its first frame
    length: dict[int, int]

    def at(self, number: int) -> slice:
        """Frames of an episode; raises UserError for one that was lost when they were made."""
        if number not in self.begin:
            raise UserError(f'episode {number} has no latents, expected the episodes of before')
        return slice(self.begin[number], self.begin[number] + self.length[number])

    @property
    def bytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def encoded(
    episodes: Episodes, encode: Encode, reach: int
) -> Iterator[tuple[Float[np.ndarray, 'n Z b'], int]]:
    """Yield (latents, frames) of all episodes end to end, in pieces, as an encoder sees them that
    has seen everything before; reach: earlier frames that a frame's latents depend on.
    """
    length = max(reach, 1)
    rows = max(1, min(MOST_FRAMES, CHUNK_BYTES // episodes.bytes_per_frame) // (reach + length))
    taken = rows * length
    obs: np.ndarray | None = None  # `reach` frames that are done, then those that are not
    first = np.zeros(0, bool)
    program = jax.jit(encode)

    def piece(count: int) -> tuple[np.ndarray, int]:
        """Encode the next `count` frames, at most `taken`."""
        assert obs is not None
        index = np.arange(rows)[:, None] * length + np.arange(reach + length)
        index = np.minimum(index, len(obs) - 1)
        latents = np.asarray(program(obs[index], first[index]))[:, reach:]
        return latents.reshape(-1, *latents.shape[2:])[:count].astype(np.float16), count

    for _, record in episodes.numbered():
        frames = unpack(record.obs, episodes.schema)
        begins = (record.flags & FIRST) > 0
        if obs is None:  # what lies before the first episode is masked by its is_first
            obs, first = np.repeat(frames[:1], reach, 0), np.zeros(reach, bool)
        obs, first = np.concatenate([obs, frames]), np.concatenate([first, begins])
        while len(obs) - reach >= taken:
            yield piece(taken)
            obs, first = obs[taken:], first[taken:]
    if obs is not None and len(obs) > reach:
        yield piece(len(obs) - reach)


class LatentStore:
    """Folder of a run where the latents of its datasets lie."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def load(self, name: str, episodes: Episodes, tokenizers: Sequence[str]) -> Latents | None:
        """Open the latents of a dataset by tokenizers with these fingerprints; None if they are not
        there.
        """
        try:
            known = json.loads((self.folder / f'{name}.json').read_text())
        except (OSError, ValueError):
            return None
        if known.get('made_of') != _made_of(episodes, tokenizers):
            return None
        try:
            files = [np.load(self._path(name, i), mmap_mode='r') for i in range(len(tokenizers))]
        except (OSError, ValueError):
            return None
        begin, length = _places(known['lengths'])
        whole = all(len(file) == sum(length.values()) for file in files)
        return Latents(files, begin, length) if whole else None

    def make(
        self,
        name: str,
        episodes: Episodes,
        tokenizers: Sequence[str],
        encoders: Sequence[Encode],
        reach: int,
    ) -> Latents:
        """Compute the latents of a dataset by each seed's encoder and write them, with what they
        were made of, which comes last.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f'{name}.json').unlink(missing_ok=True)
        lengths = {number: len(record) for number, record in episodes.numbered()}
        total, files = sum(lengths.values()), []
        for seed, encode in enumerate(encoders):
            file, done = None, 0
            for latents, count in encoded(episodes, encode, reach):
                if file is None:
                    file = np.lib.format.open_memmap(
                        self._path(name, seed), 'w+', np.float16, (total, *latents.shape[1:])
                    )
                file[done : done + count] = latents
                done += count
            assert file is not None and done == total
            file.flush()
            files.append(file)
        plain = {str(number): length for number, length in lengths.items()}
        known = {'made_of': _made_of(episodes, tokenizers), 'lengths': plain}
        write_json(self.folder / f'{name}.json', known)
        return Latents(files, *_places(lengths))

    def _path(self, name: str, seed: int) -> pathlib.Path:
        return self.folder / f'{name}-{seed}.npy'


def deviation(datasets: Sequence[Episodes], encode: Encode, reach: int) -> float:
    """Return the standard deviation of the latents of datasets, of the first MEASURED frames of
    each.
    """
    sums = np.zeros(3)
    for episodes in datasets:
        seen = 0
        for latents, count in encoded(episodes, encode, reach):
            exact = latents.astype(np.float64)
            sums += exact.size, exact.sum(), np.square(exact).sum()
            seen += count
            if seen >= MEASURED:
                break
    total, first, second = sums
    return float(np.sqrt(max(second / total - (first / total) ** 2, 1e-12)))


def _made_of(episodes: Episodes, tokenizers: Sequence[str]) -> dict[str, Any]:
    return {'dataset': episodes.fingerprint, 'part': episodes.part, 'tokenizers': list(tokenizers)}


def _places(lengths: dict[Any, int]) -> tuple[dict[int, int], dict[int, int]]:
    """First frame and length of each episode by its number."""
    numbers = [int(number) for number in lengths]
    ends = list(itertools.accumulate(lengths.values(), initial=0))
    begin = dict(zip(numbers, ends[:-1], strict=True))
    return begin, dict(zip(numbers, lengths.values(), strict=True))
