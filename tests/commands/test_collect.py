"""Collecting: who plays which share, the arrival convention of what comes out, and the dataset on
disk.
"""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from reverie.agents.ppo import PPOConfig, train
from reverie.commands.collect.dataset import frames_of_training, weak, write_dataset
from reverie.commands.collect.players import collect, nearest, play, players, snapshots, streams_for
from reverie.data.episodes import Episodes
from reverie.envs.device import TimeLimit, make
from reverie.types import UserError

CONFIG = PPOConfig(env_frames=8192, envs=16, rollout=32, minibatches=2, width=16, snapshots=4)


@pytest.fixture(scope='module')
def game():
    return TimeLimit(make('minatar/breakout'), 50)


@pytest.fixture(scope='module')
def run(game):
    return CONFIG, train(game, CONFIG, jax.random.key(0))


@pytest.fixture(scope='module')
def mixed(game, run):
    return list(collect(game, players('mixed', game.spec, run), 4000, jax.random.key(1), envs=4))


def test_mixed_is_four_equal_shares_under_four_labels(mixed):
    frames = {}
    for label, episode, _ in mixed:
        frames[label] = frames.get(label, 0) + len(episode.reward)
    assert frames == {'random': 1000, 'ppo25': 1000, 'ppo50': 1000, 'ppo100': 1000}


def test_episodes_keep_the_arrival_convention(mixed):
    for _, episode, complete in mixed:
        first, rest = episode.is_first[0], episode.is_first[1:]
        assert first and not np.any(rest)
        assert episode.is_last[-1] and not np.any(episode.is_last[:-1])
        assert not np.any(episode.is_terminal & ~episode.is_last)
        assert not np.any(episode.prev_action[0]) and episode.reward[0] == 0.0
        assert np.all(episode.prev_action[1:].sum(-1) == 1)
        assert complete or not episode.is_terminal[-1]
    assert sum(not complete for _, _, complete in mixed) <= 4 * 4  # one tail per stream at most
    assert any(episode.is_terminal[-1] for _, episode, _ in mixed)


def test_what_arrives_is_what_the_game_does_after_the_recorded_action(mixed):
    """Independent of the collector: the paddle moves where prev_action says, unless the game was
    sticky.
    """
    moved = wrong = 0
    for _, episode, _ in mixed:
        paddle = np.argmax(episode.obs[:, 9, :, 0], -1)
        push = np.argmax(episode.prev_action, -1)
        expected = np.clip(
            paddle[:-1] + np.select([push[1:] == 1, push[1:] == 3], [-1, 1], 0), 0, 9
        )
        moved += len(expected)
        wrong += int(np.sum(expected != paddle[1:]))
    assert wrong / moved < 0.1  # sticky 0.1, and a repeated action is often the same one


def test_the_same_key_collects_the_same_episodes(game, run, mixed):
    again = list(collect(game, players('mixed', game.spec, run), 4000, jax.random.key(1), envs=4))
    assert [(label, complete) for label, _, complete in again] == [
        (label, complete) for label, _, complete in mixed
    ]
    for (_, a, _), (_, b, _) in zip(again, mixed, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_chunks_join_without_a_seam(game, monkeypatch):
    player = players('random', game.spec, None)[0]
    whole = list(play(game, player, 300, 3, jax.random.key(2)))
    monkeypatch.setattr('reverie.commands.collect.players.CHUNK', 30)
    parts = list(play(game, player, 300, 3, jax.random.key(2)))
    assert [len(x.reward) for x in whole] == [100] and [len(x.reward) for x in parts] == [25] * 4
    joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole[0])


def test_snapshots_are_those_nearest_to_the_fraction_of_the_final_return(game, run):
    returns = np.array([np.nan, 1.0, 4.0, 9.0, 12.0, 10.0])
    assert [nearest(returns, x) for x in (0.25, 0.5, 1.0)] == [1, 2, 5]
    expert = players('expert', game.spec, run)[0]
    jax.tree.map(np.testing.assert_array_equal, expert.params, run[1].params)
    assert expert.env_frames == 8192


def test_short_data_is_played_by_few_streams_so_that_episodes_end():
    assert [streams_for(x) for x in (100, 25_000, 1_000_000)] == [1, 10, 64]


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    """-> (path, options, configuration of PPO)."""
    path = tmp_path_factory.mktemp('collected') / 'data'
    options = {'time_limit': 100}
    config = dataclasses.replace(CONFIG, env_frames=4096)
    write_dataset(
        path, 'minatar/breakout', 'mixed', 2000, options=options, config=config, seed=3, episodes=8
    )
    return path, options, config


def test_a_dataset_on_disk_carries_scores_curve_and_players(dataset):
    path, options, _ = dataset
    data = Episodes(path)
    assert data.counts['frames'] == 2000
    assert {kind: x['frames'] for kind, x in data.counts['kinds'].items()} == dict.fromkeys(
        ('random', 'ppo25', 'ppo50', 'ppo100'), 500
    )
    provenance = data.manifest['provenance']
    assert provenance['seed'] == 3 and provenance['env'] == {
        'name': 'minatar/breakout',
        'options': options,
    }
    assert provenance['ppo']['curve']['env_frames'] == [1024, 2048, 3072, 4096]
    assert [x['kind'] for x in provenance['players']] == ['random', 'ppo25', 'ppo50', 'ppo100']
    found = provenance['scores']
    for score in (found['random']['sampled'], found['ppo']['sampled'], found['ppo']['greedy']):
        assert len(score['returns']) == 8 and score['mean'] == pytest.approx(
            np.mean(score['returns'])
        )


