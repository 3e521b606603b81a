"""Several datasets as one source: `Mixture` splits the rows of every batch between them by weight.

Observations must be alike, and actions too, but for datasets of video without actions, whose rows
count as unlabelled in the action space of the others. Where the datasets are of several tasks,
every row tells which task it is of.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from reverie.data.episodes import Episodes
from reverie.data.latents import Latents
from reverie.data.manifest import words
from reverie.data.source import Dataset
from reverie.data.sources import Resident, Streaming, check_state
from reverie.types import ActionSpace, Batch, EnvSpec, Params, UserError

VIDEO = ActionSpace.composite(())  # of datasets without actions


class Mixture(Dataset):
    """Windows of several datasets, with a share of the rows each.

    parts: of the datasets. spec: has the names of the tasks, if there are several, and the action
    space. weights: of each dataset, equal if not given; they need not add up to 1.
    """

    def __init__(
        self, parts: Sequence[Resident | Streaming], spec: EnvSpec, weights: Sequence[float] = ()
    ):
        check_alike([part.episodes for part in parts])
        self.parts, self.spec = tuple(parts), spec
        self.weights = shares(weights, len(parts))
        self.recordings = tuple(part.episodes for part in parts)
        self.numbers = [task_number(episodes, spec) for episodes in self.recordings]
        # A policy learns from labelled steps alone, so only datasets that have some take part.
        labelled = [episodes.counts['labelled_frames'] > 0 for episodes in self.recordings]
        self.labelled = np.array(labelled if any(labelled) else [True] * len(parts))
        self.data = tuple(part.data for part in parts)

    def check(
        self, params: Params, batch: int, length: int, seeds: int, relevant: float = 0.0
    ) -> None:
        """Raise UserError for a batch with too few rows for all datasets."""
        self.rows(batch, relevant)

    def rows(self, batch: int, relevant: float) -> tuple[tuple[int, int], ...]:
        """Return (relevant rows, uniform rows) of each part.

        Both sorts are split by weight, relevant ones between the parts with actions.
        """
        count = round(relevant * batch)
        around = np.zeros(len(self.parts), int)
        around[self.labelled] = self._split(batch, count, 'relevant', self.labelled)
        uniform = self._split(batch, batch - count, 'uniform', np.ones(len(self.parts), bool))
        return tuple(zip(around.tolist(), uniform, strict=True))

    def _split(self, batch: int, count: int, sort: str, takes: np.ndarray) -> list[int]:
        """Split the rows of one sort between the parts that take some."""
        parts = int(takes.sum())
        if 0 < count < parts:
            raise UserError(
                f'a batch of {batch} has {count} {sort} rows, expected at least {parts}, one of each '
                'dataset; give a larger batch'
            )
        return apportion(count, self.weights[takes])

    def most_updates(self, batch: int, length: int, seeds: int) -> int | None:
        """Return the updates that every part could load if all rows were its own."""
        bounds = [part.most_updates(batch, length, seeds) for part in self.parts]
        return min((bound for bound in bounds if bound is not None), default=None)

    def load(
        self, updates: int, batch: int, length: int, seeds: int, relevant: float = 0.0
    ) -> PyTree:
        """Return the parts' own windows; None if none of them has any."""
        loaded = tuple(
            part.load(updates, near + rest, length, seeds, near / (near + rest))
            if near + rest
            else None
            for part, (near, rest) in zip(self.parts, self.rows(batch, relevant), strict=True)
        )
        return loaded if jax.tree.leaves(loaded) else None

    def draw(
        self,
        data: PyTree,
        loaded: PyTree,
        key: PRNGKeyArray,
        batch: int,
        length: int,
        relevant: float = 0.0,
    ) -> Batch:
        """Traced: draw the rows of every part and interleave them, so that any run of rows of one
        sort has about the shares of the whole; relevant rows come first.
        """
        rows = self.rows(batch, relevant)
        given = (None,) * len(rows) if loaded is None else loaded
        drawn: list[Batch] = []
        for i, (near, rest) in enumerate(rows):
            if near + rest:
                one = self.parts[i].draw(
                    data[i],
                    given[i],
                    jax.random.fold_in(key, i),
                    near + rest,
                    length,
                    near / (near + rest),
                )
                drawn.append(self._alike(one, self.numbers[i], i))
        order = interleaved(rows)
        merged: Batch = jax.tree.map(lambda *x: jnp.concatenate(x)[order], *drawn)
        return merged

    def _alike(self, batch: Batch, number: int | None, part: int) -> Batch:
        """The rows of a part in the action space of all, with the number of their task."""
        n, length = batch.step.reward.shape
        if self.parts[part].schema.actions == VIDEO:
            zeros = jnp.zeros((n, length, self.spec.actions.size))
            batch = batch._replace(
                step=batch.step._replace(prev_action=zeros), has_action=jnp.zeros(n, bool)
            )
        return batch if number is None else batch._replace(task=jnp.full(n, number, jnp.int32))

    def of_seed(self, data: PyTree, seed: Int[Array, ''] | int) -> PyTree:
        """Traced: the parts' data for a seed."""
        pairs = zip(self.parts, data, strict=True)
        return tuple(part.of_seed(mine, seed) for part, mine in pairs)

    def use_latents(self, latents: Sequence[Latents]) -> None:
        """Let every part learn from its latents instead of frames from now on."""
        for part, mine in zip(self.parts, latents, strict=True):
            part.use_latents([mine])
        self.data = tuple(part.data for part in self.parts)

    def with_latents(self, data: PyTree, frame: jax.ShapeDtypeStruct) -> PyTree:
        """Return the parts' data with shapes of latents in the place of frames."""
        pairs = zip(self.parts, data, strict=True)
        return tuple(part.with_latents(mine, frame) for part, mine in pairs)

    def get_state(self) -> dict[str, Any]:
        """Return the states of all parts."""
        states = [part.get_state() for part in self.parts]
        return {'source': 'mixture', 'dataset': fingerprint(self.recordings), 'parts': states}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore `get_state`; raise UserError for another source or other datasets."""
        check_state(state, 'mixture', fingerprint(self.recordings))
        for part, its in zip(self.parts, state['parts'], strict=True):
            part.set_state(its)


def common_spec(datasets: Sequence[Episodes], spec: EnvSpec | None = None) -> EnvSpec:
    """Return the spec that an agent of all datasets is built from: `spec`, or that of the first
    dataset with actions, and the names of the tasks if there are several.
    """
    check_alike(datasets)
    tasks = tuple(dict.fromkeys(episodes.task for episodes in acted(datasets)))
    found = acted(datasets)[0].spec if spec is None else spec
    return dataclasses.replace(found, tasks=tasks if len(tasks) > 1 else ())


def acted(datasets: Sequence[Episodes]) -> list[Episodes]:
    """Return the datasets that have an action space; all if none has."""
    found = [episodes for episodes in datasets if episodes.spec.actions != VIDEO]
    return found or list(datasets)


def task_number(episodes: Episodes, spec: EnvSpec) -> int | None:
    """Return the number of a dataset's task; None where there is one task. Video without actions that
    shows none of the tasks counts as the first: only rewards and policies depend on it.
    """
    if not spec.tasks:
        return None
    return spec.tasks.index(episodes.task) if episodes.task in spec.tasks else 0


def check_alike(datasets: Sequence[Episodes]) -> None:
    """Raise UserError unless observations are the same, and actions where there are some."""
    first, by_actions = datasets[0], acted(datasets)[0]
    for episodes in datasets:
        seen = (list(episodes.schema.obs_shape), episodes.schema.obs_dtype)
        expected = (list(first.schema.obs_shape), first.schema.obs_dtype)
        if seen != expected:
            raise UserError(
                f'{episodes.path}: observations are {seen[1]}{seen[0]}, expected '
                f'{expected[1]}{expected[0]} as in {first.path}'
            )
        given, needed = episodes.spec.actions, by_actions.spec.actions
        if given != VIDEO and _plain(given, needed) != _plain(needed, given):
            raise UserError(
                f'{episodes.path}: actions are {_said(given)}, expected {_said(needed)} as in '
                f'{by_actions.path}, or none'
            )


def _plain(actions: ActionSpace, other: ActionSpace) -> ActionSpace:
    """An action space without what a model does not see: names that the other lacks, keys."""
    parts = tuple(dataclasses.replace(part, keys=(), camera='') for part in actions.parts)
    meanings = actions.meanings if other.meanings else ()
    return dataclasses.replace(actions, parts=parts, meanings=meanings)


def _said(actions: ActionSpace) -> str:
    names = f' ({", ".join(actions.meanings)})' if actions.meanings else ''
    return words(actions) + names


def fingerprint(datasets: Sequence[Episodes]) -> str:
    """Return the fingerprint of a dataset, or one of several in their order."""
    if len(datasets) == 1:
        return datasets[0].fingerprint
    known = ' '.join(episodes.fingerprint for episodes in datasets)
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def shares(weights: Sequence[float], count: int) -> np.ndarray:
    """Return weights that add up to 1, equal ones if none are given.

    Raises UserError unless there is one positive number for each of `count` datasets.
    """
    given = np.array(weights or [1.0] * count, float)
    if len(given) != count or not np.isfinite(given).all() or not (given > 0).all():
        said = ' '.join(f'{x:g}' for x in weights)
        raise UserError(f'weights {said}: expected {count} positive numbers, one of each dataset')
    return given / math.fsum(given)


def apportion(count: int, weights: np.ndarray) -> list[int]:
    """Split `count` by weights, by largest remainder; each gets at least 1 of any."""
    exact = count * weights / weights.sum()
    found = np.floor(exact + 1e-9).astype(int)
    for i in np.argsort(found - exact, kind='stable')[: count - found.sum()]:
        found[i] += 1
    while count and not found.all():
        found[found.argmin()] += 1
        found[found.argmax()] -= 1
    return [int(x) for x in found]


@functools.lru_cache
def interleaved(rows: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Return the order [B] that sorts rows, laid part by part with relevant ones first, into all
    relevant rows and then the others, each spread evenly over its sort.
    """
    sort = np.concatenate([np.repeat([0, 1], pair) for pair in rows])
    place = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for pair in rows for n in pair])
    return np.lexsort((place, sort))
