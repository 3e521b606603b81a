"""Whole runs of the toy: resume, seeds, faults, signals, devices."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from toy_agent import Crash, FailingStream, Stream, Table, main, model_loss, poisoned, toy

from reverie.errors import ExportError
from reverie.training import checkpoint, metrics
from reverie.training.checkpoint import flatten
from reverie.training.compilation import Compiler
from reverie.training.run import run
from reverie.training.run_folder import save_run_config
from reverie.types import UserError

HERE = pathlib.Path(__file__).parent


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def train(folder, agent=None, source=None, **changes):
    arguments = dict(updates_per_call=4, log_every_s=0.0, checkpoint_every_s=1e9, config=dict(a=1))
    return run(agent or toy(), source or Table(), folder, **{**arguments, **changes})


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run of two seeds: folder, parameters, source."""
    folder, source = tmp_path_factory.mktemp('whole'), Stream()
    return folder, train(folder, source=source, seeds=2, checkpoint_every_s=0.0), source


@pytest.mark.parametrize('calls', [1, 4, 6, 8])
def test_an_interrupted_run_continues_bit_for_bit(whole, tmp_path, calls):
    """5 calls of each phase: before the first save, inside each phase, and between them."""
    source = FailingStream()
    source.calls = calls
    with pytest.raises(Crash):
        train(tmp_path, source=source, seeds=2, checkpoint_every_s=0.0)
    source = Stream()
    params = train(tmp_path, source=source, seeds=2, checkpoint_every_s=0.0)
    assert same(params, whole[1]) and source.get_state() == whole[2].get_state()
    ours, theirs = (metrics.read(f / 'metrics.jsonl') for f in (tmp_path, whole[0]))
    assert [r['gradient_steps'] for r in ours] == [r['gradient_steps'] for r in theirs]
    assert [r.get('loss/fit') for r in ours] == [r.get('loss/fit') for r in theirs]
    assert sorted(r['seconds'] for r in ours) == [r['seconds'] for r in ours]


def test_every_record_carries_its_coordinates_and_every_seed(whole):
    records = metrics.read(whole[0] / 'metrics.jsonl')
    assert [(r['phase'], r['step']) for r in records] == [
        *[('model', s) for s in (4, 8, 12, 16, 20)],
        *[('head', s) for s in (2, 4, 6, 8, 10)],
    ]
    last = records[-1]
    assert last['gradient_steps'] == 30 and last['env_frames'] == 30 * 4 * 2
    assert len(last['loss/head/seeds']) == 2
    np.testing.assert_allclose(np.mean(last['loss/head/seeds']), last['loss/head'], rtol=1e-6)
    assert last['time/frames_per_s'] == pytest.approx(last['time/updates_per_s'] * 2 * 4 * 2)
    assert 'pred' in records[0] and 'loss/size' in records[0] and records[0]['opt/skipped'] == 0


def test_a_finished_run_returns_its_parameters_without_training(whole):
    source = FailingStream()
    source.calls = 1
    before = (whole[0] / 'metrics.jsonl').read_text()
    assert same(train(whole[0], source=source, seeds=2), whole[1])
    assert (whole[0] / 'metrics.jsonl').read_text() == before


def test_the_saved_parameters_load_without_the_agent(whole):
    params, meta = checkpoint.load(whole[0])
    assert same(params, whole[1]) and jax.tree.structure(params) == jax.tree.structure(whole[1])
    assert (
        meta['phase'] == 'head'
        and meta['complete']
        and meta['seeds'] == 2
        and meta['config']['a'] == 1
    )


def test_seeds_trained_together_equal_each_trained_alone(tmp_path):
    together = train(tmp_path / 'both', seeds=2, seed=3)
    for i in range(2):
        alone = train(tmp_path / str(i), seed=3 + i)
        for a, b in zip(leaves(together), leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-5, atol=1e-5)


