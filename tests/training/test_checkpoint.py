"""Checkpoints under damage: deleted, truncated and flipped files, full disks, interrupted saves."""

import contextlib
import gc
import json
import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.io import file_hash
from reverie.training import checkpoint
from reverie.types import UserError

pytestmark = pytest.mark.compat


def tree(value: float):
    params = dict(model={0: jnp.full((2, 3), value)}, head=jnp.ones((2, 1)))
    params['a.b'] = {'x/y': jnp.full((2,), value, jnp.bfloat16)}
    train = dict(opt=(jnp.full((2, 3), -value), None), rms={}, step=jnp.full((2,), 7, jnp.int32))
    return params, train


def shapes(x):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), x)


def target(meta):
    return shapes(tree(0.0)[0]), shapes(tree(0.0)[1])


def write(folder, number, value):
    return checkpoint.save(
        folder, number, *tree(value), dict(complete=False, gradient_steps=number)
    )


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'checkpoints'
    write(folder, 1, 1.0)
    write(folder, 2, 2.0)
    return folder


@pytest.fixture
def copy(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / 'checkpoints')


def restored_value(folder):
    params, train, meta = checkpoint.restore_latest(folder, target)
    value = float(params['model'][0][0, 0])
    assert meta['gradient_steps'] == value
    for a, b in zip(jax.tree.leaves((params, train)), jax.tree.leaves(tree(value)), strict=True):
        assert a.dtype == b.dtype and np.array_equal(
            np.asarray(a, np.float32), np.asarray(b, np.float32)
        )
    return value


def test_what_is_saved_comes_back_with_its_structure_and_types(two_steps):
    assert restored_value(two_steps) == 2.0


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert checkpoint.restore_latest(tmp_path, target) is None


def test_parameters_load_without_agent_or_optimiser(two_steps):
    params, meta = checkpoint.load(two_steps.parent)
    assert jax.tree.structure(params) == jax.tree.structure(tree(0.0)[0])
    assert params['a.b']['x/y'].dtype == jnp.bfloat16 and float(params['model'][0][1, 2]) == 2.0
    assert meta['versions']['jax'] == jax.__version__


def test_loading_a_folder_without_checkpoints_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match='no checkpoint'):
        checkpoint.load(tmp_path)


def delete(path):
    path.unlink()


