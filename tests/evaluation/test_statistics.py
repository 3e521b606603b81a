"""Intervals against scipy, loops, rliable's numbers, and simulations in which the truth is known."""

import json
import pathlib

import numpy as np
import pytest
import scipy.stats

from reverie.evaluation import results
from reverie.evaluation.statistics import (
    derive,
    difference,
    figure_interval,
    interval,
    iqm,
    keep_scores,
    normalised,
    recompute,
    stratified_interval,
    summary,
)
from reverie.types import UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('key', [None, 'env', 'seeds', 'dataset'])
def test_scoring_again_keeps_a_row_that_another_run_has_added(key):
    def scored(*names):
        each = {name: {'per_seed': [[1.0, 2.0], [3.0, 5.0]]} for name in ('random', *names)}
        return dict(
            env='e',
            seeds=[0, 1],
            dataset={},
            command=names[-1],
            score=recompute(dict(score=each))['score'],
        )

    before = {**scored('imagination', 'bc'), 'added_by': {'bc': 'reverie train bc'}}
    again = keep_scores(scored('imagination'), before | ({key: 'other'} if key else {}))
    assert (
        ('bc' in again['score'])
        == ('imagination - bc' in again.get('differences', {}))
        == (not key)
    )
    if not key:
        assert again['added_by'] == {'bc': 'reverie train bc'}
        assert keep_scores(scored('imagination', 'bc'), before).get('added_by') is None


def runs(n, episodes=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 1)) + rng.normal(3, 2, (n, episodes))


@pytest.mark.parametrize('n', [4, 10, 15, 24])
def test_iqm_is_the_mean_of_the_middle_half(n):
    scores = np.random.default_rng(n).normal(size=n) ** 3
    ordered, cut = sorted(scores.tolist()), int(0.25 * n)
    middle = ordered[cut : n - cut]
    assert iqm(scores) == pytest.approx(sum(middle) / len(middle))
    assert iqm(scores.reshape(-1, 1)) == pytest.approx(iqm(scores))


def test_normalised_is_zero_for_random_and_one_for_the_reference():
    np.testing.assert_allclose(normalised([2.0, 7.0, 12.0], 2.0, 12.0), [0, 0.5, 1])


@pytest.mark.parametrize('n', [2, 3, 9])
def test_below_ten_runs_the_interval_is_students_t_of_the_runs_means(n):
    rows = [*runs(n - 1), [1.0, 2.0, 6.0]]  # ragged
    means = [np.mean(row) for row in rows]
    got = interval(rows)
    want = scipy.stats.t.interval(0.95, n - 1, np.mean(means), scipy.stats.sem(means))
    np.testing.assert_allclose(got[:2], want)
    assert got[2:] == ('t', 'seeds', n, 1) and got.label == f't over {n} seeds'
    np.testing.assert_allclose(stratified_interval([rows], trim=0.0)[:2], want)


@pytest.mark.parametrize('n', [10, 30])
def test_from_ten_runs_on_the_interval_is_scipys_percentile_bootstrap(n):
    rows, got = runs(n), interval(runs(n), resamples=20_000)
    want = scipy.stats.bootstrap(
        [rows.mean(1)], np.mean, n_resamples=20_000, method='percentile', rng=1
    )
    np.testing.assert_allclose(got[:2], want.confidence_interval, atol=0.02)
    assert got.label == f'bootstrap over {n} seeds'


def hits(draw, of, truth=0.0, draws=2000):
    found = [of(draw()) for _ in range(draws)]
    return sum(ci[0] <= truth <= ci[1] for ci in found) / draws


@pytest.mark.parametrize('n', [3, 5])
def test_of_2000_intervals_over_few_runs_93_to_97_in_100_hold_the_truth(n):
    rng = np.random.default_rng(n)
    draw = lambda: (
        rng.normal(size=(n, 1)) + rng.normal(0, 2, (n, 16))
    )  # runs differ, and their episodes
    assert 0.93 <= hits(draw, interval) <= 0.97
    pairs = lambda: (draw() + 100 * (shared := rng.normal(size=(n, 1))), draw() + 100 * shared)
    assert 0.93 <= hits(pairs, lambda pair: difference(*pair)['ci95']) <= 0.97


