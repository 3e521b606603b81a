"""Connections that say nothing, or too much: none keeps a player out or slows one down."""

import asyncio
import contextlib
import json
import logging
import struct
import threading
import time

import pytest

from reverie.serve import connections, server
from reverie.serve.compiler import ProgramCompiler
from reverie.serve.connections import origin
from reverie.serve.engine import STARTS, STARTS_AT_ONCE, Engine
from reverie.serve.guard import FirstOfEach
from reverie.serve.mailbox import Mailbox
from reverie.serve.messages import Do, Set
from tests.serve.fake import TOKEN, FakeSession, Running, wait


@pytest.fixture
def running(tmp_path):
    with Running(FakeSession(4), tmp_path) as running:
        yield running


def is_closed(client) -> bool:
    """Whether the server has closed a connection; reads what it said before."""
    client.settimeout(0)
    try:
        while client.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


def closed_after(client, limit_s=10.0, every=b'') -> float:
    """Seconds until the server closes a connection, which says `every` meanwhile."""
    begin = time.monotonic()
    while not is_closed(client):
        assert time.monotonic() - begin < limit_s, 'it was not closed'
        with contextlib.suppress(OSError):
            client.sendall(every)
        time.sleep(0.02)
    return time.monotonic() - begin


def masked(opcode: int, data: bytes = b'') -> bytes:
    """One whole frame of a client, with a mask of zeros."""
    return struct.pack('>BBI', 0x80 | opcode, 0x80 | len(data), 0) + data


HALF = ('GET / HTTP/1.1', 'Host: localhost')


@pytest.mark.parametrize(
    'lines, then, every',
    [
        ((), '', b''),
        (HALF, '', b''),
        (HALF, 'X: ', b'x'),
        ((), 'G', b''),
        ((*HALF, 'Content-Length: 99', ''), '', b'x'),
    ],
)
def test_whoever_does_not_finish_a_request_is_closed_in_time(
    running, monkeypatch, lines, then, every
):
    monkeypatch.setattr(connections, 'REQUEST_S', 0.5)
    assert closed_after(running.open(*lines, then=then), every=every) < 3.0


def test_a_second_request_has_as_long_as_the_first(running, monkeypatch):
    monkeypatch.setattr(connections, 'REQUEST_S', 0.5)
    get = (f'GET /status?token={TOKEN} HTTP/1.1', f'Host: 127.0.0.1:{running.port}', '')
    client = running.open(*get)
    assert b'200 OK' in client.recv(4096)
    client.sendall(b'GET / HTTP/1.1\r\nX: ')
    assert closed_after(client, every=b'x') < 3.0


def test_a_player_who_only_watches_is_left_alone(running, monkeypatch):
    monkeypatch.setattr(connections, 'REQUEST_S', 0.3)
    with running.join() as page:
        page.frames(lambda h: h['t'] >= 150)  # at 100 frames per second


def test_idle_connections_give_way_and_keep_nobody_out(running, monkeypatch):
    monkeypatch.setattr(connections, 'FROM_LOOPBACK', 20)
    with running.join() as page:
        idle = [running.open(*HALF) for _ in range(60)]
        for _ in range(5):
            assert running.get('/').status_code == 200
        with running.join() as other:
            other.frames(lambda h: h['t'] >= 2)
        wait(lambda: sum(map(is_closed, idle)) >= 40)
        page.frames(lambda h: h['t'] >= 10)
        assert not is_closed(idle[-1])


def test_where_nobody_waits_to_be_known_the_newest_is_refused(running, monkeypatch):
    monkeypatch.setattr(connections, 'ALL', 2)
    with running.join() as one, running.join() as two:
        assert closed_after(running.open()) < connections.REQUEST_S / 2
        for page in (one, two):
            page.frames(lambda h: h['t'] >= 2)


def test_only_those_who_know_the_token_count_towards_the_cap(running, monkeypatch):
    monkeypatch.setattr(server, 'CONNECTIONS', 2)
    strangers = [running.raw(token='wrong') for _ in range(4)]
    with running.join() as one, running.join() as two:
        for page in (one, two):
            page.frames(lambda h: h['t'] >= 1)
        assert running.get('/').status_code == 503
        assert running.get('/', 'wrong').status_code == 403
    wait(lambda: running.get('/').status_code == 200)
    for client in strangers:
        assert is_closed(client)


@pytest.mark.parametrize('headers', [(), ('Content-Length: 9',), [f'X{i}: y' for i in range(200)]])
def test_whoever_is_refused_is_closed_at_once(running, headers):
    token = TOKEN if headers else 'wrong'
    assert closed_after(running.raw(*headers, token=token)) < connections.REQUEST_S / 2
    page = (f'GET /?token={"wrong"} HTTP/1.1', f'Host: 127.0.0.1:{running.port}', '')
    assert closed_after(running.open(*page)) < connections.REQUEST_S / 2


