"""Import of NumPy archives (Dreamer V2 and V3) and of Minari's HDF5."""

import io
import json
import sys

import numpy as np
import pytest
from footage import bring, check_counter, counter, draw_actions

from reverie import cli
from reverie.data.records import LAST, TERMINAL

T = 24


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / 'episodes'
    folder.mkdir()
    return folder


@pytest.fixture
def refused(source, tmp_path, capsys, monkeypatch):
    def run(kind: str, *options: object) -> str:
        words = ['reverie', 'data', 'import', kind, source, '--out', tmp_path / 'data', *options]
        monkeypatch.setattr(sys, 'argv', list(map(str, words)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2 and not (tmp_path / 'data').exists()
        error = capsys.readouterr().err
        assert error.startswith('error: ') and error.count('\n') == 1
        return error

    return run


def dreamer_v2(actions: np.ndarray, one_hot: bool = True) -> dict[str, np.ndarray]:
    """An episode as Dreamer V2 writes it: what arrives together stands together."""
    arrived = np.concatenate([[0], actions])
    action = np.eye(3, dtype=np.float32)[arrived] if one_hot else arrived[:, None] / 2
    action[0] = 0
    place = np.arange(len(arrived))
    return {
        'image': counter(actions),
        'action': action.astype(np.float32),
        'reward': arrived.astype(np.float32),
        'is_first': place == 0,
        'is_last': place == len(arrived) - 1,
        'is_terminal': place == len(arrived) - 1,
        'discount': (place < len(arrived) - 1).astype(np.float32),
    }


def dreamer_v3(actions: np.ndarray) -> dict[str, np.ndarray]:
    """The same episode as Dreamer V3 writes it: the action is the one chosen at the frame."""
    found = dreamer_v2(actions)
    found['action'] = np.concatenate([actions, [0]]).astype(np.int32)
    found['stepid'] = np.zeros((len(actions) + 1, 20), np.uint8)
    return found


@pytest.mark.parametrize('write', [dreamer_v2, dreamer_v3])
def test_an_archive_of_either_convention_is_stored_by_arrival(source, tmp_path, write):
    for i in range(3):
        np.savez_compressed(source / f'ep{i}.npz', **write(draw_actions(T, i)))
    data = bring('npz', source, tmp_path / 'data', '--holdout', 'ep1')
    assert data.spec.actions.kind == 'discrete' and data.spec.actions.size == 3
    assert data.held_out == {1}
    for record in data.records():
        check_counter(record)
        np.testing.assert_array_equal(record.reward[1:], record.action[1:])
        assert record.complete and record.flags[-1] == LAST | TERMINAL
    expected = 'departure' if write is dreamer_v3 else 'arrival'
    assert data.provenance['alignment'] == expected


def test_the_convention_can_be_said(source, tmp_path):
    chosen = dreamer_v3(draw_actions(T))
    del chosen['stepid']
    np.savez(source / 'a.npz', **chosen)
    (record,) = bring('npz', source, tmp_path / 'data', '--alignment', 'departure').records()
    check_counter(record)


def test_numbers_as_actions_and_episodes_without_flags(source, tmp_path):
    found = dreamer_v2(draw_actions(T), one_hot=False)
    found['obs'] = found.pop('image').transpose(0, 3, 1, 2)  # channels first, as for PyTorch
    found = {key: found[key] for key in ('obs', 'action', 'reward', 'discount')}
    np.savez(source / 'a.npz', **found)
    data = bring('npz', source, tmp_path / 'data')
    (record,) = data.records()
    assert data.spec.actions.kind == 'continuous' and data.spec.obs_shape == (32, 48, 3)
    check_counter(record, 0, scale=2)
    assert record.complete and record.flags[-1] == LAST | TERMINAL


def test_a_chunk_with_several_episodes_is_cut(source, tmp_path):
    parts = [dreamer_v3(draw_actions(n, n)) for n in (T, T + 3)]
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    first = {key: x[: T + 10] for key, x in whole.items()}
    rest = {key: x[T + 10 :] for key, x in whole.items()}
    np.savez(source / '0-a-b-1.npz', **first)
    np.savez(source / '1-b-0-1.npz', **rest)
    records = list(bring('npz', source, tmp_path / 'data').records())
    assert [len(record) for record in records] == [T, 10, T + 3 - 10]
    assert [record.complete for record in records] == [True, False, True]
    for record in records:
        check_counter(record)


@pytest.mark.parametrize(
    'change, words',
    [
        ({'action': np.array([{}] * T)}, 'a.npz: action holds pickled objects, expected numbers'),
        ({'image': np.array([None] * T)}, 'a.npz: image holds pickled objects'),
        ({'action': np.zeros((T - 1, 3), np.float32)}, 'a.npz: action is [23, 3], expected 24'),
        ({'reward': np.zeros(T + 1, np.float32)}, 'a.npz: reward is [25], expected 24 steps'),
        (
            {'action': np.full((T, 2), 1.5, np.float32)},
            'a.npz: actions from 1.5 to 1.5, expected -1',
        ),
        ({'action': np.full((T, 2), np.nan, np.float32)}, 'a.npz: actions from nan'),
        ({'image': np.zeros((T, 8, 8, 3), np.complex64)}, 'a.npz: image: is complex64'),
        ({'reward': None}, 'a.npz: has no reward, only image'),
        ({'image': None}, '--key names the observation'),
    ],
)
def test_archives_that_are_wrong(source, refused, change, words):
    found = {k: x for k, x in (dreamer_v2(draw_actions(T)) | change).items() if x is not None}
    np.savez(source / 'a.npz', **found)
    assert words in refused('npz')


@pytest.mark.parametrize('data', [b'', b'PK\x03\x04', b'nothing', b'\x80\x04\x95'])
def test_files_that_are_no_archives(source, refused, data):
    (source / 'a.npz').write_bytes(data)
    assert 'a.npz: is no NumPy archive' in refused('npz')
    (source / 'a.npz').unlink()
    assert 'episodes: has no .npz file' in refused('npz')


def test_archives_that_differ(source, refused):
    found = dreamer_v2(draw_actions(T))
    np.savez(source / 'a.npz', **found)
    np.savez(source / 'b.npz', **found | {'image': found['image'][:, ::2]})
    assert 'a.npz has observations uint8[32, 48, 3], b.npz uint8[16, 48, 3]' in refused('npz')
    np.savez(source / 'b.npz', **found | {'action': found['action'][:, :2]})
    assert 'b.npz: action has 2 numbers, expected 3 as in a.npz' in refused('npz')
    assert '--size is for videos' in refused('npz', '--size', '8x8')


def test_an_archive_that_claims_more_than_memory(source, refused):
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {'descr': '|u1', 'fortran_order': False, 'shape': (1 << 20, 64, 64, 3)}
    )
    np.savez(source / 'a.npz', **dreamer_v2(draw_actions(T)))
    with zipfile.ZipFile(source / 'a.npz', 'a') as archive:
        archive.writestr('vector.npy', header.getvalue())
    assert 'a.npz: vector is uint8[1048576, 64, 64, 3], expected at most' in refused(
        'npz', '--key', 'vector'
    )


# Minari


def write_minari(path, episodes, space=None, observations=None, **more) -> None:
    """HDF5 in the layout of Minari 0.5: a group for each episode, one observation more than actions.

    observations: what to store in place of pictures, by the pictures.
    """
    import h5py

    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, 'w') as file:
        for i, actions in enumerate(episodes):
            group = file.create_group(f'episode_{i}')
            obs = counter(actions)
            found = {'observations': obs} if observations is None else observations(obs)
            for name, x in found.items():
                group.create_dataset(name, data=x)
            steps = len(actions)
            group['actions'] = actions
            group['rewards'] = actions.astype(float)
            group['terminations'] = np.arange(steps) == steps - 1
            group['truncations'] = np.zeros(steps, bool)
    space = {'type': 'Discrete', 'dtype': 'int64', 'start': 0, 'n': 3} if space is None else space
    metadata = {'dataset_id': 'counter/test-v0', 'action_space': json.dumps(space), **more}
    (path.parent / 'metadata.json').write_text(json.dumps(metadata))