def truncate(path):
    with open(path, 'r+b') as f:
        f.truncate(path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize('damage', [delete, truncate, flip])
def test_damage_to_any_file_walks_back_to_the_step_before(two_steps, tmp_path, capfd, damage):
    files = sorted(
        p.relative_to(two_steps / '000000002')
        for p in (two_steps / '000000002').rglob('*')
        if p.is_file()
    )
    assert len(files) > 8
    for i, file in enumerate(files):
        folder = shutil.copytree(two_steps, tmp_path / str(i))
        path = folder / '000000002' / file
        if damage is not delete and path.stat().st_size == 0:
            continue
        damage(path)
        capfd.readouterr()
        found = checkpoint._newest_sound(folder)
        assert found is not None and found[0].name == '000000001', file
        assert len(capfd.readouterr().err.splitlines()) == 1
        assert [p.name[:17] for p in folder.glob('corrupt-*')] == ['corrupt-000000002']
    assert restored_value(folder) == 1.0


@pytest.mark.filterwarnings('ignore')
def test_orbax_alone_does_not_notice_a_flipped_bit_in_an_array(copy):
    """Why there is a manifest: without it, at least one single-bit flip would be restored without
    complaint.
    """
    quiet = 0
    for path in sorted((copy / '000000002' / 'params').rglob('*')):
        if path.is_file() and path.stat().st_size:
            whole = path.read_bytes()
            flip(path)
            assert checkpoint.fault_of(copy / '000000002') is not None
            with contextlib.suppress(Exception):  # counted is what Orbax does not notice
                checkpoint._read_arrays(copy / '000000002' / 'params', target({})[0])
                quiet += 1
            path.write_bytes(whole)
    assert quiet > 0 and checkpoint.fault_of(copy / '000000002') is None


def test_an_added_file_is_damage_too(copy):
    (copy / '000000002' / 'params' / 'extra').write_text('x')
    assert 'unknown' in checkpoint.fault_of(copy / '000000002')


def test_when_every_step_is_damaged_the_run_refuses_now_and_the_next_time(copy):
    for step in checkpoint.steps(copy):
        flip(step / 'meta.json')
    for _ in range(2):
        with pytest.raises(UserError, match='no sound checkpoint is left'):
            checkpoint.restore_latest(copy, target)


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_step(copy, tmp_path, monkeypatch):
    """A kill before any write, sync, rename or removal would leave what is on the disk there."""
    moments = []

    def watched(place, name):
        act = getattr(place, name)

        def first_look(*args, **options):
            moments.append(shutil.copytree(copy, tmp_path / f'moment-{len(moments)}'))
            return act(*args, **options)

        monkeypatch.setattr(place, name, first_look)

    remove = shutil.rmtree
    for place, name in [
        (checkpoint, '_write_arrays'),
        (checkpoint, 'write_json'),
        (checkpoint, 'sync'),
    ]:
        watched(place, name)
    for place, name in [(os, 'rename'), (shutil, 'rmtree')]:
        watched(place, name)
    checkpoints = checkpoint.CheckpointManager(copy, max_to_keep=2)
    checkpoints.save(3, *tree(3.0), dict(complete=False, gradient_steps=3))
    monkeypatch.undo()
    assert len(moments) > 15
    seen = set()
    for folder in moments:
        checkpoint.clean(folder)
        _, meta = checkpoint._newest_sound(folder)
        seen.add((meta['gradient_steps'], len(checkpoint.steps(folder))))
        assert not [p for p in folder.iterdir() if not p.name.isdigit()]
        remove(folder)
    assert seen == {(2, 2), (3, 3), (3, 2)}
    assert restored_value(copy) == 3.0


def test_an_interrupted_save_is_ignored_and_removed(copy):
    shutil.copytree(copy / '000000002', copy / 'tmp-000000003')
    assert restored_value(copy) == 2.0
    checkpoint.clean(copy)
    assert not list(copy.glob('tmp-*')) and len(checkpoint.steps(copy)) == 2


def test_another_format_is_refused_by_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'FORMAT', 99)
    write(tmp_path, 1, 1.0)
    monkeypatch.undo()
    with pytest.raises(UserError, match='format 99; this version reads format 1'):
        checkpoint.restore_latest(tmp_path, target)


def lie(step, edit):
    """Change meta.json and set the manifest right, as an attacker would."""
    meta = json.loads((step / 'meta.json').read_text())
    edit(meta)
    (step / 'meta.json').write_text(json.dumps(meta))
    manifest = json.loads((step / 'manifest.json').read_text())
    (step / 'manifest.json').write_text(
        json.dumps({**manifest, 'meta.json': file_hash(step / 'meta.json')})
    )


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'change', [dict(shape=[2**40, 2**20]), dict(shape='x'), dict(dtype='O'), dict(path=[[]])]
)
def test_a_checkpoint_that_lies_about_its_arrays_is_a_users_mistake(copy, change):
    lie(copy / '000000002', lambda meta: meta['arrays']['params'][2].update(change))
    with pytest.raises(UserError, match='000000002'):
        checkpoint.load(copy.parent)
    # Orbax leaves coroutines behind, which complain at length when they go: here, not in a later
    # test
    gc.collect()


def test_other_shapes_are_refused_by_name(two_steps):
    def wider(meta):
        params, train = target(meta)
        params['head'] = jax.ShapeDtypeStruct((2, 5), jnp.float32)
        return params, train

    with pytest.raises(UserError, match=r"'head'.*\[2, 1\].*\[2, 5\]"):
        checkpoint.restore_latest(two_steps, wider)


