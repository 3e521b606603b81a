"""HTTP server of the page, its socket and the saved files, behind the guard."""

import asyncio
import base64
import contextlib
import errno
import hashlib
import importlib.resources
import logging
import re
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from reverie.evaluation.video import PALETTE
from reverie.serve import connections, keys, messages
from reverie.serve.engine import Engine
from reverie.serve.guard import Bucket, FirstOfEach, Guard
from reverie.serve.mailbox import Mailbox
from reverie.serve.players import Client
from reverie.serve.session import Session
from reverie.types import UserError

RATE, BURST = 100.0, 200.0  # orders of one page, per second and at once; more must wait
SEND_S = 10.0  # a page that takes no frame for so long is gone
CONNECTIONS = 128  # known to the guard and open at once, beyond which requests get 503
BACKLOG = 2048  # connections that may wait to be accepted; where few may, a burst keeps others out
# Codes that a socket is closed with
MALFORMED, BINARY = 1008, 1003
FULL, SLOW = 1013, 1011
STYLES, SCRIPTS = ('page.css',), ('page.js', 'pictures.js', 'controls.js')
TYPES = {'gif': 'image/gif', 'mp4': 'video/mp4'}


def page() -> str:
    """The page in one file: what it shows, its style and its scripts."""
    folder = importlib.resources.files('reverie.serve')
    style, script = (
        '\n'.join(folder.joinpath(name).read_text() for name in names)
        for names in (STYLES, SCRIPTS)
    )
    html = folder.joinpath('page.html').read_text()
    return html.replace('<style>', f'<style>\n{style}').replace('<script>', f'<script>\n{script}')


