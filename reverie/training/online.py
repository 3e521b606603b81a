"""Sources that play while they train: `Online` for environments on the device, `OnlineHost` for those on the host.

Both keep streams of steps in a ring (`data.replay`) and play as many frames per update as the train ratio says:
frames = batch * length / ratio, in whole vector steps. An explorer acts; what it remembers of a step (say, its latent
state) may be kept in the ring, handed to the loss as `Batch.context`, and be replaced by what the loss returns.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from reverie.data import replay
from reverie.data.replay import HostRing, Layout, Ring, Rows, Stored
from reverie.envs.device import Vector
from reverie.training.state import available_bytes, own_buffers
from reverie.types import ActionSpace, Batch, Env, EnvSpec, Explorer, Mean, Metrics, Params, State, Step, UserError


def vector_steps(ratio: float | int, batch: int, length: int, envs: int) -> int:
    """Steps of all environments per update. Raises UserError unless that is a whole number."""
    frames = batch * length / ratio if ratio > 0 else math.nan
    steps = frames / envs
    if not (steps >= 1 and abs(steps - round(steps)) < 1e-6):
        raise UserError(
            f'train ratio {ratio:g} with a batch of {batch} x {length} steps makes {frames:g} frames per update, '
            f'{steps:g} of each of {envs} environments; expected a whole number, at least 1'
        )
    return round(steps)


def check_memory(what: str, needed: int, available: int | None) -> None:
    """Raises UserError if a replay does not fit."""
    if available is not None and needed > available:
        raise UserError(
            f'{what} takes {needed / 1e9:.3g} GB, but {available / 1e9:.3g} GB are free; expected a smaller capacity'
        )


@dataclasses.dataclass(frozen=True)
class Play:
    """How much is played and kept, for one seed.

    envs: environments side by side.
    capacity: steps that replay holds, of all of them together.
    ratio: train ratio, replayed steps per frame played.
    prefill: frames played before the first update; at least what makes one window.
    random_prefill: the prefill is uniformly random instead of the explorer's.
    online: each new window is trained on once as soon as it is complete (the online queue of DreamerV3).
    """

    envs: int
    capacity: int
    ratio: float | int
    prefill: int = 0
    random_prefill: bool = True
    online: bool = True

    def __post_init__(self):
        if self.envs < 1 or self.prefill < 0:
            raise UserError(f'{self.envs} environments and prefill {self.prefill}; expected at least 1 and 0')

    @property
    def slots(self) -> int:
        """Of each environment's stream."""
        return self.capacity // self.envs

    def check(self, batch: int, length: int) -> None:
        """Raises UserError, naming the numbers, if updates of batch x length cannot be fed."""
        vector_steps(self.ratio, batch, length, self.envs)
        if self.slots < length + 1:
            raise UserError(
                f'a capacity of {self.capacity} steps is {self.slots} of each of {self.envs} environments; '
                f'expected at least {length + 1}, a window of {length} and the step before it'
            )

    def prefill_steps(self, length: int) -> int:
        """Vector steps before the first update, a window's worth at least."""
        return max(math.ceil(self.prefill / self.envs), length)

    def env_frames(self, updates: int, batch: int, length: int) -> int:
        """Frames played after `updates`, the prefill included."""
        steps = self.prefill_steps(length) + updates * vector_steps(self.ratio, batch, length, self.envs)
        return steps * self.envs


def random_actions(actions: ActionSpace, key: PRNGKeyArray, n: int) -> Array:
    """Uniform: index [n] if discrete, [n, A] in [-1, 1] if continuous."""
    if actions.kind == 'discrete':
        return jax.random.randint(key, (n,), 0, actions.size)
    return jax.random.uniform(key, (n, actions.size), minval=-1.0, maxval=1.0)


class Scores(NamedTuple):
    """Of the episode that each environment is in."""

    ret: Float[Any, ' N']
    length: Int[Any, ' N']  # steps after the reset


def score(scores: Scores, step: Step, xp: Any = jnp) -> tuple[Scores, Metrics]:
    """A step [N] arrived: -> (scores, sums over the episodes that ended with it)."""
    ret = xp.where(step.is_first, 0, scores.ret + step.reward).astype(np.float32)
    length = xp.where(step.is_first, 0, scores.length + 1).astype(np.int32)
    ended = step.is_last.sum().astype(np.float32)
    total = lambda x: xp.where(step.is_last, x, 0).sum().astype(np.float32)
    return Scores(ret, length), {'env/return': Mean(total(ret), ended), 'env/length': Mean(total(length), ended)}


class Playing(NamedTuple):
    """`live` of one seed: everything that changes while it plays."""

    env: PyTree
    step: Step  # [N] arrived, not yet acted on, not yet in the ring
    actor: State
    scores: Scores
    ring: Ring


