"""Replay the demos in Freedoom's WADs: a video and the action of each frame, played by people.

    python examples/doom/render.py --packages .doom --out clips

Writes for each demo MAP.mp4 (160 x 120, 17.5 frames a second) and MAP.actions.npy [T, 4], and one
actions.json that declares the four components. Row n of the actions was chosen while frame n was on
screen: it leads to frame n + 1.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import fetch
import numpy as np
import script
from jaxtyping import Int

from reverie.errors import UserError

HZ = 35  # tics a second
VERSION = 109  # Doom 1.9; other formats have other headers
HEADER = 13
END = 0x80
FIRE = 1  # bit of the buttons
STILL = HZ // 2  # tics that are kept after the last movement
AT_ONCE = 2
PATIENCE = 1800  # seconds; the longest demo takes two minutes

TURNS = ['hard left', 'left', 'slight left', 'none', 'slight right', 'right', 'hard right']
EDGES = (-9.5, -3.5, -0.5, 0.5, 3.5, 9.5)  # between the classes of -turn, summed over a pair
COMPONENTS = [
    {
        'name': 'move',
        'kind': 'discrete',
        'choices': ['back', 'none', 'forward'],
        'rest': 'none',
        'keys': {'forward': ['w', 'ArrowUp'], 'back': ['s', 'ArrowDown']},
    },
    {
        'name': 'strafe',
        'kind': 'discrete',
        'choices': ['left', 'none', 'right'],
        'rest': 'none',
        'keys': {'left': ['a'], 'right': ['d']},
    },
    {
        'name': 'turn',
        'kind': 'discrete',
        'choices': TURNS,
        'rest': 'none',
        'keys': {'hard left': ['ArrowLeft'], 'hard right': ['ArrowRight']},
        'camera': 'x',
    },
    {
        'name': 'fire',
        'kind': 'discrete',
        'choices': ['none', 'fire'],
        'rest': 'none',
        'keys': {'fire': ['x', ' ']},
    },
]
REST = (1, 1, 3, 0)

# The engine calls `cap_videocommand` with the size it captures; it ignores most wishes about it.
CONFIG = f"""cap_fps {HZ}
cap_soundcommand "cat > /dev/null"
cap_videocommand "sh ./encode.sh %w %h"
cap_muxcommand "true"
cap_wipescreen 0
render_wipescreen 0
hudadd_demoprogressbar 0
use_fullscreen 0
"""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Recording of one player: the header as it was; forward, side, turn and buttons of each tic.

    Forward, right and *left* are positive.
    """

    wad: pathlib.Path
    lump: str
    map: str
    header: bytes
    tics: Int[np.ndarray, 'n 4']

    def lmp(self) -> bytes:
        """Bytes of a demo file that the engine replays."""
        return self.header + self.tics.astype(np.uint8).tobytes() + bytes([END])


