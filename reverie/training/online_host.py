"""A source that plays while it trains, for environments on the host: `OnlineHost`. See `online` for
what it does.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from reverie.data import replay
from reverie.data.replay import DrawnRows, HostRing, Layout
from reverie.training.online import (
    CollectConfig,
    EpisodeTally,
    check_memory,
    check_same,
    score,
    vector_steps,
)
from reverie.training.state import available_bytes
from reverie.types import (
    Batch,
    EnvSpec,
    Explorer,
    Mean,
    Metrics,
    Params,
    Source,
    State,
    Step,
    UserError,
)


@runtime_checkable
class HostEnvs(Protocol):
    """N environments on the host with auto-reset in the arrival convention, e.g.
    `envs.host.HostVector`.

    If there are `send(action)` and `receive() -> Step`, the two halves of `step`, the environments
    move meanwhile.
    """

    @property
    def spec(self) -> EnvSpec: ...

    def reset(self) -> Step:
        """-> Step [N] of NumPy arrays, all `is_first`."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """action: index [N] if discrete, [N, A] if continuous -> Step [N]."""
        ...


def none_ended() -> Metrics:
    """What `score` gives where no episode ended."""
    none = Mean(np.zeros((), np.float32), np.zeros((), np.float32))
    return {'env/return': none, 'env/length': none}


class HostCollector:
    """One seed's environments, replay and explorer on the host."""

    def __init__(self, vector: HostEnvs, play: CollectConfig, memory: PyTree, seed: int):
        self.vector: Any = vector
        self.play, self.seed = play, seed
        self.rng, self.acted = np.random.default_rng(seed), 0
        self.actions = vector.spec.actions
        self.step = vector.reset()
        if self.step.reward.shape[0] != play.envs:
            raise UserError(
                f'{self.step.reward.shape[0]} environments are there, expected the {play.envs} of play'
            )
        self.layout = Layout.of(self.step, self.actions)
        self.blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), memory)
        self.like = replay.to_stored(self.step, self.blank, self.actions, np)

    def begin(self) -> None:
        """New episodes, an explorer that remembers nothing, and an empty ring; chance goes on."""
        self.ring = HostRing(self.like, self.play.slots)
        self.step, self.due, self.actor = self.vector.reset(), False, None
        n = self.play.envs
        self.scores = EpisodeTally(np.zeros(n, np.float32), np.zeros(n, np.int32))
        self.ended = none_ended()

    def advance(self, action: np.ndarray, memory: PyTree) -> None:
        """Write the step that was acted on, while the environments are on their way to the next."""
        stored = replay.to_stored(self.arrived(), memory, self.actions, np)
        send = getattr(self.vector, 'send', None)
        if send is not None:
            send(action)
        self.ring.write(stored)
        self.arrive(self.vector.step(action) if send is None else None)

    def arrive(self, step: Step | None) -> None:
        """The next step, now or, if it is still to be received, when it is asked for."""
        self.due = step is None
        if step is not None:
            self.step = step
            self.scores, ended = score(self.scores, step, np)
            self.ended = jax.tree.map(np.add, self.ended, ended)

    def arrived(self) -> Step:
        """The step to act on; waits for the environments."""
        if self.due:
            self.arrive(self.vector.receive())
        return self.step

    def prefill(self, steps: int) -> None:
        """Uniformly random play."""
        n, size = self.play.envs, self.actions.size
        for _ in range(steps):
            if self.actions.kind == 'discrete':
                action = self.rng.integers(0, size, n)
            else:
                action = self.rng.uniform(-1, 1, (n, size)).astype(np.float32)
            self.advance(action, self.blank)


