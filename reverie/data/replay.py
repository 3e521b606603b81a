"""Replay: streams of environment steps in a ring, on the device or the host, and windows of them.

Each of N environments has its own stream of L slots, so a window is contiguous in time; every
vector step fills one slot of all streams. Slots hold the stored form (`Stored`): bits for boolean
observations, indices for discrete actions, and the memory that an agent keeps with a step (e.g. its
latent state), in its own dtype.

Time counts vector steps since the ring was empty: time t lives in slot t % L. A window [start,
start + T) lies wholly in what the ring holds, so it never crosses the write head; it may cross
episode ends, which `is_first` marks.

The device ring is a pytree with pure functions, to be used under `jit`, `vmap` and `scan`;
`HostRing` has the same schema in NumPy.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from reverie.data.manifest import MANIFEST
from reverie.data.records import FIRST, LAST, TERMINAL, index_dtype, unpack_bits
from reverie.data.writing import Writer, split_stream
from reverie.types import ActionSpace, Batch, EnvSpec, Step, UserError


class Stored(NamedTuple):
    """Steps in stored form. Leading dims [N] when written, [N, L] in a ring, [B, T] in windows."""

    obs: PyTree  # uint8 bits of what is boolean, else as it comes
    action: Any  # index (-1: none) if discrete, [A] float32 if continuous
    reward: Any  # float32
    flags: Any  # uint8, bits FIRST, LAST, TERMINAL
    memory: PyTree  # what the agent keeps with the step; () for nothing


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes and dtypes that turn stored form back into steps."""

    obs: PyTree  # of one observation, a tree of ShapeDtypeStruct
    actions: ActionSpace

    @classmethod
    def of(cls, step: Step, actions: ActionSpace) -> 'Layout':
        """Return the layout of steps [N], arrays or shapes.

        Raises UserError if their actions are not those of `actions`.
        """
        if tuple(step.prev_action.shape[1:]) != (actions.size,):
            raise UserError(
                f'prev_action is {list(step.prev_action.shape[1:])}, expected [{actions.size}]'
            )
        return cls(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), step.obs), actions
        )


def _is_packed(shape: Sequence[int], dtype: Any) -> bool:
    return np.dtype(dtype) == np.bool_ and len(shape) > 0


def to_stored(step: Step, memory: PyTree, actions: ActionSpace, xp: ModuleType = jnp) -> Stored:
    """Return steps [N] in stored form. xp: jnp in traced code, np on the host."""
    n = step.reward.shape[0]

    def observation(x: Any) -> Any:
        return xp.packbits(x.reshape(n, -1), axis=-1) if _is_packed(x.shape[1:], x.dtype) else x

    action = step.prev_action
    if actions.kind == 'discrete':
        known = (action != 0).any(-1) & ~step.is_first
        action = xp.where(known, action.argmax(-1), -1).astype(index_dtype(actions.size))
    else:
        action = xp.where(step.is_first[:, None], 0, action).astype(np.float32)
    flags = (
        step.is_first * np.uint8(FIRST)
        | step.is_last * np.uint8(LAST)
        | step.is_terminal * np.uint8(TERMINAL)
    )
    reward = step.reward.astype(np.float32)
    return Stored(
        jax.tree.map(observation, step.obs), action, reward, flags.astype(np.uint8), memory
    )


def to_step(stored: Stored, layout: Layout, xp: ModuleType = jnp) -> Step:
    """Inverse of `to_stored`, for any leading dims."""

    def observation(x: Any, like: Any) -> Any:
        return unpack_bits(x, like.shape, xp) if _is_packed(like.shape, like.dtype) else x

    action = stored.action
    if layout.actions.kind == 'discrete':
        choices = xp.arange(layout.actions.size, dtype=action.dtype)
        action = (action[..., None] == choices).astype(np.float32)
    first, last, terminal = ((stored.flags & bit) > 0 for bit in (FIRST, LAST, TERMINAL))
    obs = jax.tree.map(observation, stored.obs, layout.obs)
    return Step(obs, action, stored.reward, first, last, terminal)


