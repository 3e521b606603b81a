"""Opening datasets as sources within a budget of memory."""

import os
from collections.abc import Sequence

from reverie.data.episodes import Episodes
from reverie.data.labels import ALL, Labels
from reverie.data.mixture import Mixture
from reverie.data.sources import GROUP_BYTES, Resident, Streaming
from reverie.data.windows import Relevant
from reverie.types import EnvSpec

BUDGET_BYTES = 8 << 30  # of the datasets of a run


def open_source(
    dataset: str | os.PathLike[str] | Episodes,
    spec: EnvSpec,
    memory_budget_bytes: int = BUDGET_BYTES,
    relevant: Relevant = 'reward',
    labels: Labels = ALL,
    seed: int = 0,
) -> Resident | Streaming:
    """Open a dataset, given open or by path: Resident if it fits the budget, else Streaming within
    it, in an order that `seed` draws.

    Raises UserError if the dataset is of another game, observation or action space than `spec`.
    """
    episodes = dataset if isinstance(dataset, Episodes) else Episodes(dataset)
    episodes.check(spec)
    return _fitting(episodes, memory_budget_bytes, relevant, labels, seed)


def open_mixture(
    datasets: Sequence[Episodes],
    spec: EnvSpec,
    weights: Sequence[float] = (),
    memory_budget_bytes: int = BUDGET_BYTES,
    labels: Labels = ALL,
) -> Mixture:
    """Open datasets as a mixture, within one budget: the smallest ones first, each Resident if it
    takes no more than an equal part of what is left, else Streaming within that.
    """
    left, parts = memory_budget_bytes, dict[int, Resident | Streaming]()
    for i in sorted(range(len(datasets)), key=lambda i: datasets[i].total_bytes):
        share = left // (len(datasets) - len(parts))
        parts[i] = _fitting(datasets[i], share, 'reward', labels, 0)
        left -= min(datasets[i].total_bytes, share)
    return Mixture([parts[i] for i in range(len(datasets))], spec, weights)


def _fitting(
    episodes: Episodes, memory_budget_bytes: int, relevant: Relevant, labels: Labels, seed: int
) -> Resident | Streaming:
    if episodes.total_bytes <= memory_budget_bytes:
        return Resident(episodes, relevant, labels)
    group_bytes = max(1, min(GROUP_BYTES, memory_budget_bytes // 9))  # 3 + 3 x 2 threads
    return Streaming(episodes, relevant, labels, seed, group_bytes)
