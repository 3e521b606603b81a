"""A well-behaved player beside clients that attack the server: frames per second, p95, lock-outs.

    python benchmarks/attacks.py                        # dreamer4_debug, random weights
    python benchmarks/attacks.py runs/demo-breakout --seconds 20 --out results/bench/attacks.json

Starts `reverie play` as a process of its own and measures one player in it, first in quiet, then
beside each attack, which runs in another process. The time of a frame is that since the frame
before it. Meanwhile a newcomer asks for the page twice a second: one who gets no answer within two
seconds is locked out. Each attack is compared with the quiet before it, so that what else the
machine does counts as little as possible.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import random
import shlex
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from play import Server, upgrade

from reverie.evaluation.results import provenance, save
from reverie.serve.messages import unpack

BEGINNING_S = 3.0  # of an attack, while its process starts
PATIENCE_S = 2.0  # a newcomer's
FEWEST_FPS, HIGHEST_P95 = 0.9, 1.5  # times those in quiet

Attack = Callable[[str, str], None]  # where the server is, and its token; runs until it is killed


def opened(at: str, say: bytes = b'') -> socket.socket:
    """Open a connection and send some bytes."""
    host, port = at.rsplit(':', 1)
    client = socket.create_connection((host, int(port)), timeout=5)
    client.sendall(say)
    return client


def masked(opcode: int, data: bytes) -> bytes:
    """One whole WebSocket frame of a client, up to 125 bytes."""
    return struct.pack('>BBI', 0x80 | opcode, 0x80 | len(data), 0) + data


def keep_open(at: str, count: int, say: bytes, every: bytes = b'') -> None:
    """Keep `count` connections open that said `say` and say `every` once a second."""
    clients: list[socket.socket] = []
    while True:
        for client in list(clients):
            try:
                client.settimeout(0)
                if every:
                    client.sendall(every)
                if client.recv(4096) == b'':
                    raise ConnectionResetError
            except BlockingIOError:
                continue
            except OSError:
                client.close()
                clients.remove(client)
        while len(clients) < count:
            with contextlib.suppress(OSError):
                clients.append(opened(at, say))
        time.sleep(1.0)


def idle(at: str, token: str) -> None:
    """Open 500 connections that say nothing."""
    keep_open(at, 500, b'')


def half_open(at: str, token: str) -> None:
    """Open 500 connections that never finish a request."""
    keep_open(at, 500, b'GET / HTTP/1.1\r\nHost: ' + at.encode() + b'\r\n')


def slow_loris(at: str, token: str) -> None:
    """Open 500 connections that send a byte of a header each second."""
    keep_open(at, 500, b'GET / HTTP/1.1\r\nX: ', b'x')


def no_token(at: str, token: str) -> None:
    """Ask for the page without a token, as fast as one process can."""
    while True:
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f'http://{at}/', timeout=5)


def flood(at: str, token: str, parts: Iterator[bytes], pause_s: float = 0.0) -> None:
    """Send frames over a socket, reading what comes, and open another when it is closed."""
    while True:
        with contextlib.suppress(OSError):
            client = opened(at, upgrade(at, token))
            threading.Thread(target=drain, args=(client,), daemon=True).start()
            for part in parts:
                client.sendall(part)
                time.sleep(pause_s)
        time.sleep(0.05)


def drain(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while client.recv(1 << 20):
            pass
    client.close()


def orders(*kinds: dict[str, Any]) -> Iterator[bytes]:
    """Yield frames with these orders, for ever; n counts them."""
    for n in itertools.count():
        order = kinds[n % len(kinds)]
        yield masked(1, json.dumps(order | {'id': n} if 'id' in order else order).encode())


ACT: dict[str, Any] = {'type': 'act', 'action': 1, 'id': 0}
RESET = {'type': 'reset'}
PAUSE = {'type': 'set', 'field': 'paused', 'value': True}


def flood_of_orders(at: str, token: str) -> None:
    """Send actions, resets and settings, as fast as they are taken."""
    flood(at, token, orders(ACT, RESET, PAUSE, {'type': 'step'}))


def flood_below_the_limit(at: str, token: str) -> None:
    """Send 80 resets and settings a second."""
    flood(at, token, orders(RESET, PAUSE, {**PAUSE, 'value': False}), 1 / 80)


def flood_of_pings(at: str, token: str) -> None:
    """Send the smallest frames there are, thousands at once."""
    flood(at, token, itertools.repeat(masked(9, b'') * 5000))


def flood_of_recordings(at: str, token: str) -> None:
    """Ask for a GIF of the last frames, again and again."""
    flood(at, token, orders({'type': 'gif'}, {'type': 'episode'}), 1 / 20)


def stops_reading(at: str, token: str) -> None:
    """Open sockets that never read, at a high pace, two at a time."""
    clients: list[socket.socket] = []
    while True:
        with contextlib.suppress(OSError):
            clients.append(opened(at, upgrade(at, token)))
            clients[-1].sendall(masked(1, b'{"type":"set","field":"pace","value":30}'))
        clients = clients[-2:]
        time.sleep(0.5)


def reconnect_storm(at: str, token: str) -> None:
    """Join and vanish, as fast as one process can."""
    while True:
        with contextlib.suppress(OSError):
            client = opened(at, upgrade(at, token))
            client.settimeout(1)
            client.recv(200)
            if random.random() < 0.5:
                linger = struct.pack('ii', 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            client.close()


ATTACKS: tuple[Attack, ...] = (
    idle,
    half_open,
    slow_loris,
    no_token,
    flood_of_orders,
    flood_below_the_limit,
    flood_of_pings,
    flood_of_recordings,
    stops_reading,
    reconnect_storm,
)


class Newcomer(threading.Thread):
    """Asks for the page twice a second until `done`; counts answers and lock-outs."""

    def __init__(self, server: Server):
        super().__init__(daemon=True)
        self.url = f'http://{server.at}/?token={server.token}'
        self.done = threading.Event()
        self.answered = self.locked_out = 0

    def run(self) -> None:
        while not self.done.wait(0.5):
            try:
                urllib.request.urlopen(self.url, timeout=PATIENCE_S).read()
                self.answered += 1
            except OSError:
                self.locked_out += 1


def measure(server: Server, seconds: float, attack: Attack | None = None) -> dict[str, float]:
    """Play for some seconds, beside an attack that begins when the player plays.

    Returns frames per second, p95 of the time of a frame, and newcomers.
    """
    newcomer, times = Newcomer(server), []
    with server.join() as ws, attacking(server, attack):
        begin = time.monotonic() + BEGINNING_S
        while time.monotonic() - begin < seconds:
            message = ws.recv(timeout=30)
            if time.monotonic() > begin and not newcomer.is_alive():
                newcomer.start()
            if not isinstance(message, bytes):
                continue
            times.append(time.monotonic())
            if unpack(message)[0]['over']:
                ws.send('{"type": "reset"}')
        newcomer.done.set()
        newcomer.join()
    took = np.diff([t for t in times if t > begin])
    return {
        'fps': len(took) / float(took.sum()),
        'p95_ms': 1e3 * float(np.percentile(took, 95)),
        'max_ms': 1e3 * float(took.max()),
        'answered': newcomer.answered,
        'locked_out': newcomer.locked_out,
    }


@contextlib.contextmanager
def attacking(server: Server, attack: Attack | None) -> Iterator[None]:
    """Let another process attack meanwhile."""
    if attack is None:
        yield
        return
    spawn = multiprocessing.get_context('spawn')
    process = spawn.Process(target=attack, args=(server.at, server.token), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('run', nargs='?', default='dreamer4_debug')
    parser.add_argument('--seconds', type=float, default=12)
    parser.add_argument('--fps', type=float, default=20)
    parser.add_argument('--players', type=int, default=4)
    parser.add_argument('--only', nargs='*', help='names of attacks')
    parser.add_argument('--out', help='write the figures here as JSON')
    args = parser.parse_args()
    server = Server(args.run, args.players, args.fps)
    found: dict[str, Any] = {}
    try:
        time.sleep(10)  # the other views are compiled in the background
        print(
            f'{"attack":24}{"frames/s":>10}{"ratio":>7}{"p95 ms":>9}{"ratio":>7}{"locked out":>12}'
        )
        for attack in ATTACKS:
            name = attack.__name__
            if args.only and name not in args.only:
                continue
            quiet = measure(server, args.seconds)
            loud = measure(server, args.seconds, attack)
            fps, p95 = loud['fps'] / quiet['fps'], loud['p95_ms'] / quiet['p95_ms']
            newcomers = loud['answered'] + loud['locked_out']
            kept = fps >= FEWEST_FPS and p95 <= HIGHEST_P95 and not loud['locked_out']
            print(
                f'{name:24}{loud["fps"]:10.1f}{fps:7.2f}{loud["p95_ms"]:9.1f}{p95:7.2f}'
                f'{loud["locked_out"]:8.0f}/{newcomers:<3.0f}  {"" if kept else "missed"}',
                flush=True,
            )
            found[name] = {'quiet': quiet, 'beside': loud, 'fps_ratio': fps, 'p95_ratio': p95}
            time.sleep(2)
    finally:
        server.stop()
    if args.out:
        about = {'name': 'attacks', 'command': shlex.join(['python', *sys.argv]), **provenance()}
        save(args.out, {**about, 'run': args.run, 'attacks': found})


if __name__ == '__main__':
    main()
