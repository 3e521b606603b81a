"""Bad recordings: one line that names the file, exit code 2, and nothing written."""

import fractions
import json
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from footage import (
    COUNT,
    bring,
    counter,
    declare,
    draw_actions,
    encode_video,
    write_frames,
    write_lines,
)

from reverie import cli
from reverie.data.importers import decoding

T = 12


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / 'clips'
    folder.mkdir()
    return folder


@pytest.fixture
def refused(source, tmp_path, capsys, monkeypatch):
    """Import, expect to fail, and return the one line."""

    def run(*options: object, kind: str = 'video') -> str:
        words = ['reverie', 'data', 'import', kind, source, '--out', tmp_path / 'data', *options]
        monkeypatch.setattr(sys, 'argv', list(map(str, words)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith('error: ') and error.count('\n') == 1
        assert os.listdir(tmp_path) == ['clips']  # nothing half written
        return error

    return run


def labelled(source, rows=None) -> None:
    actions = draw_actions(T)
    write_frames(source / 'a', counter(actions))
    declare(source)
    np.save(source / 'a.actions.npy', actions if rows is None else rows)


def png_header(height: int, width: int) -> bytes:
    """A PNG file that claims a size, with one byte of picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', b'x') + chunk(b'IEND', b'')


def test_a_folder_without_a_video(source, refused):
    (source / 'notes.txt').write_text('nothing')
    assert 'clips: has no video, expected' in refused()


@pytest.mark.parametrize('keep', [0.0, 0.5, 0.9])
@pytest.mark.parametrize('faststart', [False, True])
def test_a_truncated_video(source, refused, keep, faststart):
    path = encode_video(source / 'a.mp4', counter(draw_actions(T)))
    if faststart:  # the header comes first, so it can be opened
        _head_first(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert 'a.mp4: ' in refused()


def _head_first(path) -> None:
    import av

    moved = path.with_suffix('.moved.mp4')
    with (
        av.open(str(path)) as old,
        av.open(str(moved), 'w', options={'movflags': 'faststart'}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    moved.rename(path)


def test_a_video_of_no_frames(source, refused):
    import av

    with av.open(str(source / 'a.mp4'), 'w') as container:
        stream = container.add_stream('libx264', fractions.Fraction(20))
        stream.height, stream.width = 32, 48
        container.start_encoding()
    assert 'a.mp4: ' in refused()


def test_a_video_that_is_text(source, refused):
    (source / 'a.mp4').write_text('#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/a.ts\n')
    assert 'a.mp4: cannot be decoded' in refused()


def test_a_picture_with_a_gigantic_header(source, refused):
    folder = write_frames(source / 'a', counter(draw_actions(T)))
    (folder / 'frame5.png').write_bytes(png_header(60_000, 60_000))
    error = refused()
    assert 'a: frame5.png: pictures of 60000x60000, expected at most' in error


def test_a_picture_that_is_cut(source, refused):
    folder = write_frames(source / 'a', counter(draw_actions(T)))
    path = folder / 'frame5.png'
    path.write_bytes(path.read_bytes()[:60])
    assert 'a: frame5.png: is not a' in refused()


def test_a_video_larger_than_allowed(source, refused):
    encode_video(source / 'a.mp4', counter(draw_actions(T)))
    assert 'a.mp4: pictures of 32x48, expected at most 1,000 pixels' in refused(
        '--max-pixels', '1000'
    )


def test_a_video_that_takes_too_much_memory(source, refused):
    encode_video(source / 'a.mp4', counter(draw_actions(T)))
    assert 'a.mp4: ' in refused('--max-gigabytes', '0.01')


@pytest.mark.parametrize(
    'program, words',
    [('import time; time.sleep(60)', 'nothing was decoded'), ('import os; os.abort()', 'died')],
)
def test_a_decoder_that_hangs_or_dies(
    source, refused, monkeypatch, tmp_path_factory, program, words
):
    child = tmp_path_factory.mktemp('child') / 'child.py'
    child.write_text(f'import sys; sys.stdin.read(); {program}')
    monkeypatch.setattr(decoding, 'CHILD', child)
    encode_video(source / 'a.mp4', counter(draw_actions(T)))
    error = refused('--max-seconds', '0.5')
    assert 'a.mp4: ' in error and words in error


def test_a_sidecar_of_another_length(source, refused):
    labelled(source, draw_actions(T)[:-1])
    assert 'a.actions.npy: has 10 rows, expected 12 or 11' in refused()


def test_actions_outside_their_range(source, refused):
    rows = draw_actions(T)
    rows[7] = 3
    labelled(source, rows)
    assert 'a.actions.npy: row 7: count is 3, expected 0 to 2 or one of none, one, two' in refused()


@pytest.mark.parametrize(
    'line, words',
    [
        ({'count': 3}, 'line 3: count is 3, expected 0 to 2'),
        ({'count': 'three'}, "line 3: count is 'three', expected"),
        ({'count': 1.5}, 'line 3: count is 1.5, expected'),
        ({'count': True}, 'line 3: count is True, expected'),
        ({'count': [1]}, 'line 3: count is [1], expected'),
        ({'count': None}, 'line 3: count is None, expected'),
        ({'speed': 3}, 'line 3: has no count'),
        ({'count': 1, 'speed': 3}, "line 3: 'speed' is none of"),
        ({'count': 1, 'reward': 'much'}, "line 3: reward is 'much'"),
        ({'count': 1, 'done': 1}, 'line 3: done is 1'),
        ([1], 'line 3: is [1], expected {component: value}'),
    ],
)
def test_lines_that_are_wrong(source, refused, line, words):
    labelled(source)
    (source / 'a.actions.npy').unlink()
    lines = [{'count': 0}] * T
    lines[2] = line
    write_lines(source / 'a.actions.jsonl', lines)
    assert words in refused()


@pytest.mark.parametrize('text', ['{', '', '[1]', '{"count": NaN}', '{"count": 1e999}'])
def test_lines_that_are_not_json(source, refused, text):
    labelled(source)
    (source / 'a.actions.npy').unlink()
    (source / 'a.actions.jsonl').write_text('{"count": 0}\n' * 4 + text + '\n{"count": 0}' * 7)
    assert 'a.actions.jsonl: line 5' in refused()


def test_numbers_outside_their_range(source, refused):
    labelled(source, np.linspace(-1, 1.5, T))
    declare(source, {'name': 'turn', 'kind': 'continuous', 'low': -1, 'high': 1})
    assert 'a.actions.npy: row 9: turn is 1.04' in refused()
    np.save(source / 'a.actions.npy', np.full(T, np.nan))
    assert 'a.actions.npy: row 0: turn is nan' in refused()


def test_pickled_actions(source, refused):
    labelled(source)
    np.save(source / 'a.actions.npy', np.array([{}] * T, object), allow_pickle=True)
    assert 'a.actions.npy: cannot be read' in refused()


@pytest.mark.parametrize(
    'change, words',
    [
        ({'kind': 'binary'}, "'count' is of kind 'binary', expected discrete or continuous"),
        ({'choices': []}, "'count' has choices []"),
        ({'choices': ['a', 'a']}, "'count' has choices ['a', 'a']"),
        ({'choices': None, 'n': 10**9}, "'count' has choices None and n 1000000000"),
        ({'rest': 'four'}, "'count' rests at 'four', expected a choice"),
        ({'keys': {'three': ['a']}}, "'count' has keys"),
        ({'keys': ['a']}, "'count' has keys"),
        ({'camera': 'z'}, "'count' has camera 'z', expected 'x' or 'y'"),
        ({'colour': 'z'}, "'count' has the field 'colour'"),
        ({'name': 'reward'}, "component name 'reward' is taken"),
        ({'name': ''}, 'has no name'),
        ({'kind': 'continuous', 'low': 2, 'high': 1}, "'count' goes from 2 to 1, expected low <"),
        ({'kind': 'continuous', 'low': 0}, "'count' has high None, expected a number"),
        ({'kind': 'continuous', 'low': 0, 'high': 1, 'rest': 2}, "'count' rests at 2, expected a"),
    ],
)
def test_components_that_are_wrong(source, refused, change, words):
    labelled(source)
    declare(source, COUNT | change)
    error = refused()
    assert 'actions.json: ' in error and words in error


@pytest.mark.parametrize('text', ['', '[]', '{"components": 3}', '{"components": []}', '[' * 10**5])
def test_a_declaration_that_is_wrong(source, refused, text):
    labelled(source)
    (source / 'actions.json').write_text(text)
    assert 'actions.json: ' in refused()


def test_actions_without_a_declaration_or_video(source, refused):
    labelled(source)
    (source / 'actions.json').unlink()
    assert 'actions.json: is missing, expected the components of a.actions.npy' in refused()
    declare(source)
    np.save(source / 'b.actions.npy', draw_actions(T))
    assert 'b.actions.npy: has no video' in refused()


def test_a_variable_rate_with_actions(source, refused):
    times = np.cumsum([0] + [0.05] * 5 + [0.5] + [0.05] * (T - 7))
    actions = draw_actions(T)
    encode_video(source / 'a.mkv', counter(actions), times=times)
    declare(source)
    np.save(source / 'a.actions.npy', actions)
    assert 'a.mkv: has a variable rate (median 20 fps) and actions' in refused()


def test_another_rate_with_actions(source, refused):
    actions = draw_actions(T)
    encode_video(source / 'a.mp4', counter(actions))
    declare(source)
    np.save(source / 'a.actions.npy', actions)
    assert 'a.mp4: has 20 fps and actions, --fps 10 would mix them' in refused('--fps', 10)


def test_different_rates_and_sizes(source, refused):
    encode_video(source / 'a.mp4', counter(draw_actions(T)), fps=20)
    b = encode_video(source / 'b.mp4', counter(draw_actions(T)), fps=30)
    assert 'videos of 20, 30 fps, expected one rate; --fps' in refused()
    encode_video(b, counter(draw_actions(T), (16, 16)), fps=20)
    assert 'a.mp4 is 32x48, b.mp4 is 16x16; expected one size, --size HxW' in refused()


@pytest.mark.parametrize(
    'options, words',
    [
        (('--size', '64'), '--size 64: expected HEIGHTxWIDTH'),
        (('--size', '0x64'), '--size 0x64: expected HEIGHTxWIDTH'),
        (('--fps', '0'), '--fps 0: expected a rate'),
        (('--holdout', '1.5'), '--holdout 1.5: expected a share'),
        (('--holdout', 'b'), '--holdout b: no such file, expected a share or some of a'),
        (('--holdout', 'a'), '--holdout a: holds out 1 of 1 files'),
        (('--fit', 'squeeze'), 'squeeze'),
        (('--seed', '-1'), '--seed -1'),
    ],
)
def test_options_that_are_wrong(source, refused, options, words):
    write_frames(source / 'a', counter(draw_actions(T)))
    assert words in refused(*options)


def test_short_videos_are_left_out_by_name(source, refused, capsys, tmp_path):
    write_frames(source / 'a', counter(draw_actions(3)))
    assert 'clips: no video has 4 frames' in refused()
    write_frames(source / 'b', counter(draw_actions(T)))
    data = bring('video', source, tmp_path / 'data')
    assert len(data) == 1 and 'a: left out, 3 frames' in capsys.readouterr().out


def test_a_dataset_that_is_there_stays(source, tmp_path, capsys, monkeypatch):
    write_frames(source / 'a', counter(draw_actions(T)))
    bring('video', source, tmp_path / 'data')
    before = (tmp_path / 'data' / 'manifest.json').read_bytes()
    with pytest.raises(ValueError, match='data exists already, expected a new path'):
        bring('video', source, tmp_path / 'data')
    assert (tmp_path / 'data' / 'manifest.json').read_bytes() == before
    bring('video', source, tmp_path / 'data', '--overwrite', '--name', 'other')
    assert json.loads((tmp_path / 'data' / 'manifest.json').read_text())['env'] == 'other'
