"""Program that decodes one video, or a folder of frames, in a process of its own.

It imports nothing of the package: a process that may take little memory has no room for JAX. A
request comes as JSON on standard input (see `decoding.Decoder`); answers go to standard output, each
a byte that says what it is, its length and its bytes: J (JSON), T (times, float64), F (a frame) or
E (one line: what is wrong; the last answer).
"""

import json
import math
import os
import resource
import struct
import sys
from collections.abc import Iterator
from typing import Any

HEAD = struct.Struct('>cQ')
# What FFmpeg may take a file for: nothing that names other files or addresses, as playlists do.
FORMATS = 'mov,mp4,matroska,webm,avi,gif,mpeg,mpegvideo,mpegts,ogg,flv,asf,h264,hevc,m4v'
THREADS = 4
# Outline of the cursor in a square of 16, as of a screen of 720 rows.
ARROW = ((0, 0), (0, 13), (3, 10), (5, 15), (7, 14), (5, 9), (9, 9))


class Unreadable(Exception):
    """Something that is wrong with the video, as the end of a line that begins with its name."""


def answer(kind: bytes, data: bytes) -> None:
    sys.stdout.buffer.write(HEAD.pack(kind, len(data)))
    sys.stdout.buffer.write(data)


def check_pixels(height: int, width: int, request: dict[str, Any]) -> None:
    if height * width > request['pixels']:
        raise Unreadable(
            f'pictures of {height}x{width}, expected at most {request["pixels"]:,} pixels'
        )


def video_frames(request: dict[str, Any]) -> Iterator[tuple[float | None, Any]]:
    """Yield (seconds, PyAV's frame) of a video file in the order they are shown."""
    import av

    os.environ.setdefault('AV_LOG_FORCE_NOCOLOR', '1')
    av.logging.set_level(av.logging.PANIC)
    whitelist = {'protocol_whitelist': 'file', 'format_whitelist': FORMATS}
    with av.open(f'file:{request["path"]}', options=whitelist) as container:
        if not container.streams.video:
            raise Unreadable('has no video, expected one')
        stream = container.streams.video[0]
        context = stream.codec_context
        check_pixels(context.height, context.width, request)
        context.options = {'max_pixels': str(request['pixels'])}
        context.thread_type = 'AUTO'
        context.thread_count = min(THREADS, os.cpu_count() or 1)
        packets = 0
        for packet in container.demux(stream):
            packets += packet.size > 0
            for frame in packet.decode():
                check_pixels(frame.height, frame.width, request)
                yield frame.time, frame
        # Headers of MP4 say how many there are; those of other containers only roughly.
        if container.format.name.startswith('mov') and packets < stream.frames:
            raise Unreadable(f'has {packets} of its {stream.frames} frames, expected a whole file')


def upright(frame: Any) -> Any:
    """Return the picture of PyAV's frame as it is to be shown: phones store it turned."""
    import numpy as np
    from PIL import Image

    pixels = frame.to_ndarray(format='rgb24')
    turns = round(getattr(frame, 'rotation', 0) / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels)


def open_picture(path: str, request: dict[str, Any]) -> Any:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the request has its own limit
    picture = Image.open(path, formats=('PNG', 'JPEG'))
    check_pixels(picture.height, picture.width, request)
    return picture


def pictures(request: dict[str, Any]) -> Iterator[tuple[float | None, Any]]:
    """Yield (seconds, something with height and width) for all frames of the request."""
    if not request['files']:
        yield from video_frames(request)
        return
    for i, path in enumerate(request['files']):
        try:
            with open_picture(path, request) as picture:
                if request['do'] == 'read':
                    picture.load()
                yield float(i), picture
        except Unreadable as error:
            raise Unreadable(f'{os.path.basename(path)}: {error}') from error
        except (OSError, ValueError, SyntaxError) as error:
            raise Unreadable(f'{os.path.basename(path)}: is not a PNG or JPEG file') from error