def lumps(wad: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of a WAD in its order; raises UserError if it is none."""
    if len(wad) < 12 or wad[:4] not in (b'IWAD', b'PWAD'):
        raise UserError(f'expected a WAD, which begins with IWAD or PWAD, got {wad[:4]!r}')
    count, directory = struct.unpack_from('<ii', wad, 4)
    if count < 0 or directory < 12 or directory + 16 * count > len(wad):
        raise UserError(f'WAD of {len(wad)} bytes: its directory of {count} lumps is cut off')
    found = []
    for start, size, name in struct.iter_unpack('<ii8s', wad[directory : directory + 16 * count]):
        if start < 0 or size < 0 or start + size > len(wad):
            raise UserError(f'WAD of {len(wad)} bytes: lump {name!r} is cut off')
        found.append((name.rstrip(b'\0').decode('ascii', 'replace'), wad[start : start + size]))
    return found


def parse(lump: bytes) -> Int[np.ndarray, 'n 4']:
    """Tics of a demo up to its end mark; raises UserError unless one player made it in Doom 1.9."""
    if len(lump) <= HEADER or lump[0] != VERSION:
        raise UserError(f'expected a demo of version {VERSION}, got {lump[:1].hex() or "nothing"}')
    if (players := sum(map(bool, lump[9:HEADER]))) != 1:
        raise UserError(f'expected a demo of one player, got one of {players}')
    body = np.frombuffer(lump[HEADER:], np.uint8)
    rows = body[: len(body) // 4 * 4].reshape(-1, 4)
    ends = np.flatnonzero(body[::4] == END)
    if not len(ends):
        raise UserError(f'demo of {len(lump)} bytes: no end mark')
    rows = rows[: ends[0]]
    tics: np.ndarray = rows.view(np.int8).astype(np.int32)
    tics[:, 3] = rows[:, 3]
    return tics


def trimmed(tics: Int[np.ndarray, 'n 4']) -> Int[np.ndarray, 'm 4']:
    """Tics without the tail after the player's death, where nothing moves."""
    moves = np.flatnonzero(tics[:, :3].any(1))
    return tics[: moves[-1] + 1 + STILL] if len(moves) else tics[:0]


def merged(tics: Int[np.ndarray, 'n 4']) -> Int[np.ndarray, 'm 4']:
    """Choices of the four components for each pair of tics; an odd last tic is dropped."""
    pairs = tics[: len(tics) // 2 * 2].reshape(-1, 2, 4)
    forward, side, turn, _ = pairs.sum(1).T
    fire = (pairs[..., 3] & FIRE).any(1)
    columns = np.sign(forward) + 1, np.sign(side) + 1, np.digitize(-turn, EDGES), fire
    return np.stack(columns, 1).astype(np.int32)


def sidecar(tics: Int[np.ndarray, 'n 4']) -> Int[np.ndarray, 'm 4']:
    """Actions by the frame they were chosen on.

    Pair n of the tics ends with frame n; so it was chosen on frame n - 1, and nothing on the last.
    """
    return np.concatenate([merged(tics)[1:], np.array([REST], np.int32)])


def demos(wad: pathlib.Path) -> list[Demo]:
    """Demos in a WAD without their still tails; one that cannot be used is said and left out."""
    contents = lumps(wad.read_bytes())
    numbered = any(name == 'MAP01' for name, _ in contents)  # Doom II: maps without episodes
    found = []
    for name, lump in contents:
        if not (name.startswith('DEMO') and name[4:].isdigit()):
            continue
        try:
            tics = parse(lump)
        except UserError as error:
            print(f'{wad.name} {name} is left out: {error}', flush=True)
            continue
        where = f'MAP{lump[3]:02d}' if numbered else f'E{lump[2]}M{lump[3]}'
        found.append(Demo(wad, name, where, lump[:HEADER], trimmed(tics)))
    return found


def render(demo: Demo, root: pathlib.Path, out: pathlib.Path) -> float:
    """Replay one demo into its two files; -> seconds it took.

    Raises UserError unless the engine drew one frame for each tic. The video appears last: a folder
    that was left half done has no video without its actions.
    """
    began = time.monotonic()
    root, out = root.absolute(), out.absolute()
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = pathlib.Path(scratch_name)
        encoder = pathlib.Path(__file__).with_name('encode.py').absolute()
        # The engine's libraries are not for Python.
        words = ['env', '-u', 'LD_LIBRARY_PATH', sys.executable, str(encoder)]
        script = f'exec {shlex.join(words)} "$1" "$2" clip.mp4\n'
        (scratch / 'encode.sh').write_text(script)
        (scratch / 'engine.cfg').write_text(CONFIG)  # the engine rewrites it: one for each demo
        (scratch / 'demo.lmp').write_bytes(demo.lmp())
        env = {
            **os.environ,
            'SDL_VIDEODRIVER': 'dummy',
            'SDL_AUDIODRIVER': 'dummy',
            'DOOMWADPATH': f'{root}/usr/share/dsda-doom:{root}/{fetch.WADS}',
            'HOME': scratch_name,
            'XDG_RUNTIME_DIR': scratch_name,
            'LD_LIBRARY_PATH': fetch.libraries(root),
        }
        command = [root / fetch.ENGINE, '-vidmode', 'sw', '-nomouse', '-config', 'engine.cfg']
        command += ['-iwad', demo.wad.absolute(), '-timedemo', 'demo.lmp', '-viddump', 'unused.mkv']
        with open(scratch / 'log', 'wb') as log:
            try:
                subprocess.run(
                    [str(word) for word in command],
                    cwd=scratch,
                    env=env,
                    timeout=PATIENCE,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            except subprocess.TimeoutExpired:
                raise UserError(f'{demo.map}: the engine took over {PATIENCE} s') from None
        count = scratch / 'clip.mp4.count'
        arrived = int(count.read_text()) if count.exists() else 0
        if arrived != len(demo.tics):
            last = (scratch / 'log').read_text('utf-8', 'replace').strip().splitlines()[-1:]
            told = f'; the engine said: {last[0]}' if last else ''
            raise UserError(f'{demo.map}: {len(demo.tics)} tics, but {arrived} frames{told}')
        np.save(out / f'{demo.map}.actions.npy', sidecar(demo.tics), allow_pickle=False)
        part = out / f'.{demo.map}.mp4'
        part.write_bytes((scratch / 'clip.mp4').read_bytes())
        part.replace(out / f'{demo.map}.mp4')
    return time.monotonic() - began


def render_all(packages: pathlib.Path, out: pathlib.Path) -> None:
    """Render every demo that `out` has not yet, longest first, `AT_ONCE` at a time."""
    root = packages / 'root'
    if not root.is_dir():
        raise UserError(f'{packages} has no packages; expected a folder that fetch.py has filled')
    fetch.check(root)
    found = [
        demo for wad in sorted((root / fetch.WADS).glob('freedoom?.wad')) for demo in demos(wad)
    ]
    if len(names := [demo.map for demo in found]) > len(set(names)):
        raise UserError(f'expected one demo for each map, got {", ".join(names)}')
    out.mkdir(parents=True, exist_ok=True)
    declared = {'components': COMPONENTS, 'task': 'doom'}
    (out / 'actions.json').write_text(json.dumps(declared, indent=2) + '\n')
    found.sort(key=lambda demo: -len(demo.tics))
    todo = [demo for demo in found if not (out / f'{demo.map}.mp4').exists()]
    seconds = sum(len(demo.tics) for demo in todo) / HZ
    print(f'{len(found)} demos, {len(todo)} of them to render: {seconds:.0f} s of play', flush=True)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {pool.submit(render, demo, root, out): demo for demo in todo}
        for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            demo = jobs[job]
            try:
                took = job.result()
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise
            frames = len(demo.tics) // 2
            print(f'{done}/{len(todo)} {demo.map}: {frames} frames, {took:.0f} s', flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    path = pathlib.Path
    parser.add_argument(
        '--packages', type=path, default=path('.doom'), help='where fetch.py put them'
    )
    parser.add_argument('--out', type=path, default=path('clips'), help='folder (default: clips)')
    options = parser.parse_args(arguments)

    def work() -> None:
        render_all(options.packages, options.out)
        print(f'clips in {options.out}')

    return script.run('render.py', work)


if __name__ == '__main__':
    sys.exit(main())
