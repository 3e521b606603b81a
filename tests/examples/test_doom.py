"""Doom's demos: lumps, tics, choices and their alignment, without any package of a distribution."""

import io
import json
import pathlib
import struct
import sys

import numpy as np
import pytest

from reverie.errors import UserError

# Scripts find one another in their own folder.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'examples' / 'doom'))
import fetch
import measure
import mirror
import render

HEADER = bytes([109, 3, 2, 5, 0, 0, 0, 0, 0, 1, 0, 0, 0])  # E2M5, one player
NAMES = [part['name'] for part in render.COMPONENTS]


def wad(lumps, kind=b'IWAD'):
    """Bytes of a WAD with these (name, content)."""
    body, entries = b'', b''
    for name, content in lumps:
        entries += struct.pack('<ii8s', 12 + len(body), len(content), name.encode())
        body += content
    return kind + struct.pack('<ii', len(lumps), 12 + len(body)) + body + entries


def demo(*tics, header=HEADER, tail=b'\x80'):
    """Bytes of a demo with these tics (forward, side, turn, buttons)."""
    return header + b''.join(struct.pack('<bbbB', *tic) for tic in tics) + tail


def chosen(row):
    """Names of the choices in one row."""
    return [part['choices'][index] for part, index in zip(render.COMPONENTS, row, strict=True)]


def test_lumps_are_read_by_name_and_place():
    data = wad([('DEMO1', b'abc'), ('E1M1', b''), ('EIGHTCHR', b'de')])
    assert render.lumps(data) == [('DEMO1', b'abc'), ('E1M1', b''), ('EIGHTCHR', b'de')]


@pytest.mark.parametrize(
    ('data', 'said'),
    [
        (b'PNG', 'expected a WAD'),
        (wad([('A', b'x')])[:-1], 'directory of 1 lumps is cut off'),
        (b'IWAD' + struct.pack('<ii', -1, 12), 'directory of -1 lumps is cut off'),
        (b'IWAD' + struct.pack('<iiii8s', 1, 12, 12, 99, b'A'), "lump b'A.*' is cut off"),
    ],
)
def test_a_broken_wad_is_refused_in_one_line(data, said):
    with pytest.raises(UserError, match=said):
        render.lumps(data)


def test_tics_are_signed_but_for_the_buttons():
    tics = [(50, -40, -3, 129), (-50, 0, 127, 0)]
    np.testing.assert_array_equal(render.parse(demo(*tics)), tics)


def test_tics_end_at_the_mark_whatever_follows_and_not_at_a_turn_of_that_value():
    tics = [(1, 2, -128, 0x80)]
    np.testing.assert_array_equal(render.parse(demo(*tics, tail=b'\x80rest')), tics)


@pytest.mark.parametrize(
    ('data', 'said'),
    [
        (b'', 'got nothing'),
        (demo(header=b'\x6e' + HEADER[1:]), 'version 109, got 6e'),
        (demo(header=HEADER[:-1] + b'\x01'), 'one of 2'),
        (demo((1, 0, 0, 0), tail=b''), 'no end mark'),
    ],
)
def test_a_demo_that_is_not_of_one_player_in_doom_1_9_is_refused(data, said):
    with pytest.raises(UserError, match=said):
        render.parse(data)


def test_maps_are_named_as_their_game_does_and_unusable_demos_are_said(tmp_path, capsys):
    play = demo((25, 0, 0, 0))
    (tmp_path / 'one.wad').write_bytes(wad([('E1M1', b''), ('DEMO1', play), ('DEMO2', b'x')]))
    (tmp_path / 'two.wad').write_bytes(wad([('MAP01', b''), ('DEMO3', play), ('DEMOX', play)]))
    (one,), (two,) = render.demos(tmp_path / 'one.wad'), render.demos(tmp_path / 'two.wad')
    assert (one.map, one.lump, two.map, two.lump) == ('E2M5', 'DEMO1', 'MAP05', 'DEMO3')
    assert capsys.readouterr().out.startswith('one.wad DEMO2 is left out: expected a demo')


