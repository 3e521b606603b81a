"""Play of a run over a real socket: frames per second, delay from key to frame, memory, and a soak.

    python benchmarks/play.py runs/demo-breakout --out results/bench/play_demo_cpu.json
    python benchmarks/play.py runs/demo-breakout --soak 60

Starts `reverie play` as a process of its own. The first form plays for a minute as a person with
the agent's skill would (keys are the likeliest action of the frame just seen, so that episodes
last; R at game over), then at full speed until 10,000 frames have come. The delay of a key counts
from sending it to receiving the first frame that obeys it; keys that a new episode answers are left
out and counted. The second form lets clients connect, stall and vanish, and measures the memory and
files they leave behind.
"""

import argparse
import json
import pathlib
import random
import re
import shlex
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from reverie.evaluation.results import provenance, save
from reverie.serve.messages import unpack


class Server:
    """Process of `reverie play`, and measurements of it."""

    def __init__(self, run: str, players: int, fps: float) -> None:
        begin = time.monotonic()
        command = [sys.executable, '-u', '-m', 'reverie.cli', 'play', run]
        command += ['--port', '0', '--no-browser']
        command += ['--players', str(players), '--fps', str(fps)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(line, end='', flush=True)
            if found := re.search(r'http://(\S+)/\?token=(\S+)', line):
                self.at, self.token = found.groups()
                break
        else:
            raise SystemExit('reverie play did not start')
        self.start_s = time.monotonic() - begin

    def join(self) -> ClientConnection:
        return connect(f'ws://{self.at}/play?token={self.token}', max_size=None, close_timeout=0.2)

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f'http://{self.at}/status?token={self.token}') as answer:
            status: dict[str, Any] = json.load(answer)
            return status

    def rss(self) -> float:
        """Resident megabytes."""
        with open(f'/proc/{self.process.pid}/status') as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS')) / 1024

    def files(self) -> int:
        return len(list(pathlib.Path(f'/proc/{self.process.pid}/fd').iterdir()))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def frames(ws: ClientConnection) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield the headers of frames as they come, with the time."""
    for message in ws:
        if isinstance(message, bytes):
            yield unpack(message)[0], time.monotonic()


def play(
    server: Server, seconds: float, key_every: float = 0.25
) -> tuple[int, list[float], int, float]:
    """Play for some seconds; return (frames, delays [s], keys left out, seconds)."""
    with server.join() as ws:
        source = frames(ws)
        header, begin = next(source)
        count = number = left_out = 0
        sent: dict[int, tuple[float, int]] = {}
        delays = []
        pressed = begin
        for header, now in source:
            count += 1
            for i in [i for i in sent if i <= header['id']]:
                then, epoch = sent.pop(i)
                if epoch == header['epoch']:
                    delays.append(now - then)
                else:
                    left_out += 1
            if now - begin > seconds:
                break
            if header['over']:
                ws.send('{"type": "reset"}')  # a new start at once instead of after a moment
            elif now - pressed > key_every * random.uniform(0.5, 1.5):
                number, pressed = number + 1, now
                sent[number] = (time.monotonic(), header['epoch'])
                action = int(np.argmax(header['probs']))
                ws.send(json.dumps({'type': 'act', 'action': action, 'id': number}))
        return count, delays, left_out, now - begin


def memory(server: Server, total: int, every: int = 1000) -> tuple[list[float], float]:
    """Let the agent play `total` frames at the highest pace; return resident MB after each `every`
    frames, and frames per second.
    """
    seen: list[float] = []
    count = 0
    with server.join() as ws:
        ws.send(json.dumps({'type': 'set', 'field': 'pace', 'value': 120.0}))
        ws.send(json.dumps({'type': 'set', 'field': 'by_agent', 'value': True}))
        begin = time.monotonic()
        for header, now in frames(ws):
            count += 1
            if header['over']:
                ws.send('{"type": "reset"}')
            if count % every == 0:
                seen.append(round(server.rss(), 1))
                rate = count / (now - begin)
                print(f'{count:6} frames  {seen[-1]:.1f} MB  {rate:.0f} frames/s', flush=True)
            if count >= total:
                return seen, count / (now - begin)
    raise SystemExit('reverie play closed the connection')


def upgrade(at: str, token: str) -> bytes:
    """Request that opens a socket, for clients that are not one."""
    lines = (
        f'GET /play?token={token} HTTP/1.1',
        f'Host: {at}',
        'Upgrade: websocket',
        'Connection: Upgrade',
        'Sec-WebSocket-Version: 13',
        'Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==',
        '',
        '',
    )
    return '\r\n'.join(lines).encode()


def raw(server: Server) -> socket.socket:
    """Open a client that sends its request and never reads."""
    host, port = server.at.rsplit(':', 1)
    client = socket.create_connection((host, int(port)))
    client.sendall(upgrade(server.at, server.token))
    return client


def soak(server: Server, seconds: float) -> dict[str, Any]:
    """Let clients connect, stall, talk nonsense and vanish; return what is left of them."""
    rng, begin = random.Random(0), time.monotonic()
    open_: list[socket.socket] = []
    made, before = 0, None
    while time.monotonic() - begin < seconds:
        # the cost of the first clients is not growth
        if before is None and time.monotonic() - begin > seconds / 6:
            before = (server.rss(), server.files())
        made += 1
        client = raw(server)
        open_.append(client)
        if rng.random() < 0.3:
            client.sendall(bytes(rng.randrange(256) for _ in range(rng.randrange(200))))
        if len(open_) > 12:
            leaving = open_.pop(rng.randrange(len(open_)))
            if rng.random() < 0.5:  # vanish as a killed process does
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            leaving.close()
        time.sleep(0.02)
    for client in open_:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        client.close()
    time.sleep(1.0)
    left = server.status()['players']
    assert before is not None
    with server.join() as ws:  # it still plays
        next(frames(ws))
    time.sleep(1.0)
    return {
        'seconds': seconds, 'clients': made, 'players_left_after_1s': left,
        'rss_mb': {'early': round(before[0], 1), 'end': round(server.rss(), 1)},
        'files': {'early': before[1], 'end': server.files()},
    }  # fmt: skip


def film(server: Server, path: str, count: int, scale: int = 16, gap: int = 8) -> None:
    """Record `count` frames of the dream (left) beside the game (right), played by the agent, as a
    GIF.
    """
    panels = []
    with server.join() as ws:
        for field, value in (('by_agent', True), ('view', 'both')):
            ws.send(json.dumps({'type': 'set', 'field': field, 'value': value}))
        for message in ws:
            if not isinstance(message, bytes):
                continue
            header, pictures = unpack(message)
            if header['view'] != 'both' or len(pictures) < 2:
                continue
            shape = (header['pictures'][0]['h'], header['pictures'][0]['w'], 3)
            dream, game = (np.frombuffer(x, np.uint8).reshape(shape) for x in pictures)
            dream, game = (x.repeat(scale, 0).repeat(scale, 1) for x in (dream, game))
            between = np.full((len(dream), gap, 3), 255, np.uint8)
            panels.append(Image.fromarray(np.concatenate([dream, between, game], 1)))
            if len(panels) == count:
                break
    panels[0].save(path, save_all=True, append_images=panels[1:], duration=100, loop=0)
    print(f'wrote {path}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('run')
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--frames', type=int, default=10_000, help='frames to measure memory over')
    parser.add_argument('--fps', type=float, default=30)
    parser.add_argument('--players', type=int, default=2)
    parser.add_argument('--soak', type=float, help='seconds of misbehaving clients instead')
    parser.add_argument('--gif', help='only record the dream beside the game, as a GIF here')
    parser.add_argument('--out', help='write the figures here as JSON')
    args = parser.parse_args()
    server = Server(args.run, args.players, args.fps)
    record = {
        'name': 'play',
        'command': shlex.join(['python', *sys.argv]),
        **provenance(),
        'run': args.run,
        'players': args.players,
        'pace': args.fps,
        'start_seconds': round(server.start_s, 1),
    }
    try:
        if args.gif:
            film(server, args.gif, 120)
            return
        if args.soak:
            record |= {'name': 'soak', 'soak': soak(server, args.soak)}
        else:
            time.sleep(20)  # the other views are compiled in the background
            count, delays, left_out, seconds = play(server, args.seconds)
            ms = 1e3 * np.array(delays)
            record |= {
                'seconds': round(seconds, 1),
                'fps': count / seconds,
                'key_to_frame_ms': {
                    'p50': float(np.median(ms)),
                    'p95': float(np.percentile(ms, 95)),
                    'max': float(ms.max()),
                    'keys': len(ms),
                    'left_out': left_out,
                },
            }
            print(json.dumps({k: record[k] for k in ('fps', 'key_to_frame_ms')}), flush=True)
            seen, rate = memory(server, args.frames)
            record['memory'] = {'every_frames': 1000, 'rss_mb': seen, 'fps': rate}
    finally:
        server.stop()
    print(json.dumps(record, indent=1))
    if args.out:
        save(args.out, record)


if __name__ == '__main__':
    main()
