"""Training from environments on the host, with two in-process stand-ins for the vector of worker
processes.
"""

import dataclasses

import jax
import numpy as np
import pytest
from test_online import PLAY, B, Crash, Failing, Signal, T, Toy, Watcher
from test_runner import leaves, same

from reverie.data import Episodes
from reverie.training import metrics, online_host
from reverie.training.online_host import OnlineHost
from reverie.training.run import run
from reverie.types import Step, UserError


class SignalVector:
    """`Signal` in NumPy, n copies; observations live in memory that every step reuses, as shared
    memory does.
    """

    def __init__(self, seed=0, n=PLAY.envs):
        self.rng, self.n, self.obs, self.moves = (
            np.random.default_rng(seed),
            n,
            np.zeros((n, 2), np.uint8),
            0,
        )

    @property
    def spec(self):
        return Signal().spec

    def reset(self):
        self.bit, self.time = self.rng.integers(0, 2, self.n), np.zeros(self.n, int)
        self.end, self.last = self.rng.integers(3, 6, self.n), np.zeros(self.n, bool)
        return self._step(np.zeros((self.n, 2)), np.zeros(self.n), np.ones(self.n, bool))

    def step(self, action):
        first, self.moves = self.last, self.moves + 1
        assert action.shape == (self.n,)
        reward = np.where(first, 0, action == self.bit)
        self.time = np.where(first, 0, self.time + 1)
        self.end = np.where(first, self.rng.integers(3, 6, self.n), self.end)
        self.bit, self.last = self.rng.integers(0, 2, self.n), ~first & (self.time >= self.end)
        return self._step(np.where(first[:, None], 0, np.eye(2)[action]), reward, first)

    def _step(self, prev_action, reward, first):
        self.obs[:] = np.stack([self.bit, self.time], -1)
        terminal = self.last & (self.time < 5)
        return Step(
            self.obs,
            prev_action.astype(np.float32),
            reward.astype(np.float32),
            first,
            self.last,
            terminal,
        )


class Halves(SignalVector):
    """The same, in two halves."""

    def send(self, action):
        self.action = np.array(action)

    def receive(self):
        action, self.action = self.action, None
        return SignalVector.step(self, action)

    def step(self, action):
        raise AssertionError('expected send and receive')


def source(seeds=1, play=PLAY, **changes):
    return OnlineHost([SignalVector(i) for i in range(seeds)], Watcher(), play, **changes)