def test_the_demo_file_for_the_engine_is_the_lump_up_to_where_the_play_ends(tmp_path):
    moves, still = [(25, -3, -100, 1)] * 3, [(0, 0, 0, 2)] * 100
    path = tmp_path / 'a.wad'
    path.write_bytes(wad([('DEMO1', demo(*moves, *still))]))
    (found,) = render.demos(path)
    assert found.lmp() == demo(*moves, *still[:17])  # half a second of 35 tics


def test_the_still_tail_is_cut_half_a_second_after_the_last_movement():
    tics = np.zeros((200, 4), np.int32)
    tics[50, 2] = -1
    tics[150, 3] = 1  # a button after death
    assert len(render.trimmed(tics)) == 51 + 17
    assert len(render.trimmed(tics[:55])) == 55 and len(render.trimmed(tics[:50])) == 0


@pytest.mark.parametrize(
    ('turns', 'choice'),
    [
        ((0, 0), 'none'), ((1, -1), 'none'), ((1, 0), 'slight left'), ((2, 1), 'slight left'),
        ((2, 2), 'left'), ((5, 4), 'left'), ((5, 5), 'hard left'), ((127, 127), 'hard left'),
        ((0, -1), 'slight right'), ((-3, 0), 'slight right'), ((-4, 0), 'right'),
        ((-9, 0), 'right'), ((-10, 0), 'hard right'), ((-128, -128), 'hard right'),
    ],
)  # fmt: skip
def test_turns_are_classes_of_the_sum_over_the_pair_and_positive_is_left(turns, choice):
    (row,) = render.merged(np.array([(0, 0, turn, 0) for turn in turns], np.int32))
    assert chosen(row) == ['none', 'none', choice, 'none']


def test_movement_is_the_sign_of_the_sum_and_fire_in_either_tic_is_fire():
    tics = [
        (50, -24, 0, 1),
        (-25, 24, 0, 2),
        (0, 40, 0, 2),
        (-50, -24, 0, 4),
        (0, -1, 0, 0),
        (0, 0, 0, 3),
    ]
    rows = render.merged(np.array([*tics, (99, 99, 99, 1)], np.int32))  # an odd last tic
    assert [chosen(row) for row in rows] == [
        ['forward', 'none', 'none', 'fire'],
        ['back', 'right', 'none', 'none'],
        ['none', 'left', 'none', 'fire'],
    ]


def test_a_row_is_chosen_on_the_frame_before_the_one_it_leads_to():
    """Tics 2n and 2n + 1 end with frame n, the engine's frame 2n + 1."""
    tics = np.zeros((9, 4), np.int32)
    tics[4] = 25, 0, 20, 1
    rows = render.sidecar(tics)
    assert rows.shape == (4, 4)
    assert [n for n, row in enumerate(rows) if tuple(row) != render.REST] == [1]
    assert chosen(rows[1]) == ['forward', 'none', 'hard left', 'fire']
    assert tuple(rows[-1]) == render.REST


def test_the_declaration_is_json_whose_rest_and_keys_are_choices():
    declared = json.loads(json.dumps(render.COMPONENTS))
    assert NAMES == ['move', 'strafe', 'turn', 'fire']
    assert chosen(render.REST) == [part['rest'] for part in declared]
    assert all(set(part['keys']) <= set(part['choices']) for part in declared)
    keys = [key for part in declared for held in part['keys'].values() for key in held]
    assert len(keys) == len(set(keys))
    assert [part.get('camera') for part in declared] == [None, None, 'x', None]


