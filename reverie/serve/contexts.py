"""Recorded frames to begin a dream from, read from a dataset one window at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from reverie.data.episodes import Episodes
from reverie.data.manifest import open_shard
from reverie.data.records import decode
from reverie.data.windows import Stream, concatenate, to_batch
from reverie.types import Step


class Contexts:
    """Windows of a dataset: number -> Step [1, length], the same for the same number.

    Reads a record or two, keeps none.
    """

    def __init__(self, episodes: Episodes, length: int):
        self.episodes, self.length = episodes, length
        self._records = [shard['records'] for shard in episodes.manifest['shards']]
        self._step = jax.jit(
            lambda window: to_batch(window, jnp.zeros(1, bool), episodes.schema).step
        )

    @functools.cached_property
    def _last(self) -> int:
        return sum(self._records)

    def _stream(self, index: int) -> Stream:
        """The record `index` and as many after it as fill a window."""
        records, frames = [], 0
        while frames < self.length:
            while index % self._last in self.episodes.lost:
                index += 1
            shard, i = 0, index % self._last
            while i >= self._records[shard]:
                i, shard = i - self._records[shard], shard + 1
            path = self.episodes.shards[shard]
            with open_shard(path) as reader:
                records.append(
                    decode(reader.read([i])[0], self.episodes.schema, f'{path} record {i}')
                )
            frames, index = frames + len(records[-1].reward), index + 1
        return concatenate(records)

    def __call__(self, number: int) -> Step:
        rng = np.random.default_rng([number, 0xC0])
        stream = self._stream(int(rng.integers(self._last)))
        last = len(stream.reward) - 1
        # not at the episode's own end, if it can be
        end = int(rng.integers(self.length - 1, max(last, self.length)))
        cut = lambda x: x[end - self.length + 1 : end + 1][None]
        step: Step = self._step(jax.tree.map(cut, stream))
        return step
