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


def held(rng: np.random.Generator, length: int, choices: int, mean: int) -> np.ndarray:
    """Choices that people hold for `mean` steps or so, the first of them most of the time."""
    changes = rng.random(length) < 1 / mean
    drawn = np.where(rng.random(length) < 0.5, 0, rng.integers(0, choices, length))
    return drawn[np.maximum.accumulate(np.where(changes, np.arange(length), 0))]


def texture(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """A world that is smooth enough to be seen moving."""
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(rng.random(shape), 1.0, mode='wrap')
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def walk_about(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Views [T, 24, 32, 1] of a large texture under a status bar, and actions (turn, pitch) by
    arrival.
    """
    rng = np.random.default_rng(seed)
    world = texture(rng, 256, 256)
    turn = held(rng, length, 5, 3)
    turn = np.where(turn == 0, 2, turn - 1 + (turn > 2))  # mostly straight on
    turn = np.clip(turn, 0, 4)
    pitch = rng.integers(-1, 2, length)
    turn[0], pitch[0] = 2, 0
    x = np.cumsum(turn - 2)
    y = np.cumsum(pitch)
    frames = np.stack(
        [np.roll(world, (-b, -a), (0, 1))[:24, :32] for a, b in zip(x, y, strict=True)]
    )
    frames[:, 20:] = 0.3
    obs = (frames * 255).astype(np.uint8)[..., None]
    return obs, np.stack([turn, pitch / 4], 1)
