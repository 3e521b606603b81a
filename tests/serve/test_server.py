"""The socket and the routes as a page, a careless client and a hostile one meet them."""

import contextlib
import errno
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import time
import types

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from reverie.data.episodes import Episodes, verify
from reverie.data.records import TERMINAL
from reverie.serve import connections, guard
from reverie.serve.guard import Bucket, Guard, split_host
from reverie.serve.server import bind
from reverie.types import UserError
from tests.serve.fake import TOKEN, Client, FakeSession, Running, wait

EXAMPLES = int(os.environ.get('REVERIE_FUZZ', '25'))  # of each fuzzed property


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    with Running(FakeSession(4), tmp_path_factory.mktemp('plays')) as running:
        yield running
        wait(lambda: not running.engine.players)


def test_a_page_gets_frames_in_order_and_its_orders_are_obeyed(running):
    with running.join() as page:
        seen = page.frames(lambda h: h['t'] >= 10)
        assert [h['t'] for h, _ in seen] == sorted({h['t'] for h, _ in seen})
        assert np.frombuffer(seen[-1][1][0], np.uint8).reshape(4, 4, 3)[0, 0, 0] == seen[-1][0]['t']
        page.send(type='act', action=2, id=7)
        header = page.frames(lambda h: h['id'] == 7)[-1][0]
        assert header['action'] == [0, 0, 1] and not header['by_agent']
        page.send(type='set', field='by_agent', value=True)
        page.send(type='set', field='steps', value=4)
        page.frames(lambda h: h['by_agent'] and h['steps'] == 4)
        assert running.session.asked[-1][1] == 4 and running.session.asked[-1][4].any()


def test_a_short_press_is_taken_for_one_frame_even_if_the_release_comes_before_it(running):
    with running.join() as page:
        page.send(type='set', field='paused', value=True)
        page.notice('state')
        for number, action in ((1, 1), (2, 0)):
            page.send(type='act', action=action, id=number)
        for number in (1, 2):
            page.send(type='step')
            header = page.frames(lambda h, n=number: h['id'] == n)[-1][0]
            assert header['action'][2 - number] == 1


def test_pause_stops_a_step_moves_one_frame_and_reset_begins_anew(running):
    with running.join() as page:
        page.frames(lambda h: h['t'] >= 3)
        (slot,) = running.engine.players
        with running.join() as clock:
            page.send(type='set', field='paused', value=True)
            assert page.notice('state')['paused']
            begin = clock.frames(lambda h: True)[-1][0]['t']
            clock.frames(lambda h: h['t'] >= begin + 5)  # what was on its way has arrived
            stopped = running.session.t[slot]
            clock.frames(lambda h: h['t'] >= begin + 15)
            assert running.session.t[slot] == stopped
        page.send(type='step')
        wait(lambda: running.session.t[slot] == stopped + 1)
        page.send(type='again')
        start = page.frames(lambda h: h['t'] == 0)[-1][0]['start']
        page.send(type='reset')
        assert page.frames(lambda h: h['t'] == 0)[-1][0]['start'] > start


def test_real_and_dream_share_their_start_and_side_by_side_brings_two_pictures(running):
    with running.join() as page:
        assert page.frames(lambda h: h['t'] == 0)[-1][0]['source'] == 'data'
        page.send(type='set', field='view', value='real')
        real = page.frames(lambda h: h['view'] == 'real')[-1][0]
        assert real['source'] == 'game'  # a recording cannot be played on
        page.send(type='set', field='view', value='both')
        header, pictures = page.frames(lambda h: h['view'] == 'both' and h['t'] == 1)[-1]
        assert header['start'] == real['start'] and len(pictures) == 2 and header['psnr'] == 100.0


def test_players_move_together_and_do_not_disturb_each_other(running):
    with running.join() as one, running.join() as two:
        one.frames(lambda h: h['t'] >= 2)
        two.send(type='set', field='paused', value=True)
        two.notice('state')
        begin = len(running.session.asked)
        one.frames(lambda h: h['t'] >= 30)
        assert {int(rows.sum()) for _, _, rows, _, _ in running.session.asked[begin + 2 :]} == {1}
        two.send(type='set', field='paused', value=False)
        wait(lambda: running.session.asked[-1][2].sum() == 2)


