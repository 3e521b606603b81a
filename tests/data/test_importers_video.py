"""Import of videos and of folders of frames, with and without actions beside them."""

import json

import numpy as np
import pytest
from footage import (
    COUNT,
    bring,
    check_counter,
    counter,
    declare,
    draw_actions,
    encode_video,
    read_counter,
    walk_about,
    write_frames,
    write_lines,
)
from PIL import Image

from reverie.data import verify
from reverie.data.records import LAST, TERMINAL

T = 24
TURN = {'name': 'turn', 'kind': 'continuous', 'low': -4, 'high': 4, 'camera': 'x'}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / 'clips'
    folder.mkdir()
    return folder


def test_a_video_without_actions_has_none(source, tmp_path):
    frames = counter(draw_actions(T))
    encode_video(source / 'one.mp4', frames)
    data = bring('video', source, tmp_path / 'data')
    (record,) = data.records()
    assert not record.has_action and not record.has_reward and not record.complete
    assert data.spec.actions.parts == () and data.schema.codec == 'webp'
    assert np.abs(record.obs.astype(int) - frames).max() <= 2
    assert data.provenance['fps'] == pytest.approx(20) and data.provenance['files'] == ['one.mp4']
    assert data.spec.name == 'clips'
    assert verify(tmp_path / 'data')['frames'] == T


@pytest.mark.parametrize('ending', ['.mp4', '.mkv', '.webm', '.avi', '.gif', ''])
@pytest.mark.parametrize('rows', [T, T - 1])
def test_row_n_of_a_sidecar_leads_to_frame_n_plus_1(source, tmp_path, ending, rows):
    actions = draw_actions(T)
    frames = counter(actions)
    if ending == '.gif':
        frames[::2, 0, 0] = 255  # Pillow writes equal pictures once, and shows it longer
        pictures = [Image.fromarray(frame) for frame in frames]
        pictures[0].save(source / 'a.gif', save_all=True, append_images=pictures[1:], duration=50)
    elif ending:
        codec = {'.webm': 'libvpx', '.avi': 'mpeg4'}.get(ending, 'libx264')
        encode_video(source / f'a{ending}', frames, codec=codec)
    else:
        write_frames(source / 'a', frames)
    declare(source)
    written = np.concatenate([actions, [2]])[:rows]
    if rows == T:
        np.save(source / 'a.actions.npy', written[:, None])
    else:
        write_lines(source / 'a.actions.jsonl', [{'count': int(a)} for a in written])
    data = bring('video', source, tmp_path / 'data')
    (record,) = data.records()
    assert len(record) == T and data.spec.actions.kind == 'discrete'
    assert data.spec.actions.meanings == ('none', 'one', 'two')
    check_counter(record)


def test_components_keep_keys_camera_and_scale(source, tmp_path):
    actions = draw_actions(T)
    encode_video(source / 'a.mp4', counter(actions))
    jump = {
        'name': 'jump', 'kind': 'discrete', 'n': 2, 'keys': {'1': [' ']}, 'rest': 0,
    }  # fmt: skip
    declare(source, TURN | {'keys': {'low': ['a'], 'high': ['d']}}, jump, task='walk')
    write_lines(
        source / 'a.actions.jsonl', [{'turn': int(a), 'jump': str(int(a) % 2)} for a in actions]
    )
    data = bring('video', source, tmp_path / 'data')
    turn, jump = data.spec.actions.parts
    assert (turn.camera, turn.low, turn.high, turn.keys) == ('x', -4, 4, (('a',), ('d',)))
    assert jump.choices == ('0', '1') and jump.keys == ((), (' ',)) and data.task == 'walk'
    (record,) = data.records()
    check_counter(record, 0, scale=4)
    np.testing.assert_array_equal(record.action[1:, 1], actions % 2)


def test_steps_without_a_label_rewards_and_ends_arrive_one_frame_later(source, tmp_path):
    actions = draw_actions(T)
    write_frames(source / 'a', counter(actions))
    declare(source)
    lines = [{'count': COUNT['choices'][a], 'reward': float(n)} for n, a in enumerate(actions)]
    lines[4] = {'label': False, 'reward': 4}
    lines[9]['done'] = True
    write_lines(source / 'a.actions.jsonl', lines)
    first, second = bring('video', source, tmp_path / 'data').records()
    assert len(first) == 11 and len(second) == T - 11
    assert first.complete and first.flags[-1] == LAST | TERMINAL and not second.complete
    np.testing.assert_array_equal(first.reward, [0, *range(10)])
    np.testing.assert_array_equal(second.reward, [0, *range(11, T - 1)])
    assert first.action[5, 0] == -1 and np.all(first.action[1:5] >= 0)
    check_counter(second, 0)


def test_files_without_a_sidecar_are_unlabelled_among_others(source, tmp_path, capsys):
    for name in 'abc':
        write_frames(source / name, counter(draw_actions(T, ord(name))))
    declare(source)
    np.save(source / 'b.actions.npy', draw_actions(T, ord('b')))
    records = list(bring('video', source, tmp_path / 'data').records())
    assert [record.has_action for record in records] == [False, True, False]
    assert '2 of 3 videos have no actions' in capsys.readouterr().out


