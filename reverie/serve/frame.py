"""One frame of N players, traced: the state that the device keeps, the frame that players see, and
two ways to dream: synchronous and pipelined.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from reverie.types import EnvSpec, Params, Playable, Prediction, Step

View = Literal['dream', 'real', 'both']


class Carry(NamedTuple):
    """State that stays on the device; leading dim [N] players."""

    model: PyTree[Array]  # the world model's state, or its pending frame
    env: PyTree[Array]  # state of the real environment, () without one
    action: Float[Array, 'N A']  # the agent's next, where it is known before the next frame


class Frame(NamedTuple):
    """The frame that players see, leading dim [N].

    Pictures are uint8 [N, h, w, c], other observations float32 [N, n]. reward, cont, is_last, value
    and probs may be of the frame before this one: see `Session.heads_lag`.
    """

    image: Array
    real: Array | None  # the environment's picture in the view 'both'
    real_last: Bool[Array, ' N'] | None  # whether the environment's episode ended there
    action: Float[Array, 'N A']  # the one that led here
    reward: Float[Array, ' N']
    cont: Float[Array, ' N']
    is_last: Bool[Array, ' N']
    value: Float[Array, ' N'] | None  # None without a critic
    probs: Float[Array, 'N A'] | None  # of the agent's next action; None where it has none


HostFrame: TypeAlias = Any  # a `Frame` of one player on the host: NumPy, without a leading dim


class FrameResult(NamedTuple):
    """One frame further, before it is made into a `Frame`."""

    carry: Carry
    action: Float[Array, 'N A']
    step: Step | None  # of the environment, where it moved
    said: Prediction | None  # None in the view 'real'
    value: Float[Array, ' N'] | None
    probs: Float[Array, 'N A'] | None


class FrameInputs(NamedTuple):
    """Inputs of a frame beside the model and the carry."""

    given: Float[Array, 'N A']  # actions of the players
    by_agent: Bool[Array, ' N']  # rows in which the agent plays
    # action -> (environment's state, Step), or (its state, None) in a dream
    play: Callable[[Array], tuple[PyTree, Step | None]]
    # (state, feat) -> (the agent's next action, value, probs)
    read: Callable[[PyTree, Array], tuple[Array, Array | None, Array | None]]
    key: PRNGKeyArray
    real: bool  # the view is 'real'; static
    agent: bool  # the agent plays in some row; static


class Synchronous:
    """Shows a frame together with the heads' predictions of it; any world model.

    The agent's action waits in the carry.
    """

    def begin(self, model: Any, state: PyTree, action: Array, key: PRNGKeyArray) -> PyTree:
        """State to keep; `action` led to its newest frame, which was observed with `key`."""
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
    """Shows a frame before it is committed, for a `PipelinedWorldModel`.

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
            moved = Carry(kept, env, carry.action)
            return FrameResult(moved, inputs.given, step, said, value, probs)
        state, said = model.commit(carry.model)
        chosen, value, probs = inputs.read(state, said.feat)
        action = jnp.where(inputs.by_agent[:, None], chosen, inputs.given)
        env, step = inputs.play(action)
        move = model.observe_pending if inputs.real else model.denoise_next
        kept = move(state, step if inputs.real else action, inputs.key)
        moved = Carry(kept, env, carry.action)
        return FrameResult(moved, action, step, None if inputs.real else said, value, probs)


def env_action(spec: EnvSpec, action: Float[Array, 'N A'] | Float[np.ndarray, 'N A']) -> Any:
    """Actions [N, A] as environments take them: index [N] if discrete."""
    return action.argmax(-1) if spec.actions.kind == 'discrete' else action


def read_out(
    agent: Playable,
    params: Params,
    key: PRNGKeyArray,
    by_agent: Bool[Array, ' N'],
    state: PyTree,
    feat: Array,
) -> tuple[Float[Array, 'N A'], Float[Array, ' N'] | None, Float[Array, 'N A'] | None]:
    """The agent's next action [N, A], value and probs; a planner plans only where it plays."""
    choose = functools.partial(agent.choose, params, state, feat, key)
    action, probs = jax.eval_shape(choose)
    if probs is not None:
        action, probs = choose()
    else:
        idle = lambda: jnp.zeros(action.shape, action.dtype)
        action = jax.lax.cond(by_agent.any(), lambda: choose()[0], idle)
    return action.astype(jnp.float32), agent.expected_return(params, feat), probs


def framed(result: FrameResult, image: Array, view: View) -> Frame:
    """The `Frame` of a result; image: the model's newest frame, as an observation."""
    step, said = result.step, result.said
    heads = dict(value=result.value, probs=result.probs)
    if view == 'real':
        assert step is not None
        return Frame(
            image=shown(step.obs),
            real=None,
            real_last=None,
            action=result.action,
            reward=step.reward.astype(jnp.float32),
            cont=1.0 - step.is_terminal,
            is_last=step.is_last,
            **heads,
        )
    assert said is not None
    return Frame(
        image=shown(image),
        real=None if step is None else shown(step.obs),
        real_last=None if step is None else step.is_last,
        action=result.action,
        reward=said.reward,
        cont=said.cont,
        is_last=said.cont < 0.5,
        **heads,
    )


def shown(obs: PyTree[Array]) -> Array:
    """Part of an observation [N, ...] for the screen: its first image, else all numbers [N, n]."""
    flat: Callable[[Array], Array] = lambda x: x.reshape(len(x), -1).astype(jnp.float32)
    if isinstance(obs, Mapping):
        images = [key for key in sorted(obs) if obs[key].ndim == 4]
        if images:
            return shown(obs[images[0]])
        return jnp.concatenate([flat(obs[key]) for key in sorted(obs)], -1)
    image: Array = obs
    if image.ndim != 4:
        return flat(image)
    if image.dtype == jnp.uint8:
        return image
    return jnp.round(255 * jnp.clip(image.astype(jnp.float32), 0, 1)).astype(jnp.uint8)
