"""Faults that a run survives, and the files it leaves of them: numbers that are not finite, full disks, short
memory, signals.
"""

import errno
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_runner import leaves, same, train
from toy_agent import BATCH, LENGTH, Table, model_loss, poisoned, table, toy

from reverie.training import checkpoint, faults, metrics, signals, state
from reverie.types import OutOfMemoryError, UserError


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """One seed, undisturbed: parameters."""
    return train(tmp_path_factory.mktemp('whole'))


def rotten():
    """A table with one row that is not a number."""
    data = table()
    return Table({**data, 'obs': data['obs'].at[5].set(jnp.nan)})


def test_a_skipped_update_leaves_the_very_batch_and_key_behind(tmp_path, capfd):
    params = train(tmp_path, source=rotten(), seeds=2)
    assert all(np.isfinite(x).all() for x in leaves(params))
    files, said = sorted((tmp_path / 'faults').iterdir()), capfd.readouterr().err
    assert 1 < len(files) <= faults.KEPT
    for path in files:
        phase, update, seed = path.stem.split('-')
        update, seed = int(update), int(seed.removeprefix('seed'))
        index = ['model', 'head'].index(phase)
        key = jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], index)
        sample_key, loss_key = jax.random.split(jax.random.fold_in(key, update))
        batch = rotten().draw(rotten().data, None, sample_key, BATCH, LENGTH)
        with np.load(path, allow_pickle=False) as found:
            np.testing.assert_array_equal(found['step/obs'], batch.step.obs)
            np.testing.assert_array_equal(found['step/reward'], batch.step.reward)
            np.testing.assert_array_equal(found['key'], jax.random.key_data(loss_key))
            assert found['update'] == update and np.isnan(found['step/obs']).any()
            assert np.isnan(found[f'value/loss/{"fit" if phase == "model" else "head"}'])
        assert f'phase {phase} step {update + 1}: loss/' in said and str(path) in said


def test_training_that_stops_names_the_file_of_where_it_began(tmp_path, capfd):
    with pytest.raises(
        UserError, match=r'step 31: loss/size is NaN .* of the first of them, its batch .*npz'
    ) as stop:
        train(tmp_path, agent=toy((40, 4), model=poisoned(21, 1000)))
    (path,) = (tmp_path / 'faults').iterdir()
    assert str(path) in str(stop.value) and path.name == 'model-000000021-seed0.npz'
    assert '\n' not in str(stop.value) and capfd.readouterr().err.count('skipped') == 1


def test_skips_without_end_are_not_all_reported(tmp_path, capfd):
    def every_other(params, batch, key, step):
        losses, rest = model_loss(params, batch, key, step)
        return {**losses, 'fit': jnp.where(step % 2 == 0, jnp.inf, losses['fit'])}, rest

    train(tmp_path, agent=toy((40, 0), model=every_other))
    assert (
        capfd.readouterr().err.count('loss/fit is inf')
        == faults.KEPT
        == len(list((tmp_path / 'faults').iterdir()))
    )


def test_a_batch_that_cannot_be_written_ends_nothing(tmp_path, capfd):
    (tmp_path / 'faults').touch()  # a file in the place of the folder
    train(tmp_path, source=rotten())
    assert 'its batch could not be written' in capfd.readouterr().err


def test_an_optimiser_that_is_not_finite_is_not_saved(tmp_path):
    import optax

    def update(grads, memory, params=None):
        return jax.tree.map(jnp.zeros_like, grads), memory + jnp.inf

    agent = toy((8, 0), optimiser=optax.GradientTransformation(lambda p: jnp.zeros(()), update))
    with pytest.raises(
        UserError,
        match='phase model step 4: weights or optimiser are not finite; nothing was saved',
    ):
        train(tmp_path, agent=agent, checkpoint_every_s=0.0)
    assert not checkpoint.steps(tmp_path / 'checkpoints')


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_only(
    whole, tmp_path, monkeypatch, capfd
):
    write, calls = checkpoint._write_arrays, []

    def full(path, tree):
        calls.append(path)
        if 3 <= len(calls) <= 4:  # a checkpoint writes twice: the second one fails, and the third
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        write(path, tree)

    monkeypatch.setattr(checkpoint, '_write_arrays', full)
    assert same(train(tmp_path, checkpoint_every_s=0.0), whole)
    said = capfd.readouterr().err
    assert 'SAVING FAILED (2 in a row) at gradient step 12' in said and 'No space left' in said
    assert checkpoint.load(tmp_path)[1]['gradient_steps'] == 30