def test_the_players_kept_beside_a_dataset_are_the_snapshots_of_the_run_that_made_it(dataset):
    path, options, config = dataset
    env = make('minatar/breakout', **options)
    again = train(env, config, jax.random.split(jax.random.key(3), 3)[0])
    kept = snapshots(path)
    assert [p.env_frames for p in kept] == [1024, 2048, 3072, 4096]
    assert [p.label for p in kept] == ['ppo1024', 'ppo2048', 'ppo3072', 'ppo4096']
    np.testing.assert_array_equal([p.online_return for p in kept], again.curve['return'])
    for i, player in enumerate(kept):
        jax.tree.map(
            np.testing.assert_array_equal,
            player.params,
            jax.tree.map(lambda x, i=i: x[i], again.snapshots),
        )
    [chunk] = play(env, kept[0], 40, 4, jax.random.key(0))
    assert chunk.reward.shape == (10, 4)


def test_kept_players_that_changed_or_are_not_there_are_refused(dataset, tmp_path):
    path = tmp_path / 'changed'
    shutil.copytree(dataset[0], path)
    data = bytearray((path / 'ppo.npz').read_bytes())
    data[len(data) // 2] ^= 1
    (path / 'ppo.npz').write_bytes(data)
    with pytest.raises(UserError, match='changed since it was written'):
        snapshots(path)
    write_dataset(tmp_path / 'random', 'minatar/breakout', 'random', 100, episodes=2)
    with pytest.raises(UserError, match='no snapshots of PPO'):
        snapshots(tmp_path / 'random')


def test_a_ppo_not_above_twice_random_play_is_named(dataset):
    score = lambda random, ppo: {
        'random': {'sampled': {'mean': random}},
        'ppo': {'sampled': {'mean': ppo}},
    }
    assert (
        weak(score(0.5, 1.1)) == [] and weak(score(-3.0, 0.2)) == [] and weak({'random': {}}) == []
    )
    assert weak(score(0.5, 0.92)) == [
        'PPO scores 0.92 and random play 0.50; expected more than 1.00: give it more ppo-frames'
    ]
    assert len(weak(score(0.0, 0.0))) == len(weak(score(-3.0, -2.0))) == 1
    provenance = Episodes(dataset[0]).manifest['provenance']
    assert provenance['warnings'] == weak(provenance['scores'])


def test_ppo_trains_for_as_many_frames_as_are_recorded_but_long_enough_for_the_game():
    assert [frames_of_training('minatar/breakout', n) for n in (1000, 200_000, 10**6)] == [
        200_000,
        200_000,
        10**6,
    ]
    assert [frames_of_training('minatar/asterix', n) for n in (200_000, 10**7)] == [
        3_000_000,
        10**7,
    ]


def test_a_share_of_the_episodes_is_held_out_and_the_others_stay_as_they_were(tmp_path):
    paths = [tmp_path / name for name in ('all', 'some')]
    for path, holdout in zip(paths, (0.0, 0.2), strict=True):
        write_dataset(path, 'minatar/breakout', 'random', 400, episodes=2, holdout=holdout)
    whole, split = map(Episodes, paths)
    assert not whole.held_out and len(split.held_out) == len(split) // 5
    assert max(np.diff(sorted(split.held_out))) == 5
    assert whole.fingerprint == split.fingerprint


def test_players_that_are_not_numbers_do_not_play(game, run):
    config, result = run
    spoilt = jax.tree.map(np.array, result.snapshots)
    for x in jax.tree.leaves(spoilt):
        x[-1] = np.nan
    with pytest.raises(UserError, match=r'not finite; expected a rate below 0\.005'):
        players('mixed', game.spec, (config, result._replace(snapshots=spoilt)))


def test_mistakes_are_refused_before_anything_is_trained(tmp_path, monkeypatch, game):
    monkeypatch.setattr('reverie.commands.collect.dataset.train', lambda *_: pytest.fail('trained'))
    write = lambda path, name, kind, frames: write_dataset(
        path, name, kind, frames, config=CONFIG, episodes=4
    )
    with pytest.raises(UserError, match="kind 'best' is unknown"):
        write(tmp_path / 'a', 'minatar/breakout', 'best', 1000)
    with pytest.raises(UserError, match='pong'):
        write(tmp_path / 'a', 'minatar/pong', 'mixed', 1000)
    with pytest.raises(UserError, match='at least 4'):
        write(tmp_path / 'a', 'minatar/breakout', 'mixed', 3)
    assert not (tmp_path / 'a').exists()
    (tmp_path / 'b').mkdir()
    with pytest.raises(UserError, match='exists'):
        write(tmp_path / 'b', 'minatar/breakout', 'mixed', 1000)
    with pytest.raises(UserError, match='needs a trained PPO'):
        players('expert', game.spec, None)


def test_random_play_on_the_host_is_recorded_and_ppo_there_is_refused(tmp_path):
    pytest.importorskip('gymnasium')
    for name in 'ab':
        facts = write_dataset(
            tmp_path / name, 'gym/CartPole-v1', 'random', 900, episodes=3, envs=2, seed=4
        )
    episodes = Episodes(tmp_path / 'a')
    assert episodes.frames == 900 and episodes.spec.obs_shape == (4,)
    assert episodes.fingerprint == Episodes(tmp_path / 'b').fingerprint
    assert 10 < facts['scores']['random']['sampled']['mean'] < 40
    firsts = [record.obs[0] for record in episodes.records()]
    assert len(np.unique(firsts, axis=0)) == len(firsts), 'episodes begin differently'
    with pytest.raises(UserError, match='runs on the host; expected --kind random'):
        write_dataset(tmp_path / 'c', 'gym/CartPole-v1', 'mixed', 900)
    assert not (tmp_path / 'c').exists()
