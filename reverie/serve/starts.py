"""Beginnings of players, traced: the first frames of an episode, or a recorded context."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from reverie.envs.device import Vector
from reverie.serve.frame import Carry, Frame, Pipelined, Synchronous, env_action, read_out, shown
from reverie.types import Params, Playable, Step


class Beginning(NamedTuple):
    """One player at a beginning; leading dim [1]."""

    row: Carry  # env is None after a recorded context
    frame: Frame  # as the world model sees it
    seen: Array  # the environment's own picture


@dataclasses.dataclass(frozen=True, eq=False)
class Starts:
    """Makes `Beginning`s of an agent: the same for the same key, or the same recording."""

    agent: Playable
    movement: Synchronous | Pipelined
    vector: Vector | None  # of one environment
    context: int  # frames that the agent plays before the start
    key: Array  # of recorded contexts

    def from_game(self, params: Params, key: PRNGKeyArray) -> Beginning:
        """Let the agent play the first frames of an episode."""
        assert self.vector is not None
        vector, model = self.vector, self.agent.model(params)
        key_reset, key_play = jax.random.split(key)
        begin = vector.reset(key_reset)

        def play(
            carry: tuple[Carry, Step, Frame], x: tuple[Array, PRNGKeyArray]
        ) -> tuple[tuple[Carry, Step, Frame], None]:
            number, key = x
            (state, env, action), first, _ = carry
            key_env, key_see = jax.random.split(key)
            env, step = jax.lax.cond(
                number == 0,
                lambda: (env, first),
                lambda: vector.step(env, env_action(self.agent.spec, action), key_env),
            )
            state, action, frame = self.observe(params, state, step, key_see)
            return (Carry(state, env, action), first, frame), None

        empty = Carry(model.initial(1), begin[0], jnp.zeros((1, self.agent.spec.actions.size)))
        blank = self._blank(params, begin[1])
        numbers = jnp.arange(self.context + 1)
        keys = jax.random.split(key_play, self.context + 1)
        (row, _, frame), _ = jax.lax.scan(play, (empty, begin[1], blank), (numbers, keys))
        return self.begin(model, row, frame, jax.random.split(keys[-1])[1])

    def from_recording(self, params: Params, steps: Step) -> Beginning:
        """Observe recorded steps [1, L], without an environment."""
        model = self.agent.model(params)
        keys = jax.random.split(self.key, steps.is_first.shape[1])
        major = jax.tree.map(lambda x: x.swapaxes(0, 1), steps)

        def see(
            carry: tuple[PyTree, Array, Frame], x: tuple[Step, PRNGKeyArray]
        ) -> tuple[tuple[PyTree, Array, Frame], None]:
            return self.observe(params, carry[0], *x), None

        action = jnp.zeros((1, self.agent.spec.actions.size))
        blank = self._blank(params, jax.tree.map(lambda x: x[0], major))
        start = (model.initial(1), action, blank)
        (state, action, frame), _ = jax.lax.scan(see, start, (major, keys))
        return self.begin(model, Carry(state, None, action), frame, keys[-1])

    def begin(self, model: Any, row: Carry, frame: Frame, key: Array) -> Beginning:
        """Make a start of a row [1] whose newest frame was observed with `key`."""
        dreamed = frame._replace(image=shown(model.decode(row.model)))
        key_model, _ = jax.random.split(key)
        state = self.movement.begin(model, row.model, frame.action, key_model)
        return Beginning(row._replace(model=state), dreamed, frame.image)

    def observe(
        self, params: Params, state: PyTree, step: Step, key: Array
    ) -> tuple[PyTree, Array, Frame]:
        """Take in a real frame [1]; return (state, the agent's next action, the frame)."""
        key_model, key_choose = jax.random.split(key)
        state, feat = self.agent.model(params).observe(state, step, key_model)
        by_agent = jnp.zeros(1, bool)
        action, value, probs = read_out(self.agent, params, key_choose, by_agent, state, feat)
        frame = Frame(
            image=shown(step.obs),
            real=None,
            real_last=None,
            action=step.prev_action.astype(jnp.float32),
            reward=step.reward.astype(jnp.float32),
            cont=1.0 - step.is_terminal,
            is_last=step.is_last,
            value=value,
            probs=probs,
        )
        return state, action, frame

    def _blank(self, params: Params, step: Step) -> Frame:
        """A frame of zeros, of the shapes that `observe` gives."""
        state = self.agent.model(params).initial(1)
        outline = jax.eval_shape(self.observe, params, state, step, self.key)[2]
        blank: Frame = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outline)
        return blank
