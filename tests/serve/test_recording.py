"""Recordings that pages ask for: whole or absent, and never more bytes than are allowed."""

import json
import logging
import os

import pytest

from reverie.serve import recording
from tests.serve.fake import FakeSession, Running, wait


def saved(page, what='gif'):
    """Ask for a recording; return the notice of it, or of why there is none."""
    page.send(type=what)
    while True:
        message = page.socket.recv(timeout=30)
        notice = json.loads(message) if isinstance(message, str) else {'type': 'frame'}
        if notice['type'] in ('saved', 'notice') and 'another recording' not in notice['text']:
            return notice
        if notice['type'] == 'notice':  # the last one was told of before it was put away
            page.send(type=what)


@pytest.mark.parametrize('what', ['gif', 'episode'])
def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(tmp_path, caplog, what):
    folder = tmp_path / 'plays'
    folder.mkdir()
    (folder / 'before').write_bytes(bytes(900))
    with Running(FakeSession(1), folder, most_bytes=1000) as running, running.join() as page:
        page.frames(lambda h: h['t'] >= 12)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                answer = saved(page, what)
                assert answer['type'] == 'notice' and '\n' not in answer['text']
                assert '--recordings' in answer['text'] and '1000' in answer['text']
        page.frames(lambda h: h['t'] >= 20)
    assert [path.name for path in folder.iterdir()] == ['before']
    assert [record.message.count('not saved') for record in caplog.records] == [1]


def test_a_player_has_a_part_of_his_own_and_room_comes_back_with_what_is_removed(tmp_path):
    def in_all():
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    limits = dict(most_bytes=10**6, places=2)
    with (
        Running(FakeSession(2), tmp_path, **limits) as running,
        running.join() as one,
        running.join() as two,
    ):
        saver = running.engine.saver
        assert saver.share == 500_000
        for page in (one, two):
            page.frames(lambda h: h['t'] >= 12)
            page.send(type='set', field='paused', value=True)
        assert saved(one)['type'] == 'saved'
        saver.share = in_all() * 3 // 2
        assert "a player's" in saved(one)['text']
        saver.share = 10**6
        assert saved(two)['type'] == 'saved'
        saver.most_bytes = in_all() + 100
        for page in (one, two):
            assert '--recordings' in saved(page)['text']
        assert len(list(tmp_path.iterdir())) == 2
        for path in tmp_path.iterdir():
            path.unlink()
        assert saved(one)['type'] == 'saved'


def test_a_recording_that_fails_leaves_nothing_and_neither_does_a_killed_server(
    tmp_path, monkeypatch
):
    def full(frames, kind, has_reward, spec, path, facts):
        path.write_bytes(b'half of it')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(recording, 'episode', full)
    left = tmp_path / '.saving-of-another'
    left.mkdir()
    os.utime(left, (1, 1))
    with Running(FakeSession(1), tmp_path) as running, running.join() as page:
        page.frames(lambda h: h['t'] >= 12)
        assert 'No space left' in saved(page, 'episode')['text']
        wait(lambda: not list(tmp_path.iterdir()))


def test_only_so_many_recordings_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, 'MOST', 2)
    with Running(FakeSession(1), tmp_path) as running, running.join() as page:
        page.frames(lambda h: h['t'] >= 12)
        assert [saved(page)['type'] for _ in range(4)] == ['saved', 'saved', 'notice', 'notice']
