"""Statistics of scores: means with intervals that say their kind and n, and paired differences.

The unit is a run (one training seed): a run's score is the mean return of its episodes, and an
interval over runs says where the mean of many runs lies. Below ten runs it is Student's t, from ten
on a percentile bootstrap. (Of three normal runs the bootstrap's interval is [min, max] and holds
the true mean 75 times of 100, of ten 89 times, of thirty 94.)

With one run only its episodes are left: that interval says how well this run was measured, not how
another would do, and is labelled so. Random play and a dataset are no trained runs; their unit is
the episode.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from reverie.types import UserError

# [seeds][episodes], ragged allowed
Returns = Sequence[Sequence[float]] | Sequence[np.ndarray] | np.ndarray

LEVEL = 0.95
BOOTSTRAP_FROM = 10  # values; the percentile bootstrap of fewer covers too little
UNTRAINED = ('random', 'data')  # read-outs that no run trained
# read-outs of one run: seed i of each shares data, and the first two share its model
PAIRED = ('imagination', 'wm_bc', 'bc')


class Interval(NamedTuple):
    """95% interval of a mean or an interquartile mean."""

    low: float
    high: float
    kind: str  # 't', 'bootstrap', over several games 'stratified bootstrap'
    # 'seeds'; 'episodes' (no trained run); 'episodes of one seed' or 'of each seed' (fixed runs)
    over: str
    n: int  # how many of them; in the game that has fewest
    games: int = 1

    @property
    def label(self) -> str:
        """The kind and n, e.g. 't over 3 seeds'."""
        games = f' in each of {self.games} games' if self.games > 1 else ''
        return f'{self.kind} over {self.n:,} {self.over}{games}'


def iqm(scores: Any, axis: int | None = None) -> Any:
    """Interquartile mean: that of the middle half, 25% cut from each end.

    Agarwal et al. 2021, section 4.3.
    """
    return scipy.stats.trim_mean(np.asarray(scores, float), 0.25, axis=axis)


def normalised(score: Any, random: float, reference: float) -> Any:
    """Normalised score (s - random) / (reference - random).

    0 plays like chance, 1 like the reference (PPO at 10M frames).
    """
    return (np.asarray(score, float) - random) / (reference - random)


def _means(per_seed: Returns) -> np.ndarray:
    return np.array([np.mean(row) for row in per_seed], float)


def _pooled(per_seed: Returns) -> np.ndarray:
    return np.concatenate([np.asarray(row, float) for row in per_seed])


def _bootstrap(
    strata: Sequence[np.ndarray],
    statistic: Callable[[list[np.ndarray]], np.ndarray],
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Percentile bootstrap, resampled within each stratum.

    statistic: a list of [resamples, n] -> [resamples].
    """
    rng = np.random.default_rng(seed)
    draws = statistic([x[rng.integers(len(x), size=(resamples, len(x)))] for x in strata])
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _winsorised_t(strata: Sequence[np.ndarray], trim: float) -> tuple[float, float]:
    """Student's t of the mean of all values, `trim` cut from each end.

    The variance of a trimmed mean is that of the winsorised values (Tukey and McLaughlin 1963),
    here a sum over strata with Welch's degrees of freedom. With one stratum and trim 0 it is the
    textbook interval; with several, Welch's.
    """
    values = np.sort(np.concatenate(strata))
    cut = int(trim * len(values))
    kept = values[cut : len(values) - cut]
    winsorised = [np.clip(x, kept[0], kept[-1]) for x in strata]
    variance = np.array([len(x) * np.var(x, ddof=1) for x in winsorised]) / len(kept) ** 2
    total = variance.sum()
    if total == 0:
        return float(kept.mean()), float(kept.mean())
    freedom = total**2 / np.sum(variance**2 / np.array([len(x) - 1 for x in strata]))
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, freedom) * total**0.5
    return float(kept.mean() - half), float(kept.mean() + half)