def test_a_phase_leaves_its_weight_mean_behind_and_the_next_begins_from_it(tmp_path):
    """With an optimiser that adds one to each weight, the mean of decay 0.5 has a closed form."""
    import optax

    plus_one = optax.GradientTransformation(
        lambda p: (), lambda g, s, p=None: (jax.tree.map(lambda x: x * 0 + 1, g), s)
    )
    agent = toy((3, 1), optimiser=plus_one, ema_decay=0.5)
    start = agent.init(jax.random.split(jax.random.key(0))[0])
    params = train(tmp_path, agent=agent)
    # weights w+1, w+2, w+3; mean: 0.5, then 1.25, then 2.125 above the start
    np.testing.assert_allclose(params['model']['w'][0], start['model']['w'] + 2.125, rtol=1e-5)
    begun = train(tmp_path / 'begun', agent=toy((0, 0)))
    np.testing.assert_array_equal(begun['head']['w'][0], start['head']['w'] / 2)
    np.testing.assert_array_equal(begun['model']['w'][0], start['model']['w'])


def test_each_phase_compiles_once_and_once_more_for_a_remainder(tmp_path):
    traced = []

    def counted(*args):
        traced.append(1)
        return model_loss(*args)

    train(tmp_path / 'even', agent=toy((40, 0), model=counted))
    per_compilation = len(traced)
    assert metrics.read(tmp_path / 'even' / 'metrics.jsonl')[-1]['time/compilations'] == 1
    traced.clear()
    train(tmp_path / 'odd', agent=toy((41, 0), model=counted))
    assert metrics.read(tmp_path / 'odd' / 'metrics.jsonl')[-1]['time/compilations'] == 2
    assert len(traced) <= 2 * per_compilation


@pytest.mark.parametrize(
    'source, threads', [(Table, ['compiling_0', 'compiler_0']), (Stream, ['compiling_0'] * 2)]
)
def test_the_next_phase_is_compiled_beside_the_one_that_trains_and_never_twice(
    tmp_path, caplog, source, threads
):
    """Where the host loads batches the shapes of the next phase are not known before it begins."""
    jax.config.update('jax_log_compiles', True)  # in every thread, unlike jax.log_compiles
    try:
        train(tmp_path, agent=toy((4, 4)), source=source())
    finally:
        jax.config.update('jax_log_compiles', False)
    compiled = [
        r.threadName
        for r in caplog.records
        if 'Finished XLA compilation of jit(call)' in r.getMessage()
    ]
    assert compiled == threads


def test_on_an_accelerator_all_phases_are_compiled_before_the_first_one_trains(
    tmp_path, monkeypatch
):
    waiting = []
    program = Compiler.program

    def spied(self, *args):
        found = program(self, *args)
        waiting.append({later: future.done() for later, future in self.ahead.items()})
        return found

    monkeypatch.setattr(Compiler, 'program', spied)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    train(tmp_path, agent=toy((4, 4)))
    assert waiting == [{1: True}, {}]


def test_a_signal_while_the_first_program_compiles_ends_the_run_at_once(tmp_path, monkeypatch):
    """The compiler cannot be stopped; nothing is saved, for nothing was learnt."""
    begun, over = threading.Event(), threading.Event()
    compile_it = Compiler._compile

    def slow(*args):
        begun.set()
        assert over.wait(60)
        return compile_it(*args)

    def send():
        assert begun.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Compiler, '_compile', slow)
    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == 75 and not over.is_set()
    over.set()
    assert not checkpoint.steps(tmp_path / 'checkpoints')
    monkeypatch.undo()
    train(tmp_path)


def test_losses_that_stay_nan_stop_the_run_and_leave_checkpoints_alone(tmp_path):
    agent = toy((40, 4), model=poisoned(21, 1000))
    with pytest.raises(
        UserError, match=r'phase model step 31: loss/size is NaN \(seed 0, 10 updates in a row'
    ):
        train(tmp_path, agent=agent, checkpoint_every_s=0.0)
    saved = [int(p.name) for p in checkpoint.steps(tmp_path / 'checkpoints')]
    assert saved[-1] <= 32
    params, meta = checkpoint.load(tmp_path)
    assert all(np.isfinite(x).all() for x in leaves(params)) and meta['step'] == saved[-1]


