"""Losses of recordings that nothing is trained on, taken a few times in every phase."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from reverie.data.source import Source
from reverie.types import Outcome, Params, Phase

BATCHES = 4  # always the same ones, under the same noise
TIMES = 10  # in a phase, the last at its end


class HeldOut:
    """Losses of a phase on the first batches of a source."""

    def __init__(self, source: Source):
        self.source = source
        self.key = jax.random.key(0)
        self.programs: dict[str, Any] = {}
        self.loaded: dict[tuple[int, int, float], PyTree] = {}

    def due(self, phase: Phase, before: int, after: int) -> bool:
        """Tell if the updates between are followed by a look."""
        marks = [n * TIMES // phase.steps for n in (before, after)]
        return phase.held_out and marks[1] > marks[0]

    def losses(self, phase: Phase, params: Params, step: int) -> dict[str, np.ndarray]:
        """Return {held_out/<loss>: [seeds]} of weights [seeds, ...] after `step` updates."""
        seeds = len(jax.tree.leaves(params)[0])
        shape = phase.batch, phase.length, phase.relevant
        if shape not in self.loaded:
            loaded = self.source.load(BATCHES, phase.batch, phase.length, seeds, phase.relevant)
            self.loaded[shape] = loaded
        if phase.name not in self.programs:
            self.programs[phase.name] = jax.jit(functools.partial(self._means, phase))
        keys = jax.random.split(self.key, seeds)
        program = self.programs[phase.name]
        means = program(
            params, self.source.data, self.loaded[shape], keys, phase.fixed(), jnp.int32(step)
        )
        return {f'held_out/{name}': np.asarray(x) for name, x in means.items()}

    def _means(
        self,
        phase: Phase,
        params: Params,
        data: PyTree,
        loaded: PyTree,
        keys: Key[Array, ' seeds'],
        fixed: Params,
        step: Array,
    ) -> dict[str, Array]:
        def one(params: Params, loaded: PyTree, key: Array, seed: Array) -> dict[str, Array]:
            mine = self.source.of_seed(data, seed)

            def batch(_: None, x: tuple[PyTree, Array]) -> tuple[None, dict[str, Array]]:
                loaded, key = x
                sample_key, loss_key = jax.random.split(key)
                drawn = self.source.sample(
                    (), params, mine, loaded, sample_key, phase.batch, phase.length, phase.relevant
                )[1]
                outcome = Outcome(*phase.loss({**params, **fixed}, drawn, loss_key, step))
                return None, {name: x.mean() for name, x in outcome.losses.items()}

            keys = jax.random.split(key, BATCHES)
            means = jax.lax.scan(batch, None, (loaded, keys))[1]
            return {name: x.mean() for name, x in means.items()}

        seeds = jnp.arange(keys.shape[0])
        return jax.vmap(one, in_axes=(0, 1, 0, 0))(params, loaded, keys, seeds)