@pytest.mark.parametrize(
    'address, expected',
    [
        ('127.0.0.1', 'loopback'), ('127.1.2.3', 'loopback'), ('::1', 'loopback'), ('::ffff:127.0.0.1', 'loopback'),
        ('192.168.0.9', '192.168.0.9'), ('::ffff:192.168.0.9', '192.168.0.9'),
        ('2001:db8::1:2:3', '2001:db8::/64'), ('fe80::1%eth0', 'fe80::/64'), ('', ''),
    ],
)  # fmt: skip
def test_hosts_are_told_apart_by_address_or_network(address, expected):
    assert origin((address, 80) if address else None) == expected


@pytest.mark.parametrize('frame', [masked(9), masked(1, b'{"type":"step"}'), masked(1)])
def test_a_flood_is_read_a_little_at_a_time_and_then_cut_off(running, monkeypatch, frame):
    monkeypatch.setattr(connections, 'ABUSE_S', 0.5)
    pieces = []
    parse = connections.WebSocketsSansIOProtocol.data_received
    monkeypatch.setattr(
        connections.WebSocketsSansIOProtocol,
        'data_received',
        lambda self, data: (pieces.append(len(data)), parse(self, data)),
    )
    client = running.raw()
    begin = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - begin < 20:
            client.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                client.sendall(frame * 5000)
            is_closed(client)
    took = time.monotonic() - begin
    assert took < 15
    pieces = pieces[1:]  # the request
    assert max(pieces) <= connections.READ_PIECE
    assert sum(pieces) <= connections.READ_BURST + took * connections.READ_RATE + 1024


def test_of_each_message_only_the_first_few_are_logged():
    seen, log = [], logging.Logger('a log')
    log.addFilter(FirstOfEach(3))
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    log.addHandler(handler)
    for i in range(9):
        log.warning('bad request %d', i)
    log.warning('another')
    assert seen[:2] == ['bad request 0', 'bad request 1'] and len(seen) == 4
    assert 'no more' in seen[2] and seen[3] == 'another'


class CountingSession(FakeSession):
    """Notes when episodes begin."""

    def __init__(self, slots):
        super().__init__(slots)
        self.begun: list[float] = []

    def start(self, slot, number, source='game', real=False):
        self.begun.append(time.monotonic())
        return super().start(slot, number, source, real)

    def within_the_pace(self, places=1):
        """Whether no more episodes began than a place may begin."""
        took = self.begun[-1] - self.begun[0]
        return len(self.begun) <= places * (STARTS_AT_ONCE + 1 + took * STARTS)


def test_resets_begin_a_few_episodes_and_the_last_one_counts(tmp_path):
    with Running(CountingSession(2), tmp_path) as running, running.join() as page:
        page.frames(lambda h: h['t'] >= 2)
        for i in range(60):
            page.send(type=('reset', 'again')[i % 2])
            page.send(type='set', field='view', value=('real', 'dream')[i % 2])
            time.sleep(0.01)
        page.send(type='act', action=2, id=77)
        assert page.frames(lambda h: h['id'] == 77 and h['t'] > 0)[-1][0]['view'] == 'dream'
        assert running.session.within_the_pace()


def test_joining_again_and_again_begins_no_more_episodes(tmp_path):
    with Running(CountingSession(2), tmp_path) as running:
        with running.join() as page:
            page.frames(lambda h: h['t'] >= 1)
            for _ in range(40):
                with running.raw() as client:
                    assert b'101' in client.recv(64)
                wait(lambda: len(running.engine.players) == 1)
            with running.join() as other:
                other.frames(lambda h: h['t'] >= 2)
        assert running.session.within_the_pace(places=2)


def test_a_flood_of_orders_wakes_the_engine_once_and_is_answered_once():
    engine, told = Engine(FakeSession(1)), []
    mailbox = Mailbox(asyncio.new_event_loop())
    mailbox.put = told.append
    player = engine.join(mailbox)
    engine._take_orders()
    for i in range(100):
        engine.order(player, Set('pace', 20.0 + i))
        engine.order(player, Do('reset'))
    assert engine._inbox.qsize() == 1
    engine._take_orders()
    (answer,) = map(json.loads, told)
    assert answer['type'] == 'state' and answer['pace'] == player.pace == 119.0


def test_a_program_is_compiled_once_however_often_a_page_asks():
    compiled, begun, go = [], threading.Event(), threading.Event()

    class Slow(FakeSession):
        def compile(self, view='dream', steps=0, plays=False):
            begun.set()
            go.wait(30)
            compiled.append((view, steps, plays))

    ready = []
    compiler = ProgramCompiler(Slow(1), lambda: ready.append(1), lambda error: ready.append(error))
    compiler.want('dream', 2)
    assert begun.wait(30)
    for _ in range(50):
        compiler.want('both', 2)
        compiler.want_now('real', 4)
    go.set()
    wait(lambda: len(ready) >= 6)
    compiler.stop()
    assert ready == [1] * 6 and len(set(compiled)) == 6
    assert compiled[1:3] == [('real', 4, False), ('real', 4, True)]  # before all that waited
