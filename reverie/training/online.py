"""Source that plays in environments on the device while an agent learns; see also `online_host`.

It keeps streams of steps in a ring (`data.replay`) and plays as many frames per update as the train
ratio says: frames = batch * length / ratio, in whole vector steps. An explorer acts; what it
remembers of a step (say, its latent state) may be kept in the ring, handed to the loss as
`Batch.context`, and be replaced by what the loss returns.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from reverie.data import replay
from reverie.data.replay import Layout, Ring, Stored
from reverie.data.source import Source
from reverie.envs.device import Vector
from reverie.training.state import available_bytes, own_buffers
from reverie.types import (
    ActionSpace,
    Batch,
    Env,
    Explorer,
    Mean,
    Metrics,
    Params,
    State,
    Step,
    UserError,
)


def vector_steps(ratio: float | int, batch: int, length: int, envs: int) -> int:
    """Return the steps of each environment per update; raise UserError unless they are whole."""
    frames = batch * length / ratio if ratio > 0 else math.nan
    steps = frames / envs
    if not (steps >= 1 and abs(steps - round(steps)) < 1e-6):
        raise UserError(
            f'train ratio {ratio:g} with a batch of {batch} x {length} steps makes {frames:g} frames per update, '
            f'{steps:g} of each of {envs} environments; expected a whole number, at least 1'
        )
    return round(steps)


def check_memory(what: str, needed: int, available: int | None) -> None:
    """Raise UserError if a replay does not fit."""
    if available is not None and needed > available:
        raise UserError(
            f'{what} takes {needed / 1e9:.3g} GB, but {available / 1e9:.3g} GB are free; expected a smaller capacity'
        )


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Amounts of play and replay of one seed."""

    envs: int
    """Environments side by side."""

    capacity: int
    """Steps that replay holds, of all environments together."""

    ratio: float | int
    """Train ratio: replayed steps per frame played."""

    prefill: int = 0
    """Frames played before the first update; at least what makes one window."""

    random_prefill: bool = True
    """Prefill by uniformly random play instead of the explorer's."""

    online: bool = True
    """Train on each new window once as soon as it is complete (the online queue of DreamerV3)."""

    context: int = 1
    """Steps before a window whose memories come with it, if the explorer has memories."""

    def __post_init__(self) -> None:
        if self.envs < 1 or self.prefill < 0:
            raise UserError(
                f'{self.envs} environments and prefill {self.prefill}; expected at least 1 and 0'
            )

    @property
    def slots(self) -> int:
        """Steps that replay holds of each environment."""
        return self.capacity // self.envs

    def as_saved(self, state: dict[str, Any]) -> 'CollectConfig':
        """Return these amounts with the capacity of a saved run."""
        return dataclasses.replace(self, capacity=int(state.get('capacity', self.capacity)))

    def check(self, batch: int, length: int) -> None:
        """Raise UserError, naming the numbers, if updates of batch x length cannot be fed."""
        vector_steps(self.ratio, batch, length, self.envs)
        if self.slots < length + 1:
            raise UserError(
                f'a capacity of {self.capacity} steps is {self.slots} of each of {self.envs} environments; '
                f'expected at least {length + 1}, a window of {length} and the step before it'
            )

    def prefill_steps(self, length: int) -> int:
        """Return the vector steps before the first update, a window's worth at least."""
        return max(math.ceil(self.prefill / self.envs), length)

    def env_frames(self, updates: int, batch: int, length: int) -> int:
        """Return the frames played after `updates`, the prefill included."""
        steps = self.prefill_steps(length) + updates * vector_steps(
            self.ratio, batch, length, self.envs
        )
        return steps * self.envs


class EpisodeTally(NamedTuple):
    """Return and length so far of the episode that each environment is in."""

    ret: Float[Any, ' N']
    length: Int[Any, ' N']  # steps after the reset


