"""Playing in a world model or in the real environment, one frame at a time: N players in one
compiled forward pass.

A `Session` holds what the device knows of N players: the world model's state, the environment's,
and the action that the agent would take next. `start` puts one player at a beginning, `frame` moves
some of them on. Both are compiled once; players come, go and begin anew without compiling again,
and a frame costs the same for ever.
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
    framed,
    read_out,
    shown,
)
from reverie.types import Env, Params, PipelinedWorldModel, Playable, Step, UserError, where_rows

StartFrom = Literal['game', 'data']


class Session:
    """N players of one agent.

    agent: any `Playable`. params: of one seed; until something is played, shapes will do.
    env: the real environment on the device, None for dreams only.
    contexts: number -> Step [1, L] of recorded frames to begin a dream from, None without
    recordings.
    slots: N. context: frames that the agent plays before a game start; a planner waits. seed: of
    all draws.
    early: show a dreamed frame before its commit, where the world model can; None: if it can.
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
        self.agent, self.env, self.contexts = agent, env, contexts
        if not self.sources:
            raise UserError(
                'a dream begins from real frames: expected an environment or recordings'
            )
        self.params = self.load(params)
        self.slots, self.context = slots, context
        self.discrete = agent.spec.actions.kind == 'discrete'
        self.frames = 0  # calls so far: the number of the next draw
        self._key = jax.random.key(seed)
        self.steps_choices: tuple[int, ...] = getattr(agent, 'sampling_steps', ())
        self.steps: int = agent.cfg.dynamics.sampling_steps if self.steps_choices else 0  # type: ignore[attr-defined]
        self._agents: dict[int, Playable] = {self.steps: agent}
        self.pipelined = (pipelined is None or pipelined) and self._can_be_early()
        self._movement = Pipelined() if self.pipelined else Synchronous()
        self._vector = None if env is None else (Vector(env, slots), Vector(env, 1))
        self._jit = jax.jit(
            self._frame, static_argnames=('view', 'steps', 'plays'), donate_argnames=('carry',)
        )
        self._game, self._data = jax.jit(self._start_game), jax.jit(self._start_data)
        self._put = jax.jit(self._put_row, donate_argnames=('carry',))
        self._programs: dict[tuple[str, int, bool], Any] = {}
        self._shape = jax.eval_shape(self._empty, params, self._key)
        self.carry: Carry | None = None

    def load(self, params: Params) -> Params:
        """Take these weights, as light as the agent multiplies them; shapes will do. -> what is
        kept of them
        """
        light = getattr(self.agent, 'for_inference', lambda params: params)
        outline = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
        self.params = jax.eval_shape(light, params) if outline else light(params)
        return self.params

    def _can_be_early(self) -> bool:
        found: list[bool] = []
        look = lambda params: found.append(
            isinstance(self.agent.model(params), PipelinedWorldModel)
        )
        jax.eval_shape(look, self.params)  # a world model exists only where it is traced
        return found[0]

    @property
    def sources(self) -> tuple[StartFrom, ...]:
        """Where a player may begin."""
        return (
            *(('game',) if self.has_game else ()),
            *(('data',) if self.contexts is not None else ()),
        )

    @property
    def views(self) -> tuple[View, ...]:
        return ('dream', 'real', 'both') if self.has_game else ('dream',)

    @property
    def has_game(self) -> bool:
        """Whether there is a real environment."""
        return self.env is not None

    def close(self) -> None:
        """Ends what was started outside of the device."""

    def notices(self) -> list[tuple[int, str]]:
        """What players should know, as (slot, sentence); each is told once."""
        return []

    def start(
        self, slot: int, number: int, source: StartFrom = 'game', real: bool = False
    ) -> Frame:
        """Put the player of `slot` at a beginning; the same number and source always give the same
        one.

        'game': the agent has played the first frames of an episode. 'data': a recorded context; the
        environment stays
        where it was. real: show the environment's own frame instead of the model's view of it. ->
        Frame [1]
        """
        if self.carry is None:
            self.carry = jax.jit(self._empty)(self.params, self._key)
        if source not in self.sources:
            raise UserError(f'start {source!r} given; expected one of {", ".join(self.sources)}')
        if source == 'game':
            row, frame, seen = self._begin_game(slot, number)
        else:
            assert self.contexts is not None
            row, frame, seen = self._call('data', self._data, self.params, self.contexts(number))
        self.carry = self._call(f'put {source}', self._put, self.carry, row, np.int32(slot))
        return frame._replace(image=seen if real else frame.image)

    def _begin_game(self, slot: int, number: int) -> tuple[Carry, Frame, Array]:
        key = jax.random.fold_in(self._key, number)
        return self._call('game', self._game, self.params, key)

    def heads_lag(self, view: View) -> bool:
        """Whether reward, cont and is_last of a `frame` are of the frame before it.

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
        """Move the players of `rows` [N] on by one frame, under `action` [N, A] or, where
        `by_agent` [N], the agent's.

        Where there is one player, `rows` must be true.
        world: 'dream', 'real', or 'both': the dream, and the environment beside it under the same
        actions.
        steps: K, denoising steps of a frame, for models that have a choice. Returns at once: the
        device works on.
        """
        if self.carry is None:
            raise UserError('no player has begun; expected a start before the first frame')
        numbers = np.asarray(action, np.float32), np.asarray(by_agent, bool), np.asarray(rows, bool)
        program = self.compile(view, steps, bool((numbers[1] & numbers[2]).any()))
        arrived = None if view == 'dream' else self._arrive(*numbers)
        self.carry, frame = program(
            self.params, self.carry, *numbers, np.uint32(self.frames % 2**32), arrived
        )
        self.frames += 1
        return frame

    def _arrive(self, action: np.ndarray, by_agent: np.ndarray, rows: np.ndarray) -> Step | None:
        """What environments outside of the device answer [N]; None where they move with the
        players.
        """
        return None

    def _call(self, name: str, function: Any, *args: Any) -> Any:
        """Compiled at its first call and never again, wherever its arguments come from."""
        at = (name, 0, False)
        if at not in self._programs:
            self._programs[at] = function.lower(*args).compile()
        return self._programs[at](*args)

    def _at(self, view: View, steps: int, plays: bool) -> tuple[str, int, bool]:
        """Of the program that moves players; whether the agent plays matters to early frames of a
        dream alone.
        """
        return view, steps or self.steps, plays and self.heads_lag(view)

    def ready(self, view: View, steps: int = 0) -> bool:
        """Whether `frame` need not compile first, whoever plays."""
        return all(self._at(view, steps, plays) in self._programs for plays in (False, True))

    def compile(self, view: View = 'dream', steps: int = 0, plays: bool = False) -> Any:
        """The program of `frame` for a world, K, and whether the agent plays in any row.

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
        # the world as it came
        view, steps, plays = self._at(view, steps, plays)  # type: ignore[assignment]
        if steps not in self._agents:
            if steps not in self.steps_choices:
                raise UserError(
                    f'{steps} sampling steps given; expected one of {self.steps_choices}'
                )
            self._agents[steps] = self.agent.with_sampling_steps(steps)  # type: ignore[attr-defined]
        return self._jit.trace(*self._outlines(view), view=view, steps=steps, plays=plays)

    def _outlines(self, view: View) -> tuple[Any, ...]:
        """Shapes of what a program takes."""
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.params)
        action = jax.ShapeDtypeStruct((self.slots, self.agent.spec.actions.size), np.float32)
        flag, number = (
            jax.ShapeDtypeStruct((self.slots,), bool),
            jax.ShapeDtypeStruct((), np.uint32),
        )
        return (
            params,
            self._shape,
            action,
            flag,
            flag,
            number,
            None if view == 'dream' else self._arrives(),
        )

    def _arrives(self) -> Step | None:
        """Shapes of what `_arrive` returns."""
        return None

    # ---------------------------------------------------------------- traced

    def _empty(self, params: Params, key: Array) -> Carry:
        n, model = self.slots, self.agent.model(params)
        env = () if self._vector is None else self._vector[0].reset(key)[0]
        action = jnp.zeros((n, self.agent.spec.actions.size))
        return Carry(self._movement.begin(model, model.initial(n), action, key), env, action)

    def _taken(self, action: Float[Array, 'N A'] | Float[np.ndarray, 'N A']) -> Any:
        """An action as environments take it."""
        return action.argmax(-1) if self.discrete else action

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
            return self._vector[0].step(carry.env, self._taken(action), key_env)

        read = functools.partial(read_out, self.agent, params, key_choose, by_agent)
        result = self._movement(
            model, carry, FrameInputs(given, by_agent, play, read, key_model, view == 'real', plays)
        )
        frame = framed(result, model.decode(self._movement.state(result.carry.model)), view)
        if self.slots == 1:
            return result.carry, frame
        select = getattr(model, 'where_rows', where_rows)  # avoids a copy of caches
        held = where_rows(rows, result.carry._replace(model=None), carry._replace(model=None))
        return held._replace(model=select(rows, result.carry.model, carry.model)), frame

    def _start_game(self, params: Params, key: Array) -> tuple[Carry, Frame, Array]:
        """-> (row [1], its frame as the model sees it, the environment's own frame)."""
        assert self._vector is not None
        vector, model = self._vector[1], self.agent.model(params)
        key_reset, key_play = jax.random.split(key)
        begin = vector.reset(key_reset)

        def play(carry, x):
            number, key = x
            (state, env, action), first, _ = carry
            key_env, key_see = jax.random.split(key)
            env, step = jax.lax.cond(
                number == 0,
                lambda: (env, first),
                lambda: vector.step(env, self._taken(action), key_env),
            )
            state, action, frame = self._seen(params, state, step, key_see)
            return (Carry(state, env, action), first, frame), None

        empty = Carry(model.initial(1), begin[0], jnp.zeros((1, self.agent.spec.actions.size)))
        blank = self._blank(params, begin[1])
        numbers = jnp.arange(self.context + 1)
        keys = jax.random.split(key_play, self.context + 1)
        (row, _, frame), _ = jax.lax.scan(play, (empty, begin[1], blank), (numbers, keys))
        return self._begun(model, row, frame, jax.random.split(keys[-1])[1])

    def _start_data(self, params: Params, steps: Step) -> tuple[Carry, Frame, Array]:
        """The same for recorded steps [1, L], without an environment."""
        model = self.agent.model(params)
        keys = jax.random.split(self._key, steps.is_first.shape[1])
        major = jax.tree.map(lambda x: x.swapaxes(0, 1), steps)

        def see(carry, x):
            return self._seen(params, carry[0], *x), None

        action = jnp.zeros((1, self.agent.spec.actions.size))
        start = (model.initial(1), action, self._blank(params, jax.tree.map(lambda x: x[0], major)))
        (state, action, frame), _ = jax.lax.scan(see, start, (major, keys))
        return self._begun(model, Carry(state, None, action), frame, keys[-1])

    def _begun(
        self, model: Any, row: Carry, frame: Frame, key: Array
    ) -> tuple[Carry, Frame, Array]:
        """key: that the newest frame was seen with."""
        dreamed = frame._replace(image=shown(model.decode(row.model)))
        key_model, _ = jax.random.split(key)
        return (
            row._replace(model=self._movement.begin(model, row.model, frame.action, key_model)),
            dreamed,
            frame.image,
        )

    def _seen(
        self, params: Params, state: PyTree, step: Step, key: Array
    ) -> tuple[PyTree, Array, Frame]:
        """A real frame [1] arrives. -> (state, what the agent does next, the frame)"""
        key_model, key_choose = jax.random.split(key)
        state, feat = self.agent.model(params).observe(state, step, key_model)
        action, value, probs = read_out(
            self.agent, params, key_choose, jnp.zeros(1, bool), state, feat
        )
        taken, cont = step.prev_action.astype(jnp.float32), 1.0 - step.is_terminal
        reward = step.reward.astype(jnp.float32)
        return (
            state,
            action,
            Frame(shown(step.obs), None, None, taken, reward, cont, step.is_last, value, probs),
        )

    def _blank(self, params: Params, step: Step) -> Frame:
        """A frame of zeros, of the shapes that `_seen` gives."""
        outline = jax.eval_shape(
            self._seen, params, self.agent.model(params).initial(1), step, self._key
        )[2]
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outline)

    def _put_row(self, carry: Carry, row: Carry, slot: Array) -> Carry:
        """Without an environment in the row, that of the carry stays where it was."""
        put = lambda a, b: a.at[slot].set(b[0].astype(a.dtype))
        placed = jax.tree.map(put, carry._replace(env=None), row._replace(env=None))
        return placed._replace(
            env=carry.env if row.env is None else jax.tree.map(put, carry.env, row.env)
        )
