"""Sources of recorded windows: `Resident`, a dataset on the device, and `Streaming`, one on disk.

Both see episodes as one long stream, cut windows from it at random, let them cross episode ends,
and finish them by `windows.to_batch`, so an agent cannot tell the two apart.

Rows come in two sorts. The first round(relevant * B) rows are `relevant`: with relevant='reward'
their windows hold a step with positive reward, chosen uniformly among all such steps (the task's
own data, for behaviour cloning); the other rows are uniform over the stream (for the dynamics).
Dreamer 4 mixes the two half and half.
"""

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from reverie.data.episodes import Episodes
from reverie.data.records import Record, decode, hide_actions
from reverie.data.source import Dataset
from reverie.data.windows import (
    Relevant,
    RowSampling,
    Stream,
    concatenate,
    keep_labels,
    rewarded_steps,
    to_batch,
)
from reverie.types import Batch, EnvSpec, UserError

log = logging.getLogger(__name__)


class Resident(Dataset):
    """A dataset that lies on the device as a whole."""

    def __init__(
        self,
        episodes: Episodes,
        relevant: Relevant = 'reward',
        label_fraction: float = 1.0,
        seed: int = 0,
    ):
        self.rows = RowSampling(relevant, label_fraction, seed)
        self.schema, self.path = episodes.schema, episodes.path
        keep = keep_labels(len(episodes), label_fraction, seed)
        stream = concatenate(
            r if keep[i] else hide_actions(r, self.schema) for i, r in episodes.numbered()
        )
        self.fingerprint = episodes.fingerprint  # now it is known what can be read
        rewarded = rewarded_steps(stream)
        self.frames = len(stream.flags)
        self.has_rewarded = len(rewarded) > 0
        _warn_without_reward(episodes, self.rows)
        half = stream.reward.astype(np.float16)
        if np.array_equal(half.astype(np.float32), stream.reward):
            stream = stream._replace(reward=half)
        self.data = jax.device_put({'stream': stream, 'rewarded': rewarded})

    def starts(
        self, data: PyTree, key: PRNGKeyArray, batch: int, length: int, count: int
    ) -> Int[Array, ' B']:
        """Traced: choose the first frame of each window; the first `count` rows are relevant."""
        if length > self.frames:
            raise UserError(
                f'{self.path}: dataset has {self.frames} frames, expected at least one window of {length}'
            )
        uniform_key, reward_key, offset_key = jax.random.split(key, 3)
        end = self.frames - length
        starts = jax.random.randint(uniform_key, (batch,), 0, end + 1)
        if self.rows.relevant == 'all' or not self.has_rewarded or count == 0:
            return starts
        chosen = jax.random.randint(reward_key, (count,), 0, data['rewarded'].shape[0])
        offset = jax.random.randint(offset_key, (count,), 0, length)
        return jnp.concatenate(
            [jnp.clip(data['rewarded'][chosen] - offset, 0, end), starts[count:]]
        )

    def draw(
        self,
        data: PyTree,
        loaded: PyTree,
        key: PRNGKeyArray,
        batch: int,
        length: int,
        relevant: float = 0.0,
    ) -> Batch:
        """Traced: cut random windows [B, T]; relevant rows come first."""
        count = round(relevant * batch)
        starts = self.starts(data, key, batch, length, count)

        def window(start: Array) -> Stream:
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, length)
            stream: Stream = jax.tree.map(cut, data['stream'])
            return stream

        windows = jax.vmap(window)(starts)
        return to_batch(windows, jnp.arange(batch) < count, self.schema)

    def get_state(self) -> dict[str, Any]:
        """Return the dataset's fingerprint; every draw comes from the key."""
        return {'source': 'resident', 'dataset': self.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raise UserError for the state of another source or dataset."""
        check_state(state, 'resident', self.fingerprint)


def check_state(state: dict[str, Any], source: str, fingerprint: str) -> None:
    """Raise UserError unless the state was saved by this sort of source on the same data."""
    for name, expected in (('source', source), ('dataset', fingerprint)):
        if state.get(name) != expected:
            raise UserError(
                f'data state has {name} {state.get(name)}, expected {expected}; use another run folder'
            )


def _warn_without_reward(episodes: Episodes, rows: RowSampling) -> None:
    if rows.relevant == 'reward' and not episodes.counts['rewarded_steps']:
        log.warning(
            '%s: no step has a positive reward; relevant rows are drawn uniformly', episodes.path
        )


class RecordSource:
    """Random access to the records of a dataset, over all shards; None for a lost one.

    Raises UserError naming a wrong record if more are wrong than may be.
    """

    def __init__(self, episodes: Episodes, keep: np.ndarray):
        self.episodes, self.keep = episodes, keep
        self.reader = ArrayRecordDataSource([str(episodes.shards[i]) for i in episodes.sound])
        held = [np.arange(episodes.first[i], episodes.first[i + 1]) for i in episodes.sound]
        self.place = {int(number): place for place, number in enumerate(np.concatenate(held))}

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> Record | None:
        place = self.place.get(index)
        if place is None:
            return None
        try:
            record = self._read(place, f'{self.episodes.path} record {index}')
        except UserError as fault:
            self.episodes.lose([index], fault)
            return None
        return record if self.keep[index] else hide_actions(record, self.episodes.schema)

    def _read(self, place: int, where: str) -> Record:
        try:
            data = self.reader[place]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f'{where}: cannot be read ({str(error).splitlines()[0][:120]})'
            ) from error
        return decode(data, self.episodes.schema, where)


def _group(records: Sequence[Record | None]) -> Stream | None:
    """Lay the sound records of a group end to end."""
    sound = [record for record in records if record is not None]
    return concatenate(sound) if sound else None


class Streaming(Dataset):
    """A dataset too large for the device, of which Grain reads shuffled episodes ahead in groups.

    A group is a random part of the dataset of about `group_frames` frames, laid end to end; windows
    are drawn from it as `Resident` draws from the whole, until as many frames were drawn as it
    holds. Batches are a function of the seed and of the sequence of calls; the state is a few
    numbers and restores it exactly.
    """

    def __init__(
        self,
        episodes: Episodes,
        relevant: Relevant = 'reward',
        label_fraction: float = 1.0,
        seed: int = 0,
        group_frames: int = 1 << 18,
        threads: int = 2,
    ):
        self.rows = RowSampling(relevant, label_fraction, seed)
        self.schema, self.path = episodes.schema, episodes.path
        self.seed, self.fingerprint = seed, episodes.fingerprint
        self.data: dict[str, Any] = {}
        self.has_rewarded = episodes.counts['rewarded_steps'] > 0
        _warn_without_reward(episodes, self.rows)
        self.group_size = min(
            len(episodes), math.ceil(group_frames * len(episodes) / episodes.frames)
        )
        self.groups_per_epoch = math.ceil(len(episodes) / self.group_size)
        source = RecordSource(episodes, keep_labels(len(episodes), label_fraction, seed))
        groups = (
            grain.MapDataset.source(source)
            .seed(seed)
            .shuffle()
            .repeat()
            .batch(self.group_size, batch_fn=list)
        )
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        self._groups = iter(groups.map(_group).to_iter_dataset(options))
        self._before = self._groups.get_state()  # of the reader, before it gave the current group
        self._group: Stream | None = None
        self._rewarded = np.zeros(0, np.int32)
        self._drawn = self._batches = 0

    def load(
        self, updates: int, batch: int, length: int, seeds: int, relevant: float = 0.0
    ) -> Stream:
        """Read the windows of the next batches in stored form, NumPy [updates, seeds, B, T, ...]."""
        windows = [
            self._draw(batch, length, round(relevant * batch)) for _ in range(updates * seeds)
        ]
        return Stream(
            *(
                np.stack(xs).reshape(updates, seeds, *xs[0].shape)
                for xs in zip(*windows, strict=True)
            )
        )

    def draw(
        self,
        data: PyTree,
        loaded: PyTree,
        key: PRNGKeyArray,
        batch: int,
        length: int,
        relevant: float = 0.0,
    ) -> Batch:
        """Traced: make `loaded`, windows [B, T] in stored form, a Batch; relevant rows come first."""
        return to_batch(loaded, jnp.arange(batch) < round(relevant * batch), self.schema)

    def _draw(self, batch: int, length: int, count: int) -> Stream:
        """Cut one batch of windows [B, T] from the current group, the first `count` relevant."""
        group = self._ensure_group(length)
        frames = len(group.flags)
        rng = np.random.default_rng([self.seed, self._batches])
        starts = rng.integers(0, frames - length + 1, batch)
        if self.rows.relevant == 'reward' and count and len(self._rewarded):
            chosen = rng.choice(self._rewarded, count)
            starts[:count] = np.clip(chosen - rng.integers(0, length, count), 0, frames - length)
        index = starts[:, None] + np.arange(length)
        windows = Stream(*(x[index] for x in group))
        self._batches += 1
        self._drawn += batch * length
        if self._drawn >= frames:
            self._group, self._drawn = None, 0
            self._before = self._groups.get_state()
        return windows

    def _ensure_group(self, length: int) -> Stream:
        """Return the current group, or the next that is long enough for a window."""
        group = self._group
        for _ in range(self.groups_per_epoch + 1):
            if group is not None and len(group.flags) >= length:
                return group
            self._before = self._groups.get_state()
            self._group = group = next(self._groups)
            self._rewarded = rewarded_steps(group) if group is not None else np.zeros(0, np.int32)
        raise UserError(
            f'{self.path}: no group of episodes has {length} frames, expected one at least a window long'
        )

    def get_state(self) -> dict[str, Any]:
        """Return where reading is; restored, the next `load` gives what it would have given."""
        progress = {'reader': self._before, 'drawn': self._drawn, 'batches': self._batches}
        return {'source': 'streaming', 'dataset': self.fingerprint, 'seed': self.seed} | progress

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore `get_state`; raise UserError for another source, dataset or seed."""
        check_state(state, 'streaming', self.fingerprint)
        if state['seed'] != self.seed:
            raise UserError(
                f'{self.path}: state was saved with data seed {state["seed"]}, expected {self.seed}'
            )
        self._groups.set_state(state['reader'])
        self._before, self._group = state['reader'], None
        self._drawn, self._batches = state['drawn'], state['batches']


def open_source(
    dataset: str | os.PathLike[str] | Episodes,
    spec: EnvSpec,
    memory_budget_bytes: int = 8 << 30,
    relevant: Relevant = 'reward',
    label_fraction: float = 1.0,
    seed: int = 0,
) -> Resident | Streaming:
    """Open a dataset, given open or by path: Resident if it fits the budget, else Streaming.

    The last three arguments are those of `RowSampling`. Raises UserError if the dataset is of
    another game, observation or action space than `spec`.
    """
    episodes = dataset if isinstance(dataset, Episodes) else Episodes(dataset)
    episodes.check(spec)
    if episodes.frames * episodes.bytes_per_frame <= memory_budget_bytes:
        return Resident(episodes, relevant, label_fraction, seed)
    return Streaming(episodes, relevant, label_fraction, seed)
