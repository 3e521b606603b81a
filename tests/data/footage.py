"""Counter videos: frame n shows the sum of the actions up to n, so any shift in time shows."""

import fractions
import json
import pathlib

import numpy as np

from reverie import cli
from reverie.data import Episodes
from reverie.data.records import Record

LEVEL = 4  # brightness of 1, so that colours may be rounded
SIZE = (32, 48)


def bring(kind: str, source: object, out: pathlib.Path, *options: object) -> Episodes:
    """Import by the command line and open what it wrote."""
    words = ['data', 'import', kind, source, '--out', out, *options]
    cli.dispatch(list(map(str, words)))
    return Episodes(out)


def draw_actions(length: int, seed: int = 0, high: int = 3) -> np.ndarray:
    """Draw actions [length - 1] of 0 to high - 1; action n is chosen at frame n."""
    return np.random.default_rng(seed).integers(0, high, length - 1)


def counter(actions: np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frames [T, h, w, 3] that show the sum of the actions before each."""
    total = np.concatenate([[0], np.cumsum(actions)])
    assert total.max() * LEVEL < 256
    one = np.ones((1, *size, 3), np.uint8)
    return (total * LEVEL).astype(np.uint8)[:, None, None, None] * one


def read_counter(obs: np.ndarray) -> np.ndarray:
    """Frames [T, h, w, c] of uint8 -> the sums [T] that they show."""
    return np.round(obs.reshape(len(obs), -1).mean(-1) / LEVEL).astype(int)


def check_counter(
    record: Record, column: int | None = None, scale: float = 1, zero: float = 0
) -> None:
    """Every frame shows what the stored actions add up to.

    A stored value v of the column counts (v - zero) * scale.
    """
    action = record.action if column is None else record.action[:, column]
    moved = (action[1:].astype(float) - zero) * scale
    assert len(moved) and len(np.unique(moved)) > 1
    np.testing.assert_allclose(np.diff(read_counter(record.obs)), moved, atol=1e-4)


def encode_video(
    path: pathlib.Path,
    frames: np.ndarray,
    fps: float = 20,
    codec: str = 'libx264',
    times: np.ndarray | None = None,
) -> pathlib.Path:
    """Write a video whose colours are kept but for rounding; times: seconds of each frame."""
    import av

    form = {'libx264': 'yuv444p', 'mpeg4': 'yuv420p', 'libvpx': 'yuv420p'}[codec]
    options = {'libx264': {'qp': '0'}}.get(codec, {})
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, fractions.Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = form, options
        if codec != 'libx264':
            stream.bit_rate = 4_000_000
        if times is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, 'rgb24')
            if times is not None:
                picture.pts, picture.time_base = round(1000 * times[i]), fractions.Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_frames(folder: pathlib.Path, frames: np.ndarray) -> pathlib.Path:
    """Write a folder of PNG files, frame 10 after frame 9 by number only."""
    from PIL import Image

    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f'frame{i}.png')
    return folder


COUNT = {'name': 'count', 'kind': 'discrete', 'choices': ['none', 'one', 'two']}


def declare(folder: pathlib.Path, *components: dict, **more: object) -> None:
    """Write actions.json."""
    found = {'components': list(components or [COUNT]), **more}
    (folder / 'actions.json').write_text(json.dumps(found))


def write_lines(path: pathlib.Path, lines: list[dict]) -> pathlib.Path:
    path.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    return path
