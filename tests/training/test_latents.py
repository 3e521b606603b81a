"""Latents of a frozen tokenizer: computed once, the same as in every update, at unit scale."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_agent import Crash

from reverie.agents import registry
from reverie.data import Episodes, Mixture, Resident, Streaming, Writer
from reverie.data.mixture import common_spec
from reverie.training import metrics
from reverie.training.latents import LatentCache, fingerprint
from reverie.training.run import run
from reverie.types import ActionSpace, Component, EnvSpec, LongWindows, Step

# a world model alone: two phases are compiled instead of four
SPEC = EnvSpec('toy', (10, 10, 3), ActionSpace.composite([Component('move', ('a', 'b', 'c'))]))
LENGTHS = (9, 30, 3, 17, 12)
whole = pytest.mark.whole
SOURCES = [
    ('streaming', 2),
    *(pytest.param(*s, marks=whole) for s in (('resident', 1), ('resident', 2), ('streaming', 1))),
]


def config(**tokenizer):
    cfg = registry.dreamer4_debug()
    return dataclasses.replace(cfg, tokenizer=dataclasses.replace(cfg.tokenizer, **tokenizer))


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'd'
    rng = np.random.default_rng(0)
    with Writer(path, SPEC, compressed=True) as writer:
        for i, t in enumerate(LENGTHS):
            first, last = np.arange(t) == 0, np.arange(t) == t - 1
            obs = rng.integers(0, 256, (t, 10, 10, 3), np.uint8)
            step = Step(obs, rng.integers(0, 3, (t, 1)), np.ones(t), first, last, last)
            writer.add('human', step, held_out=i == 3)
    return path


def train(folder, source, agent, **options):
    return run(
        agent,
        source,
        folder,
        updates_per_call=2,
        log_every_s=0.0,
        checkpoint_every_s=0.0,
        **options,
    )


def sources(dataset, kind):
    if kind == 'mixture':
        parts = [sources(dataset, part) for part in ('resident', 'streaming')]
        return Mixture(parts, common_spec([part.episodes for part in parts]), (2.0, 1.0))
    train = Episodes(dataset, part='train')
    if kind == 'resident':
        return Resident(train)
    return Streaming(train, group_bytes=25 * train.bytes_per_frame)


@pytest.mark.parametrize('kind, seeds', SOURCES)
def test_cached_latents_are_those_of_the_whole_past_at_unit_deviation(
    dataset, tmp_path, kind, seeds
):
    agent = registry.make(config(), SPEC)
    source = sources(dataset, kind)
    params = train(tmp_path, source, agent, seeds=seeds)
    stored = [np.load(tmp_path / 'latents' / f'train-{i}.npy') for i in range(seeds)]
    frames = sum(LENGTHS) - LENGTHS[3]
    for seed in range(seeds):
        mine = jax.tree.map(lambda x, i=seed: x[i], params)
        obs, first = [], []
        for record in Episodes(dataset, part='train').records():
            obs.append(record.obs)
            first.append(np.arange(len(record)) == 0)
        whole = agent.tokenize(mine, jnp.concatenate(obs)[None], jnp.concatenate(first)[None])[0]
        assert stored[seed].shape == (frames, 2, 4)
        np.testing.assert_allclose(stored[seed], whole, atol=4e-3)
        assert np.asarray(whole).std() == pytest.approx(1.0, abs=2e-3)
    # and a batch holds them beside its own actions
    source = sources(dataset, kind)
    LatentCache(tmp_path, agent, {'train': source}).use(params)
    loaded = source.load(1, 4, 6, seeds)
    for seed in range(seeds):
        windows = jax.tree.map(lambda x, i=seed: x[0, i], loaded)
        batch = source.draw(source.of_seed(source.data, seed), windows, jax.random.key(3), 4, 6)
        assert batch.step.obs is None and batch.latents.shape == (4, 6, 2, 4)
        found = batch.latents[0].reshape(6, -1).astype(np.float32)
        every = stored[seed].reshape(frames, -1).astype(np.float32)
        assert (np.abs(every[:, None] - np.asarray(found)[None]).max(-1) == 0).any(0).all()


@whole
@pytest.mark.parametrize('kind', ['mixture', 'resident', 'streaming'])
def test_an_interrupted_run_reads_its_latents_again_and_ends_the_same(
    dataset, tmp_path, kind, monkeypatch
):
    agent = registry.make(config(), SPEC)
    file = 'train_1-0.npy' if kind == 'mixture' else 'train-0.npy'
    uncut = train(tmp_path / 'whole', sources(dataset, kind), agent)

    failing = sources(dataset, kind)
    calls, load = [], failing.load

    def crash(*args):
        calls.append(args[0])
        if sum(calls) >= 8:  # updates: a call of the dynamics that is not its first
            raise Crash
        return load(*args)

    monkeypatch.setattr(failing, 'load', crash)
    with pytest.raises(Crash):
        train(tmp_path / 'cut', failing, agent)
    written = (tmp_path / 'cut' / 'latents' / file).stat().st_mtime_ns
    again = train(tmp_path / 'cut', sources(dataset, kind), agent)
    assert (tmp_path / 'cut' / 'latents' / file).stat().st_mtime_ns == written
    for a, b in zip(jax.tree.leaves(uncut), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@whole
def test_latents_of_another_tokenizer_or_dataset_are_not_taken(dataset, tmp_path):
    agent = registry.make(config(), SPEC)
    params = train(tmp_path, sources(dataset, 'resident'), agent)
    known = json.loads((tmp_path / 'latents' / 'train.json').read_text())
    assert known['made_of']['tokenizers'] == [fingerprint(jax.tree.map(lambda x: x[0], params))]
    for name in ('dataset', 'tokenizers'):
        changed = {**known, 'made_of': {**known['made_of'], name: ['other']}}
        (tmp_path / 'latents' / 'train.json').write_text(json.dumps(changed))
        source = sources(dataset, 'resident')
        LatentCache(tmp_path, agent, {'train': source}).use(params)
        assert json.loads((tmp_path / 'latents' / 'train.json').read_text()) == known


@whole
def test_without_the_cache_every_update_encodes_and_the_scale_is_still_one(dataset, tmp_path):
    agent = registry.make(config(cache_latents=False), SPEC)
    source = sources(dataset, 'resident')
    params = train(tmp_path, source, agent)
    assert source.data['stream'].obs is not None
    assert params['encoder']['latent_scale'][0] > 1.0
    plain = registry.make(config(cache_latents=False, unit_latents=False), SPEC)
    params = train(tmp_path / 'plain', sources(dataset, 'resident'), plain)
    assert 'latent_scale' not in params['encoder']
    assert not (tmp_path / 'plain' / 'latents').exists()


@whole
def test_held_out_losses_are_logged_ten_times_and_change_nothing(dataset, tmp_path):
    agent = registry.make(config(), SPEC)
    held_out = Resident(Episodes(dataset, part='held_out'))
    with_them = train(tmp_path / 'a', sources(dataset, 'resident'), agent, held_out=held_out)
    without = train(tmp_path / 'b', sources(dataset, 'resident'), agent)
    for a, b in zip(jax.tree.leaves(with_them), jax.tree.leaves(without), strict=True):
        np.testing.assert_array_equal(a, b)
    records = metrics.read(tmp_path / 'a' / 'metrics.jsonl')
    seen = {r['phase'] for r in records if any(name.startswith('held_out/') for name in r)}
    assert seen == {'tokenizer', 'dynamics'}
    last = [r for r in records if 'held_out/shortcut' in r][-1]
    assert np.isfinite(last['held_out/shortcut'])


def test_updates_with_longer_windows_come_as_often_as_they_are_told():
    long = LongWindows(24, 0.25, 0.2)
    told = [long.at(i, 40) for i in range(40)]
    assert told[:8] == [False, False, False, True, False, False, False, True]
    assert all(told[32:]) and sum(told) == 8 + 8


@whole
@pytest.mark.parametrize('kind, seeds', SOURCES)
def test_some_updates_have_longer_windows_of_as_many_frames(dataset, tmp_path, kind, seeds):
    cfg = config()
    phase = dataclasses.replace(
        cfg.dynamics_phase, steps=6, long_length=12, long_share=0.5, long_end=0.34
    )
    agent = registry.make(dataclasses.replace(cfg, dynamics_phase=phase), SPEC)
    seen = []
    dynamics = agent.phases[1]
    loss = lambda params, batch, key, step: (
        jax.debug.callback(
            lambda s: seen.append((int(s), batch.step.reward.shape)), step, ordered=False
        ),
        dynamics.loss(params, batch, key, step),
    )[1]
    agent.phases = (agent.phases[0], dataclasses.replace(dynamics, loss=loss), *agent.phases[2:])
    params = train(tmp_path, sources(dataset, kind), agent, seeds=seeds)
    jax.effects_barrier()
    assert set(seen) == {
        (0, (4, 6)), (1, (2, 12)), (2, (4, 6)), (3, (2, 12)), (4, (2, 12)), (5, (2, 12))
    }  # fmt: skip
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))


@whole
def test_latents_of_several_datasets_have_a_deviation_of_one_together(dataset, tmp_path):
    agent = registry.make(config(), SPEC)
    held_out = Resident(Episodes(dataset, part='held_out'))
    parts = [Resident(Episodes(dataset, part='train')), held_out]
    mixture = Mixture(parts, common_spec([part.episodes for part in parts]))
    train(tmp_path, mixture, agent)
    both = [np.load(tmp_path / 'latents' / f'train_{i}-0.npy') for i in (0, 1)]
    assert [len(x) for x in both] == [sum(LENGTHS) - LENGTHS[3], LENGTHS[3]]
    assert np.concatenate(both).astype(np.float64).std() == pytest.approx(1.0, abs=2e-3)
    assert mixture.data[0]['latents'].shape[1] == len(both[0])
