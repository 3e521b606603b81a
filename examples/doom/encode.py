"""Encode raw RGB frames from standard input as a small video; the engine starts this.

    encode.py WIDTH HEIGHT OUT.mp4

Frames arrive at 35 a second, the first one black. Frame n of the video is frame 2n + 1 of the
engine, area-averaged to 160 x 120; beside it, OUT.mp4.count gets the number of frames that arrived.
"""

import pathlib
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np

SIZE = (160, 120)
RATE = Fraction(35, 2)
# A frame is a picture of its own every ten, so that windows decode from anywhere at little cost;
# without B-frames the first timestamp is 0.
CODEC = {'crf': '10', 'g': '10', 'bf': '0', 'preset': 'medium', 'threads': '1'}


def frames(stream: BinaryIO, width: int, height: int) -> Iterator[np.ndarray]:
    """Whole frames [h, w, 3] of a stream; a rest shorter than a frame is dropped."""
    while len(data := stream.read(width * height * 3)) == width * height * 3:
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def write(out: pathlib.Path, pictures: Iterable[np.ndarray]) -> None:
    """Write pictures [h, w, 3] of any size as the frames of a video."""
    with av.open(str(out), 'w', format='mp4') as container:
        video = container.add_stream('libx264', rate=RATE, options=CODEC)
        video.width, video.height = SIZE
        video.pix_fmt = 'yuv420p'
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame = frame.reformat(*SIZE, format='yuv420p', interpolation='AREA')
            frame.pts, frame.time_base = number, 1 / RATE
            container.mux(video.encode(frame))
        container.mux(video.encode())


def encode(stream: BinaryIO, width: int, height: int, out: pathlib.Path) -> int:
    """Write every second frame of a stream to `out`; -> the number of frames that arrived."""
    count = 0

    def wanted() -> Iterator[np.ndarray]:
        nonlocal count
        for picture in frames(stream, width, height):
            if count % 2:
                yield picture
            count += 1

    write(out, wanted())
    return count


if __name__ == '__main__':
    target = pathlib.Path(sys.argv[3])
    arrived = encode(sys.stdin.buffer, int(sys.argv[1]), int(sys.argv[2]), target)
    target.with_name(f'{target.name}.count').write_text(str(arrived))
