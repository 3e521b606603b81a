"""Source that plays in environments on the host while an agent learns, as `online` does on the
device.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from reverie.data import replay
from reverie.data.replay import DrawnRows, HostRing, Layout
from reverie.data.source import Source
from reverie.training.online import (
    CollectConfig,
    EpisodeTally,
    check_memory,
    check_same,
    score,
    vector_steps,
)
from reverie.training.state import available_bytes
from reverie.types import Batch, EnvSpec, Explorer, Mean, Metrics, Params, State, Step, UserError


@runtime_checkable
class HostEnvs(Protocol):
    """N environments on the host, with auto-reset in the arrival convention."""

    @property
    def spec(self) -> EnvSpec: ...

    def reset(self) -> Step:
        """Return Step [N] of NumPy arrays, all `is_first`."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """Move by an action, index [N] if discrete, [N, A] if continuous; return Step [N]."""
        ...


@runtime_checkable
class OverlappingEnvs(HostEnvs, Protocol):
    """Environments whose `step` has two halves, between which they move; e.g. worker processes."""

    def send(self, action: np.ndarray) -> None: ...

    def receive(self) -> Step: ...


def none_ended() -> Metrics:
    """Return the sums of `score` where no episode ended."""
    none = Mean(np.zeros((), np.float32), np.zeros((), np.float32))
    return {'env/return': none, 'env/length': none}


class HostCollector:
    """Environments, replay and explorer of one seed on the host.

    act: (params, explorer's state, step, [seed, count]) -> (state, action, memory), compiled.
    memory: shapes of what the explorer remembers of a step [N].
    """

    def __init__(
        self,
        vector: HostEnvs,
        explorer: Explorer,
        act: Callable[..., tuple[State, Array, PyTree]],
        play: CollectConfig,
        memory: PyTree,
        seed: int,
    ):
        self.vector = vector
        self.overlapping = vector if isinstance(vector, OverlappingEnvs) else None
        self.explorer, self.act = explorer, act
        self.play, self.seed = play, seed
        self.rng, self.acted = np.random.default_rng(seed), 0
        self.actions = vector.spec.actions
        self.params: Params = {}
        self.step = vector.reset()
        if self.step.reward.shape[0] != play.envs:
            raise UserError(
                f'{self.step.reward.shape[0]} environments are there, expected the {play.envs} of play'
            )
        self.layout = Layout.of(self.step, self.actions)
        self.blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), memory)
        self.like = replay.to_stored(self.step, self.blank, self.actions, np)

    def begin(self) -> None:
        """Begin new episodes with an empty ring and explorer; random numbers go on."""
        self.ring = HostRing(self.like, self.play.slots)
        self.step, self.due = self.vector.reset(), False
        self.actor: State = None
        n = self.play.envs
        self.scores = EpisodeTally(np.zeros(n, np.float32), np.zeros(n, np.int32))
        self.ended = none_ended()

    def draw(self, batch: int, length: int) -> DrawnRows:
        """Play one update's share, after the prefill if nothing was played yet, and choose rows."""
        if not self.ring.written:
            self._prefill(self.play.prefill_steps(length))
        self._explore(vector_steps(self.play.ratio, batch, length, self.play.envs))
        return self.ring.choose(self.rng, batch, length, self.play.online)

    def take_ended(self) -> Metrics:
        """Return sums over the episodes that ended since the last call."""
        ended, self.ended = self.ended, none_ended()
        return ended

    def _prefill(self, steps: int) -> None:
        """Play at random or by the explorer; its episodes are not scored."""
        if self.play.random_prefill:
            for _ in range(steps):
                self._advance(self.actions.draw(self.rng, self.play.envs), self.blank)
        else:
            self._explore(steps)
        self._arrived()
        self.ended = none_ended()

    def _explore(self, steps: int) -> None:
        """Play `steps` vector steps by the explorer."""
        if self.actor is None:
            self.actor = self.explorer.initial(self.params, self.play.envs)
        for _ in range(steps):
            chance = np.array([self.seed, self.acted], np.uint32)
            self.actor, action, memory = self.act(self.params, self.actor, self._arrived(), chance)
            self.acted += 1
            # Read before the environments move: they may reuse the memory of their observations.
            action, memory = jax.device_get((action, memory))
            self._advance(action, memory)

    def _advance(self, action: np.ndarray, memory: PyTree) -> None:
        """Write the step that was acted on, while the environments are on their way to the next."""
        stored = replay.to_stored(self._arrived(), memory, self.actions, np)
        if self.overlapping is None:
            self.ring.write(stored)
            self._arrive(self.vector.step(action))
        else:
            self.overlapping.send(action)
            self.ring.write(stored)
            self.due = True

    def _arrived(self) -> Step:
        """Return the step to act on; wait for the environments if they still move."""
        if self.due and self.overlapping is not None:
            self._arrive(self.overlapping.receive())
        return self.step

    def _arrive(self, step: Step) -> None:
        self.step, self.due = step, False
        self.scores, ended = score(self.scores, step, np)
        self.ended = jax.tree.map(np.add, self.ended, ended)


class OnlineHost(Source):
    """Environments and replay on the host, whose play overlaps with training.

    While the device works on one call of updates, `load` plays and draws the next call's batches.
    So the explorer acts with the weights from before the call that is being worked on, and memories
    come back two calls later: always, not as timing has it, so that a seed determines a run. Where
    the device does one thing at a time (a GPU), acting waits for training unless it has a device of
    its own.

    vectors: environments of each seed, which have random seeds of their own.
    explorer: acts with the agent's parameters.
    play: amounts of play and replay, of each seed.
    seed: of actions and draws; seed i of the run uses seed + i.
    acting: device to act on, e.g. jax.devices('cpu')[0] beside a GPU; None for the default one.
    dataset: path to export the replay of all seeds to at the end of training.
    facts: provenance of `dataset`.
    """

    plays: ClassVar[bool] = True

    def __init__(
        self,
        vectors: Sequence[HostEnvs],
        explorer: Explorer,
        play: CollectConfig,
        seed: int = 0,
        acting: jax.Device | None = None,
        dataset: str | os.PathLike[str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        self.vectors, self.explorer = tuple(vectors), explorer
        self.play, self.seed = play, seed
        self.acting, self.dataset = acting, dataset
        self.facts = dict(facts or {})
        self.players: list[HostCollector] = []
        self._begin()
        self._act = jax.jit(self._acted)
        self._take = jax.jit(
            lambda params, i: jax.tree.map(lambda x: x[i], params), static_argnums=1
        )

    def _acted(
        self, params: Params, actor: State, step: Step, chance: Array
    ) -> tuple[State, Array, PyTree]:
        key = jax.random.fold_in(jax.random.key(chance[0]), chance[1])
        actor, action = self.explorer.act(params, actor, step, key, False)
        return actor, action, self.explorer.memory(actor)

    def check(
        self, params: Params, batch: int, length: int, seeds: int, relevant: float = 0.0
    ) -> None:
        """Raise UserError if ratio, capacity, memory, seeds or the export's target do not fit;
        `params` may be shapes.
        """
        self.play.check(batch, length)
        if seeds != len(self.vectors):
            raise UserError(
                f'{len(self.vectors)} vectors of environments for {seeds} seeds, expected one for each'
            )
        if not self.players:
            n = self.play.envs
            memory = jax.eval_shape(
                lambda p: self.explorer.memory(self.explorer.initial(p, n)), params
            )
            self.players = [
                HostCollector(v, self.explorer, self._act, self.play, memory, self.seed + i)
                for i, v in enumerate(self.vectors)
            ]
        if self.dataset is not None:
            replay.check_export(self.dataset, self.players[0].layout, self.vectors[0].spec)
        each = replay.bytes_per_step(self.players[0].like)
        what = f'replay of {self.play.capacity} steps of {each} bytes for {seeds} seeds'
        check_memory(what, each * self.play.envs * self.play.slots * seeds, available_bytes())
        self._begin()

    def _begin(self) -> None:
        """Begin a phase: new episodes and empty rings, nothing asked."""
        self.over, self.loads = False, 0
        self.asked: dict[int, list[list[DrawnRows]]] = {}  # by load: [updates][seeds]
        self.answers: list[tuple[PyTree, np.ndarray]] = []  # of the oldest in `asked` on
        for player in self.players:
            player.begin()

    def set_params(self, params: Params) -> None:
        """Copy the weights [seeds, ...] to act with from the next `load` on."""
        if self.over:  # another phase begins
            self._begin()
        for i, player in enumerate(self.players):
            mine = self._take(params, i)
            player.params = mine if self.acting is None else jax.device_put(mine, self.acting)

    def load(
        self, updates: int, batch: int, length: int, seeds: int, relevant: float = 0.0
    ) -> dict[str, Any]:
        """Play, and draw the next batches: NumPy arrays in stored form, [updates, seeds, B, ...]."""
        self._take_answers()
        rows, found = [], []
        for _ in range(updates):
            rows.append([player.draw(batch, length) for player in self.players])
            for player, drawn in zip(self.players, rows[-1], strict=True):
                found.append(player.ring.windows(drawn, length, self.play.context))
        self.asked[self.loads] = rows
        self.loads += 1
        stacked = jax.tree.map(lambda *x: np.stack(x).reshape(updates, seeds, *x[0].shape), *found)
        return {'rows': stacked[0], 'context': stacked[1]}

    def sample(
        self,
        live: PyTree,
        params: Params,
        data: PyTree,
        loaded: PyTree,
        key: PRNGKeyArray,
        batch: int,
        length: int,
        relevant: float = 0.0,
    ) -> tuple[PyTree, Batch, Metrics]:
        """Traced: make a Batch of one update's share of `load`; every row is relevant."""
        rows, context = loaded['rows'], loaded['context']
        return live, replay.to_batch(rows, context, self.players[0].layout), {}

    def write_memory(
        self, live: PyTree, memory: PyTree, ok: Bool[Array, '']
    ) -> tuple[PyTree, PyTree]:
        """Traced: hand all memories [B, T, ...] to the host."""
        return live, memory

    def write_back(self, memory: PyTree, ok: Bool[np.ndarray, 'seeds updates']) -> None:
        """Take memories [seeds, updates, B, T, ...] of the oldest unanswered `load`; keep them
        where `ok`.
        """
        self.answers.append((memory, ok))

    def _take_answers(self) -> None:
        """Write memories of the load before the last one, not of a later one: a checkpoint may
        bring those early.
        """
        while self.answers and min(self.asked) <= self.loads - 2:
            (memory, ok), rows = self.answers.pop(0), self.asked.pop(min(self.asked))
            for u, of_seeds in enumerate(rows):
                for i, drawn in enumerate(of_seeds):
                    if ok[i, u]:
                        new = jax.tree.map(lambda x, i=i, u=u: x[i, u], memory)
                        self.players[i].ring.write_memory(drawn, new)
        # A loss that gives no memories never answers.
        self.asked = {load: x for load, x in self.asked.items() if load >= self.loads - 2}

    def metrics(self) -> dict[str, Mean]:
        """Return sums over the episodes that ended since the last call, fields [seeds]."""
        ended = [player.take_ended() for player in self.players]
        metrics: dict[str, Mean] = jax.tree.map(lambda *x: np.stack(x), *ended)
        return metrics

    def env_frames(self, updates: int, batch: int, length: int) -> int:
        """Return the frames that one seed has played after `updates`, the prefill included."""
        return self.play.env_frames(updates, batch, length)

    @property
    def owes_export(self) -> bool:
        """Whether a dataset of the replay is asked for and not there."""
        return not replay.exported(self.dataset)

    def as_saved(self, state: dict[str, Any]) -> 'Source':
        """Return a copy with empty rings of a saved run's size, to read its arrays into."""
        play = self.play.as_saved(state)
        if play == self.play:
            return self
        saved = copy.copy(self)
        saved.players = [copy.copy(player) for player in self.players]
        for player in saved.players:
            player.ring = HostRing(player.like, play.slots)
        return saved

    def arrays(self) -> list[dict[str, Any]]:
        """Return the replay of every seed for a checkpoint, not copied."""
        return [player.ring.arrays() for player in self.players]

    def set_arrays(self, arrays: list[dict[str, Any]]) -> None:
        """Restore the replay of a checkpoint; environments are reset, so open episodes end there."""
        for player, saved in zip(self.players, arrays, strict=True):
            player.begin()
            player.ring.set_arrays(saved)
            player.ring.cut()

    def finish(self, live: PyTree) -> None:
        """Export the replay as a dataset, if asked to."""
        if self.dataset is not None:
            rings = [(player.ring.data, player.ring.written) for player in self.players]
            replay.export(
                self.dataset, rings, self.players[0].layout, self.vectors[0].spec, self.facts
            )
        self.over = True

    def get_state(self) -> dict[str, Any]:
        """Return what must be the same when a run continues, and where random numbers are."""
        chance = [{'rng': p.rng.bit_generator.state, 'acted': p.acted} for p in self.players]
        return {**self._same(), 'chance': chance}

    def _same(self) -> dict[str, Any]:
        env, play = self.vectors[0].spec.name, dataclasses.asdict(self.play)
        return {'source': 'online_host', 'env': env, 'seed': self.seed, **play}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore random numbers; raise UserError naming what differs from the saved run."""
        check_same(state, self._same())
        for player, saved in zip(self.players, state['chance'], strict=True):
            player.rng.bit_generator.state = saved['rng']
            player.acted = saved['acted']
