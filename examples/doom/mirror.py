"""Mirror every clip of a folder: left is right, in the picture and in the actions beside it.

    python examples/doom/mirror.py clips

Writes MAP_mirrored.mp4 and its actions for each MAP.mp4 that is not held out. Twice the turns, and
as many to the left as to the right. The status bar keeps its letters: it is not mirrored.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import av
import numpy as np
import script
from encode import write
from jaxtyping import Int, UInt8
from render import TURNS

from reverie.errors import UserError

BAR = 168 / 200  # rows of the screen above the status bar
SUFFIX = '_mirrored'


def mirrored(frames: UInt8[np.ndarray, 'T h w 3']) -> UInt8[np.ndarray, 'T h w 3']:
    """Frames seen in a mirror, with the status bar as it was."""
    view = round(BAR * frames.shape[1])
    return np.concatenate([frames[:, :view, ::-1], frames[:, view:]], 1)


def swapped(actions: Int[np.ndarray, 'T 4']) -> Int[np.ndarray, 'T 4']:
    """Actions with left and right exchanged: those of strafe and turn."""
    found = actions.copy()
    found[:, 1] = 2 - actions[:, 1]
    found[:, 2] = len(TURNS) - 1 - actions[:, 2]
    return found


def mirror_all(clips: pathlib.Path, held_out: Sequence[str]) -> None:
    """Mirror every clip of a folder that is not held out and has no mirrored one yet."""
    found = sorted(clip for clip in clips.glob('*.mp4') if not clip.name.startswith('.'))
    if not found:
        raise UserError(f'{clips}: expected mp4 files that render.py made')
    for clip in found:
        target = clip.with_stem(clip.stem + SUFFIX)
        if clip.stem.endswith(SUFFIX) or clip.stem in held_out or target.exists():
            continue
        with av.open(str(clip)) as container:
            frames = np.stack([f.to_ndarray(format='rgb24') for f in container.decode(video=0)])
        actions = np.load(clip.with_suffix('.actions.npy'), allow_pickle=False)
        np.save(target.with_suffix('.actions.npy'), swapped(actions))
        part = target.with_name(f'.{target.name}')
        write(part, mirrored(frames))
        part.replace(target)
        print(f'{target.name}: {len(frames)} frames', flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('clips', type=pathlib.Path, help='folder that render.py filled')
    parser.add_argument('--held-out', nargs='*', default=['MAP10'], help='clips to leave alone')
    options = parser.parse_args(arguments)
    return script.run('mirror.py', lambda: mirror_all(options.clips, options.held_out))


if __name__ == '__main__':
    sys.exit(main())