h5py = pytest.mark.external('h5py', 'minari')


@h5py
def test_minari_actions_lead_to_the_next_observation(source, tmp_path):
    write_minari(source / 'data' / 'main_data.hdf5', [draw_actions(T + i, i) for i in range(12)])
    data = bring('minari', source, tmp_path / 'data', '--holdout', 'episode_11')
    records = list(data.records())
    assert [len(record) for record in records] == [T + i for i in range(12)]  # in natural order
    assert data.held_out == {11} and data.provenance['dataset_id'] == 'counter/test-v0'
    for record in records:
        check_counter(record)
        np.testing.assert_array_equal(record.reward[1:], record.action[1:])
        assert record.complete and record.flags[-1] == LAST | TERMINAL


@h5py
def test_minari_spaces(source, tmp_path):
    path = source / 'main_data.hdf5'
    box = {'type': 'Box', 'dtype': 'float32', 'shape': [1], 'low': [-2.0], 'high': [2.0]}
    write_minari(path, [draw_actions(T)[:, None].astype(np.float32)[:, 0]], box)
    data = bring('minari', source, tmp_path / 'box')
    assert data.spec.actions.kind == 'continuous'
    check_counter(next(data.records()), 0, scale=2)
    write_minari(path, [draw_actions(T)], {'type': 'Discrete', 'start': 0, 'n': 7})
    assert bring('minari', path, tmp_path / 'discrete').spec.actions.size == 7
    write_minari(path, [draw_actions(T)], {'type': 'MultiDiscrete', 'nvec': [3]})
    data = bring('minari', path, tmp_path / 'multi')
    assert data.spec.actions.parts[0].size == 3
    check_counter(next(data.records()), 0)