def test_a_checkpoint_of_an_earlier_day_is_read(tmp_path):
    """Kept in the repository, so that other versions of JAX and Orbax read it too; `write` made it."""
    kept = shutil.copytree(
        pathlib.Path(__file__).parents[1] / 'golden' / 'checkpoint-1', tmp_path / 'checkpoints'
    )
    assert restored_value(kept) == 2.0
    assert checkpoint.load(tmp_path)[1]['versions']['format'] == 1


def test_the_keeper_keeps_the_newest_and_every_phase_end(tmp_path):
    checkpoints = checkpoint.CheckpointManager(tmp_path, max_to_keep=2, keep_phase_ends=True)
    for number in range(1, 6):
        assert checkpoints.save(number, *tree(number), dict(complete=number == 2))
    assert [p.name for p in checkpoint.steps(tmp_path)] == ['000000002', '000000004', '000000005']
    checkpoints.keep_phase_ends = False
    checkpoints.prune()
    assert [p.name for p in checkpoint.steps(tmp_path)] == ['000000004', '000000005']
    assert sorted(os.listdir(tmp_path)) == ['000000004', '000000005']


def test_a_disk_that_takes_no_more_is_survived_twice_and_then_ends_the_run(tmp_path, capsys):
    """The kernel refuses every write beyond 8 kB: for Python, for Orbax, and for a file that
    captures what is said.
    """
    checkpoints = checkpoint.CheckpointManager(tmp_path)
    checkpoints.save(1, *tree(1.0), dict(complete=False, gradient_steps=1))
    large = dict(
        model=jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)))
    )  # noise does not compress
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        assert not checkpoints.save(2, large, None, dict(complete=False))
        assert not checkpoints.save(3, large, None, dict(complete=False))
        with pytest.raises(SystemExit) as stop:
            checkpoints.save(4, large, None, dict(complete=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 74
    assert capsys.readouterr().err.count('SAVING FAILED') == 3
    assert sorted(os.listdir(tmp_path)) == ['000000001'] and restored_value(tmp_path) == 1.0
    assert (
        checkpoints.save(5, *tree(5.0), dict(complete=False, gradient_steps=5))
        and checkpoints.failures == 0
    )


def test_meta_is_json_and_names_every_array(two_steps):
    meta = json.loads((two_steps / '000000002' / 'meta.json').read_text())
    assert [x['path'] for x in meta['arrays']['params']] == [['a.b', 'x/y'], ['head'], ['model', 0]]


@pytest.mark.parametrize(
    'name',
    ['v3[lr=3e-4]', 'a*b?', '{a,b}', 'sp ace\ttab', 'ü@2', '-o', '~', '%41', 'a:b#c', '$HOME'],
)
def test_a_path_of_any_characters_holds_its_arrays(tmp_path, name):
    folder = tmp_path / name / 'checkpoints'
    write(folder, 1, 1.0)
    assert restored_value(folder) == 1.0
    assert [p.name for p in folder.parent.iterdir()] == ['checkpoints']


@pytest.mark.parametrize('fault', ['nothing', 'another', 'zeros'])
def test_a_save_whose_arrays_cannot_be_read_again_does_not_replace_an_older_one(
    tmp_path, monkeypatch, capsys, fault
):
    keeper = checkpoint.CheckpointManager(tmp_path / 'checkpoints', max_to_keep=1)
    keeper.save(1, *tree(1.0), dict(complete=False))
    real = checkpoint.ocp.Checkpointer.save

    def broken(self, path, arrays, **options):
        if fault == 'nothing':
            arrays = {'other': jnp.ones(3)}
        elif fault == 'another':
            arrays = {name: x for name, x in arrays.items() if name != '00000'}
        else:
            arrays = jax.tree.map(jnp.zeros_like, arrays)
        real(self, path, arrays, **options)

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, 'save', broken)
    assert not keeper.save(2, *tree(2.0), dict(complete=False))
    assert 'SAVING FAILED' in capsys.readouterr().err
    assert [p.name for p in checkpoint.steps(keeper.folder)] == ['000000001']
    assert checkpoint.fault_of(keeper.folder / '000000001') is None
