"""The fixed parts of a run, and the train states, shapes and counts that follow from them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from reverie.data.source import Source
from reverie.training import state
from reverie.training.latents import LatentCache
from reverie.training.state import TrainState
from reverie.types import Agent, Params, Phase, UserError


class Inputs(NamedTuple):
    """Inputs of a program's call beside the train state and the keys, see `update.Program`."""

    data: PyTree
    loaded: PyTree
    fixed: Params
    long: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """Agent, source and keys of a run; methods name phases by their index."""

    agent: Agent
    phases: tuple[Phase, ...]  # the agent's; those taken from another run have that run's sizes
    given: frozenset[str]  # names of the phases taken from another run
    source: Source
    keys: Key[Array, 'seeds 2']  # for initialisation, for training
    mesh: Mesh | None
    latents: LatentCache | None = None  # of recordings, for an agent with a tokenizer

    @property
    def seeds(self) -> int:
        return self.keys.shape[0]

    def check_source(self) -> None:
        """Raise UserError if the source cannot feed every phase, or fixed weights are missing."""
        for index, phase in enumerate(self.phases):
            phase.fixed()
            params = self._shapes[index].params
            self.source.check(params, phase.batch, phase.length, self.seeds, phase.relevant)
            if phase.long is not None and self.source.plays:
                raise UserError(
                    f'phase {phase.name}: long_length={phase.long.length}, but windows of an agent '
                    'that plays have one length'
                )
            if phase.long is not None:
                few = phase.longer
                self.source.check(params, few.batch, few.length, self.seeds, few.relevant)

    def init(self) -> Params:
        """Return fresh params [seeds, ...], made seed by seed, so that each starts as it would
        alone; not jitted, because it runs once.
        """
        each = [self.agent.init(key) for key in self.keys[:, 0]]
        params: Params = jax.tree.map(lambda *x: jnp.stack(x), *each)
        return params

    def begin(self, index: int, params: Params) -> TrainState:
        """Return the state at the start of a phase, every leaf in its own buffer, laid out over the
        mesh.
        """
        phase = self.phases[index]

        def created(params: Params) -> TrainState:
            own: TrainState = state.own_buffers(_created(phase, params))
            return own

        train: TrainState = jax.jit(jax.vmap(created))(params)
        begin_source = jax.jit(jax.vmap(functools.partial(self._begin_source, phase)))
        train = train._replace(live=begin_source(train.params, self.phase_keys(index)))
        placed: TrainState = jax.device_put(train, self._layout(train))
        return placed

    def expected(self, index: int) -> TrainState:
        """Return the shapes [seeds, ...] and shardings of `begin`."""
        train = self._shapes[index]
        begin_source = functools.partial(self._begin_source, self.phases[index])
        train = train._replace(live=jax.eval_shape(begin_source, train.params, self.keys[0, 0]))
        train = jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.seeds, *x.shape), x.dtype), train)
        placed: TrainState = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            train, self._layout(train),
        )  # fmt: skip
        return placed

    def phase_keys(self, index: int) -> Key[Array, ' seeds']:
        """Return the keys that the updates of a phase are folded from."""
        return jax.vmap(lambda key: jax.random.fold_in(key, index))(self.keys[:, 1])

    def fetch(self, phase: Phase, step: int, updates: int) -> Inputs:
        """Return the inputs of updates from number `step` on, on every device of the mesh."""
        long = self.long(phase, step, updates)
        if long is None:
            loaded = self._load(phase, updates)
        else:
            loaded = (self._load(phase, ~long), self._load(phase.longer, long))
        inputs = Inputs(self.source.data, loaded, phase.fixed(), long)
        if self.mesh is None:
            return inputs
        fetched: Inputs = jax.device_put(inputs, state.replicated(self.mesh))
        return fetched

    def long(self, phase: Phase, step: int, updates: int) -> np.ndarray | None:
        """Tell which updates have longer windows; None for a phase without."""
        if phase.long is None:
            return None
        return np.array([phase.long.at(step + i, phase.steps) for i in range(updates)])

    def call_size(self, phase: Phase, wanted: int) -> int:
        """Return the updates of a call of a phase: about as many as are wanted, if the source can
        load so many at once.
        """
        most = self.source.most_updates(phase.batch, phase.length, self.seeds)
        return call_size(phase.steps, wanted if most is None else min(wanted, most))

    def data_after(self, index: int, data: PyTree) -> PyTree:
        """Return the data of the phases after one: `data`, or shapes of it with latents."""
        if self.latents is None or not self.phases[index].tokenizes:
            return data
        return self.latents.outline(self._shapes[index].params, data, self.seeds)

    def begin_latents(self, index: int, params: Params) -> None:
        """Let a phase that comes after a tokenizer's learn from latents."""
        if self.latents is not None and any(p.tokenizes for p in self.phases[:index]):
            self.latents.use(params)

    def end_tokenizer(self, index: int, params: Params) -> Params:
        """Return the weights that a phase leaves behind, with its latents fixed."""
        if self.latents is None or not self.phases[index].tokenizes:
            return params
        return self.latents.end_tokenizer(params)

    def _load(self, phase: Phase, updates: int | np.ndarray) -> PyTree:
        """Load the host's part of a number of updates, or of those marked among them, the others
        left blank.
        """
        count = updates if isinstance(updates, int) else max(int(updates.sum()), 1)
        loaded = self.source.load(count, phase.batch, phase.length, self.seeds, phase.relevant)
        if isinstance(updates, int):
            return loaded

        def spread(x: np.ndarray) -> np.ndarray:
            found = np.zeros((len(updates), *x.shape[1:]), x.dtype)
            found[updates] = x[: updates.sum()]
            return found

        return jax.tree.map(spread, loaded)

    def gradient_steps(self, index: int, step: int) -> int:
        """Return the gradient steps of this phase and those before it."""
        return sum(phase.steps for phase in self.phases[:index]) + step

    def phase_frames(self, index: int, step: int) -> int:
        """Return the frames that one seed has learnt from after `step` updates of a phase."""
        phase = self.phases[index]
        return self.source.env_frames(step, phase.batch, phase.length)

    def env_frames(self, index: int, step: int) -> int:
        """Return the frames of this phase and those before it."""
        before = sum(self.phase_frames(i, p.steps) for i, p in enumerate(self.phases[:index]))
        return before + self.phase_frames(index, step)

    def _begin_source(self, phase: Phase, params: Params, key: PRNGKeyArray) -> PyTree:
        """Traced: `live` of one seed; updates take the keys from 0 on, this the last one."""
        key = jax.random.fold_in(key, 2**32 - 1)
        return self.source.begin(params, key, phase.batch, phase.length)

    def _layout(self, train: TrainState) -> PyTree:
        """Return the sharding of each leaf [seeds, ...]."""
        if self.mesh is None:
            one = SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda x: one, train)
        return state.train_sharding(self.mesh, train)

    @functools.cached_property
    def _shapes(self) -> tuple[TrainState, ...]:
        """Shapes of one seed's train state in each phase, without `live`."""
        params = jax.eval_shape(self.agent.init, self.keys[0, 0])
        found: list[TrainState] = []
        for phase in self.phases:
            found.append(jax.eval_shape(functools.partial(_created, phase), params))
            params = found[-1].params
        return tuple(found)


def _created(phase: Phase, params: Params) -> TrainState:
    return state.create(phase.begin(params) if phase.begin else params, phase)


def call_size(steps: int, wanted: int) -> int:
    """Return the updates per call: the largest divisor of `steps` in [wanted / 2, wanted]; else
    `wanted`, and then the last call of the phase is shorter and costs a second compilation.
    """
    wanted = max(1, min(wanted, steps))
    return next((n for n in range(wanted, (wanted - 1) // 2, -1) if steps % n == 0), wanted)