def policy(html: str) -> str:
    """Content-Security-Policy of the page: its own script and style, known by their hashes."""

    def hashed(tag: str) -> str:
        return ' '.join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf'<{tag}>(.*?)</{tag}>', html, re.DOTALL)
        )

    return (
        f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def hello(session: Session, title: str, symbolic: bool) -> dict[str, Any]:
    """First message of a socket: the agent, the environment, its keys and the choices of a page."""
    spec = session.agent.spec
    channels = [
        {'name': name, 'colour': PALETTE[i % len(PALETTE)].tolist()}
        for i, name in enumerate(spec.channels)
    ]
    return {
        'title': title,
        'env': spec.name,
        'kind': spec.actions.kind,
        'rest': keys.rest(spec.actions),
        'bindings': [b.plain() for b in keys.bindings(spec.actions)],
        'parts': keys.plain_parts(spec.actions),
        'has_policy': session.has_policy,
        'smooth': not symbolic,  # pictures are drawn smooth, not as cells
        'views': session.views,
        'sources': session.sources,
        'steps_choices': session.steps_choices,
        'channels': channels if symbolic else [],
    }


class Guarded:
    """Refuses with 403 what the guard refuses, before any route; adds headers to answers.

    What it lets pass is counted while it is open: beyond `CONNECTIONS` it gets 503.
    """

    def __init__(self, app: ASGIApp, guard: Guard, csp: str):
        self.app, self.guard, self.open = app, guard, 0
        self.headers = [
            (b'content-security-policy', csp.encode()),
            (b'x-content-type-options', b'nosniff'),
            (b'referrer-policy', b'no-referrer'),
            (b'cache-control', b'no-store'),
            (b'x-frame-options', b'DENY'),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] not in ('http', 'websocket'):
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        refusal = self.guard.refusal(connection.headers, connection.query_params.get('token'))
        if scope['type'] == 'http':
            send = self._with_headers(send)
        if refusal is not None:
            await self._refuse(403, refusal, scope, receive, send)
        elif self.open >= CONNECTIONS:
            await self._refuse(503, 'too many connections', scope, receive, send)
        else:
            self.open += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.open -= 1

    async def _refuse(
        self, status: int, why: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer, and end the connection."""
        answer = PlainTextResponse(why, status, {'Connection': 'close'})
        if scope['type'] == 'http':
            await answer(scope, receive, send)
        else:
            await WebSocket(scope, receive, send).send_denial_response(answer)

    def _with_headers(self, send: Send) -> Send:
        async def wrapped(message: Any) -> None:
            if message['type'] == 'http.response.start':
                message['headers'] = [*message.get('headers', []), *self.headers]
            await send(message)

        return wrapped


class App:
    """Routes of the server. hello: the first message of every socket."""

    def __init__(self, engine: Engine, guard: Guard, hello: dict[str, Any]):
        self.engine, self.hello = engine, hello
        session = engine.session
        self.choices = messages.Choices(
            session.agent.spec.actions,
            session.views,
            session.steps_choices,
            session.sources,
            session.has_policy,
        )
        self.html = page()
        routes = [
            Route('/', self.index),
            Route('/status', self.status),
            Route('/saved/{name}', self.saved),
            WebSocketRoute('/play', self.play),
        ]
        self.asgi: ASGIApp = Guarded(Starlette(routes=routes), guard, policy(self.html))

    async def index(self, request: Request) -> Response:
        return Response(self.html, media_type='text/html')

    async def status(self, request: Request) -> Response:
        engine = self.engine
        return JSONResponse(
            {
                'players': len(engine.players),
                'places': engine.session.slots,
                'frames': engine.made,
                'fps': engine.fps(),
            }
        )

    async def saved(self, request: Request) -> Response:
        """A recording by its name; only names that the saver gave out are known."""
        files = {} if self.engine.saver is None else self.engine.saver.files
        path = files.get(request.path_params['name'])
        if path is None or not path.is_file():
            return PlainTextResponse('no such recording', 404)
        return FileResponse(path, media_type=TYPES.get(path.suffix[1:]), filename=path.name)

    async def play(self, ws: WebSocket) -> None:
        """One player: a place while the socket is open, orders in, frames out."""
        await ws.accept()
        mailbox = Mailbox(asyncio.get_running_loop())
        player = self.engine.join(mailbox)
        if player is None:
            await ws.close(FULL, f'all {self.engine.session.slots} places are taken')
            return
        tasks = [
            asyncio.create_task(self._send(ws, mailbox, player)),
            asyncio.create_task(self._receive(ws, player)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.engine.leave(player)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        states = (ws.application_state, ws.client_state)
        if states == (WebSocketState.CONNECTED, WebSocketState.CONNECTED):
            with contextlib.suppress(RuntimeError, TimeoutError):  # it went away, or takes nothing
                await asyncio.wait_for(ws.close(SLOW, 'no frame was taken for too long'), 1.0)

    async def _send(self, ws: WebSocket, mailbox: Mailbox, player: Client) -> None:
        await ws.send_json({**self.hello, 'type': 'hello', 'place': player.slot, **player.state()})
        while True:
            item = await mailbox.get()
            send = ws.send_text(item) if isinstance(item, str) else ws.send_bytes(item)
            try:
                await asyncio.wait_for(send, SEND_S)
            except (TimeoutError, WebSocketDisconnect, RuntimeError):
                return

    async def _receive(self, ws: WebSocket, player: Client) -> None:
        bucket = Bucket(RATE, BURST)
        while True:
            message = await ws.receive()
            if message['type'] == 'websocket.disconnect':
                return
            text = message.get('text')
            if text is None:
                await ws.close(BINARY, 'orders are text')
                return
            while wait := bucket.wait():  # nothing more is read meanwhile
                if bucket.held_back() > connections.ABUSE_S:
                    await ws.close(MALFORMED, 'too many orders')
                    return
                await asyncio.sleep(wait)
            try:
                order = messages.parse(text, self.choices)
            except messages.MalformedMessageError as error:
                await ws.close(MALFORMED, str(error)[:100])
                return
            self.engine.order(player, order)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything slow starts.

    Raises UserError if the host is not one of this machine, or the port not to be had.
    """
    if not 0 <= port <= 65535:
        raise UserError(f'--port {port}: expected 1 to 65535, or 0 for any free one')
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host.strip() else []
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise UserError(
            f'--host {host!r} is no address and no name that resolves to one; expected one of this '
            'machine, e.g. 127.0.0.1, or 0.0.0.0 for all'
        )
    family, _, _, _, address = found[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, 'TCP_USER_TIMEOUT'):  # of every connection: one that takes nothing
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_S))
        sock.bind(address)
        sock.listen(BACKLOG)  # until then another process may bind the port, too
    except OSError as error:
        sock.close()
        raise UserError(_why_not(error, host, port)) from None
    return sock


def _why_not(error: OSError, host: str, port: int) -> str:
    """One line for a socket that could not be bound."""
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f'--host {host} is not an address of this machine; expected one that is, e.g. '
            '127.0.0.1, or 0.0.0.0 for all'
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f'--port {port}: not allowed to this user; expected a port above 1023'
    return f'cannot listen on {host}:{port}: {error.strerror}; expected a free port, e.g. --port 0'


def make_server(app: App) -> uvicorn.Server:
    config = uvicorn.Config(
        app.asgi,
        log_level='warning',
        access_log=False,
        lifespan='off',
        loop='asyncio',
        http=connections.HttpConnection,
        ws=connections.SocketConnection,
        ws_max_size=messages.MAX_BYTES,
        ws_per_message_deflate=False,
        ws_ping_interval=5.0,
        ws_ping_timeout=5.0,
        backlog=BACKLOG,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    scarce = FirstOfEach()
    for name in ('uvicorn.error', 'asyncio'):
        logging.getLogger(name).addFilter(scarce)
    return uvicorn.Server(config)


def serve(app: App, sock: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until Ctrl-C or until the engine fails; call `ready` when the page can be opened."""
    server = make_server(app)
    failure: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    async def run() -> None:
        task = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await task

    app.engine.on_failure = fail
    app.engine.start()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run())
    finally:
        app.engine.stop()
        sock.close()
    if failure:
        raise failure[0]