@pytest.mark.external('av', 'video')
def test_every_second_frame_is_kept_at_a_constant_rate_and_the_black_one_is_not(tmp_path):
    import av
    import encode

    levels = np.array([0, 40, 60, 80, 100, 120, 140], np.uint8)
    pictures = np.broadcast_to(levels[:, None, None, None], (7, 240, 320, 3)).copy()
    pictures[:, :, :160] = 200 - levels[:, None, None, None]  # left half
    stream = io.BytesIO(pictures.tobytes() + b'cut off')
    assert encode.encode(stream, 320, 240, tmp_path / 'a.mp4') == 7
    with av.open(str(tmp_path / 'a.mp4')) as container:
        video = container.streams.video[0]
        assert video.average_rate == encode.RATE and (video.width, video.height) == (160, 120)
        decoded = list(container.decode(video))
    assert [frame.time for frame in decoded] == pytest.approx([0, 2 / 35, 4 / 35])
    for frame, level in zip(decoded, (40, 80, 120), strict=True):
        image = frame.to_ndarray(format='rgb24').astype(int)
        assert (
            abs(image[:, 84:] - level).max() <= 3 and abs(image[:, :76] - (200 - level)).max() <= 3
        )


def test_apt_adds_the_libraries_that_its_plan_installs():
    plan = 'NOTE: nothing\nInst libdumb1 (1:0.9.3 Debian:12 [amd64])\nInst freedoom (0.12 x)\n'
    plan += 'Inst libsdl2-2.0-0 [2.0] (2.26 x [amd64])\nConf libdumb1 (1:0.9.3 x)\n'
    assert fetch.needed(plan) == ['dsda-doom', 'freedoom', 'libdumb1', 'libsdl2-2.0-0']


def test_without_apt_one_line_says_so_and_the_exit_code_is_two(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert fetch.main(['--into', str(tmp_path / 'doom')]) == 2
    said = capsys.readouterr().err
    assert said == 'fetch.py: no apt-get here; expected Debian or a system made from it\n'
    assert not (tmp_path / 'doom').exists()


def test_a_package_that_apt_lacks_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / 'dpkg').write_text('')
    (tmp_path / 'apt-get').write_text(
        '#!/bin/sh\ncase "$*" in *update*) echo "W: Failed to fetch lists" >&2; exit 0;; esac\n'
        'echo "W: something" >&2; echo "E: Unable to locate package freedoom" >&2; exit 100\n'
    )
    for name in ('dpkg', 'apt-get'):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
    assert fetch.main(['--into', str(tmp_path / 'doom')]) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        'failed (exit 100): E: Unable to locate package freedoom; Failed to fetch lists\n'
    )
    assert said.count('\n') == 1


def test_without_packages_one_line_says_what_fills_the_folder(tmp_path, capsys):
    where = ['--packages', str(tmp_path / 'none'), '--out', str(tmp_path / 'clips')]
    assert render.main(where) == 2
    assert 'expected a folder that fetch.py has filled' in capsys.readouterr().err
    assert not (tmp_path / 'clips').exists()


def test_a_mirrored_clip_has_left_and_right_exchanged_and_the_bar_as_it_was():
    frames = np.random.default_rng(0).integers(0, 256, (3, 100, 20, 3), np.uint8)
    found = mirror.mirrored(frames)
    np.testing.assert_array_equal(found[:, :84], frames[:, :84, ::-1])
    np.testing.assert_array_equal(found[:, 84:], frames[:, 84:])
    actions = np.array([[0, 0, 0, 1], [2, 2, 6, 0], list(render.REST), [1, 1, 4, 1]], np.int32)
    swapped = mirror.swapped(actions)
    assert swapped.tolist() == [[0, 2, 6, 1], [2, 0, 0, 0], list(render.REST), [1, 1, 2, 1]]
    np.testing.assert_array_equal(mirror.swapped(swapped), actions)


def test_a_flash_is_orange_at_the_muzzle_in_any_dreamed_frame():
    dark = np.full((2, 4, 64, 64, 3), 0.2, np.float32)
    fired = dark.copy()
    fired[0, 2, 40:48, 28:36] = (1.0, 0.6, 0.1)
    assert measure.flashes(fired, dark).tolist() == [True, False]
    elsewhere = dark.copy()
    elsewhere[0, 2, 5:13, 28:36] = (1.0, 0.6, 0.1)
    assert not measure.flashes(elsewhere, dark).any()
