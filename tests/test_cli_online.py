"""Agents that play, by the command line: trained, scored, reported, exported; every mistake as one
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
from reverie.commands.experiment import Recorded, played
from reverie.data import Episodes
from reverie.training import checkpoint, run_folder, warm
from reverie.training.run import run as train
from reverie.types import UserError
from tests.test_cli import ENV, fails, newest, reverie

pytestmark = [pytest.mark.slow, pytest.mark.compat, pytest.mark.whole]

SMALL = ('--episodes', 4, '--max-steps', 40, '--updates-per-call', 5)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Two seeds of a tiny Dreamer V3 on Breakout, 600 frames each, and what it played as a dataset."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    done = reverie(*command(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def command(folder):
    args = [
        'train',
        'dreamer_v3_debug',
        '--env',
        'minatar/breakout',
        '--frames',
        600,
        '--out',
        folder,
        *SMALL,
    ]
    return [
        *args,
        '--seeds',
        2,
        '--export',
        folder / 'played',
        '--score-every',
        200,
        '--score-episodes',
        3,
    ]


def test_one_command_trains_scores_and_reports(run):
    record = json.loads((run / 'scores.json').read_text())
    assert record['seeds'] == [0, 1] and record['gradient_steps'] == {'online': 12}
    assert record['env_frames'] == 200 + 12 * 32 <= 600
    assert np.shape(record['score']['agent']['per_seed']) == (2, 4)
    assert record['curve']['of'] == 'score' and record['curve']['env_frames'] == [
        456
    ]  # the first call past 400
    assert np.shape(record['curve']['return_per_seed']) == (2, 1)
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['step'] == 12 and lines[-1]['env_frames'] == record['env_frames']
    page = (run / 'report.html').read_text()
    assert 'score during training' in page and 'dream 1, animated' in page


@pytest.mark.whole
def test_the_same_command_killed_and_run_again_gives_the_same_weights_scores_and_replay(
    run, tmp_path
):
    folder = tmp_path / 'killed'
    args = [
        sys.executable,
        '-m',
        'reverie.cli',
        *map(str, command(folder)),
        '--checkpoint-every-s',
        '0',
    ]
    process = subprocess.Popen(args, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 1200
    while not newest(folder) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(args, env=ENV, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and 'resuming after online/' in done.stderr, done.stderr[-2000:]
    weights, straight = checkpoint.load(folder)[0], checkpoint.load(run)[0]
    jax.tree.map(np.testing.assert_array_equal, weights, straight)
    scores = [json.loads((path / 'scores.json').read_text())['score'] for path in (folder, run)]
    assert scores[0] == scores[1]
    curves = [
        json.loads((path / 'scores.json').read_text())['curve']['return_per_seed']
        for path in (folder, run)
    ]
    assert curves[0] == curves[1]
    assert Episodes(folder / 'played').fingerprint == Episodes(run / 'played').fingerprint


def test_a_second_agent_begins_with_the_world_model_of_the_first(run, tmp_path):
    """The weights are checked before the first update; a phase that plays is not trained on."""
    experiment = played('minatar/breakout')
    begin = experiment(
        'dreamer_v3_debug',
        registry.get('dreamer_v3_debug'),
        'minatar/breakout',
        seeds=2,
        env_frames=600,
    )
    config = run_folder.fingerprint(begin.agent.phases, begin.describe(), 0, 2)
    world = ('encoder', 'dynamics', 'decoder', 'reward', 'cont')
    start = warm.plan(warm.Init(run, groups=world), begin.agent, config)
    fresh = {'policy': np.zeros(2), 'encoder': np.zeros(2)}
    weights, there = start.weights(fresh), checkpoint.load(run)[0]
    assert set(weights) == {'policy', *world} and weights['policy'] is fresh['policy']
    jax.tree.map(
        np.testing.assert_array_equal, {g: weights[g] for g in world}, {g: there[g] for g in world}
    )
    longer = dataclasses.replace(begin, env_frames=1200)
    with pytest.raises(
        UserError, match='online plays and cannot go on in another folder; its own command'
    ):
        longer.train(tmp_path / 'a', init=warm.Init(run, ('online',), extend=True))
    with pytest.raises(
        UserError, match=r'nothing is left to train; take fewer, e.g. .* with --from-groups'
    ):
        longer.train(tmp_path / 'a', init=warm.Init(run))
    narrow = dataclasses.replace(
        begin.config, policy=dataclasses.replace(begin.config.policy, units=8)
    )
    with pytest.raises(UserError, match=r'does not fit: policy.units is 16 there, 8 here$'):
        dataclasses.replace(begin, config=narrow).train(
            tmp_path / 'a', init=warm.Init(run, groups=('policy',))
        )
    assert not (tmp_path / 'a').exists()


class Beginning:
    """The first two phases of an agent."""

    def __init__(self, agent):
        self.spec, self.init, self.readouts, self.phases = (
            agent.spec,
            agent.init,
            agent.readouts,
            agent.phases[:2],
        )


def test_dreamer_4_trains_on_what_was_played(run, tmp_path):
    episodes = Episodes(run / 'played')
    assert episodes.frames <= 2 * 600 and set(episodes.returns()) == {'seed0', 'seed1'}
    config = registry.get('dreamer4_debug')
    recorded = Recorded('dreamer4_debug', config, 'minatar/breakout', data=(run / 'played',))
    train(Beginning(recorded.agent), recorded.source, tmp_path / 'd4')
    lines = [
        json.loads(line) for line in (tmp_path / 'd4' / 'metrics.jsonl').read_text().splitlines()
    ]
    assert [line['phase'] for line in lines] == ['tokenizer', 'dynamics']
    assert np.isfinite([lines[0]['loss/recon'], lines[1]['loss/shortcut']]).all()


@pytest.mark.parametrize(
    'args, words',
    [
        (['planet', '--env', 'minatar/breakout'], ['planet', 'discrete', 'continuous']),
        (
            ['dreamer_v3_debug', '--env', 'minatar/breakout', '--frames', 100],
            ['--frames 100', 'at least'],
        ),
        (['dreamer_v3', '--size', '13m', '--env', 'minatar/breakout'], ["'13m'", '12m']),
        (
            ['dreamer_v1', '--size', '12m', '--env', 'minatar/breakout'],
            ['--size 12m', 'dreamer_v1'],
        ),
        (
            ['dreamer_v3_debug', '--env', 'control/pendulum', '--env-options', 'colour=2'],
            ['colour'],
        ),
        (
            ['dreamer_v3_debug', '--env', 'minatar/breakout', '--config.replay.ratio', 7],
            ['train ratio 7', 'whole number'],
        ),
    ],
)
def test_a_mistake_is_one_line_and_trains_nothing(capsys, monkeypatch, args, words, tmp_path):
    error = fails(capsys, monkeypatch, 'train', *args, '--out', tmp_path / 'run')
    assert all(word in error for word in words), error
    assert not list((tmp_path / 'run').glob('checkpoints/*'))


def test_an_agent_can_be_scored_under_other_options_of_the_same_game():
    learnt = played('hidden_order/4')(
        'dreamer_v3_debug', registry.get('dreamer_v3_debug'), 'hidden_order/4'
    )
    scored = learnt.under({'pays': 'success'})
    assert (scored.game.env.env.pays, learnt.game.env.env.pays) == ('success', 'balls')
    with pytest.raises(UserError, match='another environment'):
        learnt.under({'obs': 'image'})
