"""The protocol of all sources of training batches, and the defaults of datasets."""

import abc
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from reverie.data.episodes import Episodes
from reverie.data.latents import Latents
from reverie.types import Batch, Mean, Metrics, Params


@runtime_checkable
class Source(Protocol):
    """Origin of training batches: a dataset, or environments that play while an agent learns.

    Three kinds of state, each where it is used. `data` lies on the device, shared by all seeds and
    updates, an argument of the jitted update. `live` is one seed's part of the train state, donated
    and checkpointed with the weights: environments and replay on the device, () where there are
    none. What `load` hands over comes from the host: recorded windows, or play in environments that
    run there. The methods with a body do nothing, which is right wherever there is nothing to do;
    `Dataset` has the defaults of a dataset.
    """

    data: PyTree = None
    recordings: Episodes | None = None  # whose frames a tokenizer's latents can replace
    plays: ClassVar[bool] = False  # environments move while the agent learns

    def check(self, params: Params, batch: int, length: int, seeds: int) -> None:
        """Raise UserError before training if sizes do not fit or memory is short; `params` may be
        shapes.
        """
        return None

    def begin(self, params: Params, key: PRNGKeyArray, batch: int, length: int) -> PyTree:
        """Traced: `live` at the start of a phase, e.g. environments and a prefilled ring."""
        return ()

    def set_params(self, params: Params) -> None:
        """Copy the weights [seeds, ...] to act with from the next `load` on, and begin the phase
        if it is new; the caller donates their buffers.
        """
        return None

    def most_updates(self, batch: int, length: int, seeds: int) -> int | None:
        """Return the updates whose part of one `load` fits into memory; None for no bound."""
        return None

    def load(
        self, updates: int, batch: int, length: int, seeds: int, relevant: float = 0.0
    ) -> PyTree:
        """Return the host's part of the next `updates` batches, leading dims [updates, seeds]; None
        where there is none.
        """
        return None

    def of_seed(self, data: PyTree, seed: Int[Array, ''] | int) -> PyTree:
        """Traced: return the part of `data` that the seed of this number learns from."""
        return data

    def sample(
        self,
        live: PyTree,
        params: Params,
        data: PyTree,
        loaded: PyTree,
        key: PRNGKeyArray,
        batch: int,
        length: int,
        relevant: float = 0.0,
    ) -> tuple[PyTree, Batch, Metrics]:
        """Traced: make the batch of one update of one seed; return (live, batch, metrics of play).

        loaded: that update's slice of `load`. The first round(relevant * batch) rows come from the
        task's own data and are marked so, the rest uniformly.
        """
        ...

    def write_memory(
        self, live: PyTree, memory: PyTree, ok: Bool[Array, '']
    ) -> tuple[PyTree, PyTree]:
        """Traced: put memories [B, T, ...] of the batch just sampled into replay, if `ok`.

        Return (live, what of them `write_back` needs on the host; None for nothing).
        """
        return live, None

    def write_back(self, memory: PyTree, ok: Bool[np.ndarray, 'seeds updates']) -> None:
        """Take memories [seeds, updates, B, T, ...] of the oldest unanswered `load`; keep them
        where `ok`.
        """
        return None

    def use_latents(self, latents: Latents) -> None:
        """Learn from latents of the recordings instead of frames from now on."""
        return None

    def with_latents(self, data: PyTree, latents: Any) -> PyTree:
        """Return `data` with latents [seeds, F, Z, b], arrays or shapes, in the place of frames."""
        return data

    def metrics(self) -> dict[str, Mean]:
        """Return sums over the play on the host since the last call, fields [seeds]."""
        return {}

    def env_frames(self, updates: int, batch: int, length: int) -> int:
        """Return the frames that one seed has learnt from after `updates` of a phase: played, the
        prefill included, or drawn from a dataset.
        """
        ...

    def finish(self, live: PyTree) -> None:
        """End a phase on the host, e.g. by exporting the replay; leaves of `live` are [seeds, ...]."""
        return None

    @property
    def owes_export(self) -> bool:
        """Whether a dataset of the replay is asked for and not there."""
        return False

    def as_saved(self, state: dict[str, Any]) -> 'Source':
        """Return the source with a replay of the size that `state`, of `get_state`, had; its shapes
        are those of the checkpoint.
        """
        return self

    def enlarged(self, live: PyTree) -> PyTree:
        """Return `live` of a smaller replay, leaves [seeds, ...], as this source has it.

        Raises UserError for a replay that has begun to forget.
        """
        return live

    def arrays(self) -> PyTree:
        """Return the host's replay as NumPy arrays for a checkpoint, which also give the shapes and
        dtypes to restore.
        """
        return None

    def set_arrays(self, arrays: PyTree) -> None:
        """Restore `arrays`; environments begin afresh, so open episodes get a synthetic is_last."""
        return None

    def get_state(self) -> dict[str, Any]:
        """Return, as JSON, what must be the same when a run continues and how far the host got."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `get_state`; raise UserError naming what differs from the saved run."""
        ...


class Dataset(Source):
    """Source of recorded windows: nothing is played, and nothing comes back from the loss."""

    @abc.abstractmethod
    def draw(
        self,
        data: PyTree,
        loaded: PyTree,
        key: PRNGKeyArray,
        batch: int,
        length: int,
        relevant: float = 0.0,
    ) -> Batch:
        """Traced: make the batch of one update of one seed; relevant rows come first."""

    def sample(
        self,
        live: PyTree,
        params: Params,
        data: PyTree,
        loaded: PyTree,
        key: PRNGKeyArray,
        batch: int,
        length: int,
        relevant: float = 0.0,
    ) -> tuple[PyTree, Batch, Metrics]:
        """Traced: `draw`, in the signature of all sources."""
        return live, self.draw(data, loaded, key, batch, length, relevant), {}

    def env_frames(self, updates: int, batch: int, length: int) -> int:
        """Return the frames drawn in `updates` batches."""
        return updates * batch * length
