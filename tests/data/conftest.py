"""A counter world: the frame shows the episode's number and the sum of its actions, so any shift in
time shows.
"""

import hashlib
import json
import types

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from reverie.data import Writer
from reverie.data.manifest import checksum
from reverie.types import ActionSpace, EnvSpec, Step

ACTIONS = 5
SPEC = EnvSpec('test/counter', (3, 3, 3), ActionSpace('discrete', ACTIONS, tuple('abcde')))
BITS = 2 ** np.arange(12)


def reward_of(action, count):
    """Reward of an action that brings the sum to `count`; rarely positive."""
    return np.where(
        (action == 3) & (count % 5 == 0), 1.0, np.where(action == 0, -0.25, 0.0)
    ).astype(np.float32)


def episode(number: int, length: int, rng: np.random.Generator, terminal: bool = True) -> Step:
    """Frame [3, 3, 3] bool: bits 0-11 the sum of actions, bits 12-23 the episode's number, 24-26
    ones.
    """
    action = rng.integers(0, ACTIONS, length)
    action[0] = 0
    count = np.cumsum(action)
    bits = [
        (count[:, None] // BITS) % 2,
        np.tile((number // BITS) % 2, (length, 1)),
        np.ones((length, 3)),
    ]
    obs = np.concatenate(bits, axis=1).astype(bool).reshape(length, 3, 3, 3)
    one_hot = np.eye(ACTIONS, dtype=np.float32)[action]
    one_hot[0] = 0
    reward = reward_of(action, count)
    reward[0] = 0
    steps = np.arange(length)
    return Step(
        obs, one_hot, reward, steps == 0, steps == length - 1, (steps == length - 1) & terminal
    )


def read_frame(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """obs [*B, 3, 3, 3] -> (sum of actions [*B], episode number [*B])."""
    flat = np.asarray(obs).reshape(*obs.shape[:-3], 27).astype(int)
    return flat[..., :12] @ BITS, flat[..., 12:24] @ BITS


def episodes(count: int = 40, seed: int = 0) -> list[Step]:
    rng = np.random.default_rng(seed)
    return [episode(i, int(rng.integers(1, 25)), rng, terminal=i % 3 > 0) for i in range(count)]


def write(path, steps: list[Step], spec: EnvSpec = SPEC, **options):
    """Even episodes are of kind 'random', odd ones of kind 'ppo'."""
    with Writer(path, spec, provenance={'command': 'test', 'seed': 0}, **options) as writer:
        for i, step in enumerate(steps):
            writer.add(('random', 'ppo')[i % 2], step)
    return path


def forge(path, records: list[bytes], edit=lambda manifest: manifest):
    """Put these bytes in place of a dataset's records, with hashes and sizes to match, as an
    attacker would.
    """
    shard = path / 'shard-00000.array_record'
    writer = ArrayRecordWriter(str(shard), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()
    data = shard.read_bytes()
    entry = {'file': shard.name, 'records': len(records), 'bytes': len(data)}
    manifest = json.loads((path / 'manifest.json').read_text())
    manifest['shards'] = [entry | {'sha256': hashlib.sha256(data).hexdigest()}]
    manifest['counts']['episodes'] = len(records)
    manifest = edit(manifest)
    (path / 'manifest.json').write_text(json.dumps(manifest | {'checksum': checksum(manifest)}))
    return path


@pytest.fixture(scope='session')
def world() -> types.SimpleNamespace:
    """The counter world's functions, for tests to use."""
    return types.SimpleNamespace(
        SPEC=SPEC,
        reward_of=reward_of,
        episode=episode,
        episodes=episodes,
        read_frame=read_frame,
        write=write,
        forge=forge,
    )


@pytest.fixture(scope='session')
def steps() -> list[Step]:
    return episodes()


@pytest.fixture(scope='session')
def dataset(tmp_path_factory, steps):
    """Forty short episodes in several shards; read-only."""
    return write(tmp_path_factory.mktemp('data') / 'counter', steps, shard_bytes=4000)