def test_a_few_nan_updates_are_skipped_and_counted(tmp_path):
    agent = toy((40, 4), model=poisoned(10, 18))
    params = train(tmp_path, agent=agent)
    assert all(np.isfinite(x).all() for x in leaves(params))
    records = [r for r in metrics.read(tmp_path / 'metrics.jsonl') if r['phase'] == 'model']
    assert records[-1]['opt/skipped'] == 9 and records[0]['opt/skipped'] == 0
    assert [r['step'] for r in records if r['loss/size'] is None] == [16]


def test_a_folder_of_another_config_is_refused_key_by_key(tmp_path):
    train(tmp_path, agent=toy((4, 4)), config=dict(opt=dict(lr=0.1, clip=1), log_every_s=1))
    with pytest.raises(UserError) as error:
        train(
            tmp_path, agent=toy((4, 8)), config=dict(opt=dict(lr=0.2, clip=1), log_every_s=9, new=1)
        )
    text = str(error.value)
    for part in (
        'opt.lr: saved 0.1, given 0.2',
        'phases.head.steps: saved 4, given 8',
        'new: saved',
    ):
        assert part in text
    assert 'clip' not in text and 'log_every_s' not in text
    with pytest.raises(UserError, match='seeds: saved 1, given 2'):
        train(tmp_path, agent=toy((4, 4)), config=dict(opt=dict(lr=0.1, clip=1)), seeds=2)
    train(tmp_path, agent=toy((4, 4)), config=dict(opt=dict(lr=0.1, clip=1), log_every_s=9))


def test_each_key_of_a_config_is_compared(tmp_path):
    config = dict(a=1, b=dict(c=[1, 2], d=None), log_every_s=3)
    save_run_config(tmp_path, config, ('log_every_s',))
    for key in flatten(config):
        changed = json.loads(json.dumps(config))
        node = changed
        for name in key.split('.')[:-1]:
            node = node[name]
        node[key.split('.')[-1]] = 'other'
        if key == 'log_every_s':
            save_run_config(tmp_path, changed, ('log_every_s',))
            save_run_config(tmp_path, config, ('log_every_s',))
        else:
            with pytest.raises(UserError, match=f"{key}: saved .*given 'other'"):
                save_run_config(tmp_path, changed, ('log_every_s',))


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    whole, tmp_path, capfd
):
    source = FailingStream()
    source.calls = 4
    with pytest.raises(Crash):
        train(tmp_path, source=source, seeds=2, checkpoint_every_s=0.0)
    newest = checkpoint.steps(tmp_path / 'checkpoints')[-1]
    (newest / 'meta.json').write_text('{}')
    assert same(train(tmp_path, source=Stream(), seeds=2, checkpoint_every_s=0.0), whole[1])
    assert 'is damaged' in capfd.readouterr().err
    steps = [r['gradient_steps'] for r in metrics.read(tmp_path / 'metrics.jsonl')]
    assert steps == sorted(set(steps))


# ---------------------------------------------------------------- real processes


