"""Playing in a world model or in the real environment, one frame at a time: N players in one
compiled forward pass.

A `Session` holds the device's state of N players: the world model's, the environment's, and the
action that the agent would take next. `start` puts one player at a beginning, `frame` moves some of
them on. Both are compiled once; players come, go and begin again without compiling, and a frame
costs the same for ever.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from reverie.envs.device import Vector
from reverie.serve.frame import (
    Carry,
    Frame,
    FrameInputs,
    Pipelined,
    Synchronous,
    View,
    env_action,
    framed,
    read_out,
)
from reverie.serve.powers import AdjustableSteps, inference_params, select_rows, with_steps
from reverie.serve.starts import Beginning, Starts
from reverie.types import Env, Params, PipelinedWorldModel, Playable, Step, UserError, where_rows

StartFrom = Literal['game', 'data']


class Session:
    """N players of one agent.

    Args:
        agent: any `Playable`.
        params: of one seed; until something is played, shapes will do.
        env: the real environment on the device, None for dreams only.
        contexts: number -> Step [1, L] of recorded frames to begin a dream from, None without
            recordings.
        slots: N.
        context: frames that the agent plays before a game start; a planner waits.
        seed: of all draws.
        pipelined: show a dreamed frame before its commit; None: where the world model can.
    """

    pipelined = False

    def __init__(
        self,
        agent: Playable,
        params: Params,
        env: Env | None = None,
        contexts: Callable[[int], Step] | None = None,
        *,
        slots: int = 1,
        context: int = 8,
        seed: int = 0,
        pipelined: bool | None = None,
    ):
        if slots < 1:
            raise UserError(f'{slots} players asked for; expected at least 1')
        self.agent = agent
        self.env, self.contexts = env, contexts
        if not self.sources:
            raise UserError(
                'a dream begins from real frames: expected an environment or recordings'
            )
        self.params = self.load(params)
        self.slots, self.context = slots, context
        self.frames = 0  # calls so far: the number of the next draw
        self._key = jax.random.key(seed)
        self.steps_choices: tuple[int, ...] = ()
        self.steps = 0
        if isinstance(agent, AdjustableSteps):
            self.steps_choices, self.steps = agent.sampling_choices, agent.sampling_steps
        self._agents: dict[int, Playable] = {self.steps: agent}
        self.pipelined = pipelined is not False and self._can_pipeline()
        self._movement = Pipelined() if self.pipelined else Synchronous()
        self._vector = None if env is None else Vector(env, slots)
        one = None if env is None else Vector(env, 1)
        self.starts = Starts(agent, self._movement, one, context, self._key)
        self._jit = jax.jit(
            self._frame, static_argnames=('view', 'steps', 'plays'), donate_argnames=('carry',)
        )
        self._from_game = jax.jit(self.starts.from_game)
        self._from_recording = jax.jit(self.starts.from_recording)
        self._put = jax.jit(_put_row, donate_argnames=('carry',))
        self._programs: dict[tuple[str, int, bool], Any] = {}
        self._shape = jax.eval_shape(self._empty, params, self._key)
        self.carry: Carry | None = None

    def load(self, params: Params) -> Params:
        """Take these weights, as light as the agent multiplies them; return what is kept of them.

        Shapes will do.
        """
        lighten = functools.partial(inference_params, self.agent)
        outline = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
        self.params = jax.eval_shape(lighten, params) if outline else lighten(params)
        return self.params

    def _can_pipeline(self) -> bool:
        found: list[bool] = []

        def look(params: Params) -> None:
            found.append(isinstance(self.agent.model(params), PipelinedWorldModel))

        jax.eval_shape(look, self.params)  # a world model exists only where it is traced
        return found[0]

    @property
    def sources(self) -> tuple[StartFrom, ...]:
        """Places where a player may begin: the game, recorded data."""
        game: tuple[StartFrom, ...] = ('game',) if self.has_game else ()
        return game if self.contexts is None else (*game, 'data')

    @property
    def views(self) -> tuple[View, ...]:
        return ('dream', 'real', 'both') if self.has_game else ('dream',)

    @property
    def has_game(self) -> bool:
        """Whether there is a real environment."""
        return self.env is not None

    @property
    def has_policy(self) -> bool:
        """Whether the agent can play; one that cannot is a world model alone, without heads."""
        return bool(self.agent.readouts)

    def close(self) -> None:
        """End what was started outside of the device."""

    def notices(self) -> list[tuple[int, str]]:
        """Sentences for players as (slot, sentence); each is told once."""
        return []

    # ---------------------------------------------------------------- playing

    def start(
        self, slot: int, number: int, source: StartFrom = 'game', real: bool = False
    ) -> Frame:
        """Put the player of `slot` at a beginning and return its frame [1].

        The same number and source always give the same beginning. 'game': the agent has played the
        first frames of an episode. 'data': a recorded context; the environment stays where it was.
        real: show the environment's own frame instead of the model's view of it.
        """
        if self.carry is None:
            self.carry = jax.jit(self._empty)(self.params, self._key)
        if source not in self.sources:
            raise UserError(f'start {source!r} given; expected one of {", ".join(self.sources)}')
        if source == 'game':
            row, frame, seen = self._begin_game(slot, number)
        else:
            assert self.contexts is not None
            steps = self.contexts(number)
            row, frame, seen = self._call('data', self._from_recording, self.params, steps)
        self.carry = self._call(f'put {source}', self._put, self.carry, row, np.int32(slot))
        return frame._replace(image=seen if real else frame.image)

    def _begin_game(self, slot: int, number: int) -> Beginning:
        key = jax.random.fold_in(self._key, number)
        beginning: Beginning = self._call('game', self._from_game, self.params, key)
        return beginning

    def heads_lag(self, view: View) -> bool:
        """True where reward, cont and is_last of a `frame` are of the frame before it.

        Those of a start never are.
        """
        return self.pipelined and view != 'real'

    def frame(
        self,
        action: np.ndarray,
        by_agent: np.ndarray,
        rows: np.ndarray,
        view: View = 'dream',
        steps: int = 0,
    ) -> Frame:
        """Move the players of `rows` [N] on by one frame; returns at once, the device works on.

        Args:
            action: [N, A].
            by_agent: rows [N] in which the agent's action counts instead.
            rows: [N]; where there is one player, it must be true.
            view: 'dream', 'real', or 'both': the dream, and the environment beside it under the
                same actions.
            steps: K, denoising steps of a frame, for models that have a choice; 0 for the agent's.
        """
        if self.carry is None:
            raise UserError('no player has begun; expected a start before the first frame')
        numbers = np.asarray(action, np.float32), np.asarray(by_agent, bool), np.asarray(rows, bool)
        program = self.compile(view, steps, bool((numbers[1] & numbers[2]).any()))
        arrived = None if view == 'dream' else self._arrive(*numbers)
        frame: Frame
        self.carry, frame = program(
            self.params, self.carry, *numbers, np.uint32(self.frames % 2**32), arrived
        )
        self.frames += 1
        return frame

    def _arrive(self, action: np.ndarray, by_agent: np.ndarray, rows: np.ndarray) -> Step | None:
        """Steps [N] of environments on the host; None where they move with the players."""
        return None

    # ---------------------------------------------------------------- programs

    def _call(self, name: str, function: Any, *args: Any) -> Any:
        """Call a function that is compiled once, wherever its arguments come from."""
        at = (name, 0, False)
        if at not in self._programs:
            self._programs[at] = function.lower(*args).compile()
        return self._programs[at](*args)

    def _at(self, view: View, steps: int, plays: bool) -> tuple[View, int, bool]:
        """Cache key of a frame's program; `plays` matters only for pipelined dreams."""
        return view, steps or self.steps, plays and self.has_policy and self.heads_lag(view)

    def ready(self, view: View, steps: int = 0) -> bool:
        """Whether `frame` need not compile first, whoever plays."""
        return all(self._at(view, steps, plays) in self._programs for plays in (False, True))

    def compile(self, view: View = 'dream', steps: int = 0, plays: bool = False) -> Any:
        """The program of `frame` for a view, K, and whether the agent plays in any row.

        May run in another thread; players go on meanwhile.
        """
        at = self._at(view, steps, plays)
        if at not in self._programs:
            if view not in self.views:
                raise UserError(f'view {view!r} given; expected one of {", ".join(self.views)}')
            self._programs[at] = self.trace(view, steps, plays).lower().compile()
        return self._programs[at]

    def trace(self, view: View = 'dream', steps: int = 0, plays: bool = False) -> Any:
        """The program before it is compiled; its jaxpr tells what a frame costs."""
        view, steps, plays = self._at(view, steps, plays)
        if steps not in self._agents:
            self._agents[steps] = with_steps(self.agent, steps)
        return self._jit.trace(*self._outlines(view), view=view, steps=steps, plays=plays)

    def _outlines(self, view: View) -> tuple[Any, ...]:
        """Shapes of a program's arguments."""
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.params)
        action = jax.ShapeDtypeStruct((self.slots, self.agent.spec.actions.size), np.float32)
        flag = jax.ShapeDtypeStruct((self.slots,), bool)
        number = jax.ShapeDtypeStruct((), np.uint32)
        arrived = None if view == 'dream' else self._arrives()
        return params, self._shape, action, flag, flag, number, arrived

    def _arrives(self) -> Step | None:
        """Shapes of what `_arrive` returns."""
        return None

    # ---------------------------------------------------------------- traced

    def _empty(self, params: Params, key: Array) -> Carry:
        n, model = self.slots, self.agent.model(params)
        env = () if self._vector is None else self._vector.reset(key)[0]
        action = jnp.zeros((n, self.agent.spec.actions.size))
        return Carry(self._movement.begin(model, model.initial(n), action, key), env, action)

    def _frame(
        self,
        params: Params,
        carry: Carry,
        given: Float[Array, 'N A'],
        by_agent: Bool[Array, ' N'],
        rows: Bool[Array, ' N'],
        number: Array,
        arrived: Step | None,
        *,
        view: View,
        steps: int,
        plays: bool,
    ) -> tuple[Carry, Frame]:
        model = self._agents[steps].model(params)
        key_model, key_env, key_choose = jax.random.split(jax.random.fold_in(self._key, number), 3)

        def play(action: Array) -> tuple[PyTree, Step | None]:
            if view == 'dream':
                return carry.env, None
            if arrived is not None:
                return carry.env, arrived
            assert self._vector is not None
            return self._vector.step(carry.env, env_action(self.agent.spec, action), key_env)

        read = functools.partial(read_out, self.agent, params, key_choose, by_agent)
        inputs = FrameInputs(given, by_agent, play, read, key_model, view == 'real', plays)
        result = self._movement(model, carry, inputs)
        frame = framed(result, model.decode(self._movement.state(result.carry.model)), view)
        if self.slots == 1:
            return result.carry, frame
        state = select_rows(model, rows, result.carry.model, carry.model)
        held = where_rows(rows, result.carry._replace(model=None), carry._replace(model=None))
        return held._replace(model=state), frame


def _put_row(carry: Carry, row: Carry, slot: Array) -> Carry:
    """Write a row [1] into the carry; without an environment in the row, the carry's stays."""
    put = lambda a, b: a.at[slot].set(b[0].astype(a.dtype))
    placed: Carry = jax.tree.map(put, carry._replace(env=None), row._replace(env=None))
    env = carry.env if row.env is None else jax.tree.map(put, carry.env, row.env)
    return placed._replace(env=env)
