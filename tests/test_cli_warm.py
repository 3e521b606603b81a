"""Warm starts of Dreamer 4, as a lab would use them: from the Python interface and by the command
line.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from reverie.agents import registry
from reverie.commands.collect import dataset
from reverie.commands.experiment import Recorded, load
from reverie.data import Episodes
from reverie.data.labels import Labels
from reverie.training import checkpoint
from reverie.training.warm import Init
from reverie.types import UserError
from tests.test_cli import ENV, fails, newest, options, reverie

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.xdist_group('warm')]

SOURCE = registry.get('dreamer4_debug')


def phase(config, name, **changes):
    field = f'{name}_phase'
    return dataclasses.replace(
        config, **{field: dataclasses.replace(getattr(config, field), **changes)}
    )


STEADY = phase(
    SOURCE, 'imagine', muon=False, decay=0.0
)  # as in `dreamer4_demo`: AdamW at a constant rate
ALL = ('encoder', 'decoder', 'dynamics', 'policy', 'reward', 'cont', 'value', 'prior')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'random'
    dataset.write_dataset(path, 'minatar/breakout', 'random', 1000, episodes=2)
    return path


def train(folder, data, config=STEADY, seeds=2, label_fraction=1.0, updates_per_call=2, **changes):
    experiment = Recorded(
        'dreamer4_debug', config, 'minatar/breakout', 0, seeds, '', (data,), Labels(label_fraction)
    )
    return experiment.train(folder, updates_per_call=updates_per_call, **changes)


@pytest.fixture(scope='module')
def source(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('source') / 'run'
    return folder, train(folder, data)


def same(a, b, groups=ALL):
    a, b = ([np.asarray(x) for x in jax.tree.leaves({g: p[g] for g in groups})] for p in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_imagination_in_two_runs_equals_imagination_in_one(source, data, tmp_path, capfd):
    """4 + 4 updates, the baseline taken as it is; after that, everything, and the chain is on
    record.
    """
    longer = phase(STEADY, 'imagine', steps=8)
    straight = train(tmp_path / 'straight', data, longer)
    warm = train(tmp_path / 'warm', data, longer, init=Init.parse(f'{source[0]}:imagine+'))
    assert same(warm, straight) and not same(warm, source[1], ('policy',))
    said = capfd.readouterr().err
    assert (
        'phases tokenizer, dynamics, finetune, imagine (' in said
        and 'seeds 0 1; imagine goes on' in said
    )
    assert 'after 4 of 8 updates; as all at once' in said


def test_a_model_is_finetuned_on_other_data_with_few_labels(source, data, tmp_path):
    """The dynamics as after its phase, not as finetuned: a learning rate of 0 keeps them."""
    other = tmp_path / 'other'
    dataset.write_dataset(other, 'minatar/breakout', 'random', 1000, episodes=2, seed=5)
    brief = phase(STEADY, 'imagine', steps=0)
    still = phase(brief, 'finetune', learning_rate=0.0)
    params = train(
        tmp_path / 'a', other, still, label_fraction=0.5, init=Init(source[0], ('dynamics',))
    )
    kept = source[0] / 'checkpoints' / '000000008'
    before = checkpoint.read(kept, checkpoint.meta_of(kept))
    assert same(params, before, ('encoder', 'decoder', 'dynamics')) and not same(
        params, source[1], ('dynamics',)
    )
    record = json.loads((tmp_path / 'a' / 'config.json').read_text())['from']
    assert record['differs']['dataset'] == [Episodes(data).fingerprint, Episodes(other).fingerprint]
    assert record['differs']['label_fraction'] == [1.0, 0.5] and list(record['phases']) == [
        'tokenizer',
        'dynamics',
    ]
    assert set(record['groups']) == {'encoder', 'decoder', 'dynamics'} and set(
        record['checkpoints']
    ) == {kept.name}
    params = train(tmp_path / 'b', other, brief, init=Init(source[0], ('dynamics',)))
    assert same(params, before, ('encoder', 'decoder')) and not same(params, before, ('dynamics',))


def test_another_preset_takes_the_tokenizer_and_nothing_that_does_not_fit(source, data, tmp_path):
    wide = dataclasses.replace(STEADY.dynamics.transformer, width=32)
    other = dataclasses.replace(
        STEADY, dynamics=dataclasses.replace(STEADY.dynamics, transformer=wide), head_units=8
    )
    for name in ('dynamics', 'finetune', 'imagine'):
        other = phase(other, name, steps=0)
    params = train(tmp_path / 'a', data, other, init=Init(source[0], ('tokenizer',)))
    assert same(params, source[1], ('encoder', 'decoder'))
    with pytest.raises(
        UserError, match=r'does not fit: dynamics.transformer.width is 16 there, 32 here$'
    ):
        train(tmp_path / 'b', data, other, init=Init(source[0], ('dynamics',)))
    tokenizer = dataclasses.replace(
        STEADY.tokenizer, patch=(2, 5), bottleneck=8, pixels='bernoulli'
    )
    other = dataclasses.replace(STEADY, tokenizer=tokenizer)
    with pytest.raises(UserError) as error:
        train(tmp_path / 'b', data, other, init=Init(source[0], ('tokenizer',)))
    text = str(error.value)
    assert (
        'tokenizer.patch is [5, 5] there, [2, 5] here; tokenizer.bottleneck is 4 there, 8 here'
        in text
    )
    assert "tokenizer.pixels is 'mse' there, 'bernoulli' here" in text
    assert '\n' not in text and not (tmp_path / 'b').exists()


def test_the_command_line_takes_a_model_killed_and_run_again_scores_and_reports(
    source, data, tmp_path
):
    """SIGKILL in imagination, then the same command: what one run gives that is not disturbed."""
    steady = ['--config.imagine-phase.no-muon', '--config.imagine-phase.decay', 0]
    folder = tmp_path / 'run'
    args = [
        'train',
        'dreamer4_debug',
        *options(data, folder),
        '--seeds',
        2,
        '--updates-per-call',
        1,
        *steady,
    ]
    args += [
        '--config.imagine-phase.steps',
        20,
        '--from',
        f'{source[0]}:finetune',
        '--checkpoint-every-s',
        0,
    ]
    process = subprocess.Popen(
        [sys.executable, '-m', 'reverie.cli', *map(str, args)],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    limit = time.monotonic() + 1200
    while not newest(folder) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert b'taken from' in process.communicate()[1]
    assert newest(folder) < 32, 'it ended before it could be killed'
    done = reverie(*args)
    assert done.returncode == 0 and 'resuming after imagine/' in done.stderr, done.stderr[-2000:]
    # As many updates a call: programs of other lengths may round differently.
    straight = train(tmp_path / 'straight', data, phase(STEADY, 'imagine', steps=20),
                     init=Init(source[0], ('finetune',)), updates_per_call=1)  # fmt: skip
    assert same(load(folder)[1], straight) and same(straight, source[1], ('dynamics', 'prior'))
    record = json.loads((folder / 'scores.json').read_text())
    assert record['gradient_steps'] == {'tokenizer': 4, 'dynamics': 4, 'finetune': 4, 'imagine': 20}
    assert record['from']['run'] == 'run' and record['from']['phases'] == [
        'tokenizer',
        'dynamics',
        'finetune',
    ]
    page = (folder / 'report.html').read_text()
    assert 'Where it comes from' in page and 'tokenizer, dynamics, finetune (' in page


@pytest.mark.parametrize(
    'extra, words',
    [
        (['--from', 'nowhere'], ['nowhere', 'not a run folder']),
        (['--from', '{run}'], ['nothing is left to train', ':finetune, or train one on']),
        (
            ['--from', '{run}:imagin'],
            ["'imagin' is unknown", 'tokenizer, dynamics, finetune, imagine'],
        ),
        (['--from', '{run}:finetune', '--seeds', 3], ['seeds [0, 1], not [2]']),
        (['--from', '{run}:finetune', '--config.bins', 31], ['bins is 63 there, 31 here']),
        (['--from-groups', 'encoder'], ['--from-groups encoder', '--from RUN']),
    ],
)
def test_a_mistaken_warm_start_is_one_line(
    capsys, monkeypatch, source, data, tmp_path, extra, words
):
    extra = [str(x).replace('{run}', str(source[0])) for x in extra]
    error = fails(
        capsys,
        monkeypatch,
        'train',
        'dreamer4_debug',
        *options(data, tmp_path / 'a'),
        '--seeds',
        2,
        *extra,
    )
    assert all(word in error for word in words), error
    assert not (tmp_path / 'a').exists()
