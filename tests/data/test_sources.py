import functools
import json

import jax
import numpy as np
import pytest

from reverie.data import Episodes, Resident, Streaming, Writer, open_source
from reverie.data.labels import Labels
from reverie.data.records import FIRST, encode, unpack
from reverie.types import Batch, Step, UserError

B, T = 8, 12


def draw(
    source,
    seed: int = 0,
    updates: int = 1,
    batch: int = B,
    length: int = T,
    seeds: int = 2,
    relevant: float = 0.5,
) -> Batch:
    """All batches of one `load`, as NumPy with leading dims [updates, seeds]; one program, as the
    runner does.
    """
    loaded = source.load(updates, batch, length, seeds, relevant)
    keys = jax.random.split(jax.random.key(seed), (updates, seeds))
    return jax.tree.map(
        np.asarray, sampler(source, batch, length, relevant)(source.data, loaded, keys)
    )


@functools.lru_cache
def sampler(source, batch, length, relevant):
    one = lambda data, loaded, key: source.draw(data, loaded, key, batch, length, relevant)
    per_seed = jax.vmap(one, (None, 0, 0))
    return jax.jit(lambda data, loaded, keys: jax.vmap(per_seed, (None, 0, 0))(data, loaded, keys))


def make(kind, dataset, **options):
    if kind == 'resident':
        return Resident(Episodes(dataset), **options)
    episodes = Episodes(dataset)
    return Streaming(episodes, group_bytes=150 * episodes.bytes_per_frame, **options)


@pytest.fixture(scope='module')
def resident(dataset):
    return make('resident', dataset)


@pytest.fixture(scope='module', params=['resident', 'streaming'])
def source(request, dataset, resident):
    return resident if request.param == 'resident' else make('streaming', dataset)


@pytest.fixture(scope='module')
def batches(source) -> Batch:
    return draw(source, updates=6)


def test_both_sources_give_the_same_shapes_and_dtypes(batches):
    lead = (6, 2, B)
    step = Step(
        ((*lead, T, 3, 3, 3), 'bool'),
        ((*lead, T, 5), 'float32'),
        ((*lead, T), 'float32'),
        *3 * [((*lead, T), 'bool')],
    )
    expected = Batch(step, (lead, 'bool'), (lead, 'bool'), (lead, 'bool'))
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), batches) == expected


def test_each_action_leads_to_its_frame_and_each_reward_is_that_action_s(batches, world):
    step = batches.step
    count, _ = world.read_frame(step.obs)
    action, first = step.prev_action.argmax(-1), step.is_first
    inside = ~first[..., 1:]
    assert (np.diff(count)[inside] == action[..., 1:][inside]).all() and inside.any()
    assert (count[first] == 0).all()
    np.testing.assert_array_equal(step.prev_action.sum(-1), ~first)
    np.testing.assert_array_equal(step.reward, np.where(first, 0, world.reward_of(action, count)))


def test_windows_cross_episode_ends_exactly_where_is_first_says(batches, world):
    step = batches.step
    _, number = world.read_frame(step.obs)
    changes = np.diff(number) != 0
    np.testing.assert_array_equal(changes, step.is_first[..., 1:])
    np.testing.assert_array_equal(step.is_last[..., :-1], step.is_first[..., 1:])
    np.testing.assert_array_equal(step.is_terminal, step.is_last & (number % 3 > 0))
    assert changes.any() and step.is_last[..., :-1].any()