def test_a_disk_that_stays_full_ends_the_run_and_the_next_one_goes_on(whole, tmp_path, monkeypatch):
    write, calls = checkpoint._write_arrays, []

    def full(path, tree):
        calls.append(path)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        write(path, tree)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(checkpoint, '_write_arrays', full)
        train(tmp_path, checkpoint_every_s=0.0)
    assert stop.value.code == 74
    assert [int(p.name) for p in checkpoint.steps(tmp_path / 'checkpoints')] == [4, 8]
    assert same(train(tmp_path), whole)


class Terminated(Table):
    """Gets SIGTERM when asked for batches for the `calls`-th time."""

    calls = 0

    def load(self, *args):
        self.calls -= 1
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().load(*args)


@pytest.mark.parametrize(
    ('calls', 'phase', 'step'), [(2, 'model', 8), (7, 'head', 4), (10, 'head', 10)]
)
def test_sigterm_in_any_phase_saves_after_the_call_at_work_and_asks_to_be_requeued(
    whole, tmp_path, calls, phase, step
):
    source = Terminated()
    source.calls = calls
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, source=source)
    assert stop.value.code == 75 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    meta = checkpoint.load(tmp_path)[1]
    assert (meta['phase'], meta['step']) == (phase, step)
    assert same(train(tmp_path), whole)


def hungry(params, batch, key, step):
    """The loss, with 2^47 bytes in the middle, which sorting needs all at once."""
    losses, rest = model_loss(params, batch, key, step)
    ramp = jax.lax.broadcasted_iota(jnp.float32, (1 << 45,), 0)
    many = jax.lax.sort(jax.lax.stop_gradient(jnp.sin(ramp * losses['fit'].sum())))
    return {**losses, 'fit': losses['fit'] + jax.lax.slice_in_dim(many, 7, 8)}, rest


def test_an_update_that_does_not_fit_is_refused_before_it_runs(tmp_path):
    with pytest.raises(
        OutOfMemoryError,
        match=r'phase model: its updates take .* GB .*are free; expected a smaller batch',
    ):
        train(tmp_path, agent=toy((4, 0), model=hungry))
    assert not checkpoint.steps(tmp_path / 'checkpoints')


def test_memory_that_runs_out_all_the_same_is_one_line_of_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(state, 'available_bytes', lambda device=None: None)
    with pytest.raises(
        OutOfMemoryError, match=r'phase model: out of memory .*now 4 x 2\) or fewer seeds \(now 1\)'
    ) as stop:
        train(tmp_path, agent=toy((4, 0), model=hungry))
    assert '\n' not in str(stop.value) and stop.value.code == 71


def test_files_that_are_only_cached_count_as_free_memory(tmp_path, monkeypatch):
    (tmp_path / 'memory.max').write_text('1000000\n')
    (tmp_path / 'memory.current').write_text('900000\n')
    (tmp_path / 'memory.stat').write_text('anon 300000\ninactive_file 500000\nactive_file 100000\n')
    monkeypatch.setattr(state, 'CGROUP', tmp_path)
    assert state.available_bytes() == 600000


def test_a_clock_that_goes_backwards_changes_nothing(whole, tmp_path, monkeypatch):
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, 'time', lambda: float(next(clock)))
    monkeypatch.setattr(time, 'time_ns', lambda: 10**9 * next(clock))
    assert same(train(tmp_path, checkpoint_every_s=0.0), whole)
    seconds = [r['seconds'] for r in metrics.read(tmp_path / 'metrics.jsonl')]
    assert seconds == sorted(seconds) and seconds[-1] < 600
    for age, step in enumerate(checkpoint.steps(tmp_path / 'checkpoints')):
        os.utime(step, (10**6 - age, 10**6 - age))  # the newest looks oldest
    assert checkpoint.load(tmp_path)[1]['gradient_steps'] == 30
    assert signals.EXIT[signal.SIGTERM] == 75
