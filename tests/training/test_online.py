"""Training from play: the toy learns to answer a signal while it collects, and what replay
remembers is watched.
"""

import dataclasses
import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_runner import leaves, same

from reverie.data import Episodes
from reverie.training import checkpoint, metrics, online, state
from reverie.training.online import CollectConfig, Online, vector_steps
from reverie.training.run import run
from reverie.training.update import make_program
from reverie.types import ActionSpace, EnvSpec, Outcome, Phase, Step, UserError

pytestmark = pytest.mark.slow

B, T, N = 4, 6, 3


class SignalState(NamedTuple):
    bit: jax.Array
    time: jax.Array
    end: jax.Array


@dataclasses.dataclass(frozen=True)
class Signal:
    """Observations are (signal, time); answering the signal 0 or 1 with that action earns 1. Ends
    after 3 to 5 steps, by truncation if after 5."""

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec('signal', (2,), ActionSpace('discrete', 2))

    def _obs(self, state):
        return jnp.stack([state.bit, state.time]).astype(jnp.uint8)

    def reset(self, key):
        bit_key, end_key = jax.random.split(key)
        bit, end = jax.random.bernoulli(bit_key), jax.random.randint(end_key, (), 3, 6)
        state, no = (
            SignalState(bit.astype(jnp.int32), jnp.zeros((), jnp.int32), end),
            jnp.asarray(False),
        )
        return state, Step(self._obs(state), jnp.zeros(2), jnp.zeros(()), jnp.asarray(True), no, no)

    def step(self, state, action, key):
        reward = (action == state.bit).astype(jnp.float32)
        bit, time = jax.random.bernoulli(key).astype(jnp.int32), state.time + 1
        last = time >= state.end
        state = SignalState(bit, time, state.end)
        one_hot = jax.nn.one_hot(action, 2)
        return state, Step(
            self._obs(state), one_hot, reward, jnp.asarray(False), last, last & (time < 5)
        )


@dataclasses.dataclass(frozen=True)
class Watcher:
    """The best action by expected reward, one in five at random.

    Remembers the time of its step, 1 at the reset.
    """

    def initial(self, params, batch):
        return jnp.zeros(batch, jnp.int16)

    def act(self, params, state, step, key, greedy):
        value = params['policy']['w'][step.obs[:, 0].astype(jnp.int32)]
        chance, any_key = jax.random.split(key)
        wild = jax.random.bernoulli(chance, 0.2, value.shape[:1]) & ~jnp.asarray(greedy)
        action = jnp.where(
            wild, jax.random.randint(any_key, value.shape[:1], 0, 2), value.argmax(-1)
        )
        return jnp.where(step.is_first, 1, state + 1).astype(jnp.int16), action

    def memory(self, state):
        return {'time': state}


def toy_loss(params, batch, key, step):
    """Regression of rewards on (signal, action); metrics say whether the contexts are those of the
    steps before.

    Memories that come back are 100 larger, so that absorbed ones are known.
    """
    obs, action = batch.step.obs[:, :-1, 0].astype(jnp.int32), batch.step.prev_action[:, 1:]
    value = (params['policy']['w'][obs] * action).sum(-1)
    fit = (value - batch.step.reward[:, 1:]) ** 2 * ~batch.step.is_first[:, 1:]
    time, context = batch.step.obs[..., 1].astype(jnp.int16), batch.context['time'][:, 0]
    right = (context % 100 == time[:, 0]) | batch.step.is_first[:, 0]
    seen = {'batches': params['seen']['batches'] + 1}
    facts = dict(
        right=right.mean(),
        absorbed=(context >= 100).mean(),
        lag=(params['slow']['w'] - params['policy']['w']).max(),
    )
    memory = {
        'time': time + 101 + jnp.minimum(context, 0)[:, None]
    }  # depends on the context, as latent states do
    return Outcome(dict(fit=jnp.pad(fit, ((0, 0), (0, 1)))), facts, memory, dict(seen=seen))