def counted(request: dict[str, Any]) -> Iterator[tuple[int, float | None, Any]]:
    for i, (time, picture) in enumerate(pictures(request)):
        if i >= request['frames']:
            raise Unreadable(f'more than {request["frames"]:,} frames, expected at most so many')
        yield i, time, picture


def probe(request: dict[str, Any]) -> None:
    """Answer with the time of every frame (NaN if not known), and where the size changes."""
    times: list[float] = []
    sizes: list[list[int]] = []
    for i, time, picture in counted(request):
        times.append(math.nan if time is None else time)
        turned = round(getattr(picture, 'rotation', 0) / 90) % 2
        size = (picture.height, picture.width)[:: -1 if turned else 1]
        if not sizes or sizes[-1][1:] != [*size]:
            sizes.append([i, *size])
        if i % 1000 == 0:
            beat()
    answer(b'J', json.dumps({'sizes': sizes}).encode())
    answer(b'T', struct.pack(f'={len(times)}d', *times))


def beat() -> None:
    """Tell that there is progress."""
    answer(b'J', b'{}')
    sys.stdout.buffer.flush()


def fitted(picture: Any, size: tuple[int, int], fit: str) -> Any:
    """Return a picture of another size by area averaging."""
    from PIL import Image

    height, width = size
    if picture.size == (width, height):
        return picture
    scale = (max if fit == 'crop' else min)(width / picture.width, height / picture.height)
    if fit == 'stretch':
        return picture.resize((width, height), Image.Resampling.BOX)
    if fit == 'crop':
        w, h = width / scale, height / scale
        left, top = (picture.width - w) / 2, (picture.height - h) / 2
        return picture.resize(
            (width, height), Image.Resampling.BOX, box=(left, top, left + w, top + h)
        )
    inner = (
        max(1, min(width, round(picture.width * scale))),
        max(1, min(height, round(picture.height * scale))),
    )
    whole = Image.new('RGB', (width, height))
    at = ((width - inner[0]) // 2, (height - inner[1]) // 2)
    whole.paste(picture.resize(inner, Image.Resampling.BOX), at)
    return whole


def draw_cursor(picture: Any, at: list[float]) -> None:
    """Draw an arrow whose tip is at [x, y] of a screen of 720 rows."""
    from PIL import ImageDraw

    scale = picture.height / 720
    outline = [((at[0] + x) * scale, (at[1] + y) * scale) for x, y in ARROW]
    ImageDraw.Draw(picture).polygon(outline, fill='white', outline='black')


def read(request: dict[str, Any]) -> None:
    """Answer with the frames whose `repeat` is not 0, at the size that is asked for."""
    import numpy as np

    repeat, size, cursor = request['repeat'], request['size'], request.get('cursor') or {}
    for i, _, shot in counted(request):
        if repeat is not None and (i >= len(repeat) or not repeat[i]):
            if i % 1000 == 0:
                beat()
            continue
        picture = upright(shot) if hasattr(shot, 'to_ndarray') else shot.convert('RGB')
        if str(i) in cursor:
            draw_cursor(picture, cursor[str(i)])
        pixels = np.asarray(fitted(picture, size, request['fit']) if size else picture)
        answer(b'F', pixels.tobytes())


def main() -> None:
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (request['bytes'], request['bytes']))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        (probe if request['do'] == 'probe' else read)(request)
    except Unreadable as error:
        answer(b'E', str(error).encode(errors='backslashreplace'))
    except MemoryError:
        answer(b'E', f'takes more than {request["bytes"]:,} bytes to decode'.encode())
    except (OSError, ValueError, EOFError) as error:  # FFmpeg's errors are of these kinds, too
        what = str(getattr(error, 'strerror', None) or type(error).__name__)
        answer(b'E', f'cannot be decoded ({what:.80}), expected a sound video'.encode())
    except Exception as error:  # a decoder's own mistakes must be one line as well
        answer(b'E', f'cannot be decoded ({type(error).__name__}: {error!s:.80})'.encode())
    sys.stdout.buffer.flush()


if __name__ == '__main__':
    main()