class OnlineHost(Source):
    """Environments and replay on the host, whose play overlaps with training.

    While the device works on one call of updates, `load` plays and draws the next call's batches.
    So the explorer acts with the weights from before the call that is being worked on, and memories
    come back two calls later: always, not as timing has it, so that a seed determines a run. Where
    the device does one thing at a time (a GPU), acting waits for training unless it has a device of
    its own.

    vectors: the environments of each seed.
    explorer: acts with the agent's parameters.
    play: how much is played and kept, by each seed.
    seed: of actions and draws; seed i of the run uses seed + i. The vectors have seeds of their
    own.
    acting: device to act on, e.g. jax.devices('cpu')[0] beside a GPU; the default one if None.
    dataset: where the replay of all seeds is left as a native dataset at the end of training, if
    anywhere.
    facts: what its manifest says of where it comes from.
    """

    plays: ClassVar[bool] = True

    def __init__(
        self,
        vectors: Sequence[HostEnvs],
        explorer: Explorer,
        play: CollectConfig,
        seed: int = 0,
        acting: jax.Device | None = None,
        dataset: str | os.PathLike | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        self.vectors, self.explorer, self.play, self.seed = tuple(vectors), explorer, play, seed
        self.acting, self.dataset, self.facts = acting, dataset, dict(facts or {})
        self.players: list[HostCollector] = []
        self.weights: list[Params] = []
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

    def check(self, params: Params, batch: int, length: int, seeds: int) -> None:
        """Raises UserError if ratio, capacity, memory or seeds do not fit; `params` may be shapes."""
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
                HostCollector(v, self.play, memory, self.seed + i)
                for i, v in enumerate(self.vectors)
            ]
        each = replay.bytes_per_step(self.players[0].like)
        what = f'replay of {self.play.capacity} steps of {each} bytes for {seeds} seeds'
        check_memory(what, each * self.play.envs * self.play.slots * seeds, available_bytes())
        self._begin()

    def _begin(self) -> None:
        """As at the start of a phase."""
        self.over, self.loads = False, 0
        self.asked: dict[int, list[list[DrawnRows]]] = {}  # by load: [updates][seeds]
        self.answers: list[tuple[PyTree, np.ndarray]] = []  # of the oldest in `asked` on
        for player in self.players:
            player.begin()

    def set_params(self, params: Params) -> None:
        """Copy the weights [seeds, ...] to act with from the next `load` on."""
        if self.over:  # another phase begins
            self._begin()
        self.weights = [self._take(params, i) for i in range(len(self.players))]
        if self.acting is not None:
            self.weights = jax.device_put(self.weights, self.acting)

    def load(
        self, updates: int, batch: int, length: int, seeds: int, relevant: float = 0.0
    ) -> dict[str, Any]:
        """Plays, and draws the next `updates` batches: NumPy arrays in stored form, [updates,
        seeds, B, ...].
        """
        self._take_answers()
        steps = vector_steps(self.play.ratio, batch, length, self.play.envs)
        rows, found = [], []
        for _ in range(updates):
            rows.append([self._draw(i, steps, batch, length) for i in range(len(self.players))])
            for player, drawn in zip(self.players, rows[-1], strict=True):
                found.append(player.ring.windows(drawn, length, self.play.context))
        self.asked[self.loads] = rows
        self.loads += 1
        stacked = jax.tree.map(lambda *x: np.stack(x).reshape(updates, seeds, *x[0].shape), *found)
        return {'rows': stacked[0], 'context': stacked[1]}

    def _draw(self, seed: int, steps: int, batch: int, length: int) -> DrawnRows:
        """Play `steps` vector steps of one seed, after the prefill if nothing was played yet, and
        choose rows.
        """
        player, prefill = self.players[seed], self.play.prefill_steps(length)
        if not player.ring.written:
            if self.play.random_prefill:
                player.prefill(prefill)
            else:
                self._explore(seed, prefill)
            player.arrived()
            player.ended = none_ended()
        self._explore(seed, steps)
        return player.ring.choose(player.rng, batch, length, self.play.online)

    def _explore(self, seed: int, steps: int) -> None:
        player, params = self.players[seed], self.weights[seed]
        if player.actor is None:
            player.actor = self.explorer.initial(params, self.play.envs)
        for _ in range(steps):
            chance = np.array([player.seed, player.acted], np.uint32)
            player.actor, action, memory = self._act(params, player.actor, player.arrived(), chance)
            player.acted += 1
            # Read before the environments move: they may reuse the memory of their observations.
            action, memory = jax.device_get((action, memory))
            player.advance(action, memory)

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
        """Memories of the load before the last one, not of a later one: a checkpoint may bring
        those early.
        """
        while self.answers and min(self.asked) <= self.loads - 2:
            (memory, ok), rows = self.answers.pop(0), self.asked.pop(min(self.asked))
            for u, of_seeds in enumerate(rows):
                for i, drawn in enumerate(of_seeds):
                    if ok[i, u]:
                        new = jax.tree.map(lambda x, i=i, u=u: x[i, u], memory)
                        self.players[i].ring.write_memory(drawn, new)
        for load in [
            load for load in self.asked if load < self.loads - 2
        ]:  # the loss gives no memories
            del self.asked[load]

    def metrics(self) -> dict[str, Mean]:
        """Of the episodes that ended since the last call, fields [seeds]."""
        ended = [player.ended for player in self.players]
        for player in self.players:
            player.ended = none_ended()
        return jax.tree.map(lambda *x: np.stack(x), *ended)

    def env_frames(self, updates: int, batch: int, length: int) -> int:
        """Frames that one seed has played after `updates`, the prefill included."""
        return self.play.env_frames(updates, batch, length)

    def arrays(self) -> list[dict[str, Any]]:
        """The replay of every seed, for a checkpoint; not copied."""
        return [player.ring.arrays() for player in self.players]

    def set_arrays(self, arrays: list[dict[str, Any]]) -> None:
        """The replay of a checkpoint.

        Environments begin anew, so the episodes that were open end there.
        """
        for player, saved in zip(self.players, arrays, strict=True):
            player.begin()
            player.ring.set_arrays(saved)
            player.ring.cut()

    def finish(self, live: PyTree) -> None:
        """Leaves the replay behind as a dataset, if asked to."""
        if self.dataset is not None:
            rings = [(player.ring.data, player.ring.written) for player in self.players]
            replay.export(
                self.dataset,
                rings,
                self.players[0].layout,
                self.vectors[0].spec,
                self.facts,
                overwrite=True,
            )
        self.over = True

    def get_state(self) -> dict[str, Any]:
        """JSON-serialisable: what must be the same when a run continues, and where chance is."""
        chance = [{'rng': p.rng.bit_generator.state, 'acted': p.acted} for p in self.players]
        return {**self._same(), 'chance': chance}

    def _same(self) -> dict[str, Any]:
        env = self.vectors[0].spec.name
        return {
            'source': 'online_host',
            'env': env,
            'seed': self.seed,
            **dataclasses.asdict(self.play),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises UserError naming what differs from the saved run."""
        check_same(state, self._same())
        for player, saved in zip(self.players, state['chance'], strict=True):
            player.rng.bit_generator.state = saved['rng']
            player.acted = saved['acted']
