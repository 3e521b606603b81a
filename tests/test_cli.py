"""The command line as its user meets it: the whole job on a tiny agent, and every mistake as one
line.
"""

import errno
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from reverie import cli
from reverie.agents import registry
from reverie.agents.ppo import PPOConfig
from reverie.commands.collect import dataset
from reverie.commands.experiment import SAFE, Recorded
from reverie.data import Episodes
from reverie.evaluation import returns
from reverie.training import checkpoint, run_folder
from reverie.types import OutOfMemoryError, UserError

pytestmark = [pytest.mark.slow, pytest.mark.compat]

# As tests/conftest.py made it; a file, socket or process that is not closed is told.
ENV = os.environ | {'PYTHONWARNINGS': 'ignore,error::ResourceWarning'}
PPO = PPOConfig(env_frames=4096, envs=16, rollout=16, minibatches=2, snapshots=4, width=16)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'breakout-mixed'
    dataset.write_dataset(path, 'minatar/breakout', 'mixed', 2000, config=PPO, episodes=4)
    return path


def reverie(*args: object, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'reverie.cli', *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=1200, **kwargs)
    assert 'ResourceWarning' not in done.stderr, done.stderr[-2000:]
    return done


def options(data, run):
    return [
        '--env',
        'minatar/breakout',
        '--data',
        data,
        '--out',
        run,
        '--episodes',
        4,
        '--max-steps',
        40,
    ]


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    """A whole run of two seeds by the command line."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    args = [
        'train',
        'dreamer4_debug',
        *options(data, folder),
        '--seeds',
        2,
        '--updates-per-call',
        2,
    ]
    done = reverie(*args, '--results', folder / 'results.json')
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_one_command_trains_scores_and_reports(run):
    record = json.loads((run / 'scores.json').read_text())
    assert record == json.loads((run / 'results.json').read_text())
    assert record['seeds'] == [0, 1] and record['env_frames'] == 2000
    assert record['gradient_steps'] == dict.fromkeys(
        ('tokenizer', 'dynamics', 'finetune', 'imagine'), 4
    )
    for name in ('imagination', 'wm_bc'):
        score = record['score'][name]
        assert np.shape(score['per_seed']) == np.shape(score['greedy']['per_seed']) == (2, 4)
        assert score['mean'] == pytest.approx(np.mean(score['per_seed']))
    assert {'random', 'data', 'ppo'} <= set(record['score'])
    said = record['trust']['reward']['recorded']['said']
    assert len(said['per_seed']) == 2 and said['mean'] == pytest.approx(np.mean(said['per_seed']))
    page = (run / 'report.html').read_text()
    assert 'Imagination' in page and 'data:image/png' in page
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert [line['phase'] for line in lines if line['step'] == 4] == [
        'tokenizer',
        'dynamics',
        'finetune',
        'imagine',
    ]
    assert all(
        line['time/compilations'] == 1 for line in lines
    )  # none after the first step of a phase


def test_the_same_command_again_trains_nothing_and_eval_gives_the_same_scores(run, data):
    record = json.loads((run / 'scores.json').read_text())
    before = record['score']['imagination']['per_seed']
    checkpoints = sorted((run / 'checkpoints').iterdir())
    done = reverie('eval', run, '--episodes', 4, '--max-steps', 40)
    assert done.returncode == 0, done.stderr[-2000:]
    after = json.loads((run / 'scores.json').read_text())
    assert after['score']['imagination']['per_seed'] == before and after['trust'] == record['trust']
    assert re.search(r'eval  imagination  sampled  .* to .*, t over 2 seeds\)', done.stdout)
    assert 'Imagination RL minus WM + BC, greedy: ' in done.stdout
    assert sorted((run / 'checkpoints').iterdir()) == checkpoints


@pytest.mark.whole
def test_trust_alone_is_measured_again_and_the_scores_stay(run):
    before = json.loads((run / 'scores.json').read_text())
    done = reverie('eval', run, '--trust')
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((run / 'scores.json').read_text()) == before
    assert 'trust dreams rank 9 policies' in done.stdout and 'eval ' not in done.stdout
    assert 'by that of the game under other dice: ' in done.stdout


def test_policies_of_all_strengths_play_in_the_game_and_in_the_dream(run):
    """Random play, four snapshots, four read-outs; recall beside the game's own."""
    before = json.loads((run / 'scores.json').read_text())
    ranking = before['trust']['ranking']
    names = [policy['name'] for policy in ranking['policies']]
    assert names[0] == 'random' and sum('PPO' in name for name in names) == 4
    assert names[5:] == [
        f'{name}, {how}' for name in ('imagination', 'wm_bc') for how in ('sampled', 'greedy')
    ]
    assert len(ranking['correlation']['per_seed']) == 2 and ranking['correlation']['n'] == 2
    brick = before['trust']['channels'][3]
    assert brick['name'] == 'brick' and brick['ceiling'][0]['recall'] > 0.95
    page = (run / 'report.html').read_text()
    assert 'Dreamed against real return' in page and '<g><title>random: ' in page