def test_relevant_rows_come_first_and_hold_a_reward(batches):
    np.testing.assert_array_equal(
        batches.relevant, np.broadcast_to(np.arange(B) < B // 2, batches.relevant.shape)
    )
    assert (batches.step.reward[batches.relevant] > 0).any(-1).all()
    assert not (batches.step.reward[~batches.relevant] > 0).any(-1).all()


def test_resident_equals_a_loop_over_the_same_starts(resident, steps):
    flat = Step(*(np.concatenate(xs) for xs in zip(*steps, strict=True)))
    batch = draw(resident, seed=3, updates=6)
    keys = jax.random.split(jax.random.key(3), (6, 2))
    start_of = jax.vmap(jax.vmap(lambda key: resident.starts(resident.data, key, B, T, B // 2)))
    starts = np.asarray(jax.jit(start_of)(keys))
    for index in np.ndindex(6, 2, B):
        for t in range(T):
            for found, expected in zip(batch.step, flat, strict=True):
                np.testing.assert_array_equal(found[*index, t], expected[starts[index] + t])


def test_uniform_starts_are_uniform_and_relevant_ones_uniform_over_rewards(dataset, steps):
    source = Resident(Episodes(dataset))
    rows, length = 40_000, 5
    starts = np.asarray(source.starts(source.data, jax.random.key(0), rows, length, rows // 2))
    reward = np.concatenate([s.reward for s in steps])
    ends = len(reward) - length + 1
    expected = np.zeros(ends)
    for r in np.flatnonzero(reward > 0):
        for offset in range(length):
            expected[np.clip(r - offset, 0, ends - 1)] += 1
    for given, law in ((starts[rows // 2 :], np.ones(ends)), (starts[: rows // 2], expected)):
        found = np.bincount(given, minlength=ends) / len(given)
        # Five standard errors of a binomial share, for every start.
        law = law / law.sum()
        assert (
            len(found) == ends and (abs(found - law) < 5 * np.sqrt(law / len(given)) + 1e-12).all()
        )


@pytest.mark.parametrize(
    'kind, fraction, count',
    [
        ('resident', 0.0, 0),
        ('resident', 0.3, 2),
        ('streaming', 0.0, 0),
        ('streaming', 1.0, B),
        ('streaming', 0.3, 2),
    ],
)
def test_the_share_of_relevant_rows_is_exact(dataset, kind, fraction, count):
    batch = draw(make(kind, dataset), relevant=fraction)
    assert (batch.relevant.sum(-1) == count).all()


@pytest.mark.parametrize('kind', ['resident', 'streaming'])
def test_without_positive_rewards_relevant_rows_are_uniform_and_that_is_said(
    tmp_path, world, steps, kind, capsys
):
    flat = [s._replace(reward=-np.abs(s.reward)) for s in steps]
    path = world.write(tmp_path / 'd', flat)
    source = make(kind, path)
    draw(source, relevant=0.0)
    assert not capsys.readouterr().err
    batch = draw(source)
    assert capsys.readouterr().err.count('no step has a positive reward') == 1
    assert (batch.relevant.sum(-1) == B // 2).all() and not (batch.step.reward > 0).any()


@pytest.mark.parametrize('rewards', [True, False])
@pytest.mark.parametrize('kind', ['resident', 'streaming'])
def test_relevant_rows_come_from_labelled_steps(tmp_path, world, steps, kind, rewards):
    """A policy learns nothing from a window without actions, however much reward it holds."""
    if not rewards:
        steps = [s._replace(reward=np.zeros_like(s.reward)) for s in steps]
    path = world.write(tmp_path / 'd', steps)
    batch = draw(make(kind, path, labels=Labels(0.25)), updates=40, length=2)
    relevant = batch.relevant
    # a window may begin before the step that it was drawn for, in an episode without labels
    assert batch.has_action[relevant].mean() > 0.8
    assert batch.has_action[~relevant].mean() < 0.5
    rewarded = (batch.step.reward > 0).any(-1)[relevant]
    # a group that is read at once may hold no labelled reward
    assert rewarded.all() == rewards if kind == 'resident' else (rewarded.mean() > 0.8) == rewards


@pytest.mark.parametrize('kind', ['resident', 'streaming'])
def test_label_fraction_hides_the_actions_of_the_same_episodes_every_time(dataset, world, kind):
    seen = {}
    for trial in range(2):
        batch = draw(make(kind, dataset, labels=Labels(0.5, seed=4)), seed=trial, updates=8)
        labelled = batch.has_action
        assert 0 < labelled.mean() < 1
        assert not batch.step.prev_action[~labelled].any()
        _, number = world.read_frame(batch.step.obs)
        seen[trial] = set(number[labelled].ravel().tolist())
        assert batch.step.prev_action[labelled].sum() == (~batch.step.is_first[labelled]).sum()
    assert len(seen[0] | seen[1]) <= 20


def test_a_window_that_touches_an_unlabelled_record_counts_as_unlabelled(tmp_path, world):
    rng = np.random.default_rng(0)
    with Writer(tmp_path / 'd', world.SPEC) as writer:
        for i in range(20):
            writer.add('x', world.episode(i, 10, rng), has_action=i < 10, has_reward=i % 2 == 0)
    batch = draw(Resident(Episodes(tmp_path / 'd')), updates=8)
    _, number = world.read_frame(batch.step.obs)
    np.testing.assert_array_equal(batch.has_action, (number < 10).all(-1))
    np.testing.assert_array_equal(batch.has_reward, (number % 2 == 0).all(-1))
    assert (batch.step.reward[number % 2 == 1] == 0).all()


def windows_of(loaded):
    return [np.asarray(x) for x in loaded]


def test_streaming_resumed_anywhere_gives_the_same_batches(dataset):
    straight = make('streaming', dataset)
    states, expected = [], []
    for _ in range(14):
        states.append(json.loads(json.dumps(straight.get_state())))
        expected.append(windows_of(straight.load(1, B, T, 1)))
    assert any(s['drawn'] for s in states)
    assert (
        len({s['reader']['next_index'] for s in states}) > 3
    )  # several groups, and cuts inside and between them
    for cut in (0, 1, 2, 3, 7, 13):
        resumed = make('streaming', dataset)
        resumed.set_state(states[cut])
        for batch in expected[cut:]:
            for found, wanted in zip(windows_of(resumed.load(1, B, T, 1)), batch, strict=True):
                np.testing.assert_array_equal(found, wanted)
    assert straight.get_state() == resumed.get_state()


def test_streaming_differs_between_seeds_of_training_and_of_data(dataset):
    load = lambda seed: make('streaming', dataset, seed=seed).load(1, B, T, 2).obs
    a, b = load(0), load(1)
    assert not np.array_equal(a, b) and not np.array_equal(a[:, 0], a[:, 1])


def test_a_group_as_large_as_the_data_holds_every_episode_once_in_random_order(
    dataset, world, steps
):
    source = Streaming(Episodes(dataset))
    source.load(1, B, T, 1)
    _, number = world.read_frame(unpack(source._group.obs, source.schema))
    order = number[np.flatnonzero(source._group.flags & FIRST)]
    assert sorted(order) == list(range(len(steps))) and list(order) != sorted(order)
    np.testing.assert_array_equal(np.bincount(number), [len(s.reward) for s in steps])


def test_streaming_has_read_every_episode_before_it_reads_one_twice(dataset, world, steps):
    source = make('streaming', dataset)
    seen = []
    for _ in range(len(steps) // source.group_size):
        group = next(source._groups)
        seen += world.read_frame(unpack(group.obs, source.schema))[1][
            (group.flags & FIRST) > 0
        ].tolist()
    assert len(set(seen)) == len(seen) > len(steps) // 2


def test_a_state_of_another_source_or_dataset_is_refused(dataset, tmp_path, world, steps):
    resident, streaming = make('resident', dataset), make('streaming', dataset)
    resident.set_state(resident.get_state())
    with pytest.raises(UserError, match='source streaming, expected resident'):
        resident.set_state(streaming.get_state())
    other = make('resident', world.write(tmp_path / 'd', steps[:5]))
    with pytest.raises(UserError, match='dataset'):
        resident.set_state(other.get_state())
    with pytest.raises(UserError, match='data seed 0, expected 1'):
        make('streaming', dataset, seed=1).set_state(streaming.get_state())


@pytest.mark.parametrize('kind', ['resident', 'streaming'])
def test_a_window_longer_than_the_data_is_refused(dataset, kind):
    with pytest.raises(UserError, match='100000'):
        draw(make(kind, dataset), length=100_000, seeds=1)


def test_a_small_budget_streams_and_a_large_one_does_not(dataset, world):
    assert isinstance(open_source(dataset, world.SPEC), Resident)
    assert isinstance(open_source(dataset, world.SPEC, memory_budget_bytes=1000), Streaming)
    with pytest.raises(UserError, match='label_fraction is 2'):
        Labels(2.0)


def test_a_broken_record_stops_streaming_with_its_name(tmp_path, world, steps):
    path = world.write(tmp_path / 'd', steps[:3])
    records = [encode(r) for r in Episodes(path).records()]
    source = make('streaming', world.forge(path, [*records[:2], b'junk']))
    with pytest.raises(UserError, match='record 2'):
        source.load(30, B, 2, 1)


@pytest.mark.parametrize('kind', ['resident', 'streaming'])
def test_lost_episodes_are_never_seen_and_too_many_stop_the_source(
    tmp_path, world, steps, kind, caplog
):
    path = world.write(tmp_path / 'd', steps, shard_bytes=4000)
    shards = Episodes(path).shards
    data = bytearray(shards[0].read_bytes())
    used = np.flatnonzero(data)  # most of a small shard is padding
    data[used[len(used) // 2]] ^= 1  # noticed when it is read
    shards[0].write_bytes(data)
    shards[1].write_bytes(b'')  # noticed when it is opened
    episodes = Episodes(path, max_lost=0.5)
    gone = set(episodes.lost)
    make_one = lambda: (
        Resident(episodes)
        if kind == 'resident'
        else Streaming(episodes, group_bytes=150 * episodes.bytes_per_frame)
    )
    source = make_one()
    _, number = world.read_frame(draw(source, updates=30).step.obs)
    seen = set(number.ravel().tolist())
    assert len(episodes.lost) == len(gone) + 1 > 1 and len(seen) > 20 and not seen & episodes.lost
    assert len([m for m in caplog.messages if 'left out' in m]) == 1 + len(episodes.lost) - len(
        gone
    )
    episodes = Episodes(path, max_lost=len(gone) / 40)  # enough for the shard, not for the record
    with pytest.raises(UserError, match=r'13 of 40 episodes .* are damaged, expected at most 30'):
        draw(make_one(), updates=30)