def test_fps_shows_the_nearest_frame_at_each_tick(source, tmp_path):
    encode_video(source / 'a.mp4', counter(np.ones(T - 1, int)), fps=20)
    data = bring('video', source, tmp_path / 'data', '--fps', 5)
    (record,) = data.records()
    np.testing.assert_array_equal(read_counter(record.obs), np.arange(0, T, 4))
    assert data.provenance['fps'] == 5


def test_a_variable_rate_is_brought_to_its_median_and_said(source, tmp_path, capsys):
    times = np.cumsum([0] + [0.05] * 15 + [0.5] + [0.05] * (T - 17))
    encode_video(source / 'a.mkv', counter(np.ones(T - 1, int)), times=times)
    (record,) = bring('video', source, tmp_path / 'data').records()
    assert 'median 20 fps' in capsys.readouterr().out
    shown = read_counter(record.obs)
    assert len(record) == T + 9 and np.all(np.bincount(shown)[:14] == 1)
    assert np.bincount(shown)[14:18].sum() == 13  # half a second of the two frames around the gap


def test_size_and_fit(source, tmp_path):
    frames = np.zeros((T, 40, 80, 3), np.uint8)
    frames[:, :, :40, 0], frames[:, :, 40:, 1] = 200, 100
    write_frames(source / 'a', frames)
    write_frames(source / 'b', frames[:, ::2])
    shown = {}
    for fit in ('crop', 'pad', 'stretch'):
        data = bring('video', source, tmp_path / fit, '--size', '16x16', '--fit', fit)
        shown[fit] = next(data.records()).obs[0]
    assert all(x.shape == (16, 16, 3) for x in shown.values())
    np.testing.assert_array_equal(shown['stretch'][8, [0, 7, 8, 15], 0], [200, 200, 0, 0])
    np.testing.assert_array_equal(shown['stretch'], shown['crop'])  # both halves are of one colour
    np.testing.assert_array_equal(shown['pad'][:, 0, 0] > 0, (np.arange(16) // 4 % 3) > 0)


def test_holdout_takes_whole_files(source, tmp_path, monkeypatch):
    monkeypatch.setattr('reverie.data.importers.common.LONGEST', 10)
    for name in ('ep1', 'ep2', 'ep10'):
        write_frames(source / name, counter(draw_actions(T)))
    one = bring('video', source, tmp_path / 'one', '--holdout', '0.1')
    assert len(one) == 9 and len(one.held_out) == 3
    assert one.provenance['files'] == ['ep1'] * 3 + ['ep2'] * 3 + ['ep10'] * 3
    assert len({one.provenance['files'][i] for i in one.held_out}) == 1
    again = bring('video', source, tmp_path / 'again', '--holdout', '0.1')
    assert again.held_out == one.held_out
    named = bring('video', source, tmp_path / 'named', '--holdout', 'ep1', 'ep10')
    assert named.held_out == {0, 1, 2, 6, 7, 8}
    assert [len(record) for record in named.only('train').records()] == [8, 8, 8]


def test_a_size_that_changes_begins_an_episode(source, tmp_path):
    frames = counter(draw_actions(T))
    folder = write_frames(source / 'a', frames)
    for i in range(10, T):
        Image.fromarray(frames[i]).resize((20, 20)).save(folder / f'frame{i}.png')
    data = bring('video', source, tmp_path / 'data', '--size', '16x16')
    assert [len(record) for record in data.records()] == [10, 14]
    assert json.loads((tmp_path / 'data' / 'manifest.json').read_text())['obs']['shape'][0] == 16


@pytest.mark.parametrize(
    'moved, words',
    [
        (0, 'actions move the picture: they fit best where they are (turn'),
        (1, 'actions look shifted by one: they fit best one frame earlier (turn'),
        (-1, 'actions look shifted by one: they fit best one frame later (turn'),
    ],
)
def test_inspect_says_whether_the_sidecar_is_shifted(source, tmp_path, capsys, moved, words):
    obs, action = walk_about(300, 0)
    write_frames(source / 'a', obs.repeat(3, -1))
    declare(source, {'name': 'turn', 'kind': 'discrete', 'n': 5, 'rest': 2, 'camera': 'x'})
    np.save(source / 'a.actions.npy', np.roll(action[1:, 0], moved))
    bring('video', source, tmp_path / 'data', '--fps', '12.5')
    said = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
    assert words in said and '12.5 fps, 0 cuts' in said


@pytest.mark.external('imageio_ffmpeg', 'video')
def test_a_video_of_another_encoder(source, tmp_path):
    import imageio_ffmpeg as ffmpeg

    actions = draw_actions(T)
    frames = counter(actions)
    out = ffmpeg.write_frames(str(source / 'a.mp4'), (48, 32), fps=30, macro_block_size=1)
    out.send(None)
    for frame in frames:
        out.send(np.ascontiguousarray(frame))
    out.close()
    declare(source)
    np.save(source / 'a.actions.npy', actions)
    (record,) = bring('video', source, tmp_path / 'data').records()
    check_counter(record)