@dataclasses.dataclass(frozen=True)
class Online:
    """Environments and replay on the device: collecting and learning are one program, vmapped over seeds.

    env: one pure-JAX environment; play.envs copies run.
    explorer: acts with the agent's parameters.
    play: how much is played and kept, by each seed.
    dataset: where the replay of all seeds is left as a native dataset at the end of training, if anywhere.
    facts: what its manifest says of where it comes from.
    """

    env: Env
    explorer: Explorer
    play: Play
    dataset: str | os.PathLike | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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

    def check(self, params: Params, batch: int, length: int, seeds: int) -> None:
        """Raises UserError if ratio, capacity or memory do not fit; `params` may be shapes."""
        self.play.check(batch, length)
        like = jax.eval_shape(self._first_stored, params, jax.random.key(0))
        each = replay.bytes_per_step(like)
        needed = each * self.play.envs * self.play.slots * seeds
        what = f'replay of {self.play.capacity} steps of {each} bytes for {seeds} seeds'
        check_memory(what, needed, available_bytes(jax.devices()[0]))

    def _start(self, params: Params, key: PRNGKeyArray, batch: int, slots: int) -> Playing:
        """Traced: environments reset, nothing in the ring."""
        n = self.play.envs
        env, step = self.vector.reset(key)
        actor = self.explorer.initial(params, n)
        stored = replay.to_stored(step, self.explorer.memory(actor), self.actions)
        scores = Scores(jnp.zeros(n), jnp.zeros(n, jnp.int32))
        return Playing(env, step, actor, scores, replay.empty(stored, slots, batch))

    def _first_stored(self, params: Params, key: PRNGKeyArray) -> Stored:
        return jax.tree.map(lambda x: x[:, 0], self._start(params, key, 1, 1).ring.data)

    def begin(self, params: Params, key: PRNGKeyArray, batch: int, length: int) -> Playing:
        """Traced: the prefill is played. Every leaf has its own buffer."""
        self.play.check(batch, length)
        reset_key, key = jax.random.split(key)
        live = self._start(params, reset_key, batch, self.play.slots)
        live, _ = self._collect(live, params, key, self.play.prefill_steps(length), self.play.random_prefill)
        # The ring was written to, so its buffers are its own; copied like the rest, it would take its memory twice.
        rest: Any = own_buffers(live._asdict() | {'ring': live.ring._asdict() | {'data': None}})
        return Playing(**rest | {'ring': Ring(**rest['ring'] | {'data': live.ring.data})})

    def next(
        self, live: Playing, params: Params, key: PRNGKeyArray, batch: int, length: int
    ) -> tuple[Playing, Batch, Metrics]:
        """Traced: plays, writes, and draws a batch."""
        play_key, draw_key = jax.random.split(key)
        steps = vector_steps(self.play.ratio, batch, length, self.play.envs)
        live, metrics = self._collect(live, params, play_key, steps, False)
        ring = replay.choose(live.ring, draw_key, length, self.play.online)
        rows, context = replay.windows(ring, length)
        return live._replace(ring=ring), replay.to_batch(rows, context, self.layout), metrics

    def absorb(self, live: Playing, memory: PyTree, ok: Bool[Array, '']) -> Playing:
        """Traced: new memories [B, T, ...] of the last batch into the ring.

        In place if they depend on the batch's context, as latent states do; else XLA may read the context after the
        write, for which it copies the stored memories at each update.
        """
        return live._replace(ring=replay.absorb(live.ring, memory, ok))

    def _collect(
        self, live: Playing, params: Params, key: PRNGKeyArray, steps: int, random: bool
    ) -> tuple[Playing, Metrics]:
        """Plays and writes `steps` vector steps -> (live, sums over the episodes that ended)."""

        def frame(live: Playing, key: PRNGKeyArray) -> tuple[Playing, Metrics]:
            act_key, env_key = jax.random.split(key)
            actor = live.actor
            if random:
                action = random_actions(self.actions, act_key, self.play.envs)
            else:
                actor, action = self.explorer.act(params, actor, live.step, act_key, False)
            stored = replay.to_stored(live.step, self.explorer.memory(actor), self.actions)
            ring = replay.write(live.ring, stored)
            env, step = self.vector.step(live.env, action, env_key)
            scores, ended = score(live.scores, step)
            return Playing(env, step, actor, scores, ring), ended

        live, ended = jax.lax.scan(frame, live, jax.random.split(key, steps))
        return live, jax.tree.map(lambda x: x.sum(0), ended)

    def env_frames(self, updates: int, batch: int, length: int) -> int:
        """Frames that one seed has played after `updates`, the prefill included."""
        return self.play.env_frames(updates, batch, length)

    def finish(self, live: Playing) -> None:
        """Leaves the replay behind as a dataset, if asked to."""
        if self.dataset is None:
            return
        data, counts = jax.device_get((live.ring.data._replace(memory=()), live.ring.written))
        rings = [(jax.tree.map(lambda x, i=i: x[i], data), int(count)) for i, count in enumerate(counts)]
        replay.export(self.dataset, rings, self.layout, self.env.spec, dict(self.facts), overwrite=True)

    def get_state(self) -> dict[str, Any]:
        """What must be the same when a run continues; all that changes is in `live`."""
        return {'source': 'online', 'env': self.env.spec.name, **dataclasses.asdict(self.play)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises UserError naming what differs from the saved run."""
        _check_same(state, self.get_state())


def _check_same(saved: dict[str, Any], given: dict[str, Any]) -> None:
    differing = [f'{k}: saved {saved.get(k)!r}, given {x!r}' for k, x in given.items() if saved.get(k) != x]
    if differing:
        raise UserError(f'the run was made with another source; {"; ".join(differing)}')


# ------------------------------------------------------------------------------------ environments on the host


@runtime_checkable
class HostEnvs(Protocol):
    """N environments on the host with auto-reset in the arrival convention, e.g. `envs.host.HostVector`.

    If there are `send(action)` and `receive() -> Step`, the two halves of `step`, the environments move meanwhile.
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


class Player:
    """One seed's environments, replay and explorer on the host."""

    def __init__(self, vector: HostEnvs, play: Play, memory: PyTree, seed: int):
        self.vector: Any = vector
        self.play, self.seed = play, seed
        self.rng, self.acted = np.random.default_rng(seed), 0
        self.actions = vector.spec.actions
        self.step = vector.reset()
        if self.step.reward.shape[0] != play.envs:
            raise UserError(f'{self.step.reward.shape[0]} environments are there, expected the {play.envs} of play')
        self.layout = Layout.of(self.step, self.actions)
        self.blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), memory)
        self.like = replay.to_stored(self.step, self.blank, self.actions, np)

    def begin(self) -> None:
        """New episodes, an explorer that remembers nothing, and an empty ring; chance goes on."""
        self.ring = HostRing(self.like, self.play.slots)
        self.step, self.due, self.actor = self.vector.reset(), False, None
        n = self.play.envs
        self.scores = Scores(np.zeros(n, np.float32), np.zeros(n, np.int32))
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


