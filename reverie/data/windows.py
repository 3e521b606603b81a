"""Episodes as one long stream, and windows of it as a `Batch`.

The step after `is_last` is the next episode's `is_first`, and windows may cross it. Inside a stream
everything keeps its stored form (bits, indices); `to_batch` turns it into what agents see, on the
device.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from reverie.data.records import FIRST, LAST, TERMINAL, Record, Schema, unpack_bits
from reverie.types import Batch, Step

HAS_ACTION, HAS_REWARD = 8, 16  # further bits of `flags`, set for every step of a record
Relevant = Literal['reward', 'all']  # steps that relevant rows are drawn around, if labelled


class Stream(NamedTuple):
    """Episodes end to end, in stored form. Leading dim [F] frames; windows of it have [B, T]."""

    obs: Any  # [F, *stored_shape]; None where there are latents
    action: Any  # [F] or [F, A]
    reward: Any  # [F] float32, or float16 where that is exact
    flags: Any  # [F] uint8
    latents: Any = None  # [F, Z, b] of a frozen tokenizer


def concatenate(records: Iterable[Record]) -> Stream:
    """Lay records end to end, labelled ones first, so that few windows touch both sorts."""
    parts: dict[bool, list[Stream]] = {True: [], False: []}
    for record in records:
        known = np.uint8(record.has_action) if record.labelled is None else record.labelled
        bits = known * np.uint8(HAS_ACTION) | np.uint8(record.has_reward * HAS_REWARD)
        parts[record.has_action].append(
            Stream(record.obs, record.action, record.reward, record.flags | bits)
        )
    fields = list(zip(*parts[True], *parts[False], strict=True))[:4]
    return Stream(*map(np.concatenate, fields))


def relevant_steps(stream: Stream, relevant: Relevant) -> np.ndarray:
    """Return the indices [R] of the steps around which relevant windows are cut; none where every
    step will do.

    A policy learns from labelled steps alone: those with positive reward if they are asked for and
    there are any, else all.
    """
    labelled = (np.asarray(stream.flags) & HAS_ACTION) > 0
    rewarded = labelled & (np.asarray(stream.reward) > 0)
    if relevant == 'reward' and rewarded.any():
        return np.flatnonzero(rewarded).astype(np.int32)
    return np.flatnonzero(labelled if not labelled.all() else []).astype(np.int32)


def to_batch(windows: Stream, relevant: Bool[Array, ' B'], schema: Schema) -> Batch:
    """Traced: turn windows in stored form [B, T, ...] into a Batch."""
    flags = windows.flags
    first = (flags & FIRST) > 0
    if schema.actions.kind == 'discrete':
        # -1 gives zeros.
        action = jax.nn.one_hot(windows.action, schema.actions.size, dtype=jnp.float32)
    elif schema.actions.kind == 'composite':
        action = schema.actions.vector(jnp.asarray(windows.action))
    else:
        action = windows.action
    obs = windows.obs
    if schema.packed and obs is not None:
        obs = unpack_bits(obs, schema.obs_shape, jnp)
    has_action = jnp.all((flags & HAS_ACTION) > 0, axis=1)
    # A row that counts as unlabelled must not leak the actions that some of its frames do have.
    action = jnp.where(has_action[:, None, None], action, 0)
    has_reward = jnp.all((flags & HAS_REWARD) > 0, axis=1)
    reward = windows.reward.astype(jnp.float32)
    step = Step(obs, action, reward, first, (flags & LAST) > 0, (flags & TERMINAL) > 0)
    return Batch(step, has_action, has_reward, relevant, latents=windows.latents)