def to_batch(windows: Stored, context: PyTree, layout: Layout) -> Batch:
    """Traced: make windows [B, T] a Batch, in which every row is relevant: a replay holds nothing
    but the task's own data.
    """
    yes = jnp.ones(windows.flags.shape[0], bool)
    return Batch(to_step(windows, layout), yes, yes, yes, context)


def bytes_per_step(stored: Stored) -> int:
    """Return the bytes of one step of one environment; `stored` is [N, ...], arrays or shapes."""
    return sum(math.prod(x.shape[1:]) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(stored))


# ------------------------------------------------------------------------------------ which windows


def earliest(count: Any, slots: int, xp: ModuleType = jnp) -> Any:
    """Return the first time a window may start at: the oldest whose step before is held too."""
    return xp.maximum(count - slots + 1, 0)


def queued(
    count: Any, seen: Any, envs: int, slots: int, batch: int, length: int, xp: ModuleType = jnp
) -> tuple[Any, Any, Any, Any]:
    """Take rows from the online queue of DreamerV3, in which each of the windows that a stream is
    cut into end to end is handed out once, oldest first.

    seen: windows handed out, lost ones included; window q is the (q // N)-th of stream q % N.
    Return (seen, env [B], start [B], use [B]: true where the queue had a window for the row).
    """
    ready = count // length * envs
    oldest = -(-earliest(count, slots, xp) // length) * envs
    seen = xp.maximum(seen, oldest)
    window = seen + xp.arange(batch)
    use = window < ready
    return seen + use.sum(), window % envs, window // envs * length, use


def winners(env: Any, start: Any, length: int, xp: ModuleType = jnp) -> Any:
    """Return the mask [B, T] of steps that no later row contains too, so that each step is written
    once and writes are deterministic.
    """
    time = start[:, None] + xp.arange(length)
    row = xp.arange(env.shape[0])
    later = (row[None, :] > row[:, None]) & (env[None, :] == env[:, None])  # [B, B']
    inside = (time[..., None] >= start) & (time[..., None] < start + length)  # [B, T, B']
    return ~(inside & later[:, None, :]).any(-1)


# ------------------------------------------------------------------------------------ on the device


class Ring(NamedTuple):
    """Replay of one seed on the device."""

    data: Stored  # [N, L, ...]
    written: Int[Array, '']  # vector steps so far
    seen: Int[Array, '']  # windows that left the online queue
    env: Int[Array, ' B']  # rows of the last batch, for `write_memory`
    start: Int[Array, ' B']

    @property
    def slots(self) -> int:
        slots: int = self.data.flags.shape[1]
        return slots


def empty(like: Stored, slots: int, batch: int) -> Ring:
    """Return a ring of `slots` per stream for steps like `like`, [N, ...] arrays or shapes."""
    data = jax.tree.map(lambda x: jnp.zeros((x.shape[0], slots, *x.shape[1:]), x.dtype), like)

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.int32)

    return Ring(data, written=zeros(), seen=zeros(), env=zeros(batch), start=zeros(batch))


def enlarged(data: Stored, written: int, slots: int, axis: int) -> Stored:
    """Return the data of a ring with `slots` per stream, on `axis`; it may be one of fewer.

    Raises UserError for a smaller ring that has begun to forget.
    """
    held = data.flags.shape[axis]
    if held == slots:
        return data
    if written > held or slots < held:
        raise UserError(
            f'a replay of {held} steps of each environment holds the last of {written}; expected '
            f'none forgotten where it grows to {slots}'
        )

    def pad(x: Any) -> Any:
        widths = [(0, slots - held if i == axis else 0) for i in range(x.ndim)]
        return np.pad(x, widths) if isinstance(x, np.ndarray) else jnp.pad(x, widths)

    return Stored(*jax.tree.map(pad, tuple(data)))


def write(ring: Ring, stored: Stored) -> Ring:
    """Write one vector step [N, ...] over the oldest one."""
    slot = ring.written % ring.slots
    put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), slot, 1)
    return ring._replace(data=jax.tree.map(put, ring.data, stored), written=ring.written + 1)


