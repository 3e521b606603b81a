"""Import of Minecraft recordings with the quirks of their recorder."""

import json

import numpy as np
import pytest
from footage import LEVEL, bring, counter, draw_actions, encode_video, read_counter

from reverie.data.importers.vpt import BINS, PARTS, degrees_of, to_bin
from reverie.errors import UserError

T = 24
PLACE = {part.name: i for i, part in enumerate(PARTS)}


def row(tick: int, **more) -> dict:
    """A line of the recorder at which nothing is done."""
    mouse = {'x': 640.0, 'y': 360.0, 'dx': 0.0, 'dy': 0.0, 'dwheel': 0.0, 'buttons': []}
    mouse |= {'newButtons': []} | more.pop('mouse', {})
    keys = more.pop('keys', [])
    return {
        'mouse': mouse, 'keyboard': {'keys': keys, 'newKeys': [], 'chars': ''}, 'isGuiOpen': False,
        'hotbar': 0, 'tick': tick, 'yaw': 0.0, **more,
    }  # fmt: skip


@pytest.fixture
def record(tmp_path):
    """Import one recording, of a counter that jumps, and return its episodes."""

    def run(rows: list[dict], frames: np.ndarray | None = None, *options: object):
        folder = tmp_path / 'recordings'
        folder.mkdir()
        frames = counter(np.zeros(T - 1, int)) if frames is None else frames
        encode_video(folder / 'a.mp4', frames)
        (folder / 'a.jsonl').write_text(''.join(f'{json.dumps(x)}\n' for x in rows))
        return bring('vpt', folder, tmp_path / 'data', *options)

    return run


def test_line_n_leads_to_frame_n_plus_1(record):
    actions = draw_actions(T, high=2)
    keys = [['key.keyboard.space', 'key.keyboard.f3'] if a else [] for a in actions]
    rows = [row(n, keys=keys[n] if n < T - 1 else []) for n in range(T)]
    data = record(rows, counter(actions))
    (episode,) = data.records()
    np.testing.assert_array_equal(
        np.diff(read_counter(episode.obs)), episode.action[1:, PLACE['jump']]
    )
    assert len(episode) == T and data.task == 'minecraft'
    assert data.provenance['fps'] == pytest.approx(20)
    assert len(PARTS) == 25 and PARTS[-2].camera == 'x' and PARTS[-1].camera == 'y'
    others = [i for name, i in PLACE.items() if name not in ('jump', 'camera.x', 'camera.y')]
    assert not episode.action[1:, others].any()
    assert np.all(episode.action[1:, -2:] == BINS // 2)


@pytest.mark.parametrize('begins', [[0], []])
def test_attack_that_is_stuck_from_the_first_tick_counts_from_the_next_press(record, begins):
    rows = [row(n, mouse={'buttons': [0]}) for n in range(T)]
    rows[0]['mouse']['newButtons'] = begins
    rows[10]['mouse']['newButtons'] = [0]
    (episode,) = record(rows).records()
    expected = np.arange(T - 1) >= (10 if begins else 0)
    np.testing.assert_array_equal(episode.action[1:, PLACE['attack']], expected)


def test_the_scroll_wheel_is_a_key_of_the_hotbar(record):
    rows = [row(n, hotbar=4 if n < 8 else 6) for n in range(T)]
    (episode,) = record(rows).records()
    slots = episode.action[1:, [PLACE[f'hotbar.{i}'] for i in range(1, 10)]]
    assert slots.sum() == 1 and slots[8, 6] == 1


def test_mouse_movement_in_bins(record):
    moves = np.linspace(-100, 100, T)
    rows = [row(n, mouse={'dx': moves[n], 'dy': -moves[n]}) for n in range(T)]
    (episode,) = record(rows).records()
    x, y = episode.action[1:, PLACE['camera.x']], episode.action[1:, PLACE['camera.y']]
    np.testing.assert_array_equal(x, BINS - 1 - y)
    assert x[0] == 0 and x[-1] == BINS - 1 and np.all(np.diff(x) >= 0)


def test_bins_are_fine_around_zero():
    assert [to_bin(d * 2400 / 360) for d in (-180, -10, 0, 0.1, 10, 500)] == [0, 0, 5, 5, 10, 10]
    middles = [degrees_of(i) for i in range(BINS)]
    assert [to_bin(d * 2400 / 360) for d in middles] == list(range(BINS))
    np.testing.assert_allclose(middles, -np.array(middles[::-1]))
    assert middles[-1] == pytest.approx(10) and middles[6] == pytest.approx(11**0.2 - 1)


def test_a_cursor_is_drawn_where_a_window_is_open(record):
    rows = [row(n, isGuiOpen=n >= 12, mouse={'x': 480.0, 'y': 360.0}) for n in range(T)]
    frames = np.full((T, 360, 640, 3), 40 * LEVEL // 4, np.uint8)
    (episode,) = record(rows, frames).records()
    bright = (episode.obs.astype(int) > 120).any(-1)
    assert not bright[:12].any() and bright[12:].any((1, 2)).all()
    ys, xs = np.nonzero(bright[15])
    assert ys.min() >= 180 and ys.max() <= 190 and xs.min() >= 240 and xs.max() <= 246


def test_a_gap_in_the_ticks_begins_an_episode(record):
    actions = draw_actions(T, high=2)
    rows = [
        row(n if n < 10 else n + 50, keys=['key.keyboard.w'] * a) for n, a in enumerate(actions)
    ]
    episodes = list(record(rows, counter(actions)).records())
    assert [len(episode) for episode in episodes] == [10, T - 10]
    for episode in episodes:
        np.testing.assert_array_equal(
            np.diff(read_counter(episode.obs)), episode.action[1:, PLACE['forward']]
        )
        assert not episode.complete


def test_recordings_that_are_wrong(record, tmp_path):
    with pytest.raises(UserError, match=r'a\.jsonl: has 10 lines, expected 24 or 23'):
        record([row(n) for n in range(10)])
    path = tmp_path / 'recordings'
    for text in ('{', '[]', '{"mouse": {}}', json.dumps(row(0) | {'tick': 'one'})):
        (path / 'a.jsonl').write_text(f'{text}\n' * T)
        with pytest.raises(UserError, match=r'a\.jsonl: line 1: expected JSON with mouse'):
            bring('vpt', path, tmp_path / 'data')
    (path / 'a.jsonl').unlink()
    with pytest.raises(UserError, match=r'recordings: has no \.jsonl beside its videos'):
        bring('vpt', path, tmp_path / 'data')