def test_a_bootstrap_over_three_runs_would_hold_it_in_75():
    rng = np.random.default_rng(0)

    def bootstrap(rows):
        means = rows.mean(1)[rng.integers(3, size=(400, 3))].mean(1)
        return np.quantile(means, [0.025, 0.975])

    assert 0.71 < hits(lambda: rng.normal(size=(3, 16)), bootstrap) < 0.79


def test_from_ten_runs_on_the_bootstrap_covers_nearly_as_often_as_it_says():
    rng = np.random.default_rng(0)
    assert (
        0.90
        < hits(
            lambda: rng.normal(size=(30, 1)), lambda rows: interval(rows, resamples=400), draws=400
        )
        < 0.98
    )


def test_the_iqm_over_five_games_of_three_runs_is_covered_and_by_the_bootstrap_it_would_not_be():
    rng = np.random.default_rng(1)
    level, spread = (
        np.linspace(0, 2, 5)[:, None, None],
        np.array([0.2, 0.3, 0.5, 0.4, 0.3])[:, None, None],
    )
    draw = lambda n: list(level + spread * rng.normal(size=(5, n, 1)))
    truth = iqm(draw(200_000))

    def bootstrap(games):
        picked = [game[rng.integers(3, size=(200, 3)), 0] for game in games]
        return np.quantile(iqm(np.concatenate(picked, 1), axis=1), [0.025, 0.975])

    assert stratified_interval(draw(3)).label == 't over 3 seeds in each of 5 games'
    assert 0.92 <= hits(lambda: draw(3), stratified_interval, truth) <= 0.98
    assert hits(lambda: draw(3), bootstrap, truth, draws=500) < 0.9


def test_the_mean_over_two_games_of_few_runs_is_welchs_interval():
    a, b = runs(3, seed=1), 2 * runs(6, seed=2)
    got = stratified_interval([a, a, -b], trim=0.0)  # weights by runs: of 12 in all, a six, b six
    assert got.n == 3 and got.games == 3
    got = stratified_interval(
        [np.concatenate([a, a + 1]), -b], trim=0.0
    )  # six runs each: (mean a - mean b) / 2
    welch = scipy.stats.ttest_ind(np.concatenate([a, a + 1]).mean(1), b.mean(1), equal_var=False)
    np.testing.assert_allclose(2 * np.array(got[:2]), welch.confidence_interval(0.95))


def test_the_interval_over_games_resamples_runs_within_each_game_as_a_loop_does():
    rng = np.random.default_rng(1)
    games = [rng.normal(size=(10, 6)) + 3 * i for i in range(3)]
    got, draws = stratified_interval(games, resamples=20_000), []
    for _ in range(4000):
        picked = [game.mean(1)[rng.integers(10)] for game in games for _ in range(10)]
        draws.append(scipy.stats.trim_mean(picked, 0.25))
    np.testing.assert_allclose(got[:2], np.quantile(draws, [0.025, 0.975]), atol=0.03)
    assert got.label == 'stratified bootstrap over 10 seeds in each of 3 games'


def test_iqm_and_interval_are_those_of_rliable():
    want = json.loads((ROOT / 'tests' / 'golden' / 'rliable.json').read_text())
    scores = np.array(want['scores'])  # [runs, games]
    assert iqm(scores) == pytest.approx(want['iqm'], rel=1e-9)
    games = [game[:, None] for game in scores.T]  # one episode a run
    for name, trim in (('iqm', 0.25), ('mean', 0.0)):
        got = stratified_interval(games, trim=trim, resamples=20_000)
        np.testing.assert_allclose(got[:2], want[f'{name}_ci95'], atol=0.02)
        assert got.kind == 'stratified bootstrap'


def test_episodes_of_one_run_are_never_runs():
    episodes = np.random.default_rng(0).normal(5, 2, 400)
    half = 1.96 * episodes.std() / 400**0.5  # closed form of the mean's spread
    got = interval([episodes], resamples=4000)
    np.testing.assert_allclose(got[:2], [episodes.mean() - half, episodes.mean() + half], atol=0.02)
    assert got.label == 'bootstrap over 400 episodes of one seed'
    assert interval([episodes], trained=False).label == 'bootstrap over 400 episodes'
    assert interval([episodes[:4]]).label == 't over 4 episodes of one seed'
    assert interval([[3.0]]) is None and summary([[3.0]])['ci95'] is None
    # more games do not make runs of episodes, and one lone run takes the others' intervals along
    games = stratified_interval([[episodes], [episodes + 1]])
    assert games.label == 'bootstrap over 400 episodes of one seed in each of 2 games'.replace(
        'b', 'stratified b', 1
    )
    assert stratified_interval([[episodes], [episodes[:50]] * 3]).over == 'episodes of each seed'
    assert stratified_interval([[episodes], [episodes[:9]]]) is None


