"""Connections below the routes: how long a request may take, how many an address may open, and how
fast a socket is read.

uvicorn's protocols wait for ever for the rest of a request, count connections before they are
known, and parse whatever has arrived in one go.
"""

import asyncio
import ipaddress
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from reverie.serve.guard import Bucket

REQUEST_S = 5.0  # for a whole request, from the opening of its connection or its first byte
CLOSE_S = 5.0  # for a client to take what is left for it after its socket was ended
FROM_LOOPBACK, FROM_ADDRESS = 256, 96  # connections open from this machine, from any other address
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # that this process may have open
ALL = 512 if FILES == resource.RLIM_INFINITY else min(512, FILES // 2)
# Bytes of a socket that are read per second and at once, and those that are parsed before others
# have a turn. An order has some fifty bytes; the smallest frames have six, and each costs as much.
READ_RATE, READ_BURST, READ_PIECE = 16384.0, 32768.0, 1024
GOODBYE_S = 1.0  # between the last word to a client that is given up, and the end
ABUSE_S = 5.0  # of being held back without a pause, after which a socket is closed
ABUSE = 1008  # the code it is closed with


def origin(client: tuple[str, int] | None) -> str:
    """The host behind an address: in IPv6, where one host has a whole network, the network."""
    try:
        ip = ipaddress.ip_address(client[0].partition('%')[0] if client else '')
    except ValueError:
        return ''
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return 'loopback'
    return str(ip if ip.version == 4 else ipaddress.ip_network((ip, 64), strict=False))


class HttpConnection(H11Protocol):
    """Connection that must send each request whole within `REQUEST_S`.

    Where an address has more connections than it may, or all have together, the oldest that has
    not sent its first request is closed for the new one; if there is none, the new one is.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.origin, self.since = '', 0.0
        self.asked = False  # a whole request has come
        self._upgraded = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.origin = origin(self.client)
        self.since = time.monotonic()
        self._await_request()
        self._make_room()

    def _make_room(self) -> None:
        everybody = [c for c in self.connections if not c.transport.is_closing()]
        mine = [c for c in everybody if getattr(c, 'origin', None) == self.origin]
        most = FROM_LOOPBACK if self.origin == 'loopback' else FROM_ADDRESS
        for group, limit in ((mine, most), (everybody, ALL)):
            if len(group) > limit:
                waiting = [c for c in group if isinstance(c, HttpConnection) and not c.asked]
                min(waiting, key=lambda c: c.since).transport.abort()
                return

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._upgraded:
            return
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):  # the client's turn, as h11 has it
            self._await_request()
        else:
            self._note_request()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        self._note_request()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _note_request(self) -> None:
        self.asked = True
        self._forget_deadline()

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class SocketConnection(WebSocketsSansIOProtocol):
    """Socket that is read no faster than a page speaks, a little at a time.

    The rest waits, and so does whoever sends it. One that had to be held back for `ABUSE_S` without
    a pause is closed, as is one that takes `CLOSE_S` to go when the server has ended it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.origin = ''
        self._bucket = Bucket(READ_RATE, READ_BURST)
        self._unread = bytearray()
        self._turn: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.origin = origin(self.client)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unread.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:  # the request, whole, from `HttpConnection`
            super().data_received(data)
            if not self.handshake_initiated:  # websockets has refused it; uvicorn would not say so
                self.transport.write(b''.join(self.conn.data_to_send()))
                self.transport.close()
            return
        self._unread += data
        self._read()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message['type'] == 'websocket.http.response.body' and not message.get('more_body'):
            self.handshake_complete = True  # by a refusal; uvicorn would log that it is missing

    async def receive(self) -> Any:
        message = await super().receive()
        self._read()
        return message

    def _read(self) -> None:
        """Parse one piece of what has come, unless it is early or an order waits to be taken."""
        if self._turn is None and self._unread and not self.read_paused:
            piece = bytes(self._unread[:READ_PIECE])
            wait = self._bucket.wait(len(piece))
            if not wait:
                del self._unread[: len(piece)]
                super().data_received(piece)
            elif self._bucket.held_back() > ABUSE_S:
                self._give_up()
            if self._unread:
                self._turn = self.loop.call_later(wait, self._next_turn)
        if self.transport.is_closing():
            self._unread.clear()
        elif self._unread:
            self.transport.pause_reading()
        elif not self.read_paused:
            self.transport.resume_reading()

    def _next_turn(self) -> None:
        self._turn = None
        self._read()

    def _give_up(self) -> None:
        """Close the socket and read nothing more, so that the reason is not lost by a reset."""
        self._unread.clear()
        self.read_paused = True
        self.transport.pause_reading()
        if not self.close_sent:
            self.conn.fail(ABUSE, 'too much was sent')
            self.transport.write(b''.join(self.conn.data_to_send()))
            self.close_sent = True
            self.queue.put_nowait({'type': 'websocket.disconnect', 'code': ABUSE})
            self.close_timer = self.loop.call_later(GOODBYE_S, self.transport.abort)

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self.loop.call_later(CLOSE_S, self.transport.abort)
