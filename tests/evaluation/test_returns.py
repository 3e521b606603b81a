"""Scores of environments whose returns are known, and the results file."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from reverie.evaluation import results, returns
from reverie.evaluation.returns import RandomActor, evaluate, evaluate_seeds
from reverie.types import ActionSpace, EnvSpec, Step


@dataclasses.dataclass(frozen=True)
class Walk:
    """An episode of a random length n in [2, 40): step i pays i for action 1, nothing else; after
    its end it pays NaN.

    Its state says how long it will be, so that a test knows every return beforehand.
    """

    time_limit: int = 1000
    spec = EnvSpec('walk', (1, 1, 1), ActionSpace('discrete', 2))

    def reset(self, key):
        n = jax.random.randint(key, (), 2, 40)
        no, zero = jnp.zeros((), bool), jnp.zeros(())
        return (n, jnp.int32(0)), Step(
            jnp.full((1, 1, 1), n, float), jnp.zeros(2), zero, ~no, no, no
        )

    def step(self, state, action, key):
        n, i = state
        i = i + 1
        reward = jnp.where(i > n, jnp.nan, i * (action == 1).astype(float))
        terminal = i >= n
        obs = jnp.full((1, 1, 1), n, float)
        step = Step(
            obs,
            jax.nn.one_hot(action, 2),
            reward,
            i < 0,
            terminal | (i >= self.time_limit),
            terminal,
        )
        return (n, i), step


@dataclasses.dataclass(frozen=True)
class Parity:
    """Greedy: action 1 if `params['flip']` is 0, else 0.

    Sampled: always the other one. Counts its steps as memory.
    """

    def initial(self, params, batch):
        return jnp.zeros(batch, jnp.int32)

    def act(self, params, state, step, key, greedy):
        action = jnp.full(state.shape, 1 - params['flip'].astype(jnp.int32))
        return state + 1, jnp.where(greedy, action, 1 - action)


def total(n):
    return sum(range(1, n + 1))


PARAMS = {'flip': jnp.zeros(())}


def test_returns_are_those_of_one_whole_episode_per_copy():
    got = evaluate(Walk(), Parity(), PARAMS, jax.random.key(0), episodes=16, greedy=True, chunk=10)
    assert len(set(got.lengths.tolist())) > 5 and got.lengths.min() < 10 < got.lengths.max()
    assert got.returns.tolist() == [total(n) for n in got.lengths]
    assert not got.truncated.any()


def test_sampled_and_greedy_are_two_read_outs():
    got = evaluate(Walk(), Parity(), PARAMS, jax.random.key(0), episodes=16, greedy=False, chunk=10)
    assert not got.returns.any() and got.lengths.min() >= 2


def test_unfinished_episodes_count_so_far_and_are_truncated():
    whole = evaluate(
        Walk(), Parity(), PARAMS, jax.random.key(0), episodes=16, greedy=True, chunk=10
    )
    cut = evaluate(
        Walk(),
        Parity(),
        PARAMS,
        jax.random.key(0),
        episodes=16,
        greedy=True,
        chunk=10,
        max_steps=13,
    )
    assert cut.truncated.tolist() == [n > 13 for n in whole.lengths]
    assert cut.returns.tolist() == [total(min(n, 13)) for n in whole.lengths]
    assert cut.lengths.tolist() == [min(n, 13) for n in whole.lengths]


def test_a_time_limit_of_the_environment_is_truncation_too():
    got = evaluate(
        Walk(time_limit=13), Parity(), PARAMS, jax.random.key(0), episodes=16, greedy=True, chunk=10
    )
    assert got.lengths.max() == 13
    assert got.truncated.tolist() == [n == 13 for n in got.lengths]


def test_the_size_of_a_chunk_changes_no_score():
    env, actor = Walk(), RandomActor(Walk().spec.actions)
    a, b = (evaluate(env, actor, {}, jax.random.key(3), episodes=4, chunk=c) for c in (10, 7))
    assert a.returns.tolist() == b.returns.tolist() and len(set(a.returns.tolist())) > 1


def test_every_seed_plays_with_its_own_parameters():
    params = {'flip': jnp.array([0.0, 1.0, 0.0])}
    got = evaluate_seeds(
        Walk(), Parity(), params, jax.random.key(0), episodes=8, greedy=True, chunk=10
    )
    assert got.returns.shape == (3, 8) and not got.returns[1].any()
    assert got.returns[[0, 2]].ravel().tolist() == [total(n) for n in got.lengths[[0, 2]].ravel()]
    assert got.lengths[0].tolist() != got.lengths[2].tolist()  # their own episodes as well


def test_scoring_again_compiles_nothing_and_greedy_shares_the_program():
    args = {'episodes': 4, 'chunk': 11}
    before = returns._play._cache_size()
    for seed in range(2):
        for greedy in (False, True):
            params = {'flip': jnp.full((), float(seed))}
            evaluate(
                Walk(),
                Parity(),
                params,
                jax.random.key(seed),
                greedy=greedy,
                max_steps=20 + seed,
                **args,
            )
    assert returns._play._cache_size() - before == 1


def test_the_random_actor_is_uniform():
    actor, step = RandomActor(ActionSpace('discrete', 4)), Step(*[jnp.zeros(4000)] * 6)
    action = actor.act({}, (), step, jax.random.key(0), False)[1]
    assert scipy.stats.chisquare(np.bincount(np.asarray(action), minlength=4)).pvalue > 0.01
    action = RandomActor(ActionSpace('continuous', 2)).act({}, (), step, jax.random.key(0), True)[1]
    assert (
        action.shape == (4000, 2)
        and scipy.stats.kstest(np.ravel(action), 'uniform', (-1, 2)).pvalue > 0.01
    )


def record(**changes):
    scores = {
        'random': [0.0, 2.0],
        'ppo': {'sampled': [10.0, 12.0], 'greedy': [13.0]},
        'imagination': {'sampled': [[5.0, 7.0], [6.0]], 'greedy': [[11.0], [11.0]]},
    }
    given = dict(
        preset='dreamer4',
        env='minatar/breakout',
        command='reverie train dreamer4',
        seeds=[0, 1],
        env_frames=10,
        gradient_steps={'tokenizer': 3},
        seconds=1.5,
        scores=scores,
    )
    return results.record(**(given | changes))


def test_a_record_is_written_and_read_back(tmp_path):
    saved = record()
    path = results.save(tmp_path / 'dreamer4' / 'minatar_breakout.json', saved)
    assert json.loads(path.read_text()) == saved and [p.name for p in path.parent.iterdir()] == [
        path.name
    ]
    assert {
        'preset',
        'env',
        'command',
        'device',
        'date',
        'commit',
        'versions',
        'seeds',
        'env_frames',
        'gradient_steps',
        'seconds',
        'score',
        'curve',
    } <= saved.keys()
    own = saved['score']['imagination']
    assert (
        own['per_seed'] == [[5.0, 7.0], [6.0]] and own['mean'] == 6.0 and own['normalised'] == 0.5
    )
    assert own['greedy']['normalised'] == 1.0 and saved['score']['ppo']['greedy']['mean'] == 13.0
    assert [(s['n'], s['interval']) for s in saved['score'].values()] == [
        (2, {'kind': 't', 'over': 'episodes'}),
        (2, {'kind': 't', 'over': 'episodes of one seed'}),
        (2, {'kind': 't', 'over': 'seeds'}),
    ]
    assert saved['differences'] == {}


def test_a_given_reference_replaces_the_ppo_of_the_run():
    assert record(reference=21.0)['score']['imagination']['normalised'] == 0.25
    lone = record(scores={'imagination': [1.0, 2.0]})
    assert lone['score']['imagination']['normalised'] is None


def test_a_number_that_is_not_finite_is_named_and_nothing_is_written(tmp_path):
    path = results.save(tmp_path / 'r.json', record())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r'score\.imagination\.per_seed\[0\]\[1\] is nan'):
        results.save(path, record(scores={'imagination': [1.0, float('nan')], 'random': [0.0]}))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_commit_falls_back_to_the_version_outside_a_checkout(monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError('git')

    monkeypatch.setattr(subprocess, 'run', no_git)
    assert results.commit_name() == f'v{results.reverie.__version__}'