def _interval(
    values: np.ndarray, over: str, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Interval of the mean of independent values [n]; None if there is only one."""
    if len(values) < 2:
        return None
    if len(values) < BOOTSTRAP_FROM:
        return Interval(*_winsorised_t([values], 0.0), 't', over, len(values))
    bounds = _bootstrap([values], lambda x: x[0].mean(1), resamples, seed)
    return Interval(*bounds, 'bootstrap', over, len(values))


def interval(
    per_seed: Returns, *, trained: bool = True, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Interval of one game's mean score.

    Args:
        per_seed: returns [seeds][episodes].
        trained: rows are runs; otherwise (random play, a dataset) all episodes count alike.

    Returns: over seeds, over the episodes of the only one, or over episodes; None where there is
        one value.
    """
    if trained and len(per_seed) > 1:
        return _interval(_means(per_seed), 'seeds', resamples, seed)
    over = 'episodes of one seed' if trained else 'episodes'
    return _interval(_pooled(per_seed), over, resamples, seed)


def stratified_interval(
    tasks: Sequence[Returns],
    *,
    trim: float = 0.25,
    trained: bool = True,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Interval of an aggregate over games: runs vary within each game, games are kept.

    From ten runs in every game on it is the stratified bootstrap (Agarwal et al. 2021, section
    4.1). Below it is a t interval on winsorised values: a game's three runs, resampled, vary by a
    third too little, so that with five games of three runs the bootstrap holds the truth 76 to 87
    times of 100, the t interval 93 to 97. Where a game has one run, the runs of all games are kept
    and their episodes are resampled, if each has ten.

    Args:
        tasks: per game the returns [seeds][episodes], on a common (normalised) scale.
        trim: share cut from each end; 0.25 is the interquartile mean, 0 the mean.
        trained: as in `interval`.
    """
    counts = [len(task) for task in tasks]
    kind = 'stratified bootstrap' if len(tasks) > 1 else 'bootstrap'
    if trained and min(counts) > 1:
        runs = [_means(task) for task in tasks]
        over, fewest = 'seeds', min(counts)
        if fewest < BOOTSTRAP_FROM:
            return Interval(*_winsorised_t(runs, trim), 't', over, fewest, len(tasks))
        value = lambda x: scipy.stats.trim_mean(np.concatenate(x, 1), trim, axis=1)
        return Interval(*_bootstrap(runs, value, resamples, seed), kind, over, fewest, len(tasks))
    rows = [row for task in tasks for row in (task if trained else [_pooled(task)])]
    strata = [np.asarray(row, float) for row in rows]
    fewest = min(map(len, strata))
    if fewest < BOOTSTRAP_FROM:
        return None
    one = 'one' if max(counts) == 1 else 'each'
    over = f'episodes of {one} seed' if trained else 'episodes'
    value = lambda x: scipy.stats.trim_mean(np.stack([y.mean(1) for y in x], 1), trim, axis=1)
    return Interval(*_bootstrap(strata, value, resamples, seed), kind, over, fewest, len(tasks))


def _figure(mean: float, ci: Interval | None) -> dict[str, Any]:
    """A mean with its interval as the results file holds it; `figure_interval` reads it back."""
    if ci is None:
        return {'mean': mean, 'ci95': None, 'n': 1, 'interval': None}
    kind = {'kind': ci.kind, 'over': ci.over}
    return {'mean': mean, 'ci95': [ci.low, ci.high], 'n': ci.n, 'interval': kind}


def figure_interval(figure: Mapping[str, Any]) -> Interval | None:
    """The interval of an entry that `summary` or `difference` made."""
    if figure['ci95'] is None:
        return None
    low, high = figure['ci95']
    return Interval(low, high, **figure['interval'], n=figure['n'])


def summary(per_seed: Returns, random: float | None = None, reference: float | None = None, *,
            trained: bool = True) -> dict[str, Any]:  # fmt: skip
    """One read-out as the results file holds it; `normalised` is null without a reference."""
    rows = [[float(x) for x in row] for row in per_seed]
    mean = float(np.mean(_means(rows) if trained else _pooled(rows)))
    scaled = None
    if random is not None and reference is not None and reference != random:
        scaled = float(normalised(mean, random, reference))
    return {
        'per_seed': rows,
        **_figure(mean, interval(rows, trained=trained)),
        'normalised': scaled,
    }


def of_runs(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Mean of one number of each run, with its interval over them."""
    each = np.asarray(values, float)
    return {'per_seed': each.tolist(), **_figure(float(each.mean()), _interval(each, 'seeds'))}


def difference(a: Returns, b: Returns, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Mean score of `a` minus that of `b`, whose runs are pairs: seed i of both shares its model or
    data.

    What a pair shares cancels, so the interval is that of the differences [seeds]. One pair leaves
    the episodes of its two runs, resampled each for itself, if both have ten. Raises UserError if
    the numbers of seeds differ.
    """
    if len(a) != len(b):
        raise UserError(
            f'paired difference: {len(a)} and {len(b)} seeds given, expected as many of both'
        )
    each = _means(a) - _means(b)
    ci = _interval(each, 'seeds', resamples, seed)
    fewest = min(len(a[0]), len(b[0]))
    if len(each) == 1 and fewest >= BOOTSTRAP_FROM:
        strata = [np.asarray(a[0], float), np.asarray(b[0], float)]
        bounds = _bootstrap(strata, lambda x: x[0].mean(1) - x[1].mean(1), resamples, seed)
        ci = Interval(*bounds, 'bootstrap', 'episodes of one seed', fewest)
    return {'per_seed': each.tolist(), **_figure(float(each.mean()), ci)}


def derive(played: Mapping[str, Mapping[str, Returns]], reference: float | None) -> dict[str, Any]:
    """All entries of a results file that follow from returns.

    Args:
        played: read-out -> {'sampled': returns [seeds][episodes], and maybe 'greedy': likewise}.
        reference: score that is 1 on the normalised scale.

    Returns: {'score': read-out -> summary, 'differences': 'a - b' -> difference}, the greedy one
        inside each under 'greedy'. Differences are those of read-outs that share world models.
    """
    random = float(np.mean(_pooled(played['random']['sampled']))) if 'random' in played else None
    score, differences = {}, {}
    for name, modes in played.items():
        trained = name not in UNTRAINED
        both = {mode: summary(x, random, reference, trained=trained) for mode, x in modes.items()}
        score[name] = both.pop('sampled') | both
    for a, b in itertools.combinations([name for name in PAIRED if name in played], 2):
        shared = [mode for mode in played[a] if mode in played[b]]
        both = {mode: difference(played[a][mode], played[b][mode]) for mode in shared}
        differences[f'{a} - {b}'] = both.pop('sampled') | both
    return {'score': score, 'differences': differences}


def recompute(record: Mapping[str, Any]) -> dict[str, Any]:
    """A results record with `score` and `differences` derived again from its returns."""
    played = {
        name: {'sampled': s['per_seed']}
        | ({'greedy': s['greedy']['per_seed']} if 'greedy' in s else {})
        for name, s in record['score'].items()
    }
    derived = derive(played, record.get('reference'))
    out: dict[str, Any] = {}
    for key, value in record.items():
        out |= derived if key == 'score' else {} if key in derived else {key: value}
    return out


def keep_scores(record: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """A results record with the read-outs that stood beside those of the agent before it was scored
    again, e.g. a baseline's; none of another environment, seeds or dataset.
    """
    same = all(record.get(key) == old.get(key) for key in ('env', 'seeds', 'dataset'))
    rest = {name: x for name, x in old['score'].items() if name not in record['score']}
    kept = {name: x for name, x in rest.items() if name in PAIRED and same}
    if not kept:
        return dict(record)
    by = {name: old.get('added_by', {}).get(name, old['command']) for name in kept}
    return recompute({**record, 'score': {**record['score'], **kept}, 'added_by': by})


def add_scores(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A results record with the read-outs of another one beside its own, differences derived again.

    Raises UserError unless both are of the same environment, seeds and dataset.
    """
    for key in ('env', 'seeds', 'dataset'):
        if record.get(key) != other.get(key):
            raise UserError(
                f'scores of {other.get("preset")} cannot stand beside those of '
                f'{record.get("preset")}: {key} is {other.get(key)} there, {record.get(key)} here'
            )
    added = {name: x for name, x in other['score'].items() if name in PAIRED}
    added_by = {name: other['command'] for name in added}
    return recompute(
        {
            **record,
            'score': {**record['score'], **added},
            'added_by': {**record.get('added_by', {}), **added_by},
        }
    )