@h5py
def test_minari_pictures_in_jpeg_files(source, tmp_path):
    import h5py
    from PIL import Image

    def files(obs):
        found = np.empty(len(obs), object)
        for i, frame in enumerate(obs):
            out = io.BytesIO()
            Image.fromarray(frame).save(out, 'JPEG')
            found[i] = np.frombuffer(out.getvalue(), np.uint8)
        return {'observations': found}

    path = source / 'main_data.hdf5'
    space = {'type': 'Box', 'dtype': 'uint8', 'shape': [32, 48, 3]}
    write_minari(path, [], observation_space=json.dumps(space))
    actions = draw_actions(T)
    with h5py.File(path, 'w') as file:
        group = file.create_group('episode_0')
        data = files(counter(actions))['observations']
        group.create_dataset('observations', data=data, dtype=h5py.vlen_dtype(np.uint8))
        group['actions'], group['rewards'] = actions, actions.astype(float)
        group['terminations'] = group['truncations'] = np.zeros(T - 1, bool)
    (record,) = bring('minari', source, tmp_path / 'data').records()
    check_counter(record)
    assert not record.complete


@h5py
def test_minari_observations_of_several_parts_are_chosen_by_key(source, refused, tmp_path):
    path = source / 'main_data.hdf5'
    write_minari(
        path, [draw_actions(T)], observations=lambda obs: {
            'observations/camera/image': obs, 'observations/state': np.zeros((T, 2), np.float32)
        },
    )  # fmt: skip
    assert 'episode_0 observes camera, state, expected one; --key NAME chooses' in refused('minari')
    data = bring('minari', source, tmp_path / 'image', '--key', 'camera/image')
    check_counter(next(data.records()))
    data = bring('minari', source, tmp_path / 'state', '--key', 'state')
    assert data.spec.obs_shape == (2,) and data.schema.codec == ''


@h5py
def test_minari_files_that_are_wrong(source, refused):
    path = source / 'main_data.hdf5'
    assert 'episodes: has no HDF5 file' in refused('minari')
    path.write_bytes(b'nothing')
    assert 'main_data.hdf5: is no sound HDF5 file' in refused('minari')
    write_minari(path, [])
    assert 'main_data.hdf5: has no group episode_0' in refused('minari')
    write_minari(path, [np.full(T - 1, 1)], {'type': 'Discrete', 'n': 1})
    assert 'episode_0: actions from 1 to 1, expected 0 to 0' in refused('minari')
    write_minari(path, [draw_actions(T)], {'type': 'Tuple', 'subspaces': []})
    assert 'action space' in refused('minari')
    write_minari(
        path, [draw_actions(T)], observations=lambda obs: {'observations': obs[:-1]}
    )  # fmt: skip
    assert 'episode_0: actions is [23], expected 22 steps' in refused('minari')
    (source / 'metadata.json').write_text('{')
    assert 'metadata.json: is not JSON' in refused('minari')
