"""A session that computes nothing, and a server around it: what is tested is who may say what, and
when.
"""

import contextlib
import json
import socket
import threading
import time
import types

import httpx
import numpy as np
from websockets.sync.client import connect

from reverie.serve.engine import Engine
from reverie.serve.frame import Frame
from reverie.serve.guard import Guard
from reverie.serve.messages import unpack
from reverie.serve.recording import RecordingSaver
from reverie.serve.server import App, bind, hello, make_server
from reverie.serve.session import Session
from reverie.types import ActionSpace, Component, EnvSpec

SPEC = EnvSpec('fake', (4, 4, 3), ActionSpace('discrete', 3, ('noop', 'left', 'fire')))
TURNS = ('hard left', 'left', 'slight left', 'none', 'slight right', 'right', 'hard right')
WALKER = ActionSpace.composite(
    (
        Component('move', ('back', 'none', 'forward'), rest=1.0),
        Component('turn', TURNS, rest=3.0, camera='x'),
        Component('fire', ('none', 'fire')),
        Component('pitch', (), -2.0, 4.0, rest=1.0, camera='y'),
    )
)
TOKEN = 'a-token-for-tests'


class FakeSession(Session):
    """Counts frames: the first pixel is the number of the player's frame, the second that of its
    start.
    """

    def __init__(
        self,
        slots: int,
        shape: tuple[int, ...] = (4, 4, 3),
        spec: EnvSpec = SPEC,
        has_policy: bool = True,
    ):
        readouts = {'policy': None} if has_policy else {}
        self.agent = types.SimpleNamespace(spec=spec, readouts=readouts)
        self.slots, self.steps, self.steps_choices, self.shape = slots, 2, (1, 2, 4), shape
        self.t, self.starts = np.zeros(slots, int), np.zeros(slots, int)
        self.asked: list[tuple] = []
        self.error: Exception | None = None

    @property
    def sources(self):
        return ('game', 'data')

    @property
    def views(self):
        return ('dream', 'real', 'both')

    def ready(self, view='dream', steps=0):
        return True

    def compile(self, view='dream', steps=0, plays=False):
        return None

    def _frame(self, rows, action, both=False):
        n = len(rows)
        image = np.zeros((n, *self.shape), np.uint8)
        image[:, 0, 0, 0], image[:, 0, 0, 1] = self.t[rows] % 256, self.starts[rows] % 256
        one = np.ones(n, np.float32)
        real = image if both else None
        size = self.agent.spec.actions.size
        probs = np.full((n, size), 1 / size, np.float32) if self.has_policy else None
        return Frame(
            image,
            real,
            np.zeros(n, bool) if both else None,
            action,
            one,
            one,
            np.zeros(n, bool),
            one if self.has_policy else None,
            probs,
        )

    def start(self, slot, number, source='game', real=False):
        self.t[slot], self.starts[slot] = 0, number
        return self._frame([slot], np.zeros((1, self.agent.spec.actions.size), np.float32))

    def frame(self, action, by_agent, rows, view='dream', steps=0):
        if self.error:
            raise self.error
        self.t[rows] += 1
        self.asked.append((view, steps, rows.copy(), action.copy(), by_agent.copy()))
        return self._frame(np.arange(self.slots), action, view == 'both')


class Client:
    """A page without a page."""

    def __init__(self, socket):
        self.socket = socket

    def send(self, **order):
        self.socket.send(json.dumps(order))

    def vanish(self):
        """No goodbye."""
        self.socket.socket.shutdown(socket.SHUT_RDWR)

    def frames(self, until, limit_s=30.0):
        """Headers and pictures of frames up to the first for which `until(header)` holds, which is
        the last.
        """
        end, seen = time.monotonic() + limit_s, []
        while time.monotonic() < end:
            message = self.socket.recv(timeout=limit_s)
            if isinstance(message, bytes):
                seen.append(unpack(message))
                if until(seen[-1][0]):
                    return seen
        raise AssertionError(f'no such frame among {len(seen)}: {seen[-1][0] if seen else None}')

    def notice(self, kind, limit_s=30.0):
        """The next text message of this type."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            message = self.socket.recv(timeout=limit_s)
            if isinstance(message, str) and json.loads(message)['type'] == kind:
                return json.loads(message)
        raise AssertionError(f'no {kind}')


class Running:
    """A server on a free port."""

    def __init__(self, session, folder, pace=100.0, **limits):
        self.session = session
        self.sock = bind('127.0.0.1', 0)
        self.port = self.sock.getsockname()[1]
        guard = Guard('127.0.0.1', self.port, TOKEN)
        self.engine = Engine(session, pace=pace, saver=RecordingSaver(folder, {}, **limits))
        self.app = App(self.engine, guard, hello(session, 'a fake', False))
        self.server = make_server(self.app)
        self.thread = threading.Thread(target=self.server.run, kwargs={'sockets': [self.sock]})

    def __enter__(self):
        self.engine.start()
        self.thread.start()
        wait(lambda: self.server.started)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)
        self.engine.stop()
        self.sock.close()

    def get(self, path, token=TOKEN, **headers):
        url = f'http://127.0.0.1:{self.port}{path}'
        return httpx.get(
            url, params={'token': token} if token else {}, headers=headers, timeout=60.0
        )

    def open(self, *lines, then=''):
        """A connection that has sent these lines; with `then`, the beginning of another."""
        client = socket.create_connection(('127.0.0.1', self.port), timeout=10)
        client.sendall(''.join([*(f'{line}\r\n' for line in lines), then]).encode())
        return client

    def raw(self, *headers, token=TOKEN):
        """A client that says what it must and then never reads."""
        return self.open(
            f'GET /play?token={token} HTTP/1.1',
            f'Host: 127.0.0.1:{self.port}',
            'Upgrade: websocket',
            'Connection: Upgrade',
            'Sec-WebSocket-Version: 13',
            'Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==',
            *headers,
            '',
        )

    @contextlib.contextmanager
    def join(self, **kwargs):
        with connect(
            f'ws://127.0.0.1:{self.port}/play?token={TOKEN}',
            max_size=None,
            close_timeout=0.1,
            **kwargs,
        ) as socket:
            yield Client(socket)


def wait(condition, limit_s=30.0):
    """Until the condition holds; fails after `limit_s`."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, 'it did not happen in time'
        time.sleep(0.01)