def newest(folder: pathlib.Path) -> int:
    """Gradient step of the newest finished checkpoint, 0 if there is none."""
    done = [
        int(p.parent.name)
        for p in folder.glob('checkpoints/*/manifest.json')
        if p.parent.name.isdigit()
    ]
    return max(done, default=0)


@pytest.mark.whole
def test_killed_and_started_again_equals_never_interrupted(run, data, tmp_path):
    """SIGKILL in the middle of a phase, then the same command: the same weights, bit for bit."""
    folder = tmp_path / 'killed'
    args = [
        'train',
        'dreamer4_debug',
        *options(data, folder),
        '--seeds',
        2,
        '--updates-per-call',
        2,
    ]
    command = [sys.executable, '-m', 'reverie.cli', *map(str, args), '--checkpoint-every-s', '0']
    process = subprocess.Popen(
        command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 1200
    while newest(folder) < 10 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    assert process.poll() is None, 'it ended before it could be killed'
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'resuming' in done.stderr
    (ours, meta), (straight, _) = checkpoint.load(folder), checkpoint.load(run)
    assert meta['complete'] and meta['phase'] == 'imagine'
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(straight), strict=True):
        np.testing.assert_array_equal(a, b)


def fails(capsys, monkeypatch, *args: object) -> str:
    """The one line that a mistaken command leaves on standard error."""
    monkeypatch.setattr(sys, 'argv', ['reverie', *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    return error


@pytest.mark.parametrize(
    'args, words',
    [
        (['trian'], ['trian', 'train']),
        (['train'], ['preset', 'dreamer4']),
        (['report', 'run\udcff'], ['run\\udcff', 'not UTF-8']),
        (['train', 'dreamer5', '--env', 'minatar/breakout'], ['dreamer5', 'dreamer4']),
        (['train', 'dreamer4', '--env', 'minatar/breakout', '--lr', '3'], ['--lr']),
        (['collect', '--env', 'minatar/pong'], ['minatar/pong', 'minatar/breakout']),
        (['collect', '--env', 'minatar/breakout', '--kind', 'good'], ['good', 'mixed']),
        (['collect', '--env', 'minatar/breakout', '--frames', '0.5'], ['0.5', 'whole']),
        (
            ['collect', '--env', 'minatar/breakout', '--env-options', 'sticky'],
            ['sticky', 'name=value'],
        ),
        (['collect', '--env', 'minatar/breakout', '--env-options', 'glue=1'], ['glue', 'sticky']),
        (['train', 'dreamer4', '--env', 'minatar/asterix'], ['no dataset', 'reverie collect']),
        (['eval', 'nowhere', '--episodes', '0'], ['--episodes 0', 'positive whole']),
        (['eval', 'nowhere', '--results', '/'], ['--results /', 'a folder']),
        (['eval', 'nowhere', '--results', '/dev/null/x.json'], ['/dev/null', 'no file']),
        (
            ['train', 'dreamer4', '--env', 'minatar/asterix', '--max-steps', '0'],
            ['--max-steps 0', 'positive whole'],
        ),
        (['data', 'verify', 'nowhere'], ['nowhere']),
        (['report', 'nowhere'], ['nowhere', 'config.json']),
        (['eval', 'nowhere'], ['nowhere', 'config.json']),
    ],
)
def test_a_mistake_is_one_line_that_names_the_thing_and_the_expectation(
    capsys, monkeypatch, tmp_path, args, words
):
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, monkeypatch, *args)
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())  # nothing was made