def choose(ring: Ring, key: PRNGKeyArray, length: int, online: bool = True) -> Ring:
    """Choose the rows of the next batch: from the online queue as far as it goes, the rest
    uniformly among all windows.

    The ring must hold at least `length` + 1 slots and that many steps less one.
    """
    (envs, slots), (batch,) = ring.data.flags.shape, ring.env.shape
    env_key, start_key = jax.random.split(key)
    env = jax.random.randint(env_key, (batch,), 0, envs)
    start = jax.random.randint(
        start_key, (batch,), earliest(ring.written, slots), ring.written - length + 1
    )
    if not online:
        return ring._replace(env=env, start=start)
    seen, new_env, new_start, use = queued(ring.written, ring.seen, envs, slots, batch, length)
    return ring._replace(
        seen=seen, env=jnp.where(use, new_env, env), start=jnp.where(use, new_start, start)
    )


def windows(ring: Ring, length: int, context: int = 1) -> tuple[Stored, PyTree]:
    """Return (the chosen rows [B, T, ...], memories of the `context` steps before each [B, C, ...]).

    Memories are zeros where the ring holds no such step, and None if none are kept.
    """
    slot = (ring.start[:, None] + jnp.arange(length)) % ring.slots
    rows = jax.tree.map(lambda x: x[ring.env[:, None], slot], ring.data)
    time = ring.start[:, None] + jnp.arange(-context, 0)
    held = time >= jnp.maximum(ring.written - ring.slots, 0)
    before = jax.tree.map(lambda x: x[ring.env[:, None], time % ring.slots], ring.data.memory)
    before = jax.tree.map(lambda x: jnp.where(_like(held, x), x, jnp.zeros((), x.dtype)), before)
    return rows, before if jax.tree.leaves(before) else None


def _like(mask: Any, x: Any) -> Any:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def write_memory(ring: Ring, memory: PyTree, ok: Bool[Array, '']) -> Ring:
    """Write memories [B, T, ...] of the chosen rows over the old ones, if `ok`."""
    length = jax.tree.leaves(memory)[0].shape[1]
    slot = (ring.start[:, None] + jnp.arange(length)) % ring.slots
    wins = winners(ring.env, ring.start, length) & ok
    env = jnp.where(wins, ring.env[:, None], ring.data.flags.shape[0])  # out of bounds: dropped
    put = lambda x, new: x.at[env, slot].set(new.astype(x.dtype), mode='drop')
    return ring._replace(
        data=ring.data._replace(memory=jax.tree.map(put, ring.data.memory, memory))
    )


# ------------------------------------------------------------------------------------ on the host


class DrawnRows(NamedTuple):
    """Streams and first times of a batch's windows."""

    env: Int[np.ndarray, ' B']
    start: Int[np.ndarray, ' B']