def test_saved_recordings_are_whole_and_reached_by_id_only(running):
    with running.join() as page:
        page.frames(lambda h: h['t'] >= 12)
        page.send(type='gif')
        saved = page.notice('saved')
        answer = running.get(f'/saved/{saved["id"]}')
        assert answer.status_code == 200 and answer.content[:6] == b'GIF89a'
        page.send(type='episode')
        saved = page.notice('saved')
        folder = saved['text'].split(' in ')[1]
        assert verify(folder)['episodes'] == 1
        (record,) = Episodes(folder).records()
        assert len(record.reward) >= 12 and record.reward[0] == 0 and record.reward[1] == 1
    for name in (
        '../page.html',
        '..%2f..%2fpyproject.toml',
        '%2e%2e/x',
        'C:\\x',
        folder,
        '/etc/passwd',
        'x.gif',
    ):
        answer = running.get(f'/saved/{name}')
        assert answer.status_code == 404, name
        assert 'root' not in answer.text


@pytest.mark.external('imageio_ffmpeg', 'video')
def test_an_mp4_has_every_frame_at_its_size(tmp_path):
    import imageio_ffmpeg as ffmpeg

    with Running(FakeSession(1, (5, 7, 3)), tmp_path, pace=20.0) as running, running.join() as page:
        page.frames(lambda h: h['t'] >= 12)
        page.send(type='set', field='paused', value=True)
        page.send(type='mp4')
        saved = page.notice('saved', 30.0)
        answer = running.get(f'/saved/{saved["id"]}')
    assert answer.headers['content-type'] == 'video/mp4' and answer.content[4:8] == b'ftyp'
    (path,) = tmp_path.glob('*.mp4')
    assert path.read_bytes() == answer.content
    count, seconds = ffmpeg.count_frames_and_secs(path)
    assert count == int(saved['text'].split()[0]) >= 12 and seconds == pytest.approx(
        count / 20, abs=0.06
    )
    frames = ffmpeg.read_frames(path)
    assert next(frames)['size'] == (7 * 64, 5 * 64)
    corner = [
        np.frombuffer(frame, np.uint8).reshape(5 * 64, 7 * 64, 3)[:64, :64, 0].mean()
        for frame in frames
    ]
    assert len(corner) == count and corner[0] < corner[12]  # which counts the frames


class LateSession(FakeSession):
    """The heads speak of the frame before: its number is its reward, and frame 5 is the last."""

    pipelined = True

    def frame(self, *args, **kwargs):
        frame = super().frame(*args, **kwargs)
        before = (self.t - 1).astype(np.float32)
        return frame._replace(
            reward=before, is_last=before == 5, cont=(before != 5).astype(np.float32)
        )


def test_what_is_said_a_frame_late_counts_for_the_frame_it_is_said_of(tmp_path):
    with Running(LateSession(1), tmp_path, pace=20.0) as running, running.join() as page:
        page.send(type='set', field='paused', value=True)
        page.notice('state')
        page.send(type='again')
        page.frames(lambda h: h['t'] == 0)
        told = []
        for t in (1, 2, 3, 4, 5, 5):
            page.send(type='step')
            header, (picture,) = page.frames(lambda h, t=t: h['t'] == t)[-1]
            told.append((header['reward'], header['score'], header['over']))
            assert picture[0] == t  # where it was the last one, it stays on the screen
        assert told == [
            (None, 0, False),
            (1, 1, False),
            (2, 3, False),
            (3, 6, False),
            (4, 10, False),
            (5, 15, True),
        ]
        page.send(type='episode')
        (record,) = Episodes(page.notice('saved')['text'].split(' in ')[1]).records()
        assert (
            record.reward.tolist() == [0, 1, 2, 3, 4, 5]
            and record.complete
            and record.flags[-1] & TERMINAL
        )


def test_a_place_is_free_within_a_second_of_a_disconnect(running):
    with running.join() as page:
        page.frames(lambda h: h['t'] >= 1)
        assert len(running.engine.players) == 1
        page.vanish()
        wait(lambda: not running.engine.players, 1.0)


