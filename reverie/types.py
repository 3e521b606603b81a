"""Vocabulary of every module: steps, batches, phases and the protocols between packages.

One letter means one thing everywhere:

| letter | meaning                    | letter | meaning                          |
|--------|----------------------------|--------|----------------------------------|
| B      | batch rows                 | S      | tokens of one frame              |
| T      | time steps of a window     | D      | width of a token                 |
| H      | imagination horizon        | F      | width of `feat`                  |
| N      | parallel envs or rollouts  | C      | context, frames kept in a cache  |
| A      | width of an action vector  | K      | denoising steps of one frame     |
| Z      | latent tokens of a frame   | h w c  | image rows, columns, channels    |

Arrival convention: a `Step` is everything that *arrives* together, so losses do not shift.
Auto-reset yields a step with `is_last`, then one with `is_first`; truncation sets `is_last` and
never `is_terminal`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from reverie.actions import ActionSpace as ActionSpace
from reverie.actions import Component as Component
from reverie.errors import OutOfMemoryError as OutOfMemoryError
from reverie.errors import UserError as UserError

T = TypeVar('T')
Params = dict[str, Any]
Losses = dict[str, Array]


class Mean(NamedTuple):
    """Sum and count of things whose number varies, e.g. ended episodes; divided when logged."""

    total: Any  # arrays
    n: Any


Metrics = dict[str, Array | Mean]


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """Facts about an environment that an agent is built from."""

    name: str
    # A mapping where an observation is a dictionary.
    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    actions: ActionSpace
    max_return: float | None = None
    channels: tuple[str, ...] = ()
    # Lines that say how observations are made of what the environment gives.
    seen: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    tasks: tuple[str, ...] = ()  # names of the tasks that one agent learns, where it is told which


class Step(NamedTuple):
    """Everything that arrives at one time step; [*B] is [N] when acting, [B, T] when training."""

    obs: PyTree[Array]  # [*B, h, w, c]
    prev_action: Array  # [*B, A] that led here, one-hot if discrete; zeros where is_first
    reward: Array  # [*B] earned by prev_action
    is_first: Array  # [*B] bool
    is_last: Array  # [*B] bool, true for truncation too
    is_terminal: Array  # [*B] bool; the target of `cont` is ~is_terminal


class Batch(NamedTuple):
    """Windows of steps to train on, with facts about each row."""

    step: Step  # [B, T, ...]
    has_action: Bool[Array, ' B']  # false for unlabelled video
    has_reward: Bool[Array, ' B']
    relevant: Bool[Array, ' B']  # from the task's own data (cloning), not uniform (dynamics)
    context: PyTree = None  # [B, C, ...] memories of the C steps before each row, zeros if none
    task: Int[Array, ' B'] | None = None  # number in the spec's `tasks`; None where there is one
    # [B, T, Z, b] of the frozen tokenizer, computed once; observations are missing then.
    latents: Float[Array, 'B T Z b'] | None = None


class Prediction(NamedTuple):
    """Features and predictions of an imagined step."""

    feat: Float[Array, 'N F']
    reward: Float[Array, ' N']
    cont: Float[Array, ' N']  # 1 - P[terminal]


State: TypeAlias = PyTree
Policy = Callable[[State, Array, PRNGKeyArray], Array]  # (state, feat [N, F], key) -> action [N, A]


@runtime_checkable
class WorldModel(Protocol):
    """Four methods that serve imagination training, evaluation and play alike."""

    def initial(self, batch: int) -> State: ...

    def observe(self, state: State, step: Step, key: PRNGKeyArray) -> tuple[State, Array]:
        """Take in a real frame; return (state, feat [N, F])."""
        ...

    def imagine(self, state: State, action: Array, key: PRNGKeyArray) -> tuple[State, Prediction]:
        """Dream the frame that `action` [N, A] leads to."""
        ...

    def decode(self, state: State) -> Array:
        """Return the frame of `state`, in observation space."""
        ...


@runtime_checkable
class PipelinedWorldModel(WorldModel, Protocol):
    """World model that can show a frame before it is committed.

    `pending` is a state whose newest frame is not committed yet. The same keys give the same frames
    as by the four methods.
    """

    def denoise_next(self, state: State, action: Array, key: PRNGKeyArray) -> PyTree:
        """Begin `imagine`; return the pending frame."""
        ...

    def commit(self, pending: PyTree) -> tuple[State, Prediction]:
        """Commit the pending frame (write K/V, run the heads); return (state, prediction)."""
        ...

    def imagine_pipelined(
        self, pending: PyTree, action: Array, key: PRNGKeyArray
    ) -> tuple[PyTree, Prediction]:
        """Commit the pending frame and begin the next; return (pending, prediction of the former)."""
        ...

    def observe_pending(self, state: State, step: Step, key: PRNGKeyArray) -> PyTree:
        """Begin `observe`; return the pending frame."""
        ...

    def uncommit(self, state: State, action: Array, key: PRNGKeyArray) -> PyTree:
        """Undo the commit of `observe`, whose step `action` led to; return the pending frame."""
        ...


@runtime_checkable
class Env(Protocol):
    """One pure-JAX environment, of which `envs.device.Vector` runs many; all chance is in the keys."""

    @property
    def spec(self) -> EnvSpec: ...

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, Step]: ...

    def step(self, state: PyTree, action: Array, key: PRNGKeyArray) -> tuple[PyTree, Step]:
        """Move by an action: index [] if discrete, vector [A] if continuous.

        There is no auto-reset: after an `is_last` step the result is undefined until `reset`.
        """
        ...


@runtime_checkable
class Actor(Protocol):
    """Policy with the memory it needs to act in N real environments at once."""

    def initial(self, params: Params, batch: int) -> State: ...

    def act(
        self,
        params: Params,
        state: State,
        step: Step,
        key: PRNGKeyArray,
        greedy: Bool[Array, ''] | bool,
    ) -> tuple[State, Array]:
        """Return (state, action: index [N] if discrete, [N, A] if continuous).

        `is_first` resets a row's memory.
        """
        ...


@runtime_checkable
class Explorer(Actor, Protocol):
    """Actor that collects data for replay, with whatever exploration it adds to the policy."""

    def memory(self, state: State) -> PyTree:
        """Return what replay keeps with the step just acted on, [N, ...], e.g. the latent state; ()
        for nothing.
        """
        ...


class ReadOut(NamedTuple):
    """One way to act with an agent's parameters; those that share an actor share its program."""

    actor: Actor
    params: Callable[[Params], Params]  # of the agent -> of the actor