def start(script, *args, **environment):
    root = str(HERE.parents[1])
    path = os.pathsep.join([root, str(HERE)])
    env = {**os.environ, 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu', **environment}
    env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    command = [sys.executable, *script, *map(str, args)]
    return subprocess.Popen(
        command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def newest(folder):
    return max((int(p.name) for p in checkpoint.steps(folder)), default=0)


def after_new_checkpoints(process, folder, count):
    """Wait until the run has saved as many times as it had not; the next save is under way."""
    deadline, known = time.monotonic() + 60, newest(folder)
    while newest(folder) < known + 50 * count and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def test_kill_term_and_ctrl_c_lose_nothing(tmp_path):
    """One run, killed three ways and continued, ends bit for bit as one that nobody disturbed."""
    script, folder = [str(HERE / 'toy_agent.py')], tmp_path / 'disturbed'
    outcomes = []
    for count, number in ((1, signal.SIGKILL), (3, signal.SIGTERM), (2, signal.SIGINT)):
        process = start(script, folder)
        after_new_checkpoints(process, folder / 'checkpoints', count)
        process.send_signal(number)
        outcomes.append((process.communicate(timeout=60)[1], process.returncode))
    (_, killed), (term_text, term), (int_text, interrupted) = outcomes
    assert (killed, term, interrupted) == (-signal.SIGKILL, 75, 130)
    assert 'SIGTERM: saved at ' in term_text and 'run the same command to continue' in int_text
    process = start(script, folder)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and 'resuming after' in errors, errors
    assert same(checkpoint.load(folder)[0], main(tmp_path / 'undisturbed', checkpoint_every_s=1e9))
    steps = [r['gradient_steps'] for r in metrics.read(folder / 'metrics.jsonl')]
    assert steps == list(range(50, 1501, 50))
    assert not list((folder / 'checkpoints').glob('tmp-*'))


DEVICES = """
import sys, json, jax, numpy as np
from toy_agent import Table, toy
from reverie.training import metrics
from reverie.training.run import run
from reverie.training.state import make_mesh
from reverie.types import UserError
folder, losses = sys.argv[1], []
for i, mesh in enumerate([None, make_mesh(2, 2)]):
    params = run(toy((6, 2)), Table(), f'{folder}/{i}', seeds=2, mesh=mesh, log_every_s=0.0, updates_per_call=2)
    losses.append([r.get('loss/fit', r.get('loss/head')) for r in metrics.read(f'{folder}/{i}/metrics.jsonl')])
    v = params['model']['v']
    assert len(v.sharding.device_set) == (1, 4)[i]
    assert v.addressable_shards[0].data.shape == ((2, 8), (2, 4))[i]
again = run(toy((6, 2)), Table(), f'{folder}/0', seeds=2, mesh=make_mesh(2, 2))
assert len(again['model']['v'].sharding.device_set) == 4
try:
    run(toy((6, 2)), Table(), f'{folder}/x', mesh=make_mesh(8, 1))
except UserError as error:
    refusal = str(error)
print(json.dumps([losses, refusal]))
"""


def test_four_devices_give_the_losses_of_one_and_checkpoints_move_between_them(tmp_path):
    process = start(['-c', DEVICES], tmp_path, XLA_FLAGS='--xla_force_host_platform_device_count=8')
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (one, both), refusal = json.loads(output.splitlines()[-1])
    np.testing.assert_allclose(both, one, rtol=1e-5)
    assert "batch of 4 rows does not divide over the mesh {'data': 8, 'fsdp': 1}" in refusal


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], 'a')
fcntl.flock(file, fcntl.LOCK_EX)
file.write('process 7 on elsewhere'); file.flush()
print('held', flush=True); sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A run folder that another process holds: (folder, the process)."""
    command = [sys.executable, '-c', HOLD, str(tmp_path / 'lock')]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'held\n'
        yield tmp_path, process
        process.kill()


@pytest.mark.parametrize('waits, code', [(None, 2), (0.0, 75), (0.2, 75)])
def test_a_folder_in_which_another_process_trains_is_refused_by_its_name(held, waits, code):
    folder, _ = held
    with pytest.raises(UserError, match='in use by process 7 on elsewhere') as error:
        train(folder, wait_lock_s=waits)
    assert error.value.code == code
    assert not (folder / 'config.json').exists() and not checkpoint.steps(folder / 'checkpoints')


def test_a_restarted_job_asks_to_be_tried_again(held, monkeypatch):
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    with pytest.raises(UserError, match='process 7') as error:
        train(held[0])
    assert error.value.code == 75


def test_a_holder_that_dies_blocks_nobody_and_a_run_leaves_the_folder_free(held, whole):
    folder, process = held
    process.kill()
    process.wait()
    assert (folder / 'lock').read_text() == 'process 7 on elsewhere'
    assert same(train(folder, source=Stream(), seeds=2), whole[1])
    assert (folder / 'lock').read_text() == ''
    train(folder, source=Stream(), seeds=2)


def test_a_waiting_process_goes_on_when_the_folder_is_free(held, whole):
    folder, process = held
    threading.Timer(0.5, process.kill).start()
    assert same(train(folder, source=Stream(), seeds=2, wait_lock_s=60.0), whole[1])


@pytest.mark.parametrize('cause, code', [(OSError(28, 'No space left'), 74), (UserError('x'), 2)])
def test_a_replay_that_cannot_be_exported_costs_nothing_else(whole, tmp_path, cause, code):
    class Full(Stream):
        def finish(self, live):
            raise cause

    alone = dataclasses.replace(toy(), phases=toy().phases[:1])
    with pytest.raises(ExportError, match='the run is saved') as error:
        train(tmp_path, agent=alone, source=Full(), seeds=2)
    assert error.value.code == code
    params, meta = checkpoint.load(tmp_path)
    assert meta['complete'] and same(params, error.value.params)
    assert same(train(tmp_path, agent=alone, source=Stream(), seeds=2), params)


def test_a_finished_run_given_more_updates_equals_one_that_had_them_from_the_start(tmp_path):
    """The weights' mean, which the phase leaves behind, goes on too."""
    alone = lambda steps: dataclasses.replace(toy(), phases=(toy((steps, 1)).phases[0],))
    train(tmp_path / 'a', agent=alone(10), source=Stream(), seeds=2)
    longer = train(tmp_path / 'a', agent=alone(20), source=Stream(), seeds=2)
    assert same(longer, train(tmp_path / 'b', agent=alone(20), source=Stream(), seeds=2))
    steps = [r['step'] for r in metrics.read(tmp_path / 'a' / 'metrics.jsonl')]
    assert steps == sorted(set(steps)) and steps[-1] == 20
    with pytest.raises(UserError, match=r'phases\.model\.steps: saved 20, given 10'):
        train(tmp_path / 'a', agent=alone(10), source=Stream(), seeds=2)