@dataclasses.dataclass(frozen=True)
class Toy:
    steps: int = 40
    loss: Any = toy_loss
    spec: EnvSpec = Signal().spec
    readouts: Any = dataclasses.field(default_factory=dict)

    @property
    def phases(self):
        def slow(params, step):
            return {**params, 'slow': jax.tree.map(jnp.copy, params['policy'])}

        learn = Phase(
            'learn',
            ('policy',),
            self.loss,
            dict(fit=1.0),
            optax.adam(0.05),
            self.steps,
            B,
            T,
            after=slow,
        )
        return (learn,)

    def init(self, key):
        w = 0.01 * jax.random.normal(key, (2, 2))
        return dict(
            policy=dict(w=w), slow=dict(w=jnp.zeros((2, 2))), seen=dict(batches=jnp.zeros(()))
        )


PLAY = CollectConfig(envs=N, capacity=150, ratio=2.0, prefill=30, random_prefill=False)


def source(play=PLAY, **changes):
    return Online(Signal(), Watcher(), play, **changes)


def train(folder, agent=None, live=None, **changes):
    arguments = dict(updates_per_call=4, log_every_s=0.0, checkpoint_every_s=1e9, config=dict(a=1))
    return run(agent or Toy(), live or source(), folder, **{**arguments, **changes})


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Two seeds, undisturbed: folder and parameters."""
    folder = tmp_path_factory.mktemp('online')
    return folder, train(folder, seeds=2, checkpoint_every_s=0.0)


def test_the_toy_learns_from_its_own_play(whole):
    records = metrics.read(whole[0] / 'metrics.jsonl')
    w = np.asarray(whole[1]['policy']['w'])
    assert (w.argmax(-1) == np.arange(2)).all(), w
    assert records[-1]['loss/fit'] < 0.5 * records[0]['loss/fit']
    share = [r['env/return'] / r['env/length'] for r in records]
    assert np.mean(share[-5:]) > 0.8  # a fifth of the actions are random, half of those are right


def test_records_count_what_was_played(whole):
    records = metrics.read(whole[0] / 'metrics.jsonl')
    per_update = B * T // 2
    assert [r['env_frames'] for r in records] == [30 + per_update * r['step'] for r in records]
    assert all(3 <= r['env/length'] <= 5 and 0 <= r['env/return'] <= 5 for r in records)
    assert all(len(r['env/return/seeds']) == 2 for r in records)
    # 10 records of 4 updates, in each 4 vector steps of 3 environments and 2 seeds; an episode
    # takes 4 to 6 of them
    episodes = sum(r['env/episodes'] for r in records)
    assert 40 * 4 * 6 / 6 - 12 <= episodes <= 40 * 4 * 6 / 4 + 12
    assert records[-1]['time/env_frames_per_s'] == pytest.approx(
        records[-1]['time/frames_per_s'] / 2
    )


def test_steady_state_compiles_nothing(whole):
    assert metrics.read(whole[0] / 'metrics.jsonl')[-1]['time/compilations'] == 1


@pytest.mark.parametrize('seeds', [1, 2])
def test_an_update_never_copies_the_ring(seeds):
    live, agent = source(dataclasses.replace(PLAY, capacity=N * 4567)), Toy()
    phase, keys = agent.phases[0], jax.random.split(jax.random.key(0), seeds)

    def begin(key):
        train = state.create(agent.init(key), phase)
        return train._replace(live=live.begin(train.params, key, B, T))

    train = jax.eval_shape(jax.vmap(begin), keys)
    text = (
        make_program(phase, live).call.lower(train, None, None, keys, updates=3).compile().as_text()
    )
    assert re.search(r'\b4567\b', text)
    assert not re.findall(r'= \w+\[[\d,]*\b4567\b[\d,]*\]\S* (?:copy|select|concatenate)\(.*', text)


def test_context_is_the_memory_of_the_step_before_and_absorbed_memories_come_back(whole):
    records = metrics.read(whole[0] / 'metrics.jsonl')
    assert all(r['right'] == 1 for r in records)
    assert records[0]['absorbed'] < 0.7 and records[-1]['absorbed'] > 0.2


def test_groups_that_a_loss_replaces_and_work_after_an_update(whole):
    np.testing.assert_array_equal(whole[1]['seen']['batches'], [40.0, 40.0])
    np.testing.assert_array_equal(whole[1]['slow']['w'], whole[1]['policy']['w'])


def test_a_skipped_update_leaves_groups_slow_weights_and_memories_alone(tmp_path):
    def poisoned(params, batch, key, step):
        outcome = toy_loss(params, batch, key, step)
        return outcome._replace(losses=jax.tree.map(lambda x: x + jnp.nan, outcome.losses))

    agent = Toy(steps=4, loss=poisoned)
    params = train(tmp_path, agent)
    start = agent.init(jax.random.split(jax.random.key(0))[0])
    assert same(jax.tree.map(lambda x: x[0], params), start)
    assert metrics.read(tmp_path / 'metrics.jsonl')[-1]['absorbed'] == 0
    (path,) = (
        tmp_path / 'faults'
    ).iterdir()  # the batch, as it was drawn from a ring that has moved on since
    with np.load(path, allow_pickle=False) as found:
        assert (
            found['update'] == 0
            and found['step/obs'].shape[:2] == (B, T)
            and found['step/is_first'].any()
        )
        assert any(name.startswith('context') for name in found)


def test_a_loss_must_not_replace_what_it_trains(tmp_path):
    def wrong(*args):
        return toy_loss(*args)._replace(groups=dict(policy={}, other={}))

    with pytest.raises(UserError, match=r"it trains \['policy'\] or does not know \['other'\]"):
        train(tmp_path, Toy(loss=wrong))


class Crash(RuntimeError):
    pass


class Failing:
    """A sink that fails at its nth record."""

    def __init__(self, records):
        self.left = records

    def write(self, record):
        self.left -= 1
        if self.left == 0:
            raise Crash

    def close(self):
        pass


@pytest.mark.parametrize('records', [1, 5, 9])
def test_a_killed_run_continues_bit_for_bit_ring_and_all(whole, tmp_path, records):
    with pytest.raises(Crash):
        train(tmp_path, seeds=2, checkpoint_every_s=0.0, sinks=[Failing(records)])
    assert same(train(tmp_path, seeds=2, checkpoint_every_s=0.0), whole[1])
    ours, theirs = (metrics.read(f / 'metrics.jsonl') for f in (tmp_path, whole[0]))
    for name in (
        'gradient_steps',
        'env_frames',
        'loss/fit',
        'absorbed',
        'env/return/seeds',
        'env/episodes',
    ):
        assert [r[name] for r in ours] == [r[name] for r in theirs], name


def test_a_finished_run_with_more_frames_equals_one_that_had_them_from_the_start(tmp_path):
    """The ring grows, as nothing was forgotten yet; a ring that was just full would not have begun
    a window at its first step in the last update.
    """

    def of(steps):
        frames = PLAY.env_frames(steps, B, T) + PLAY.envs
        return Toy(steps=steps), source(dataclasses.replace(PLAY, capacity=frames))

    short, long = of(8), of(20)
    train(tmp_path / 'a', *short, seeds=2)
    grown = train(tmp_path / 'a', *long, seeds=2)
    assert same(grown, train(tmp_path / 'b', *long, seeds=2))
    ours, theirs = (metrics.read(tmp_path / name / 'metrics.jsonl') for name in 'ab')
    assert [r['loss/fit'] for r in ours] == [r['loss/fit'] for r in theirs]
    assert [r['env_frames'] for r in ours] == [r['env_frames'] for r in theirs]


def test_a_ring_that_has_forgotten_does_not_grow(tmp_path):
    train(tmp_path, Toy(steps=40), seeds=1)  # more frames than the ring holds
    larger = source(dataclasses.replace(PLAY, capacity=PLAY.capacity + 30))
    with pytest.raises(UserError, match=r'holds the last of .* expected none forgotten'):
        train(tmp_path, Toy(steps=44), larger, seeds=1)


def test_the_ring_is_in_the_checkpoint_in_compact_form(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, seeds=2, checkpoint_every_s=0.0, sinks=[Failing(3)])
    meta = json.loads((checkpoint.steps(tmp_path / 'checkpoints')[-1] / 'meta.json').read_text())
    ring = {
        tuple(x['path'][2:]): x
        for x in meta['arrays']['train']
        if x['path'][:2] == ['live', 'ring']
    }
    kinds = {
        path[-1]: (tuple(x['shape']), x['dtype']) for path, x in ring.items() if path[0] == 'data'
    }
    assert kinds == {
        'obs': ((2, N, 50, 2), 'uint8'),
        'action': ((2, N, 50), 'int8'),
        'reward': ((2, N, 50), 'float32'),
        'flags': ((2, N, 50), 'uint8'),
        'time': ((2, N, 50), 'int16'),
    }


def test_seeds_trained_together_equal_each_trained_alone(whole, tmp_path):
    for i in range(2):
        alone = train(tmp_path / str(i), seed=i)
        for a, b in zip(leaves(whole[1]), leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-5, atol=1e-5)


def test_another_play_is_refused_when_a_run_continues(whole):
    with pytest.raises(UserError, match=r'ratio: saved 2.0, given 4.0'):
        train(whole[0], live=source(dataclasses.replace(PLAY, ratio=4.0)), seeds=2)


def test_the_replay_is_left_as_a_dataset(tmp_path):
    path = tmp_path / 'set'
    train(tmp_path / 'run', Toy(steps=8), source(dataset=path), seeds=2)
    episodes = Episodes(path)
    assert episodes.spec.name == 'signal' and set(episodes.counts['kinds']) == {'seed0', 'seed1'}
    for record in episodes.records():
        assert record.obs[:, 1].tolist() == list(range(len(record)))
        answers = record.obs[:-1, 0] == record.action[1:]
        assert record.reward[1:].tolist() == answers.tolist() and record.reward[0] == 0


def test_random_play_fills_the_ring_first():
    live = source(dataclasses.replace(PLAY, prefill=90, random_prefill=True))
    params = Toy().init(jax.random.key(0))
    playing = jax.jit(lambda p, k: live.begin(p, k, B, T))(params, jax.random.key(1))
    assert (
        int(playing.ring.written) == 30 and not np.asarray(playing.ring.data.memory['time']).any()
    )
    action = np.asarray(playing.ring.data.action)[:, :30]
    assert {-1, 0, 1} == set(action.ravel().tolist())
    assert 0.3 < (action == 1).sum() / (action >= 0).sum() < 0.7


@pytest.mark.parametrize(
    'play, message',
    [
        (
            dict(ratio=5.0),
            r'train ratio 5 with a batch of 4 x 6 steps makes 4.8 frames per update, 1.6 of each of 3',
        ),
        (
            dict(ratio=24.0),
            r'0.333333 of each of 3 environments; expected a whole number, at least 1',
        ),
        (
            dict(capacity=20),
            r'capacity of 20 steps is 6 of each of 3 environments; expected at least 7',
        ),
        (dict(ratio=0.0), r'train ratio 0'),
    ],
)
def test_numbers_that_do_not_fit_are_named_before_training(tmp_path, play, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, live=source(dataclasses.replace(PLAY, **play)))
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_a_ring_larger_than_memory_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(online, 'available_bytes', lambda device=None: 10**6)
    with pytest.raises(
        UserError,
        match=r'replay of 99999 steps of 10 bytes for 2 seeds takes 0.002 GB, but 0.001 GB',
    ):
        train(tmp_path, live=source(dataclasses.replace(PLAY, capacity=99_999)), seeds=2)


def test_this_machine_says_how_much_memory_is_left():
    available = online.available_bytes()
    assert available is None or 1e6 < available < 1e15


@pytest.mark.parametrize(
    'ratio, batch, length, envs, steps',
    [(32, 16, 64, 16, 2), (0.5, 4, 5, 8, 5), (1024, 16, 64, 1, 1)],
)
def test_the_train_ratio_is_replayed_steps_per_frame(ratio, batch, length, envs, steps):
    assert vector_steps(ratio, batch, length, envs) == steps
    assert batch * length / (steps * envs) == ratio