class Outcome(NamedTuple):
    """Result of a loss; one without memory and groups may return a plain (losses, metrics)."""

    losses: Losses  # {name: [B, T]}
    metrics: Metrics  # {name: scalar}
    memory: PyTree = None  # [B, T, ...] for replay to keep with the steps of the batch
    groups: Params | None = None  # untrained groups that the loss replaces, e.g. running statistics


LossFn = Callable[[Params, Batch, PRNGKeyArray, Array], Outcome | tuple[Losses, Metrics]]


@dataclasses.dataclass(frozen=True)
class LongWindows:
    """Updates of a phase whose windows are longer, and their rows fewer."""

    length: int
    share: float  # of the updates
    end: float = 0.0  # share of the updates, at the end, that are all long

    def at(self, step: int, steps: int) -> bool:
        """Tell if update number `step` of `steps` is a long one."""
        passed = math.floor((step + 1) * self.share) > math.floor(step * self.share)
        return passed or step >= steps - round(self.end * steps)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stage of training, as a value."""

    name: str  # unique in an agent; shown in progress and logs
    trains: tuple[str, ...]  # top-level parameter groups that get gradients; the others are frozen
    loss: LossFn  # (params, batch, key, step []) -> Outcome or (losses, metrics)
    scales: Mapping[str, float]  # weight of each loss term, by the names of the loss
    optimiser: optax.GradientTransformation  # of the trained groups
    steps: int  # gradient steps
    batch: int  # rows
    length: int  # steps of each row
    relevant: float = 0.0  # share of rows from the task's own data, first in the batch
    # Decay of the running mean square whose root each term is divided by; Dreamer 4, section 3.2.
    rms_decay: float | None = None
    # Decay of the running mean of the weights, which the phase leaves behind instead of the last.
    ema_decay: float | None = None
    begin: Callable[[Params], Params] | None = None  # pure; e.g. copies a head at the start
    # (params, updates before this one []) -> params, e.g. slow critics; not after skipped updates.
    after: Callable[[Params, Array], Params] | None = None
    scheduled: bool = False  # the learning rate depends on `steps`, from the first update on
    long: LongWindows | None = None  # longer windows in some of the updates
    # Reads further groups that the loss is handed, neither trained nor saved, e.g. a fixed network.
    fixed: Callable[[], Params] = dict
    tokenizes: bool = False  # its end fixes the latents that later phases learn from
    held_out: bool = True  # the loss of recordings that are held out says something

    @property
    def longer(self) -> 'Phase':
        """The phase as its updates with longer windows see it: as many frames in fewer rows."""
        assert self.long is not None
        rows = max(1, self.batch * self.length // self.long.length)
        return dataclasses.replace(self, batch=rows, length=self.long.length, long=None)

    def trained(self, params: Params) -> Params:
        """Parameter groups that the phase trains; raises UserError for an unknown one."""
        unknown = sorted(set(self.trains) - set(params))
        if unknown:
            raise UserError(
                f'phase {self.name} trains {unknown}, but the agent has the groups {sorted(params)}'
            )
        return {group: params[group] for group in self.trains}


@runtime_checkable
class Agent(Protocol):
    """Agent as the training loop, the evaluation and the player use it.

    One whose weights other runs may take also has `shaped_by`: parameter group -> fields of its
    config, dotted, without which the weights mean nothing.
    """

    spec: EnvSpec
    phases: tuple[Phase, ...]
    readouts: Mapping[str, ReadOut]  # policies to evaluate, by name: 'imagination', 'wm_bc', 'bc'

    def init(self, key: PRNGKeyArray) -> Params: ...


@runtime_checkable
class MultiTask(Agent, Protocol):
    """Agent that is told which of several tasks it does."""

    def with_task(self, task: int) -> Agent:
        """Return the same agent, told another task."""
        ...


@runtime_checkable
class Tokenizing(Agent, Protocol):
    """Agent whose later phases learn from the latents of a tokenizer that is trained before them."""

    reach: int  # earlier frames that the latents of a frame depend on
    caches_latents: bool  # computed once, instead of in every update
    scales_latents: bool  # brought to a standard deviation of 1

    def tokenize(
        self, params: Params, obs: Array, is_first: Bool[Array, 'B T']
    ) -> Float[Array, 'B T Z b']:
        """Return the latents of frames, the first of a window as of an episode's start."""
        ...

    def with_latent_scale(self, params: Params, scale: Float[Array, '']) -> Params:
        """Return weights that make latents so many times as large."""
        ...


@runtime_checkable
class Playable(Agent, Protocol):
    """Agent that people can play in: its world model and read-outs of the features, all traced.

    Optional powers, e.g. a choice of sampling steps, are the protocols in `serve.powers`.
    """

    def model(self, params: Params) -> WorldModel: ...

    def expected_return(
        self, params: Params, feat: Float[Array, 'N F']
    ) -> Float[Array, ' N'] | None:
        """Return the critic's mean; None without a critic."""
        ...

    def choose(
        self, params: Params, state: State, feat: Float[Array, 'N F'], key: PRNGKeyArray
    ) -> tuple[Float[Array, 'N A'], Float[Array, 'N A'] | None]:
        """Return (the agent's action, one-hot if discrete; probabilities of discrete actions, None
        if it has none).
        """
        ...


def sg(x: T) -> T:
    """Stop the gradient at a pytree."""
    return jax.lax.stop_gradient(x)


def where_rows(mask: Bool[Array, ' N'], new: T, old: T) -> T:
    """Take the rows of `new` where the mask is true, and those of `old` elsewhere."""

    def leaf(new: Array, old: Array) -> Array:
        return jnp.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    rows: T = jax.tree.map(leaf, new, old)
    return rows
