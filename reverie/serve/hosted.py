"""Players in environments on the host: each has a process of their own, the world model stays on
the device.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from reverie.envs.host import HostVector
from reverie.serve.frame import Carry, Frame
from reverie.serve.session import Session
from reverie.types import Params, Playable, Step


class HostSession(Session):
    """A `Session` whose real environment is on the host. Close it.

    make: number of a player -> a `HostVector` of one copy; the session closes it. Others: see
    `Session`.

    Environments move before the program that moves their players, so what the agent does is read
    back first, and frames are not early. A worker that fails ends its player's episode; `notices`
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
        self._see, self._end = jax.jit(self._seen), jax.jit(self._ended)
        with ThreadPoolExecutor(slots) as pool:  # a process takes seconds to import what it needs
            self.vectors = tuple(pool.map(make, range(slots)))
        self._arrived = [
            vector.reset() for vector in self.vectors
        ]  # the newest step of each player, [1]
        self._restarts, self._unsaid = [0] * slots, list[tuple[int, str]]()

    @property
    def has_game(self) -> bool:
        return True

    def close(self) -> None:
        for vector in self.vectors:
            vector.close()

    def notices(self) -> list[tuple[int, str]]:
        said, self._unsaid = self._unsaid, []
        return said

    def _begin_game(self, slot: int, number: int) -> tuple[Carry, Frame, Array]:
        """As `_start_game`, with the same draws, step by step."""
        _, key_play = jax.random.split(jax.random.fold_in(self._key, number))
        keys = [jax.random.split(key)[1] for key in jax.random.split(key_play, self.context + 1)]
        see = lambda state, key: self._call(
            'see', self._see, self.params, state, self._arrived[slot], key
        )
        self._take(slot, self.vectors[slot].reset(number))
        state, action, frame = see(self._call('initial', self._initial, self.params), keys[0])
        for key in keys[1:]:
            self._take(slot, self.vectors[slot].step(self._taken(action)))
            state, action, frame = see(state, key)
        return self._call('end', self._end, self.params, state, action, frame, keys[-1])

    def _ended(
        self,
        params: Params,
        state: PyTree,
        action: Float[Array, '1 A'],
        frame: Frame,
        key: PRNGKeyArray,
    ) -> tuple[Carry, Frame, Array]:
        return self._begun(self.agent.model(params), Carry(state, None, action), frame, key)

    def _arrive(
        self,
        action: Float[np.ndarray, 'N A'],
        by_agent: Bool[np.ndarray, ' N'],
        rows: Bool[np.ndarray, ' N'],
    ) -> Step:
        """The environments of `rows` move, all at the same time.

        -> Step [N], an old one where nothing moved
        """
        if (by_agent & rows).any():
            assert self.carry is not None
            action = np.where(by_agent[:, None], self.carry.action, action)
        moving = [int(slot) for slot in np.flatnonzero(rows)]
        for slot in moving:
            self.vectors[slot].send(self._taken(action[slot : slot + 1]))
        for slot in moving:
            self._take(slot, self.vectors[slot].receive())
        return jax.tree.map(lambda *x: np.concatenate(x), *self._arrived)

    def _arrives(self) -> Step:
        like = lambda x: jax.ShapeDtypeStruct((self.slots, *x.shape[1:]), x.dtype)
        return jax.tree.map(like, self._arrived[0])

    def _take(self, slot: int, step: Step) -> None:
        """A step [1] arrived."""
        vector, self._arrived[slot] = self.vectors[slot], step
        if vector.restarts > self._restarts[slot]:
            self._restarts[slot] = vector.restarts
            self._unsaid.append((slot, f'the environment failed and begins anew: {vector.fault}'))