def score(scores: EpisodeTally, step: Step, xp: Any = jnp) -> tuple[EpisodeTally, Metrics]:
    """Count a step [N] that arrived; return (tally, sums over the episodes it ended)."""
    ret = xp.where(step.is_first, 0, scores.ret + step.reward).astype(np.float32)
    length = xp.where(step.is_first, 0, scores.length + 1).astype(np.int32)
    ended = step.is_last.sum().astype(np.float32)

    def total(x: Any) -> Any:  # arrays of xp
        return xp.where(step.is_last, x, 0).sum().astype(np.float32)

    return EpisodeTally(ret, length), {
        'env/return': Mean(total(ret), ended),
        'env/length': Mean(total(length), ended),
    }


class OnlineState(NamedTuple):
    """Live state of one seed: everything that changes while it plays."""

    env: PyTree
    step: Step  # [N] arrived, not yet acted on, not yet in the ring
    actor: State
    scores: EpisodeTally
    ring: Ring


@dataclasses.dataclass(frozen=True)
class Online(Source):
    """Environments and replay on the device: collecting and learning are one program, vmapped over
    seeds.
    """

    env: Env  # one, of which play.envs copies run
    explorer: Explorer  # acts with the agent's parameters
    play: CollectConfig
    dataset: str | os.PathLike[str] | None = None  # path to export the replay of all seeds to
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # provenance of `dataset`
    plays: ClassVar[bool] = True

    @property
    def vector(self) -> Vector:
        return Vector(self.env, self.play.envs)

    @property
    def actions(self) -> ActionSpace:
        return self.env.spec.actions

    @property
    def layout(self) -> Layout:
        _, step = jax.eval_shape(self.vector.reset, jax.random.key(0))
        return Layout.of(step, self.actions)

    def check(
        self, params: Params, batch: int, length: int, seeds: int, relevant: float = 0.0
    ) -> None:
        """Raise UserError if ratio, capacity, memory or the export's target do not fit; `params`
        may be shapes.
        """
        self.play.check(batch, length)
        if self.dataset is not None:
            replay.check_export(self.dataset, self.layout, self.env.spec)
        like = jax.eval_shape(self._first_stored, params, jax.random.key(0))
        each = replay.bytes_per_step(like)
        needed = each * self.play.envs * self.play.slots * seeds
        what = f'replay of {self.play.capacity} steps of {each} bytes for {seeds} seeds'
        check_memory(what, needed, available_bytes(jax.devices()[0]))

    def _start(self, params: Params, key: PRNGKeyArray, batch: int, slots: int) -> OnlineState:
        """Traced: reset the environments and empty the ring."""
        n = self.play.envs
        env, step = self.vector.reset(key)
        actor = self.explorer.initial(params, n)
        stored = replay.to_stored(step, self.explorer.memory(actor), self.actions)
        scores = EpisodeTally(jnp.zeros(n), jnp.zeros(n, jnp.int32))
        return OnlineState(env, step, actor, scores, replay.empty(stored, slots, batch))

    def _first_stored(self, params: Params, key: PRNGKeyArray) -> Stored:
        data = self._start(params, key, 1, 1).ring.data
        first: Stored = jax.tree.map(lambda x: x[:, 0], data)
        return first

    def begin(self, params: Params, key: PRNGKeyArray, batch: int, length: int) -> OnlineState:
        """Traced: play the prefill; every leaf has its own buffer."""
        self.play.check(batch, length)
        reset_key, key = jax.random.split(key)
        live = self._start(params, reset_key, batch, self.play.slots)
        live, _ = self._collect(
            live, params, key, self.play.prefill_steps(length), self.play.random_prefill
        )
        # The ring was written to, so its buffers are its own; copied like the rest, it would take
        # its memory twice.
        rest: Any = own_buffers(live._asdict() | {'ring': live.ring._asdict() | {'data': None}})
        return OnlineState(**rest | {'ring': Ring(**rest['ring'] | {'data': live.ring.data})})

    def sample(
        self,
        live: OnlineState,
        params: Params,
        data: PyTree,
        loaded: PyTree,
        key: PRNGKeyArray,
        batch: int,
        length: int,
        relevant: float = 0.0,
    ) -> tuple[OnlineState, Batch, Metrics]:
        """Traced: play, write, and draw a batch; every row is relevant."""
        play_key, draw_key = jax.random.split(key)
        steps = vector_steps(self.play.ratio, batch, length, self.play.envs)
        live, metrics = self._collect(live, params, play_key, steps, False)
        ring = replay.choose(live.ring, draw_key, length, self.play.online)
        rows, context = replay.windows(ring, length, self.play.context)
        return live._replace(ring=ring), replay.to_batch(rows, context, self.layout), metrics

    def write_memory(
        self, live: OnlineState, memory: PyTree, ok: Bool[Array, '']
    ) -> tuple[OnlineState, None]:
        """Traced: write new memories [B, T, ...] of the last batch into the ring.

        In place if they depend on the batch's context, as latent states do; else XLA may read the
        context after the write, for which it copies the stored memories at each update.
        """
        return live._replace(ring=replay.write_memory(live.ring, memory, ok)), None

    def _collect(
        self, live: OnlineState, params: Params, key: PRNGKeyArray, steps: int, random: bool
    ) -> tuple[OnlineState, Metrics]:
        """Play and write `steps` vector steps; return (live, sums over the episodes that ended)."""

        def frame(live: OnlineState, key: PRNGKeyArray) -> tuple[OnlineState, Metrics]:
            act_key, env_key = jax.random.split(key)
            actor = live.actor
            if random:
                action = self.actions.sample(act_key, self.play.envs)
            else:
                actor, action = self.explorer.act(params, actor, live.step, act_key, False)
            stored = replay.to_stored(live.step, self.explorer.memory(actor), self.actions)
            ring = replay.write(live.ring, stored)
            env, step = self.vector.step(live.env, action, env_key)
            scores, ended = score(live.scores, step)
            return OnlineState(env, step, actor, scores, ring), ended

        live, ended = jax.lax.scan(frame, live, jax.random.split(key, steps))
        return live, jax.tree.map(lambda x: x.sum(0), ended)

    def env_frames(self, updates: int, batch: int, length: int) -> int:
        """Return the frames that one seed has played after `updates`, the prefill included."""
        return self.play.env_frames(updates, batch, length)

    def finish(self, live: OnlineState) -> None:
        """Export the replay as a dataset, if asked to."""
        if self.dataset is None:
            return
        data, counts = jax.device_get((live.ring.data._replace(memory=()), live.ring.written))
        rings = [
            (jax.tree.map(lambda x, i=i: x[i], data), int(count)) for i, count in enumerate(counts)
        ]
        replay.export(self.dataset, rings, self.layout, self.env.spec, dict(self.facts))

    @property
    def owes_export(self) -> bool:
        """Whether a dataset of the replay is asked for and not there."""
        return not replay.exported(self.dataset)

    def as_saved(self, state: dict[str, Any]) -> 'Online':
        """Return the source with the replay's size of a saved run."""
        return dataclasses.replace(self, play=self.play.as_saved(state))

    def enlarged(self, live: OnlineState) -> OnlineState:
        """Return the live state [seeds, ...] of a smaller replay with a ring of this size."""
        ring, written = live.ring, int(live.ring.written.max())
        data = replay.enlarged(ring.data, written, self.play.slots, 2)
        return live._replace(ring=ring._replace(data=data))

    def get_state(self) -> dict[str, Any]:
        """Return what must be the same when a run continues; all that changes is in `live`."""
        return {'source': 'online', 'env': self.env.spec.name, **dataclasses.asdict(self.play)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raise UserError naming what differs from the saved run."""
        check_same(state, self.get_state())


def check_same(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise UserError naming what differs between the source of a saved run and this one, whose
    capacity may be larger.
    """
    differing = [
        f'{k}: saved {saved.get(k)!r}, given {x!r}'
        for k, x in given.items()
        if saved.get(k) != x and not (k == 'capacity' and x > saved.get(k, math.inf))
    ]
    if differing:
        raise UserError(f'the run was made with another source; {"; ".join(differing)}')
