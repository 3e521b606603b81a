"""Sources of recorded windows: `Resident`, a dataset on the device, and `Streaming`, one on disk.

Both see episodes as one long stream, cut windows from it at random, let them cross episode ends,
and finish them by `windows.to_batch`, so an agent cannot tell the two apart.

Rows come in two sorts. The first round(relevant * B) rows are `relevant`: with relevant='reward'
their windows hold a labelled step with positive reward, chosen uniformly among all such steps (the
task's own data, for behaviour cloning); the other rows are uniform over the stream (for the dynamics).
Dreamer 4 mixes the two half and half.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from reverie.data.episodes import Episodes
from reverie.data.labels import ALL, Labels
from reverie.data.latents import Latents
from reverie.data.records import Record, decode
from reverie.data.source import Dataset
from reverie.data.windows import Relevant, Stream, concatenate, relevant_steps, to_batch
from reverie.io import warn
from reverie.types import Batch, UserError

EPOCHS = 1 << 32  # more than anybody trains; Grain's own endless number overflows a length
GROUP_BYTES = 1 << 30  # of a part of a larger one that windows are drawn from


class _Recorded(Dataset):
    """Common parts of both: the episodes, and a word on relevant rows where nothing is rewarded."""

    def __init__(self, episodes: Episodes, relevant: Relevant, labels: Labels):
        if relevant not in ('reward', 'all'):
            raise UserError(f'relevant is {relevant!r}, expected reward or all')
        self.relevant, self.episodes, self.recordings = relevant, episodes, (episodes,)
        self.schema, self.path = episodes.schema, episodes.path
        self.labels, self.keep = labels, labels.chosen(episodes)
        self.unrewarded = relevant == 'reward' and not episodes.counts['rewarded_steps']

    def relevant_rows(self, batch: int, relevant: float) -> int:
        """Number of a batch's relevant rows; a warning says once if none of them has a reward."""
        count = round(relevant * batch)
        if count and self.unrewarded:
            self.unrewarded = False
            warn(
                f'{self.path}: no step has a positive reward; relevant rows are drawn from all '
                'labelled steps'
            )
        return count


