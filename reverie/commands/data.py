"""`reverie data`: look into a dataset, check it, or make one of foreign recordings."""

import dataclasses
import pathlib
import re
from typing import Annotated, Literal, TypeAlias

import tyro

from reverie.commands.arguments import check_seed
from reverie.commands.terminal import command_line, say, show
from reverie.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Print a summary of a dataset."""

    path: tyro.conf.Positional[pathlib.Path]
    """Folder of the dataset."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Read every record of a dataset."""

    path: tyro.conf.Positional[pathlib.Path]
    """Folder of the dataset."""


@dataclasses.dataclass(frozen=True)
class Import:
    """Make a dataset of foreign recordings."""

    kind: tyro.conf.Positional[Literal['video', 'npz', 'minari', 'vpt']]
    """video: files or folders of frames, with or without actions. npz: episodes of Dreamer V2 or V3.
    minari: HDF5 of Minari. vpt: Minecraft recordings of OpenAI's contractors."""
    source: tyro.conf.Positional[pathlib.Path]
    """Folder or file of the recordings."""
    out: pathlib.Path
    """Folder of the dataset."""
    fps: float | None = None
    """Frames a second to bring videos to, by their times; by default their own."""
    size: str | None = None
    """Height and width to bring pictures to, e.g. 64x64; by default their own."""
    fit: Literal['crop', 'pad', 'stretch'] = 'crop'
    """How pictures of another aspect are brought to --size."""
    holdout: tuple[str, ...] = ()
    """Whole files to train nothing on: a share, e.g. 0.1, or names without suffix."""
    seed: int = 0
    """Seed of the share that is held out."""
    task: str = ''
    """Name of the task that is played."""
    name: str = ''
    """Name of the environment; by default the source's."""
    key: str = ''
    """Observation to take, where there are several (npz, minari)."""
    alignment: Literal['', 'arrival', 'departure'] = ''
    """Which action stands beside a frame (npz): the one that led to it (arrival), or the one chosen
    there (departure)."""
    lossy: bool = False
    """Keep pictures of less than 128 x 128 pixels too as JPEG, in about half the bytes."""
    overwrite: bool = False
    """Replace a dataset that is already there."""
    max_pixels: int | None = None
    """Most pixels of a foreign picture."""
    max_seconds: float | None = None
    """Longest wait for the next frame of a video."""
    max_gigabytes: float | None = None
    """Most memory that decoding a video may take."""


Action: TypeAlias = (
    Annotated[Inspect, tyro.conf.subcommand('inspect')]
    | Annotated[Verify, tyro.conf.subcommand('verify')]
    | Annotated[Import, tyro.conf.subcommand('import')]
)


@dataclasses.dataclass(frozen=True)
class Data:
    """Look into a dataset (inspect), check every record of it (verify), or make one (import)."""

    action: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Action]]


def run(args: Data) -> None:
    """Print the summary of a dataset, or the counts of a sound one, or write one."""
    from reverie.data import inspect, render, verify

    action = args.action
    if isinstance(action, Inspect):
        show(render(inspect(action.path)))
    elif isinstance(action, Verify):
        counts = [f'{n:,} {what}' for what, n in verify(action.path).items() if isinstance(n, int)]
        say(f'{action.path}: {", ".join(counts)}; all sound')
    else:
        bring_in(action)
        show(render(inspect(action.out)))
        say(f'wrote {action.out}')


def bring_in(args: Import) -> None:
    """Write a dataset of foreign recordings."""
    from reverie.data.importers import KINDS, Limits, Options, write
    from reverie.data.writing import refuse_existing
    from reverie.evaluation.results import provenance

    check_seed('seed', args.seed)
    refuse_existing(args.out, args.overwrite)  # hours of decoding would come first
    if args.fps is not None and not 0 < args.fps <= 1000:
        raise UserError(f'--fps {args.fps:g}: expected a rate above 0 and at most 1000')
    given: dict[str, float | None] = {
        'pixels': args.max_pixels,
        'seconds': args.max_seconds,
        'gigabytes': args.max_gigabytes,
    }
    for limit, value in given.items():
        if value is not None and not 0 < value < 1e15:
            raise UserError(f'--max-{limit} {value:g}: expected a number above 0')
    default = Limits()
    gigabytes = args.max_gigabytes or default.bytes / 2**30
    limits = Limits(
        pixels=args.max_pixels or default.pixels,
        seconds=args.max_seconds or default.seconds,
        bytes=int(gigabytes * 2**30),
    )
    options = Options(args.fps, size_of(args.size), args.fit, args.key, args.alignment, limits)
    name = args.name or args.source.absolute().stem
    importer = KINDS[args.kind](args.source, name, options, say)
    write(
        importer,
        args.kind,
        args.out,
        holdout=args.holdout,
        seed=args.seed,
        task=args.task,
        overwrite=args.overwrite,
        lossy=args.lossy,
        facts={'command': command_line(), 'source': args.source.name, **provenance()},
    )


def size_of(text: str | None) -> tuple[int, int] | None:
    """'64x96' -> (64, 96); raises UserError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r'(\d{1,4})x(\d{1,4})', text)
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(size) < 1:
        raise UserError(f'--size {text}: expected HEIGHTxWIDTH in pixels, e.g. 64x64')
    return size