def test_more_updates_are_refused_where_the_rate_was_planned_or_the_end_was_not_kept(tmp_path):
    phase = toy((8, 1)).phases[0]
    planned = dataclasses.replace(toy(), phases=(dataclasses.replace(phase, scheduled=True),))
    train(tmp_path, agent=planned)
    more = dataclasses.replace(planned.phases[0], steps=12)
    before = (tmp_path / 'config.json').read_bytes()
    with pytest.raises(UserError, match='made for 8 updates and cannot have 12: its learning rate'):
        train(tmp_path, agent=dataclasses.replace(planned, phases=(more,)))
    (newest,) = checkpoint.steps(tmp_path / 'checkpoints')[-1:]
    meta = json.loads((newest / 'meta.json').read_text())
    meta['arrays']['train'] = None
    (newest / 'meta.json').write_text(json.dumps(meta))
    steady = dataclasses.replace(more, scheduled=False)
    with pytest.raises(UserError, match='kept neither its optimiser nor its replay'):
        train(tmp_path, agent=dataclasses.replace(planned, phases=(steady,)))
    assert (tmp_path / 'config.json').read_bytes() == before


def test_an_export_that_failed_is_tried_again_with_the_replay_that_was_kept(tmp_path):
    class Full(Stream):
        failing = True
        exported = 0

        @property
        def owes_export(self):
            return not self.exported

        def finish(self, live):
            if self.failing:
                raise OSError(28, 'No space left on device')
            self.exported += 1

    alone = dataclasses.replace(toy(), phases=toy().phases[:1])
    source = Full()
    for _ in range(2):
        with pytest.raises(ExportError, match='the run is saved') as error:
            train(tmp_path, agent=alone, source=source)
        assert error.value.code == 74
    source.failing = False
    train(tmp_path, agent=alone, source=source)
    assert source.exported == 1