def test_a_dataset_of_another_game_or_action_count_is_refused(capsys, monkeypatch, data, tmp_path):
    run = tmp_path / 'run'
    train = ['train', 'dreamer4_debug', '--out', run, '--data', data, '--env']
    assert 'minatar/asterix' in fails(capsys, monkeypatch, *train, 'minatar/asterix')
    small = tmp_path / 'small'
    dataset.write_dataset(
        small, 'minatar/breakout', 'random', 200, options={'minimal_actions': True}, episodes=2
    )
    assert Episodes(small).spec.actions.size == 3
    manifest = json.loads((data / 'manifest.json').read_text())
    assert manifest['provenance']['env']['name'] == 'minatar/breakout'
    assert not run.exists()


def test_a_truncated_dataset_is_refused_by_name(capsys, monkeypatch, data, tmp_path):
    copy = pathlib.Path(shutil.copytree(data, tmp_path / 'data'))
    shard = next(copy.glob('*.array_record'))
    shard.write_bytes(shard.read_bytes()[:-1000])
    error = fails(
        capsys, monkeypatch, 'train', 'dreamer4_debug', '--env', 'minatar/breakout', '--data', copy,
        '--out', tmp_path / 'run',
    )  # fmt: skip
    assert shard.name in error and not (tmp_path / 'run').exists()


def test_a_dataset_that_lost_little_is_trained_on_and_one_that_lost_more_is_not(
    capsys, monkeypatch, data, caplog
):
    experiment = functools.partial(
        Recorded, 'dreamer4_debug', registry.get('dreamer4_debug'), 'minatar/breakout'
    )
    whole = experiment(data=(data,))
    frames = whole.source.frames
    monkeypatch.setattr(Episodes, '_read', lose_third(Episodes._read))
    one, all_of_them = 1 / len(whole.episodes), len(whole.episodes)
    with pytest.raises(UserError, match=rf'1 of {all_of_them} episodes .* expected at most'):
        experiment(data=(data,), max_lost=one / 2).source  # noqa: B018
    damaged = experiment(data=(data,), max_lost=one)
    assert damaged.source.frames < frames and damaged.episodes.lost == {3}
    assert (
        damaged.facts['dataset'] != whole.facts['dataset']
    )  # a run continues on the same data only


def lose_third(read):
    def damaged(self, path, indices):
        found = read(self, path, indices)
        return [b'' if i == 3 else x for i, x in zip(indices, found, strict=True)]

    return damaged


def test_a_run_folder_of_another_config_is_refused_and_left_alone(capsys, monkeypatch, run, data):
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file()}
    error = fails(
        capsys,
        monkeypatch,
        'train',
        'dreamer4_debug',
        *options(data, run),
        '--seeds',
        2,
        '--config.horizon',
        4,
    )
    assert 'config.horizon' in error and '3' in error and '4' in error
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file()}


def test_an_existing_dataset_is_not_overwritten(capsys, monkeypatch, data):
    before = (data / 'manifest.json').read_bytes()
    args = [
        'collect',
        '--env',
        'minatar/breakout',
        '--kind',
        'random',
        '--frames',
        '100',
        '--out',
        data,
    ]
    assert str(data) in fails(capsys, monkeypatch, *args)
    assert (data / 'manifest.json').read_bytes() == before