def train(folder, agent=None, live=None, **changes):
    arguments = dict(updates_per_call=4, log_every_s=0.0, checkpoint_every_s=1e9, config=dict(a=1))
    seeds = changes.get('seeds', 1)
    return run(agent or Toy(), live or source(seeds), folder, **{**arguments, **changes})


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Two seeds, undisturbed: folder and parameters."""
    folder = tmp_path_factory.mktemp('host')
    return folder, train(folder, seeds=2)


def test_the_toy_learns_and_records_count_what_was_played(whole):
    records = metrics.read(whole[0] / 'metrics.jsonl')
    w = np.asarray(whole[1]['policy']['w'])
    assert (w.argmax(-1) == np.arange(2)).all(), w
    assert [r['env_frames'] for r in records] == [30 + B * T // 2 * r['step'] for r in records]
    assert np.mean([r['env/return'] / r['env/length'] for r in records[-5:]]) > 0.8
    assert (
        all(len(r['env/return/seeds']) == 2 for r in records)
        and records[-1]['time/compilations'] == 1
    )


def test_context_is_the_memory_of_the_step_before_and_absorbed_memories_come_back(whole):
    records = metrics.read(whole[0] / 'metrics.jsonl')
    assert all(r['right'] == 1 for r in records)
    # The first two calls know only what the explorer remembered: memories come back two calls
    # later.
    assert [r['absorbed'] for r in records[:2]] == [0, 0] and records[2]['absorbed'] > 0 < records[
        -1
    ]['absorbed']


def test_a_seed_determines_the_run_whenever_it_is_saved(whole, tmp_path):
    again = train(tmp_path, seeds=2, checkpoint_every_s=0.0)
    assert same(again, whole[1])
    ours, theirs = (metrics.read(f / 'metrics.jsonl') for f in (tmp_path, whole[0]))
    for name in ('env_frames', 'loss/fit', 'absorbed', 'env/return/seeds', 'env/episodes'):
        assert [r[name] for r in ours] == [r[name] for r in theirs], name


def test_environments_that_move_meanwhile_give_the_same_run(whole, tmp_path):
    live = OnlineHost([Halves(0), Halves(1)], Watcher(), PLAY)
    assert same(train(tmp_path, live=live, seeds=2), whole[1])


def test_seeds_trained_together_equal_each_trained_alone(whole, tmp_path):
    for i in range(2):
        live = OnlineHost([SignalVector(i)], Watcher(), PLAY, seed=i)
        alone = train(tmp_path / str(i), live=live, seed=i)
        for a, b in zip(leaves(whole[1]), leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-5, atol=1e-5)


def test_a_killed_run_continues_with_its_replay_and_new_episodes(tmp_path):
    play = dataclasses.replace(PLAY, capacity=1500)  # nothing is overwritten
    with pytest.raises(Crash):
        train(tmp_path / 'run', live=source(play=play), checkpoint_every_s=0.0, sinks=[Failing(5)])
    path, restored = tmp_path / 'set', []

    class Watched(OnlineHost):
        def set_arrays(self, arrays):
            super().set_arrays(arrays)
            ring = self.players[0].ring
            restored.append(
                (ring.written, int((ring.data.memory['time'] > 100).sum()), ring.data.flags.copy())
            )

    live = Watched([SignalVector(7)], Watcher(), play, dataset=path)
    train(tmp_path / 'run', live=live)
    (count, absorbed, flags) = restored[0]
    assert count == 10 + 4 * 16 and absorbed > 20
    assert (
        (flags[:, count - 1] & 6) >= 2
    ).all()  # the newest step of every stream ends its episode
    records = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
    assert [r['step'] for r in records] == list(range(4, 41, 4)) and all(
        r['right'] == 1 for r in records
    )
    assert live.vectors[0].moves == 4 * (40 - 16)  # no second prefill
    found = list(Episodes(path).records())
    cut = [r for r in found if r.complete and not r.flags[-1] & 4 and len(r) < 6]
    assert (
        len(found) >= 30 and 1 <= len(cut) <= 3
    )  # else episodes end by termination, or after 5 steps
    for record in found:
        assert record.obs[:, 1].tolist() == list(range(len(record)))
        answers = record.obs[:-1, 0] == record.action[1:]
        assert record.reward[1:].tolist() == answers.tolist()


def test_a_finished_run_with_more_frames_goes_on_with_its_replay(tmp_path):
    def of(steps):
        play = dataclasses.replace(PLAY, capacity=PLAY.env_frames(steps, B, T))
        return Toy(steps=steps), source(play=play)

    train(tmp_path, *of(8))
    agent, live = of(20)
    train(tmp_path, agent, live)
    ring = live.players[0].ring
    assert ring.written * PLAY.envs == PLAY.env_frames(20, B, T) - 0
    rows = metrics.read(tmp_path / 'metrics.jsonl')
    assert rows[-1]['step'] == 20 and rows[-1]['env_frames'] == PLAY.env_frames(20, B, T)
    flags = ring.data.flags[:, : ring.written]
    assert (flags[:, 0] & 1).all() and np.unique(np.nonzero(flags & 2)[1]).size > 3


def test_a_restored_replay_is_held_once(tmp_path):
    train(tmp_path, live=(live := source()))
    saved = jax.tree.map(np.copy, live.arrays())
    other = source()
    other.players = live.players
    other.set_arrays(saved)
    held, given = (jax.tree.leaves(x[0]['data']) for x in (other.arrays(), saved))
    assert all(np.shares_memory(a, b) for a, b in zip(held, given, strict=True))
    read_only = jax.tree.map(np.copy, saved)
    for x in jax.tree.leaves(read_only):
        x.setflags(write=False)
    other.set_arrays(read_only)
    assert all(x.flags.writeable for x in jax.tree.leaves(other.arrays()[0]['data']))


def test_random_play_fills_the_ring_first_and_scores_nothing(tmp_path):
    live = source(play=dataclasses.replace(PLAY, prefill=90, random_prefill=True))
    live.check(Toy().init(jax.random.key(0)), B, T, 1)
    live.set_params(jax.tree.map(lambda x: x[None], Toy().init(jax.random.key(0))))
    loaded = live.load(1, B, T, 1)
    ring = live.players[0].ring
    assert ring.written == 30 + 4 and not ring.data.memory['time'][:, :30].any()
    assert loaded['rows'].obs.shape == (1, 1, B, T, 2) and loaded['rows'].obs.dtype == np.uint8
    assert live.metrics()['env/return'].n.shape == (1,) and live.metrics()['env/return'].n[0] == 0


def test_numbers_that_do_not_fit_are_named_before_training(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='1 vectors of environments for 2 seeds'):
        train(tmp_path / 'a', live=source(1), seeds=2)
    with pytest.raises(UserError, match='3 environments are there, expected the 4 of play'):
        train(tmp_path / 'b', live=source(play=dataclasses.replace(PLAY, envs=4, ratio=1.0)))
    with pytest.raises(UserError, match=r'1\.6 of each of 3 environments'):
        train(tmp_path / 'c', live=source(play=dataclasses.replace(PLAY, ratio=5.0)))
    monkeypatch.setattr(online_host, 'available_bytes', lambda device=None: 1000)
    with pytest.raises(UserError, match=r'replay of 150 steps of 10 bytes for 1 seeds takes'):
        train(tmp_path / 'd')