def test_a_client_that_stops_reading_loses_frames_and_costs_nothing(tmp_path):
    with Running(FakeSession(2, (128, 128, 3)), tmp_path) as running:
        with running.join() as other:
            begin = time.monotonic()
            other.frames(lambda h: h['t'] >= 100)
            alone = time.monotonic() - begin
            stalled = running.raw()
            wait(lambda: len(running.engine.players) == 2)
            (player,) = [p for slot, p in running.engine.players.items() if slot]
            begin = time.monotonic()
            other.frames(lambda h: h['t'] >= 200)
            assert time.monotonic() - begin < 3 * alone + 1.0
        wait(lambda: player.mailbox.dropped > 20, 10.0)
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        stalled.close()  # as a killed process does, with frames it never read
        wait(lambda: not running.engine.players, 1.0)


def test_all_places_taken_is_said_and_a_hundred_connections_leave_the_players_alone(running):
    with running.join() as page:
        page.frames(lambda h: h['t'] >= 1)
        sockets = [connect(f'ws://127.0.0.1:{running.port}/play?token={TOKEN}') for _ in range(100)]
        wait(lambda: len(running.engine.players) == 4)
        codes = []
        for extra in sockets[3:]:
            with pytest.raises(ConnectionClosed) as closed:
                extra.recv(timeout=5)
            codes.append(closed.value.rcvd.code)
        assert set(codes) == {1013}
        page.frames(lambda h: h['t'] >= 5)
        for extra in sockets[:3]:
            Client(extra).vanish()
        wait(lambda: len(running.engine.players) == 1)


@pytest.mark.parametrize(
    'headers, token, status',
    [
        ({}, TOKEN, 200),
        ({'Origin': 'http://127.0.0.1:PORT'}, TOKEN, 200),
        ({'Host': 'localhost:PORT', 'Origin': 'http://localhost:PORT'}, TOKEN, 200),
        ({}, None, 403),
        ({}, 'guess', 403),
        ({}, '', 403),
        ({}, 'ä' * 20, 403),
        ({'Origin': 'https://evil.example'}, TOKEN, 403),
        ({'Origin': 'null'}, TOKEN, 403),
        ({'Origin': 'http://127.0.0.1:1'}, TOKEN, 403),
        ({'Host': 'evil.example:PORT'}, TOKEN, 403),
        ({'Host': '127.0.0.1:1'}, TOKEN, 403),
        ({'Host': '127.0.0.1.evil.example:PORT'}, TOKEN, 403),
        ({'Host': '192.168.0.9:PORT'}, TOKEN, 403),
    ],
)
def test_host_origin_and_token_are_checked_for_pages_and_sockets(running, headers, token, status):
    headers = {name: value.replace('PORT', str(running.port)) for name, value in headers.items()}
    for path in ('/', '/status'):
        assert running.get(path, token, **headers).status_code == status
    host = headers.pop('Host', None)
    if host is not None:
        return  # the client writes its own Host
    try:
        query = f'?token={token}' if token is not None else ''
        with connect(f'ws://127.0.0.1:{running.port}/play{query}', additional_headers=headers):
            found = 200
    except InvalidStatus as refused:
        found = refused.response.status_code
    assert found == status


def test_every_answer_forbids_scripts_and_frames_of_others(running):
    for token, path in ((TOKEN, '/'), ('wrong', '/'), (TOKEN, '/nowhere')):
        headers = running.get(path, token).headers
        assert "default-src 'none'" in headers['content-security-policy']
        assert "'unsafe-inline'" not in headers['content-security-policy']
        assert (
            headers['x-content-type-options'] == 'nosniff'
            and headers['referrer-policy'] == 'no-referrer'
        )
    assert running.get('/nowhere').status_code == 404
    assert httpx.post(f'http://127.0.0.1:{running.port}/?token={TOKEN}').status_code == 405


def closing_code(running, message) -> int | None:
    """Return the code the server closes a socket with after this message; None if it stays open."""
    with connect(
        f'ws://127.0.0.1:{running.port}/play?token={TOKEN}', max_size=None, close_timeout=0.1
    ) as ws:
        try:
            ws.send(message)
            end = time.monotonic() + 0.15
            while time.monotonic() < end:
                ws.recv(timeout=0.5)
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else 1006
        except TimeoutError:  # paused
            return None
    return None


