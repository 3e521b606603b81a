"""Players in environments on the host: each has a process of its own, the world model stays on the
device.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray, PyTree

from reverie.envs.host import HostVector
from reverie.serve.frame import Carry, Frame, env_action
from reverie.serve.session import Session
from reverie.serve.starts import Beginning
from reverie.types import Params, Playable, Step


class HostSession(Session):
    """A `Session` whose real environment is on the host. Close it.

    make: number of a player -> a `HostVector` of one copy; the session closes it. Others: see
    `Session`.

    Environments move before the program that moves their players, so the agent's actions are read
    back first, and frames are synchronous. A worker that fails ends its player's episode; `notices`
    says why.
    """

    def __init__(
        self,
        agent: Playable,
        params: Params,
        make: Callable[[int], HostVector],
        *,
        slots: int = 1,
        context: int = 8,
        seed: int = 0,
    ):
        super().__init__(agent, params, slots=slots, context=context, seed=seed, pipelined=False)
        self._initial = jax.jit(lambda params: self.agent.model(params).initial(1))
        self._observe, self._end = jax.jit(self.starts.observe), jax.jit(self._end_start)
        with ThreadPoolExecutor(slots) as pool:  # a process takes seconds to import what it needs
            self.vectors = tuple(pool.map(make, range(slots)))
        # the newest step [1] of each player
        self._arrived = [vector.reset() for vector in self.vectors]
        self._restarts = [0] * slots
        self._untold: list[tuple[int, str]] = []

    @property
    def has_game(self) -> bool:
        return True

    def close(self) -> None:
        for vector in self.vectors:
            vector.close()

    def notices(self) -> list[tuple[int, str]]:
        told, self._untold = self._untold, []
        return told

    def _begin_game(self, slot: int, number: int) -> Beginning:
        """`Starts.from_game` with the same draws, step by step."""
        _, key_play = jax.random.split(jax.random.fold_in(self._key, number))
        keys = [jax.random.split(key)[1] for key in jax.random.split(key_play, self.context + 1)]

        def see(state: PyTree, key: PRNGKeyArray) -> tuple[PyTree, jax.Array, Frame]:
            step = self._arrived[slot]
            seen: tuple[PyTree, jax.Array, Frame] = self._call(
                'see', self._observe, self.params, state, step, key
            )
            return seen

        self._take(slot, self.vectors[slot].reset(number))
        state, action, frame = see(self._call('initial', self._initial, self.params), keys[0])
        for key in keys[1:]:
            self._take(slot, self.vectors[slot].step(env_action(self.agent.spec, action)))
            state, action, frame = see(state, key)
        beginning: Beginning = self._call(
            'end', self._end, self.params, state, action, frame, keys[-1]
        )
        return beginning

    def _end_start(
        self,
        params: Params,
        state: PyTree,
        action: Float[jax.Array, '1 A'],
        frame: Frame,
        key: PRNGKeyArray,
    ) -> Beginning:
        row = Carry(state, None, action)
        return self.starts.begin(self.agent.model(params), row, frame, key)

    def _arrive(
        self,
        action: Float[np.ndarray, 'N A'],
        by_agent: Bool[np.ndarray, ' N'],
        rows: Bool[np.ndarray, ' N'],
    ) -> Step:
        """Move the environments of `rows`, all at the same time.

        Returns steps [N], an old one where nothing moved.
        """
        if (by_agent & rows).any():
            assert self.carry is not None
            action = np.where(by_agent[:, None], self.carry.action, action)
        moving = [int(slot) for slot in np.flatnonzero(rows)]
        for slot in moving:
            self.vectors[slot].send(env_action(self.agent.spec, action[slot : slot + 1]))
        for slot in moving:
            self._take(slot, self.vectors[slot].receive())
        steps: Step = jax.tree.map(lambda *x: np.concatenate(x), *self._arrived)
        return steps

    def _arrives(self) -> Step:
        like = lambda x: jax.ShapeDtypeStruct((self.slots, *x.shape[1:]), x.dtype)
        steps: Step = jax.tree.map(like, self._arrived[0])
        return steps

    def _take(self, slot: int, step: Step) -> None:
        """Keep a step [1] that arrived, and note a worker that was replaced."""
        vector = self.vectors[slot]
        self._arrived[slot] = step
        if vector.restarts > self._restarts[slot]:
            self._restarts[slot] = vector.restarts
            self._untold.append((slot, f'the environment failed and begins again: {vector.fault}'))
