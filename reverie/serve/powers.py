"""Optional powers of an agent in play, and of its world model."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, PyTree

from reverie.types import Params, Playable, UserError, where_rows


@runtime_checkable
class AdjustableSteps(Playable, Protocol):
    """An agent whose world model has a choice of denoising steps."""

    @property
    def sampling_choices(self) -> tuple[int, ...]:
        """Numbers K of denoising steps that the model knows."""
        ...

    @property
    def sampling_steps(self) -> int:
        """K of this agent."""
        ...

    def with_sampling_steps(self, steps: int) -> Playable:
        """This agent with another K."""
        ...


@runtime_checkable
class LighterParams(Protocol):
    """An agent whose weights are lighter when nothing is trained."""

    def for_inference(self, params: Params) -> Params:
        """Kernels in the type they are multiplied in, without groups that play does not need."""
        ...


@runtime_checkable
class SelectsRows(Protocol):
    """A world model that merges two of its states row by row without copying caches."""

    def where_rows(self, rows: Bool[Array, ' N'], new: PyTree, old: PyTree) -> PyTree:
        """`new` where `rows`, else `old`, which is at most one frame behind."""
        ...


def inference_params(agent: Playable, params: Params) -> Params:
    """The agent's weights as light as it can have them."""
    return agent.for_inference(params) if isinstance(agent, LighterParams) else params


def select_rows(model: Any, rows: Bool[Array, ' N'], new: PyTree, old: PyTree) -> PyTree:
    """States of the world model: `new` where `rows`, else `old`."""
    select = model.where_rows if isinstance(model, SelectsRows) else where_rows
    return select(rows, new, old)


def with_steps(agent: Playable, steps: int) -> Playable:
    """The agent with K denoising steps; raises UserError if it has no such choice."""
    if not isinstance(agent, AdjustableSteps):
        raise UserError(f'{steps} sampling steps given; the agent has no choice of them')
    if steps not in agent.sampling_choices:
        raise UserError(f'{steps} sampling steps given; expected one of {agent.sampling_choices}')
    return agent.with_sampling_steps(steps)
