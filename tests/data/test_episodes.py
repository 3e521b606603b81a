import dataclasses
import errno
import json
import logging
import resource
import shutil
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from rich.console import Console

from reverie.data import Episodes, Splitter, Writer, inspect, render, split_stream, verify
from reverie.data.records import FIRST, LAST, TERMINAL, decode, encode, from_step, unpack
from reverie.types import ActionSpace, EnvSpec, Step, UserError


def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / 'copy')


def test_reading_gives_back_what_was_written(dataset, steps):
    data = Episodes(dataset)
    records = list(data.records())
    assert len(records) == len(steps) and len(data.shards) > 2
    for i, (record, step) in enumerate(zip(records, steps, strict=True)):
        assert record.kind == ('random', 'ppo')[i % 2] and record.complete
        np.testing.assert_array_equal(unpack(record.obs, data.schema), step.obs)
        np.testing.assert_array_equal(
            np.eye(5)[record.action] * (record.action >= 0)[:, None], step.prev_action
        )
        np.testing.assert_array_equal(record.reward, step.reward)
        for bit, flag in (
            (FIRST, step.is_first),
            (LAST, step.is_last),
            (TERMINAL, step.is_terminal),
        ):
            np.testing.assert_array_equal((record.flags & bit) > 0, flag)


def test_statistics_equal_numpy_over_complete_episodes_per_kind(tmp_path, world, steps):
    with Writer(tmp_path / 'd', world.SPEC) as writer:
        for i, step in enumerate(steps):
            writer.add('a' if i < 25 else 'b', step, complete=bool(step.is_terminal[-1]))
    counts = verify(tmp_path / 'd')
    for kind, part in (('a', steps[:25]), ('b', steps[25:])):
        found, done = counts['kinds'][kind], [s for s in part if s.is_terminal[-1]]
        returns = [s.reward.sum() for s in done]
        assert (found['episodes'], found['frames']) == (len(part), sum(len(s.reward) for s in part))
        assert found['complete'] == len(done) == found['returns']['count']
        expected = (
            np.mean(returns),
            np.std(returns),
            np.min(returns),
            np.max(returns),
            np.median(returns),
        )
        given = [found['returns'][name] for name in ('mean', 'std', 'min', 'max', 'median')]
        np.testing.assert_allclose(given, expected, rtol=1e-6)
    assert counts['rewarded_steps'] == sum((s.reward > 0).sum() for s in steps)


@pytest.mark.parametrize('dtype', ['uint8', 'float32', 'float16'])
def test_other_observations_and_continuous_actions_round_trip(tmp_path, dtype):
    spec = EnvSpec('test/arm', (2, 2, 1), ActionSpace('continuous', 3))
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (6, 3)).astype(np.float32)
    action[0] = 0
    t = np.arange(6)
    obs = (rng.random((6, 2, 2, 1)) * (200 if dtype == 'uint8' else 1)).astype(dtype)
    step = Step(obs, action, np.sin(t).astype(np.float32), t == 0, t == 5, t == 5)
    with Writer(tmp_path / 'd', spec) as writer:
        writer.add('x', step)
    (record,) = Episodes(tmp_path / 'd').records()
    assert record.obs.dtype == dtype
    np.testing.assert_array_equal(record.obs, obs)
    np.testing.assert_array_equal(record.action, action)


@pytest.mark.parametrize('dtype, top', [('float32', 255.0), ('float16', -0.5), ('int16', 4095)])
def test_pictures_that_no_model_can_scale_are_refused(tmp_path, dtype, top):
    spec = EnvSpec('test/screen', (2, 2, 1), ActionSpace('discrete', 2))
    first, last = np.arange(3) == 0, np.arange(3) == 2
    obs = np.zeros((3, 2, 2, 1), dtype)
    obs[1, 0, 0] = top
    step = Step(obs, np.where(first, -1, 1), np.zeros(3, np.float32), first, last, last)
    with (
        pytest.raises(UserError, match=rf'pictures of {dtype} with numbers from .*expected uint8'),
        Writer(tmp_path / 'd', spec) as writer,
    ):
        writer.add('x', step)
    assert not (tmp_path / 'd').exists()