class HostRing:
    """Ring of one seed in host memory, by the schema and rules of `Ring`; changes in place."""

    def __init__(self, like: Stored, slots: int):
        self.data = jax.tree.map(
            lambda x: np.zeros((x.shape[0], slots, *x.shape[1:]), x.dtype), like
        )
        self.envs, self.slots = self.data.flags.shape
        self.written = self.seen = 0

    def write(self, stored: Stored) -> None:
        """Write one vector step [N, ...] over the oldest one."""
        slot = self.written % self.slots
        for x, new in zip(jax.tree.leaves(self.data), jax.tree.leaves(stored), strict=True):
            x[:, slot] = new
        self.written += 1

    def choose(
        self, rng: np.random.Generator, batch: int, length: int, online: bool = True
    ) -> DrawnRows:
        """Choose the rows of the next batch, as the function `choose` does."""
        env = rng.integers(0, self.envs, batch)
        start = rng.integers(
            earliest(self.written, self.slots, np), self.written - length + 1, batch
        )
        if online:
            seen, new_env, new_start, use = queued(
                self.written, self.seen, self.envs, self.slots, batch, length, np
            )
            self.seen = int(seen)
            env, start = np.where(use, new_env, env), np.where(use, new_start, start)
        return DrawnRows(env, start)

    def windows(self, rows: DrawnRows, length: int, context: int = 1) -> tuple[Stored, PyTree]:
        """Return copies of (the rows [B, T, ...], memories of the `context` steps before each or
        None).
        """
        slot = (rows.start[:, None] + np.arange(length)) % self.slots
        found = jax.tree.map(lambda x: x[rows.env[:, None], slot], self.data)
        time = rows.start[:, None] + np.arange(-context, 0)
        held = time >= max(self.written - self.slots, 0)
        before = jax.tree.map(lambda x: x[rows.env[:, None], time % self.slots], self.data.memory)
        before = jax.tree.map(lambda x: np.where(_like(held, x), x, np.zeros((), x.dtype)), before)
        return found, before if jax.tree.leaves(before) else None

    def write_memory(self, rows: DrawnRows, memory: PyTree) -> None:
        """Write memories [B, T, ...] of rows drawn earlier, but for steps overwritten since."""
        length = jax.tree.leaves(memory)[0].shape[1]
        time = rows.start[:, None] + np.arange(length)
        keep = winners(rows.env, rows.start, length, np) & (time > self.written - 1 - self.slots)
        env = np.broadcast_to(rows.env[:, None], keep.shape)[keep]
        for x, new in zip(jax.tree.leaves(self.data.memory), jax.tree.leaves(memory), strict=True):
            x[env, time[keep] % self.slots] = np.asarray(new)[keep]

    def cut(self) -> None:
        """Mark the newest step of every stream as its episode's last; the environments are gone."""
        if self.written:
            self.data.flags[:, (self.written - 1) % self.slots] |= LAST

    def arrays(self) -> dict[str, Any]:
        """Return all of it for a checkpoint, not copied."""
        return {'data': self.data, 'written': np.array(self.written), 'seen': np.array(self.seen)}

    def set_arrays(self, arrays: dict[str, Any]) -> None:
        """Inverse of `arrays`, which may be those of a smaller ring.

        Takes them as they are, where they can be written to: a copy would hold the replay twice.
        """
        written, data = int(arrays['written']), Stored(*arrays['data'])
        data = enlarged(data, written, self.slots, 1)
        self.data = jax.tree.map(lambda x: np.require(x, requirements='W'), data)
        self.written, self.seen = written, int(arrays['seen'])


# ------------------------------------------------------------------------------------ as a dataset


def episodes(data: Stored, count: int, layout: Layout) -> Iterator[tuple[Step, bool]]:
    """Yield (episode [T], complete) of a ring's data [N, L, ...], stream by stream, oldest first.

    An episode whose beginning was overwritten is left out; an open one is not complete.
    """
    envs, slots = data.flags.shape
    held = np.arange(max(count - slots, 0), count) % slots
    for env in range(envs):
        stored = jax.tree.map(lambda x, env=env: np.asarray(x[env])[held], data._replace(memory=()))
        first = np.flatnonzero(stored.flags & FIRST)
        if len(first):
            stream = jax.tree.map(lambda x, begin=first[0]: x[begin:, None], stored)
            yield from split_stream(to_step(stream, layout, np))


def check_export(path: str | os.PathLike[str], layout: Layout, spec: EnvSpec) -> None:
    """Raise UserError for a path in use by anything but a dataset, or observations that are not one
    array.
    """
    if not isinstance(layout.obs, jax.ShapeDtypeStruct):
        raise UserError(
            f'{path}: a dataset holds one array per observation, the replay has a tree of them'
        )
    Writer(path, spec, overwrite=True)


def exported(path: str | os.PathLike[str] | None) -> bool:
    """Whether a dataset stands at `path`; true if none is asked for."""
    return path is None or (pathlib.Path(path) / MANIFEST).exists()


def export(
    path: str | os.PathLike[str],
    rings: Sequence[tuple[Stored, int]],
    layout: Layout,
    spec: EnvSpec,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write the rings (data [N, L, ...], count) of all seeds as one dataset, in the place of an
    older one; episodes of seed i have kind 'seed<i>'.

    Raises UserError as `check_export` does, and if no ring holds the beginning of an episode.
    """
    check_export(path, layout, spec)
    with Writer(path, spec, provenance, overwrite=True) as writer:
        for seed, (data, count) in enumerate(rings):
            for episode, complete in episodes(data, count, layout):
                writer.add(f'seed{seed}', episode, complete)