def test_of_random_play_and_a_dataset_all_episodes_count_alike():
    rows = [[1.0, 2.0], [6.0]]
    got = derive({'data': {'sampled': rows}, 'random': {'sampled': rows}}, None)['score']
    for name in ('data', 'random'):
        assert got[name]['mean'] == 3.0 and figure_interval(got[name]).label == 't over 3 episodes'


def test_the_interval_is_the_same_every_time():
    assert interval(runs(12)) == interval(runs(12))


@pytest.mark.parametrize('n', [2, 3, 9])
def test_a_paired_difference_has_the_interval_of_the_paired_t_test(n):
    a, b = [*runs(n - 1), [4.0]], runs(n, episodes=5, seed=7)
    want = scipy.stats.ttest_rel([np.mean(x) for x in a], b.mean(1)).confidence_interval(0.95)
    got = difference(a, b)
    np.testing.assert_allclose(got['ci95'], want)
    assert figure_interval(got).label == f't over {n} seeds' and got['mean'] == pytest.approx(
        np.mean(got['per_seed'])
    )


def test_one_pair_is_compared_over_its_episodes_or_not_at_all():
    a, b = runs(1, episodes=300), runs(1, episodes=200, seed=1)
    got = difference(a, b, resamples=4000)
    half = 1.96 * (a.var() / 300 + b.var() / 200) ** 0.5
    np.testing.assert_allclose(got['ci95'], [got['mean'] - half, got['mean'] + half], atol=0.03)
    assert figure_interval(got).label == 'bootstrap over 200 episodes of one seed'
    assert difference([[1.0, 2.0]], [[3.0]])['ci95'] is None
    with pytest.raises(UserError, match='3 and 2 seeds given'):
        difference(runs(3), runs(2))


def test_read_outs_of_one_run_are_compared_in_both_laws():
    played = {
        'imagination': {'sampled': [[3.0, 5.0], [7.0]], 'greedy': [[5.0], [6.0]]},
        'ppo': {'sampled': [[9.0]]},
        'bc': {'sampled': [[1.0], [2.0]], 'greedy': [[3.0], [6.0]]},
    }
    got = derive(played, None)['differences']
    assert list(got) == ['imagination - bc']
    assert got['imagination - bc']['per_seed'] == [3.0, 5.0]
    assert got['imagination - bc']['greedy']['per_seed'] == [2.0, 0.0]


def record():
    scores = {
        'random': [0.0, 1.0],
        'wm_bc': runs(3),
        'imagination': {'sampled': runs(3), 'greedy': runs(3, seed=2)},
    }
    return results.record(
        preset='dreamer4',
        env='minatar/breakout',
        command='reverie train',
        seeds=[0, 1, 2],
        env_frames=1,
        gradient_steps={},
        seconds=1.0,
        reference=9.0,
        scores=scores,
    )


def test_recomputing_heals_stale_figures_and_touches_nothing_else():
    right, stale = record(), record()
    stale['score']['wm_bc'] |= {'ci95': [0.0, 9.0], 'ci95_over': 'seeds'}
    stale['score']['imagination']['greedy']['mean'] = 4.0
    del stale['differences']
    assert recompute(stale) == right and list(recompute(stale)) == list(right)
    assert recompute(right) == right


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'results').glob('*/*.json')), ids=lambda p: f'{p.parent.name}/{p.stem}'
)
def test_the_recorded_figures_are_those_of_their_returns(path):
    recorded = json.loads(path.read_text())
    if 'score' in recorded:
        rounded = lambda x: json.loads(
            json.dumps(x), parse_float=lambda text: round(float(text), 6)
        )
        assert rounded(recompute(recorded)) == rounded(recorded), (
            'run: python results/plot.py --recompute'
        )