@pytest.mark.parametrize(
    'message, code',
    [
        (b'\x00\xff', 1003),
        ('x' * 5000, 1009),
        ('x' * 10_000_000, (1009, 1006)),  # cut off while it was still sending
        ('[' * 4000, 1008),
        ('{"a":' * 600, 1008),
        ('not json', 1008),
        ('[]', 1008),
        ('{"type": "act", "action": NaN, "id": 1}', 1008),
        ('{"type": "act", "action": 3, "id": 1}', 1008),
        ('{"type": "act", "action": true, "id": 1}', 1008),
        ('{"type": "act", "action": 1, "id": 1e400}', 1008),
        ('{"type": "act", "action": 1, "id": 1, "more": 1}', 1008),
        ('{"type": "set", "field": "pace", "value": 1e9}', 1008),
        ('{"type": "set", "field": "slot", "value": 1}', 1008),
        ('{"type": "set", "field": ["view"], "value": "real"}', 1008),
        ('{"type": "set", "field": "by_agent", "value": 1}', 1008),
        ('{"type": "' + '9' * 4000 + '"}', 1008),
        ('{"type": "act", "action": ' + '9' * 4000 + ', "id": 1}', 1008),
        ('{"type": "step"}', None),
    ],
)
def test_a_malformed_order_closes_its_own_socket_with_a_stated_code(running, message, code):
    assert closing_code(running, message) in (code if isinstance(code, tuple) else (code,))
    assert running.get('/status').status_code == 200


def test_a_flood_of_orders_waits_and_is_then_cut_off(running, monkeypatch):
    monkeypatch.setattr(connections, 'ABUSE_S', 1.0)
    with running.join() as page, pytest.raises(ConnectionClosed) as closed:
        begin = time.monotonic()
        while time.monotonic() - begin < 30:
            page.send(type='step')
            with contextlib.suppress(TimeoutError):
                page.socket.recv(timeout=0)
    assert closed.value.rcvd.code == 1008 and 'too' in closed.value.rcvd.reason


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
orders = st.fixed_dictionaries(
    {'type': st.sampled_from(['act', 'set', 'step', 'reset', 'gif', 'x']) | json_values},
    optional={name: json_values for name in ('action', 'id', 'field', 'value')},
)


@pytest.mark.filterwarnings(
    'ignore:Do not use the `random` module'
)  # the server's pings draw from it meanwhile
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(max_size=300)
    | orders.map(json.dumps)
    | json_values.map(json.dumps)
)
def test_whatever_is_sent_the_server_lives_and_answers_with_a_known_code(running, message):
    with connect(
        f'ws://127.0.0.1:{running.port}/play?token={TOKEN}', max_size=None, close_timeout=0.1
    ) as ws:
        try:
            ws.send(message)
            while isinstance(ws.recv(timeout=2), str):
                continue
            ws.close()
        except ConnectionClosed as closed:
            assert closed.rcvd is not None and closed.rcvd.code in (1003, 1008, 1013)
    assert running.engine._threads[0].is_alive() and running.engine._threads[1].is_alive()


paths = st.lists(
    st.sampled_from(
        ['..', '%2e%2e', '.', '/', '%2f', '\\', 'saved', 'play', '%00', 'etc', 'passwd', ':', '~']
    )
)


@pytest.mark.filterwarnings(
    'ignore:Do not use the `random` module'
)  # the server's pings draw from it meanwhile
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.text(alphabet=st.characters(codec='latin-1'), max_size=40) | paths.map(''.join),
    st.booleans(),
)
def test_whatever_path_is_asked_for_nothing_but_the_page_is_given(running, path, known):
    raw = ''.join(c if 33 <= ord(c) < 127 and c not in '?#' else f'%{ord(c):02x}' for c in path)
    with socket.create_connection(('127.0.0.1', running.port), timeout=5) as s:
        query = f'?token={TOKEN}' if known else ''
        s.sendall(
            f'GET /{raw}{query} HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\nConnection: close\r\n\r\n'.encode()
        )
        answer = b''
        while part := s.recv(65536):
            answer += part
    status = int(answer.split(b' ', 2)[1])
    assert status in ((200, 307, 404, 400) if known else (403, 400)), answer[:200]
    assert b'root:' not in answer
    if status == 200:
        assert raw in ('', 'status')


