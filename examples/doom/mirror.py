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


def main(args: Sequence[str]) -> None:
    """Mirror the clips that the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('clips', type=pathlib.Path)
    parser.add_argument('--held-out', nargs='*', default=['MAP10'], help='clips to leave alone')
    options = parser.parse_args(args)
    clips = sorted(options.clips.glob('*.mp4'))
    if not clips:
        raise UserError(f'{options.clips}: expected mp4 files that render.py made')
    for clip in clips:
        if clip.stem.endswith(SUFFIX) or clip.stem in options.held_out:
            continue
        target = clip.with_stem(clip.stem + SUFFIX)
        with av.open(str(clip)) as container:
            frames = np.stack([f.to_ndarray(format='rgb24') for f in container.decode(video=0)])
        actions = np.load(clip.with_suffix('.actions.npy'), allow_pickle=False)
        np.save(target.with_suffix('.actions.npy'), swapped(actions))
        write(target, mirrored(frames))
        print(f'{target}: {len(frames)} frames')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f'error: {error}')