def run_main(monkeypatch, *args: object) -> int | str | None:
    """The exit code of a command."""
    monkeypatch.setattr(sys, 'argv', ['reverie', *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def terminated(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError('SIGTERM was not heard')


def test_sigterm_while_collecting_leaves_nothing_and_asks_to_be_requeued(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(dataset, 'scores', terminated)
    path = tmp_path / 'data'
    assert (
        run_main(
            monkeypatch, 'collect', '--env', 'minatar/breakout', '--kind', 'random', '--out', path
        )
        == 75
    )
    assert not list(tmp_path.iterdir()) and 'SIGTERM: stopped' in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_while_scoring_leaves_the_run_as_it_was_and_asks_to_be_requeued(
    capsys, monkeypatch, run
):
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file()}
    monkeypatch.setattr(returns, 'evaluate_seeds', terminated)
    assert run_main(monkeypatch, 'eval', run, '--episodes', 4) == 75
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file()}


@pytest.mark.parametrize(
    'error, code, words',
    [
        (OSError(errno.ENOSPC, 'No space left on device', 'data/x'), 74, 'No space left'),
        (OutOfMemoryError('an update takes 9 GB'), 71, '9 GB'),
        (MemoryError(), 71, 'out of memory'),
        (RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes'), 71, '9 bytes'),
        (KeyboardInterrupt(), 130, 'interrupted'),
    ],
)
def test_what_is_nobody_s_mistake_has_its_own_exit_code_and_one_line(
    capsys, monkeypatch, error, code, words
):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, 'dispatch', fail)
    assert run_main(monkeypatch) == code
    said = capsys.readouterr().err
    assert said.startswith('error: ') and said.count('\n') == 1 and words in said


def test_keys_that_say_where_and_how_may_change_when_a_run_continues(run, tmp_path):
    saved = json.loads((run / 'config.json').read_text())
    for key in SAFE:
        (tmp_path / 'config.json').write_text(json.dumps(saved))
        run_folder.save_run_config(tmp_path, {**saved, key: 'other'}, SAFE)
    with pytest.raises(UserError, match='label_fraction: saved'):
        run_folder.save_run_config(tmp_path, {**saved, 'label_fraction': 0.5}, SAFE)


def test_help_names_every_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['reverie', '--help'])
    cli.main()
    out = capsys.readouterr().out
    assert all(f'  {name} ' in out for name in cli.COMMANDS)


def test_inspect_and_verify_say_what_is_inside(data):
    seen = reverie('data', 'inspect', data)
    assert seen.returncode == 0 and all(
        word in seen.stdout for word in ('random', 'ppo25', 'ppo50', 'ppo100')
    )
    assert 'all sound' in reverie('data', 'verify', data).stdout


@pytest.mark.parametrize('command', ['eval', 'report', 'play'])
@pytest.mark.parametrize(
    'key',
    [
        ('config', 'discount'),
        ('config', 'dynamics', 'sampling_steps'),
        ('label_fraction',),
        ('seed',),
    ],
)
def test_a_config_that_was_edited_is_refused_by_its_keys(
    capsys, monkeypatch, run, tmp_path, command, key
):
    """The checkpoint, which is under a checksum, says what the agent was trained with."""
    copy = shutil.copytree(run, tmp_path / 'run')
    value = json.loads((copy / 'config.json').read_text())
    inner = value
    for name in key[:-1]:
        inner = inner[name]
    before, inner[key[-1]] = inner[key[-1]], 0.5
    (copy / 'config.json').write_text(json.dumps(value | {'command': 'another'}))
    error = fails(capsys, monkeypatch, command, copy)
    assert f'{".".join(key)}: saved {before!r}, config.json 0.5' in error