def test_a_failing_session_ends_the_server_instead_of_leaving_it_mute(tmp_path):
    session, failed = FakeSession(1), []
    with Running(session, tmp_path) as running:
        running.engine.on_failure = failed.append
        with running.join() as page:
            page.frames(lambda h: h['t'] >= 1)
            session.error = RuntimeError('the device is gone')
            wait(lambda: failed)
    assert str(failed[0]) == 'the device is gone'


def test_a_port_in_use_is_one_line_that_names_it():
    with bind('127.0.0.1', 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(UserError, match=f'127.0.0.1:{port}.*free port'):
            bind('127.0.0.1', port)


@pytest.mark.parametrize(
    'host, port, said',
    [
        ('127.0.0.1', 99999, '--port 99999: expected 1 to 65535'),
        ('127.0.0.1', -1, '--port -1: expected 1 to 65535'),
        ('nowhere.invalid', 0, "--host 'nowhere.invalid' is no address"),
        ('a' * 300, 0, 'is no address'),
        ('', 0, "--host '' is no address"),
        ('192.0.2.7', 0, '--host 192.0.2.7 is not an address of this machine'),
        ('::99', 0, '--host ::99 is not an address of this machine|cannot listen'),
    ],
)
def test_a_host_or_port_that_cannot_be_had_is_one_line_that_names_it(host, port, said):
    with pytest.raises(UserError, match=said) as refused:
        bind(host, port)
    assert '\n' not in str(refused.value) and 'expected' in str(refused.value)


def test_a_port_that_needs_a_privilege_is_one_line_that_names_it(monkeypatch):
    def refuse(self, address):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(socket, 'socket', type('Socket', (socket.socket,), {'bind': refuse}))
    with pytest.raises(UserError, match='--port 80: not allowed to this user; expected a port ab'):
        bind('127.0.0.1', 80)


SERVER = """
import pathlib, sys
from reverie.serve.engine import Engine
from reverie.serve.guard import Guard
from reverie.serve.server import App, bind, hello, serve
from tests.serve.fake import TOKEN, FakeSession
sock = bind('127.0.0.1', 0)
port, session = sock.getsockname()[1], FakeSession(1)
app = App(Engine(session, pace=100.0), Guard('127.0.0.1', port, TOKEN), hello(session, '', False))
serve(app, sock, lambda: print(port, flush=True))
print('ended')
"""


@pytest.mark.parametrize('times', [1, 2])
def test_ctrl_c_ends_the_server_without_a_traceback_also_twice(times):
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, '-c', SERVER]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        port = int(process.stdout.readline())
        url = f'ws://127.0.0.1:{port}/play?token={TOKEN}'
        with connect(url, max_size=None, close_timeout=0.1) as ws:
            ws.recv(timeout=30)
            for _ in range(times):
                process.send_signal(signal.SIGINT)
                time.sleep(0.05)  # two signals at once would be one
            said, errors = process.communicate(timeout=30)
    assert said.strip() == 'ended' and errors == '' and process.returncode == 0


@pytest.mark.parametrize(
    'header, expected',
    [
        ('localhost:80', ('localhost', 80)), ('[::1]:80', ('::1', 80)), ('Example.org', ('example.org', None)),
        ('::1', None), ('[::1', None), ('a:b', None), ('a:123456', None), ('', None), ('[::1]x', None),
    ],
)  # fmt: skip
def test_host_headers_are_split_or_refused(header, expected):
    assert split_host(header) == expected


def test_an_open_server_answers_to_addresses_and_given_names_only():
    open_ = Guard('0.0.0.0', 80, TOKEN, ('play.example.org',))
    for known in ('192.168.0.9:80', 'play.example.org', 'localhost:80'):
        assert open_.knows(known)
    assert not open_.knows('rebound.example:80') and not open_.knows('192.168.0.9:81')


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate(monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])  # not that of servers in other threads
    monkeypatch.setattr(guard, 'time', clock)
    bucket = Bucket(10.0, 5.0)
    assert [bucket.wait() for _ in range(7)] == [0] * 5 + [pytest.approx(0.1)] * 2
    now[0] = 0.31
    assert [bucket.wait() == 0 for _ in range(4)] == [True] * 3 + [False]
    now[0] += 0.2
    assert bucket.wait() == 0 and bucket.held_back() == pytest.approx(0.2)  # no pause yet
    now[0] += 0.4
    assert bucket.wait() == 0 and bucket.held_back() == 0