class Resident(_Recorded):
    """A dataset that lies on the device as a whole."""

    def __init__(self, episodes: Episodes, relevant: Relevant = 'reward', labels: Labels = ALL):
        super().__init__(episodes, relevant, labels)
        self.order: dict[bool, list[int]] = {True: [], False: []}  # labelled ones lie first

        def records() -> Iterator[Record]:
            for i, record in episodes.numbered():
                kept = labels.of(record, episodes, bool(self.keep[i]))
                self.order[kept.has_action].append(i)
                yield kept

        stream = concatenate(records())
        self.fingerprint = episodes.fingerprint  # now it is known what can be read
        chosen = relevant_steps(stream, relevant)
        self.frames = len(stream.flags)
        self.chooses = len(chosen) > 0
        half = stream.reward.astype(np.float16)
        if np.array_equal(half.astype(np.float32), stream.reward):
            stream = stream._replace(reward=half)
        self.data = jax.device_put({'stream': stream, 'relevant': chosen})

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
        if not self.chooses or count == 0:
            return starts
        chosen = jax.random.randint(reward_key, (count,), 0, data['relevant'].shape[0])
        offset = jax.random.randint(offset_key, (count,), 0, length)
        return jnp.concatenate(
            [jnp.clip(data['relevant'][chosen] - offset, 0, end), starts[count:]]
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
        count = self.relevant_rows(batch, relevant)
        starts = self.starts(data, key, batch, length, count)

        def window(start: Array) -> Stream:
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, length)
            stream: Stream = jax.tree.map(cut, data['stream'])
            if 'latents' not in data:
                return stream
            latents, seed = data['latents'], data['seed']
            place = (seed, start, *(0 for _ in latents.shape[2:]))
            mine = jax.lax.dynamic_slice(latents, place, (1, length, *latents.shape[2:]))
            return stream._replace(latents=mine[0])

        windows = jax.vmap(window)(starts)
        return to_batch(windows, jnp.arange(batch) < count, self.schema)

    def of_seed(self, data: PyTree, seed: Int[Array, ''] | int) -> PyTree:
        """Traced: the data with the seed's number, which tells its latents."""
        return data | {'seed': seed} if 'latents' in data else data

    def with_latents(self, data: PyTree, frame: jax.ShapeDtypeStruct) -> PyTree:
        """Return data with shapes of latents in the place of frames."""
        shape = (frame.shape[0], self.frames, *frame.shape[1:])
        return _encoded(data, jax.ShapeDtypeStruct(shape, frame.dtype))

    def use_latents(self, latents: Sequence[Latents]) -> None:
        """Learn from latents instead of frames from now on."""
        (mine,) = latents
        numbers = self.order[True] + self.order[False]
        each = [
            np.concatenate([file[mine.at(number)] for number in numbers]) for file in mine.files
        ]
        self.data = _encoded(self.data, jax.device_put(np.stack(each)))

    def get_state(self) -> dict[str, Any]:
        """Return the dataset's fingerprint; every draw comes from the key."""
        return {'source': 'resident', 'dataset': self.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raise UserError for the state of another source or dataset."""
        check_state(state, 'resident', self.fingerprint)


def _encoded(data: PyTree, latents: Any) -> PyTree:
    """Data of a resident set with latents [seeds, F, Z, b], arrays or shapes, in the place of frames."""
    return data | {'stream': data['stream']._replace(obs=None), 'latents': latents}


def check_state(state: dict[str, Any], source: str, fingerprint: str) -> None:
    """Raise UserError unless the state was saved by this sort of source on the same data."""
    for name, expected in (('source', source), ('dataset', fingerprint)):
        if state.get(name) != expected:
            raise UserError(
                f'data state has {name} {state.get(name)}, expected {expected}; use another run folder'
            )


class RecordSource:
    """Random access to the records of a dataset, over all shards; None for a lost one.

    Raises UserError naming a wrong record if more are wrong than may be.
    """

    def __init__(
        self, episodes: Episodes, labels: Labels, keep: np.ndarray, latents: Latents | None = None
    ):
        self.episodes, self.labels, self.keep, self.latents = episodes, labels, keep, latents
        self.reader = ArrayRecordDataSource([str(episodes.shards[i]) for i in episodes.sound])
        held = [np.arange(episodes.first[i], episodes.first[i + 1]) for i in episodes.sound]
        self.place = {int(number): place for place, number in enumerate(np.concatenate(held))}
        # All of them where none is held out, lost ones too: a run goes on in the same order.
        whole = list(range(len(episodes)))
        self.numbers = [n for n in whole if episodes.wants(n)]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record | None:
        number = self.numbers[index]
        place = self.place.get(number)
        if place is None:
            return None
        try:
            record = self._read(place, f'{self.episodes.path} record {number}')
            if self.latents is not None:
                stored = [file[self.latents.at(number)] for file in self.latents.files]
                record = dataclasses.replace(record, obs=np.stack(stored, 1))
        except UserError as fault:
            self.episodes.lose([number], fault)
            return None
        return self.labels.of(record, self.episodes, bool(self.keep[number]))

    def _read(self, place: int, where: str) -> Record:
        try:
            data = self.reader[place]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f'{where}: cannot be read ({str(error).splitlines()[0][:120]})'
            ) from error
        return decode(data, self.episodes.schema, where, frames=self.latents is None)


def _group(records: Sequence[Record | None]) -> Stream | None:
    """Lay the sound records of a group end to end."""
    sound = [record for record in records if record is not None]
    return concatenate(sound) if sound else None


class Streaming(_Recorded):
    """A dataset too large for the device, of which Grain reads shuffled episodes ahead in groups.

    Memory is bounded in bytes of frames as they are on the device: the group that is drawn from,
    one that each of `threads` has read ahead, one that it is reading, twice while it is laid end to
    end, and two calls' windows, which are no more than a group each (or one update): at most
    3 + 3 x threads groups, of `group_bytes` or one episode each, if that is more.

    A group is a random part of the dataset of about `group_bytes`, laid end to end; windows are
    drawn from it as `Resident` draws from the whole, until as many frames were drawn as it holds.
    While one is drawn from, `threads` others are read. Batches are a function of the seed and of
    the sequence of calls; the state is a few numbers and restores it exactly.
    """

    def __init__(
        self,
        episodes: Episodes,
        relevant: Relevant = 'reward',
        labels: Labels = ALL,
        seed: int = 0,
        group_bytes: int = GROUP_BYTES,
        threads: int = 2,
    ):
        self.group_bytes = group_bytes
        super().__init__(episodes, relevant, labels)
        self.seed, self.fingerprint = seed, episodes.fingerprint
        self.threads = threads
        self.data: dict[str, Any] = {}
        self.latents: Latents | None = None
        wanted = sum(map(episodes.wants, range(len(episodes))))
        self.group_size = min(wanted, math.ceil(group_bytes * len(episodes) / episodes.total_bytes))
        self.groups_per_epoch = math.ceil(wanted / self.group_size)
        self._groups = self._reader()
        self._before = self._groups.get_state()  # of the reader, before it gave the current group
        self._group: Stream | None = None
        self._relevant = np.zeros(0, np.int32)
        self._drawn = self._batches = 0

    def _reader(self) -> Any:
        """Open the shuffled episodes, in groups that are read ahead."""
        groups = (
            grain.MapDataset.source(
                RecordSource(self.episodes, self.labels, self.keep, self.latents)
            )
            .seed(self.seed)
            .shuffle()
            .repeat(EPOCHS)
            .batch(self.group_size, batch_fn=list)
        )
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads)
        return iter(groups.map(_group).to_iter_dataset(options))

    def use_latents(self, latents: Sequence[Latents]) -> None:
        """Learn from latents instead of frames from now on, in the same order."""
        (self.latents,) = latents
        self._groups = self._reader()
        self._groups.set_state(self._before)
        self._group = None

    def most_updates(self, batch: int, length: int, seeds: int) -> int | None:
        """Return the updates whose windows take no more than a group."""
        each = seeds * batch * length * self.episodes.bytes_per_frame
        return max(1, self.group_bytes // each)

    def load(
        self, updates: int, batch: int, length: int, seeds: int, relevant: float = 0.0
    ) -> Stream:
        """Read the windows of the next batches in stored form, NumPy [updates, seeds, B, T, ...]."""
        count = self.relevant_rows(batch, relevant)
        windows = [
            self._draw(batch, length, count, seed) for _ in range(updates) for seed in range(seeds)
        ]
        loaded: Stream = jax.tree.map(
            lambda *xs: np.stack(xs).reshape(updates, seeds, *xs[0].shape), *windows
        )
        return loaded

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

    def _draw(self, batch: int, length: int, count: int, seed: int) -> Stream:
        """Cut one batch of windows [B, T] of one seed from the current group, the first `count`
        relevant.
        """
        group = self._ensure_group(length)
        frames = len(group.flags)
        rng = np.random.default_rng([self.seed, self._batches])
        starts = rng.integers(0, frames - length + 1, batch)
        if count and len(self._relevant):
            chosen = rng.choice(self._relevant, count)
            starts[:count] = np.clip(chosen - rng.integers(0, length, count), 0, frames - length)
        index = starts[:, None] + np.arange(length)
        windows: Stream = jax.tree.map(lambda x: x[index], group._replace(obs=None))
        if self.latents is None:
            windows = windows._replace(obs=group.obs[index])
        else:
            windows = windows._replace(latents=group.obs[index, seed])
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
            self._relevant = np.zeros(0, np.int32)
            if group is not None:
                self._relevant = relevant_steps(group, self.relevant)
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