def test_unlabelled_video_takes_no_space_and_reads_as_none(tmp_path, world, steps):
    with Writer(tmp_path / 'd', world.SPEC) as writer:
        writer.add('video', steps[1], has_action=False, has_reward=False)
    (record,) = Episodes(tmp_path / 'd').records()
    assert (record.has_action, record.has_reward) == (False, False)
    assert (record.action == -1).all() and not record.reward.any()
    assert verify(tmp_path / 'd')['returns'] == {'count': 0}
    assert set(msgpack.unpackb(encode(record))['fields']) == {'obs', 'flags'}


@pytest.mark.parametrize('chunk', [1, 7, 61])
def test_split_streams_are_the_episodes_whatever_the_chunks(world, chunk):
    rng = np.random.default_rng(1)
    columns = [[world.episode(10 * n + i, 13 + n, rng) for i in range(5)] for n in range(4)]
    column = lambda eps: Step(*(np.concatenate(xs)[:61] for xs in zip(*eps, strict=True)))
    streams = Step(*(np.stack(xs, axis=1) for xs in zip(*map(column, columns), strict=True)))
    splitter = Splitter()
    found = []
    for begin in range(0, 61, chunk):
        found += splitter.push(Step(*(x[begin : begin + chunk] for x in streams)))
    tails = list(splitter.flush())
    assert all(complete for _, complete in found)
    for step, _ in found:
        number = int(world.read_frame(step.obs)[1][0])
        for a, b in zip(step, columns[number // 10][number % 10], strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(found) == sum(61 // (13 + n) for n in range(4)) and len(tails) == 4
    for step, complete in tails:
        assert not complete and step.is_last[-1] and not step.is_terminal.any()


def test_a_stream_that_begins_inside_an_episode_is_refused(steps):
    inside = Step(*(x[2:, None] for x in max(steps, key=lambda s: len(s.reward))))
    with pytest.raises(UserError, match='is_first'):
        list(split_stream(inside))


def test_bit_flips_anywhere_in_any_shard_are_found(dataset, tmp_path):
    path = copy(dataset, tmp_path)
    rng = np.random.default_rng(0)
    for shard in Episodes(path).shards:
        whole = shard.read_bytes()
        for position in [0, 7, 40, len(whole) - 1, *rng.integers(0, len(whole), 12).tolist()]:
            broken = bytearray(whole)
            broken[position] ^= 1 << int(rng.integers(8))
            shard.write_bytes(broken)
            with pytest.raises(UserError, match=shard.name):
                verify(path)
        shard.write_bytes(whole)
    verify(path)


def test_any_changed_byte_of_the_manifest_is_found(dataset, tmp_path):
    path = copy(dataset, tmp_path)
    whole = (path / 'manifest.json').read_bytes()
    for position in range(0, len(whole), 97):
        broken = bytearray(whole)
        broken[position] ^= 1
        (path / 'manifest.json').write_bytes(broken)
        if bytes(broken).split() != whole.split():
            with pytest.raises(UserError, match=r'manifest\.json'):
                Episodes(path)


def test_truncated_missing_and_empty_shards_are_refused_on_opening(dataset, tmp_path):
    path = copy(dataset, tmp_path)
    shard = Episodes(path).shards[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=f'{shard.name}: shard has {len(whole) // 2} bytes, expected {len(whole)}'
    ):
        Episodes(path)
    shard.write_bytes(bytes(len(whole)))  # the right size and nothing inside
    with pytest.raises(UserError, match=r'0 readable records, expected \d+'):
        Episodes(path)
    shard.unlink()
    with pytest.raises(UserError, match=f'{shard.name}: shard is missing'):
        Episodes(path)


@pytest.mark.parametrize('damage', ['truncate', 'delete', 'empty'])
def test_a_lost_shard_is_left_out_and_its_share_is_said(dataset, tmp_path, damage, caplog, world):
    path = copy(dataset, tmp_path)
    whole = Episodes(path)
    shard, first, last = whole.shards[1], int(whole.first[1]), int(whole.first[2])
    if damage == 'delete':
        shard.unlink()
    else:
        data = shard.read_bytes()
        shard.write_bytes(data[: len(data) // 2] if damage == 'truncate' else bytes(len(data)))
    share = (last - first) / 40
    with caplog.at_level(logging.WARNING):
        data = Episodes(path, max_lost=share)
    assert data.lost == set(range(first, last)) and data.fingerprint != whole.fingerprint
    (line,) = caplog.messages
    assert shard.name in line and f'{last - first} of 40 episodes ({share:.2%}) are damaged' in line
    numbers = [int(world.read_frame(unpack(r.obs, data.schema))[1][0]) for r in data.records()]
    assert (
        numbers == [i for i in range(40) if i not in data.lost] == [i for i, _ in data.numbered()]
    )
    with pytest.raises(UserError, match=rf'{shard.name}: .*are damaged, expected at most 1\.00%'):
        Episodes(path, max_lost=0.01)


def test_a_flipped_bit_costs_its_episode_and_no_other(dataset, tmp_path, world, steps):
    path, rng = copy(dataset, tmp_path), np.random.default_rng(0)
    shard, costs = Episodes(path).shards[0], []
    whole = shard.read_bytes()
    for position in rng.choice(
        np.flatnonzero(bytearray(whole)), 24
    ).tolist():  # the rest is padding
        broken = bytearray(whole)
        broken[position] ^= 1 << int(rng.integers(8))
        shard.write_bytes(broken)
        data = Episodes(path, max_lost=0.9)
        found = {i: unpack(r.obs, data.schema) for i, r in data.numbered()}
        assert set(found) == set(range(40)) - data.lost
        for i, obs in found.items():  # whatever is read is right
            np.testing.assert_array_equal(obs, steps[i].obs)
        costs.append(len(data.lost))
    assert costs.count(1) > 12 and set(costs) <= {0, 1, data.manifest['shards'][0]['records']}


def test_a_dataset_of_another_game_or_action_count_is_refused_naming_both(dataset, world):
    data = Episodes(dataset)
    data.check(world.SPEC)
    with pytest.raises(UserError, match='environment test/counter, expected minatar/breakout'):
        data.check(dataclasses.replace(world.SPEC, name='minatar/breakout'))
    with pytest.raises(UserError, match='discrete of size 5, expected discrete of size 3'):
        data.check(dataclasses.replace(world.SPEC, actions=ActionSpace('discrete', 3)))
    with pytest.raises(UserError, match=r'\[3, 3, 3\], expected \[10, 10, 4\]'):
        data.check(dataclasses.replace(world.SPEC, obs_shape=(10, 10, 4)))


def test_nothing_and_not_a_dataset_are_refused(tmp_path, world):
    with pytest.raises(UserError, match='no episode was added'), Writer(tmp_path / 'd', world.SPEC):
        pass
    assert not list(tmp_path.iterdir())
    for path in (tmp_path, tmp_path / 'missing'):
        with pytest.raises(UserError, match='not a dataset'):
            Episodes(path)
    empty = world.write(tmp_path / 'e', world.episodes(2))
    with pytest.raises(UserError, match='dataset is empty'):
        Episodes(world.forge(empty, []))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(reward=np.array([0, np.nan, 1], np.float32)), 'reward has NaN'),
        (dict(is_first=np.array([True, True, False])), 'is_first is wrong at steps'),
        (dict(is_last=np.array([False, False, False])), 'is_last is wrong at steps'),
        (dict(is_terminal=np.array([False, True, False])), 'is_terminal is wrong at steps'),
        (dict(prev_action=np.array([-1, 2, 5])), 'action 5, expected 0 to 4'),
        (dict(prev_action=np.array([-1, 2, 260])), 'action 260, expected 0 to 4'),
        (dict(prev_action=np.array([-1, 2, -1])), 'actions from -1 to 2, expected 0 to 4'),
        (dict(prev_action=np.zeros((3, 6))), '6 actions, the dataset has 5'),
        (
            dict(obs=np.zeros((3, 3, 3, 2), bool)),
            r'bool\[3, 3, 2\], the dataset holds bool\[3, 3, 3\]',
        ),
        (dict(reward=np.zeros(2, np.float32)), 'reward of shape'),
    ],
)
def test_a_malformed_episode_is_refused_and_nothing_is_left(tmp_path, world, change, message):
    good = world.episode(0, 3, np.random.default_rng(0))
    with pytest.raises(UserError, match=message), Writer(tmp_path / 'd', world.SPEC) as writer:
        writer.add('x', good)
        writer.add('x', good._replace(**change))
    assert not list(tmp_path.iterdir())


def test_nan_observations_are_refused_naming_the_record(tmp_path, world):
    spec = dataclasses.replace(world.SPEC, obs_shape=(2,))
    t = np.arange(3)
    step = Step(np.ones((3, 2), np.float32), t - 1, np.zeros(3, np.float32), t == 0, t == 2, t == 2)
    path = world.write(tmp_path / 'd', [step, step], spec)
    data = Episodes(path)
    good = [encode(record) for record in data.records()]
    assert good[1].count(np.float32(1).tobytes() * 6) == 1
    poisoned = good[1].replace(np.float32(1).tobytes() * 6, np.float32(np.nan).tobytes() * 6)
    with pytest.raises(UserError, match='record 1: obs has NaN'):
        verify(world.forge(path, [good[0], poisoned]))


def hostile(record: bytes):
    """Records that claim what they are not."""

    def field(name, **change):
        body = msgpack.unpackb(record)
        body['fields'][name] |= change
        return msgpack.packb(body)

    def head(**change):
        return msgpack.packb(msgpack.unpackb(record) | change)

    yield 'not msgpack', b'\xc1\xff garbage'
    yield 'cut short', record[: len(record) // 2]
    yield 'trailing bytes', record + b'\x00'
    yield 'a pickle', b'\x80\x04cos\nsystem\n(S"true"\ntR.'
    yield 'deep nesting', b'\x91' * 5000 + b'\xc0'
    yield 'a huge claimed array', b'\xdd\xff\xff\xff\xff'
    yield 'a list', msgpack.packb([1, 2, 3])
    yield 'object dtype', field('obs', dtype='object')
    yield 'void dtype', field('reward', dtype='V4')
    yield 'another dtype', field('action', dtype='int64')
    yield 'huge shape', field('obs', shape=[2**40, 2**40])
    yield 'negative shape', field('reward', shape=[-1])
    yield 'nested shape', field('reward', shape=[[3]])
    yield 'missing bytes', field('reward', data=b'')
    yield 'text for bytes', field('reward', data='text')
    yield 'huge length', head(length=2**62)
    yield 'huge length, unlabelled', head(length=2**62, has_action=False, has_reward=False)
    yield 'no length', head(length=None)
    yield 'zero length', head(length=0)
    yield 'bool as length', head(length=True)
    yield 'later version', head(version=99)
    yield 'no fields', head(fields=None)
    yield 'number as kind', head(kind=5)


def test_hostile_records_are_user_errors_naming_the_record(tmp_path, world):
    path = world.write(tmp_path / 'd', [world.episode(0, 3, np.random.default_rng(0))])
    data = Episodes(path)
    (record,) = [encode(r) for r in data.records()]
    decode(record, data.schema, 'good')
    for name, bad in hostile(record):
        with pytest.raises(UserError, match='record 7'):
            decode(bad, data.schema, 'record 7')
            pytest.fail(name)
    with pytest.raises(UserError, match='record 1'):
        verify(world.forge(path, [record, bad]))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda m: m | {'version': 9}, 'version 9, expected 1'),
        (lambda m: m | {'alignment': 'departure'}, "'departure', expected 'arrival'"),
        (lambda m: m | {'obs': m['obs'] | {'dtype': 'object'}}, 'observations are object'),
        (
            lambda m: m | {'obs': m['obs'] | {'shape': [-3]}},
            r'obs\.shape\[0\] is -3, expected a whole number',
        ),
        (lambda m: {k: v for k, v in m.items() if k != 'actions'}, 'actions is missing'),
        (
            lambda m: m | {'shards': [m['shards'][0] | {'file': '../other'}]},
            'shard outside the dataset',
        ),
        (lambda m: m | {'counts': m['counts'] | {'frames': 1}}, 'frames: 3, expected 1'),
        (lambda m: m | {'counts': m['counts'] | {'rewarded_steps': -1}}, 'rewarded_steps'),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, world, change, message):
    path = world.write(tmp_path / 'd', [world.episode(0, 3, np.random.default_rng(0))])
    records = [encode(r) for r in Episodes(path).records()]
    with pytest.raises(UserError, match=message):
        verify(world.forge(path, records, change))


