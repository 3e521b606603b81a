"""How players move by one frame, traced: what the device keeps of them, what they see, and the two
ways to dream.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from reverie.types import Params, Playable, Prediction, Step

View = Literal['dream', 'real', 'both']


class Carry(NamedTuple):
    """What stays on the device; leading dim [N] players."""

    model: PyTree[Array]  # the world model's state
    env: PyTree[Array]  # that of the real environment, () without one
    action: Float[
        Array, 'N A'
    ]  # what the agent would do next, where that is known before the next frame


class Frame(NamedTuple):
    """What players get to see, leading dim [N]. Pictures are uint8 [N, h, w, c], other observations
    float32 [N, n].

    real, real_last: the environment's frame where it plays along (world 'both') and whether it
    ended its episode, else
    None. reward, cont, is_last: of the world that is played. value and probs (of the agent's next
    action) are None where the agent has none. What the heads say may be of the frame before this
    one: see `Session.heads_lag`.
    """

    image: Array
    real: Array | None
    real_last: Bool[Array, ' N'] | None
    action: Float[Array, 'N A']  # the one that led here
    reward: Float[Array, ' N']
    cont: Float[Array, ' N']
    is_last: Bool[Array, ' N']
    value: Float[Array, ' N'] | None
    probs: Float[Array, 'N A'] | None


class FrameResult(NamedTuple):
    """One frame further, before it is made into a `Frame`.

    step: of the environment, where it moved.
    """

    carry: Carry
    action: Float[Array, 'N A']
    step: Step | None
    said: Prediction | None  # None in the real world
    value: Float[Array, ' N'] | None
    probs: Float[Array, 'N A'] | None


class FrameInputs(NamedTuple):
    """What moving takes beside the model and the carry.

    play: action -> (environment's state, Step), or (its state, None) in a dream.
    read: (state, feat) -> (the agent's next action, value, probs).
    agent: whether the agent plays in any row; static.
    """

    given: Float[Array, 'N A']
    by_agent: Bool[Array, ' N']
    play: Callable[[Array], tuple[PyTree, Step | None]]
    read: Callable[[PyTree, Array], tuple[Array, Array | None, Array | None]]
    key: PRNGKeyArray
    real: bool
    agent: bool


class Synchronous:
    """A frame and what the heads say of it come together; any world model. The agent's action waits
    in the carry.
    """

    def begin(self, model: Any, state: PyTree, action: Array, key: PRNGKeyArray) -> PyTree:
        """What is kept of a state whose newest frame `action` led to and was observed with `key`."""
        return state

    def state(self, kept: PyTree) -> PyTree:
        """The world model's state, to decode."""
        return kept

    def __call__(self, model: Any, carry: Carry, inputs: FrameInputs) -> FrameResult:
        action = jnp.where(inputs.by_agent[:, None], carry.action, inputs.given)
        env, step = inputs.play(action)
        if inputs.real:
            state, feat = model.observe(carry.model, step, inputs.key)
            said = None
        else:
            state, said = model.imagine(carry.model, action, inputs.key)
            feat = said.feat
        following, value, probs = inputs.read(state, feat)
        return FrameResult(Carry(state, env, following), action, step, said, value, probs)


class Pipelined:
    """The picture comes first: a frame is shown before it is committed, see `Ahead` in
    `models.shortcut`.

    A person's frame is K passes, the commit of the frame before it in the first. Where the agent
    plays, its action waits for that commit, K + 1 passes. Either way the heads speak of the frame
    before the one that is shown.
    """

    def begin(self, model: Any, state: PyTree, action: Array, key: PRNGKeyArray) -> PyTree:
        return model.uncommit(state, action, key)

    def state(self, kept: Any) -> PyTree:
        return kept.state

    def __call__(self, model: Any, carry: Carry, inputs: FrameInputs) -> FrameResult:
        if not inputs.agent and not inputs.real:
            env, step = inputs.play(inputs.given)
            kept, said = model.imagine_pipelined(carry.model, inputs.given, inputs.key)
            _, value, probs = inputs.read(kept.state, said.feat)
            return FrameResult(
                Carry(kept, env, carry.action), inputs.given, step, said, value, probs
            )
        state, said = model.commit(carry.model)
        chosen, value, probs = inputs.read(state, said.feat)
        action = jnp.where(inputs.by_agent[:, None], chosen, inputs.given)
        env, step = inputs.play(action)
        move = model.observe_pending if inputs.real else model.denoise_next
        kept = move(state, step if inputs.real else action, inputs.key)
        return FrameResult(
            Carry(kept, env, carry.action),
            action,
            step,
            None if inputs.real else said,
            value,
            probs,
        )


def read_out(
    agent: Playable,
    params: Params,
    key: PRNGKeyArray,
    by_agent: Bool[Array, ' N'],
    state: PyTree,
    feat: Array,
) -> tuple[Float[Array, 'N A'], Float[Array, ' N'] | None, Float[Array, 'N A'] | None]:
    """-> (the agent's next action [N, A], value, probs).

    A planner thinks only where the agent plays.
    """
    choose = functools.partial(agent.choose, params, state, feat, key)
    action, probs = jax.eval_shape(choose)
    if probs is not None:
        action, probs = choose()
    else:
        action = jax.lax.cond(
            by_agent.any(), lambda: choose()[0], lambda: jnp.zeros(action.shape, action.dtype)
        )
    return action.astype(jnp.float32), agent.expected_return(params, feat), probs


def framed(result: FrameResult, image: Array, view: View) -> Frame:
    """image: the model's newest frame, as an observation."""
    step, said = result.step, result.said
    if view == 'real':
        assert step is not None
        reward, cont = step.reward.astype(jnp.float32), 1.0 - step.is_terminal
        return Frame(
            shown(step.obs),
            None,
            None,
            result.action,
            reward,
            cont,
            step.is_last,
            result.value,
            result.probs,
        )
    assert said is not None
    real, real_last = (None, None) if step is None else (shown(step.obs), step.is_last)
    return Frame(
        shown(image),
        real,
        real_last,
        result.action,
        said.reward,
        said.cont,
        said.cont < 0.5,
        result.value,
        result.probs,
    )


def shown(obs: PyTree[Array]) -> Array:
    """What of an observation is put on the screen: the first image in it, else all its numbers in a
    row.
    """
    if isinstance(obs, Mapping):
        images = [key for key in sorted(obs) if obs[key].ndim == 4]
        flat = lambda x: x.reshape(len(x), -1).astype(jnp.float32)
        return (
            shown(obs[images[0]])
            if images
            else jnp.concatenate([flat(obs[k]) for k in sorted(obs)], -1)
        )
    if obs.ndim != 4:
        return obs.reshape(len(obs), -1).astype(jnp.float32)
    if obs.dtype == jnp.uint8:
        return obs
    return jnp.round(255 * jnp.clip(obs.astype(jnp.float32), 0, 1)).astype(jnp.uint8)