class OnlineHost:
    """Environments and replay on the host, whose play overlaps with training.

    While the device works on one call of updates, `load` plays and draws the next call's batches. So the explorer acts
    with the weights from before the call that is being worked on, and memories come back two calls later: always, not
    as timing has it, so that a seed determines a run. Where the device does one thing at a time (a GPU), acting waits
    for training unless it has a device of its own.

    vectors: the environments of each seed.
    explorer: acts with the agent's parameters.
    play: how much is played and kept, by each seed.
    seed: of actions and draws; seed i of the run uses seed + i. The vectors have seeds of their own.
    acting: device to act on, e.g. jax.devices('cpu')[0] beside a GPU; the default one if None.
    dataset: where the replay of all seeds is left as a native dataset at the end of training, if anywhere.
    facts: what its manifest says of where it comes from.
    """

    def __init__(
        self,
        vectors: Sequence[HostEnvs],
        explorer: Explorer,
        play: Play,
        seed: int = 0,
        acting: jax.Device | None = None,
        dataset: str | os.PathLike | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        self.vectors, self.explorer, self.play, self.seed = tuple(vectors), explorer, play, seed
        self.acting, self.dataset, self.facts = acting, dataset, dict(facts or {})
        self.data: dict[str, Any] = {}
        self.players: list[Player] = []
        self.weights: list[Params] = []
        self._begin()
        self._act = jax.jit(self._acted)
        self._take = jax.jit(lambda params, i: jax.tree.map(lambda x: x[i], params), static_argnums=1)

    def _acted(self, params: Params, actor: State, step: Step, chance: Array) -> tuple[State, Array, PyTree]:
        key = jax.random.fold_in(jax.random.key(chance[0]), chance[1])
        actor, action = self.explorer.act(params, actor, step, key, False)
        return actor, action, self.explorer.memory(actor)

    def check(self, params: Params, batch: int, length: int, seeds: int) -> None:
        """Raises UserError if ratio, capacity, memory or seeds do not fit; `params` may be shapes."""
        self.play.check(batch, length)
        if seeds != len(self.vectors):
            raise UserError(f'{len(self.vectors)} vectors of environments for {seeds} seeds, expected one for each')
        if not self.players:
            n = self.play.envs
            memory = jax.eval_shape(lambda p: self.explorer.memory(self.explorer.initial(p, n)), params)
            self.players = [Player(v, self.play, memory, self.seed + i) for i, v in enumerate(self.vectors)]
        each = replay.bytes_per_step(self.players[0].like)
        what = f'replay of {self.play.capacity} steps of {each} bytes for {seeds} seeds'
        check_memory(what, each * self.play.envs * self.play.slots * seeds, available_bytes())
        self._begin()

    def _begin(self) -> None:
        """As at the start of a phase."""
        self.over, self.loads = False, 0
        self.asked: dict[int, list[list[Rows]]] = {}  # by load: [updates][seeds]
        self.answers: list[tuple[PyTree, np.ndarray]] = []  # of the oldest in `asked` on
        for player in self.players:
            player.begin()

    def follow(self, params: Params) -> None:
        """The weights [seeds, ...] to act with from the next `load` on."""
        if self.over:  # another phase begins
            self._begin()
        self.weights = [self._take(params, i) for i in range(len(self.players))]
        if self.acting is not None:
            self.weights = jax.device_put(self.weights, self.acting)

    def load(self, updates: int, batch: int, length: int, seeds: int, relevant: float = 0.0) -> dict[str, Any]:
        """Plays, and draws the next `updates` batches: NumPy arrays in stored form, [updates, seeds, B, ...]."""
        self._take_answers()
        steps = vector_steps(self.play.ratio, batch, length, self.play.envs)
        rows, found = [], []
        for _ in range(updates):
            rows.append([self._draw(i, steps, batch, length) for i in range(len(self.players))])
            for player, drawn in zip(self.players, rows[-1], strict=True):
                found.append(player.ring.windows(drawn, length))
        self.asked[self.loads] = rows
        self.loads += 1
        stacked = jax.tree.map(lambda *x: np.stack(x).reshape(updates, seeds, *x[0].shape), *found)
        return {'rows': stacked[0], 'context': stacked[1]}

    def _draw(self, seed: int, steps: int, batch: int, length: int) -> Rows:
        """Play `steps` vector steps of one seed, after the prefill if nothing was played yet, and choose rows."""
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
        self, data: PyTree, loaded: PyTree, key: PRNGKeyArray, batch: int, length: int, relevant: float = 0.0
    ) -> Batch:
        """Traced: one update's share of `load` as a Batch."""
        return replay.to_batch(loaded['rows'], loaded['context'], self.players[0].layout)

    def absorb(self, memory: PyTree, ok: Bool[np.ndarray, 'seeds updates']) -> None:
        """Memories [seeds, updates, B, T, ...] of the oldest `load` not answered yet; kept where `ok`."""
        self.answers.append((memory, ok))

    def _take_answers(self) -> None:
        """Memories of the load before the last one, not of a later one: a checkpoint may bring those early."""
        while self.answers and min(self.asked) <= self.loads - 2:
            (memory, ok), rows = self.answers.pop(0), self.asked.pop(min(self.asked))
            for u, of_seeds in enumerate(rows):
                for i, drawn in enumerate(of_seeds):
                    if ok[i, u]:
                        new = jax.tree.map(lambda x, i=i, u=u: x[i, u], memory)
                        self.players[i].ring.absorb(drawn, new)
        for load in [load for load in self.asked if load < self.loads - 2]:  # the loss gives no memories
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
        """The replay of a checkpoint. Environments begin anew, so the episodes that were open end there."""
        for player, saved in zip(self.players, arrays, strict=True):
            player.begin()
            player.ring.set_arrays(saved)
            player.ring.cut()

    def finish(self, live: PyTree) -> None:
        """Leaves the replay behind as a dataset, if asked to."""
        if self.dataset is not None:
            rings = [(player.ring.data, player.ring.written) for player in self.players]
            replay.export(self.dataset, rings, self.players[0].layout, self.vectors[0].spec, self.facts, overwrite=True)
        self.over = True

    def get_state(self) -> dict[str, Any]:
        """JSON-serialisable: what must be the same when a run continues, and where chance is."""
        chance = [{'rng': p.rng.bit_generator.state, 'acted': p.acted} for p in self.players]
        return {**self._same(), 'chance': chance}

    def _same(self) -> dict[str, Any]:
        env = self.vectors[0].spec.name
        return {'source': 'online_host', 'env': env, 'seed': self.seed, **dataclasses.asdict(self.play)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises UserError naming what differs from the saved run."""
        _check_same(state, self._same())
        for player, saved in zip(self.players, state['chance'], strict=True):
            player.rng.bit_generator.state = saved['rng']
            player.acted = saved['acted']