def test_an_existing_target_is_refused_and_stays_untouched(tmp_path, world, steps):
    path = world.write(tmp_path / 'd', steps[:3])
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(UserError, match='exists already'):
        Writer(path, world.SPEC)
    with pytest.raises(RuntimeError), Writer(path, world.SPEC, overwrite=True) as writer:
        writer.add('x', steps[5])
        raise RuntimeError('the collector failed')
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before
    world.write(path, steps[:5], overwrite=True)
    assert len(Episodes(path)) == 5 and [f.name for f in tmp_path.iterdir()] == ['d']
    (tmp_path / 'precious').mkdir()
    with pytest.raises(UserError, match='not a dataset'):
        Writer(tmp_path / 'precious', world.SPEC, overwrite=True)


def test_a_disk_that_takes_no_more_leaves_no_dataset_and_says_so_as_the_system_does(
    tmp_path, world, steps
):
    """The kernel refuses every write beyond 8 kB; `reverie` ends with 74 then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match='File too large') as stop:
            world.write(tmp_path / 'd', steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import numpy as np
from reverie.data import Writer
from reverie.types import ActionSpace, EnvSpec, Step
t = np.arange(9)
step = Step(np.zeros((9, 2), bool), t - 1, np.zeros(9, np.float32), t == 0, t == 8, t == 8)
with Writer(sys.argv[1], EnvSpec('x', (2,), ActionSpace('discrete', 9)), shard_bytes=300) as writer:
    for _ in range(20):
        writer.add('x', step)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_dataset_and_the_next_one_clears_its_debris(
    tmp_path, world, steps
):
    path = tmp_path / 'd'
    done = subprocess.run([sys.executable, '-c', KILLED, str(path)], capture_output=True)
    assert done.returncode == -9, done.stderr
    debris = list(tmp_path.iterdir())
    assert not path.exists() and all(f.name.startswith('.') for f in debris) and debris
    assert not list(tmp_path.rglob('manifest.json'))
    world.write(path, steps[:2])
    assert [f.name for f in tmp_path.iterdir()] == ['d']


def test_inspection_counts_actions_rewards_and_lengths(dataset, steps):
    report = inspect(dataset)
    actions = np.concatenate([s.prev_action[1:] for s in steps]).sum(0)
    assert list(report['actions'].items()) == list(zip('abcde', actions.astype(int), strict=True))
    rewards = np.concatenate([s.reward[1:] for s in steps])
    assert report['rewards'] == {f'{v:g}': int((rewards == v).sum()) for v in (-0.25, 0.0, 1.0)}
    assert sum(report['lengths'].values()) == len(steps)
    json.dumps(report)
    console = Console(width=80, record=True, file=open('/dev/null', 'w'))  # noqa: SIM115
    console.print(render(report))
    text = console.export_text()
    assert 'test/counter' in text and 'ppo' in text and '…' not in text


def test_from_step_takes_indices_and_one_hots_alike(world, dataset):
    schema = Episodes(dataset).schema
    step = world.episode(0, 9, np.random.default_rng(0))
    index = step._replace(prev_action=np.where(step.is_first, -1, step.prev_action.argmax(-1)))
    a, b = (from_step('x', s, schema, True) for s in (step, index))
    np.testing.assert_array_equal(a.action, b.action)
