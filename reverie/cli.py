"""The command line: reverie collect | data | train | eval | report | play | bench | doctor.

Heavy imports happen inside the commands, so that --help and a mistyped option answer at once.
"""

import ast
import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

from reverie.types import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota or a file takes no more


@dataclasses.dataclass(frozen=True)
class Collect:
    """Train PPO on a game, let its snapshots play, write the episodes as a dataset."""

    env: str
    """Environment, e.g. minatar/breakout."""
    kind: str = 'mixed'
    """random, medium, expert, or mixed (equal parts random, 25%, 50% and 100% of PPO's final
    return).
    """
    frames: float = 1e6
    """Frames to record."""
    out: pathlib.Path | None = None
    """Folder of the dataset; datasets/<env>-<kind> if not given."""
    ppo_frames: float | None = None
    """Frames that PPO trains on; if not given as many as are recorded, but at least what the game
    needs to be played well above chance."""
    seed: int = 0
    episodes: int = 128
    """Episodes that score PPO and the random player."""
    overwrite: bool = False
    """Replace a dataset that is already there."""
    env_options: tuple[str, ...] = ()
    """Options of the environment as name=value, e.g. sticky=0.0 protocol=gymnax."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train an agent, score it in the real environment, write the report.

    The same command continues.
    """

    config: Any
    """The experiment; every field can be changed, e.g. --config.dynamics-phase.steps 5000."""
    env: str
    """Environment, e.g. minatar/breakout."""
    out: pathlib.Path | None = None
    """Run folder; runs/<preset>-<env> if not given."""
    size: str | None = None
    """Of presets that have sizes, e.g. 12m; the default is the preset's own."""
    seed: int = 0
    seeds: int = 1
    """Agents trained in one program, with seeds seed, seed + 1, .."""
    from_: Annotated[str | None, tyro.conf.arg(name='from', metavar='RUN[:PHASE]')] = None
    """Begin with what another run has learnt; every phase not taken is trained. RUN: all phases it
    has finished. RUN:PHASE: those up to and with PHASE. RUN:PHASE,PHASE: others as well.
    RUN:PHASE+: PHASE is trained on, to the updates it has here. Seeds get their own models, or all
    that of a run with one seed."""
    from_groups: tuple[str, ...] = ()
    """With --from: take only the weights of these parameter groups, and train every phase."""
    keep_phase_ends: bool = True
    """Keep weights and optimiser at the end of each phase, for --from to begin there; about four
    times the disk.
    """
    episodes: int = 128
    """Evaluation episodes of each seed and read-out."""
    max_steps: int = 5000
    """Environment steps after which an evaluation episode is cut."""
    updates_per_call: int = 50
    """Gradient steps between two looks at the clock."""
    checkpoint_every_s: float = 120.0
    log_every_s: float = 5.0
    tensorboard: bool = False
    wandb: str | None = None
    """W&B project to log to as well; WANDB_MODE=offline needs no account."""
    results: pathlib.Path | None = None
    """Also write the scores as a results file, e.g. results/dreamer4/minatar_breakout.json."""


@dataclasses.dataclass(frozen=True)
class TrainRecorded(Train):
    __doc__ = Train.__doc__

    data: pathlib.Path | None = None
    """Dataset; datasets/<env>-mixed if not given."""
    label_fraction: float = 1.0
    """Share of the episodes whose actions are used; the others count as unlabelled video."""
    max_lost: float = 0.01
    """Share of the episodes that may be damaged; they are left out, with a warning. Beyond it
    nothing is trained.
    """


@dataclasses.dataclass(frozen=True)
class TrainPlayed(Train):
    __doc__ = Train.__doc__

    frames: float = 100_000
    """Frames that each seed plays, with those before the first update."""
    env_options: tuple[str, ...] = ()
    """Options of the environment as name=value, e.g. sticky=0.0 action_repeat=2."""
    export: pathlib.Path | None = None
    """Leave the replay of all seeds as a dataset here."""
    score_every: float = 0
    """Frames between two scores while training, which make the curve of the results; 0 for none."""
    score_episodes: int = 32
    """Sampled episodes of each such score and seed."""


@dataclasses.dataclass(frozen=True)
class Eval:
    """Score a run's agent in the real environment again."""

    run: tyro.conf.Positional[pathlib.Path]
    episodes: int = 128
    max_steps: int = 5000
    seed: int = 1000
    """Of the evaluation episodes."""
    results: pathlib.Path | None = None
    env_options: tuple[str, ...] = ()
    """Options that differ from those the agent learnt under, e.g. pays=success; the run keeps its
    own scores.
    """


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a run's report.html: scores, curves, reconstructions, dreams."""

    run: tyro.conf.Positional[pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Data:
    """Look into a dataset (inspect), or check every record of it (verify)."""

    action: tyro.conf.Positional[Literal['inspect', 'verify']]
    path: tyro.conf.Positional[pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed on this device: training (phases), or interactive play at the paper's shape
    (fps).
    """

    what: tyro.conf.Positional[Literal['phases', 'fps']] = 'phases'
    """phases: of a preset, and imagination with the cache against recomputing the context.

    fps: frames of play.
    """
    preset: str = 'dreamer4'
    """Of phases."""
    model: str = 'dreamer4-2b'
    """Of fps: dreamer4-2b, dreamer4-600m, dreamer4-200m or dreamer4-tiny, with random weights."""
    players: int = 1
    """Of fps: how many play at once."""
    frames: int = 200
    """Of fps: how many are timed."""
    steps: int = 4
    """Of fps: K, denoising steps of a frame."""
    softcap: float | None = None
    """Of fps: another soft cap of the attention's logits; 0 leaves it out."""
    attention: Literal['xla', 'tokamax', 'auto'] = 'xla'
    """Of fps: what computes attention."""
    out: pathlib.Path | None = None
    """Results file to write."""


@dataclasses.dataclass(frozen=True)
class Play:
    """Play inside an agent's dream, or beside it in the real game, in the browser."""

    agent: tyro.conf.Positional[str]
    """A run folder, or a preset to see with random weights."""
    env: str | None = None
    """Environment for a preset, e.g. minatar/asterix."""
    env_options: tuple[str, ...] = ()
    """Options of that environment as name=value."""
    seed: int = 0
    """Which of a run's seeds."""
    players: int = 2
    """Places; all players share one forward pass."""
    fps: float = 20.0
    """Frames per second that a page begins with."""
    host: str = '127.0.0.1'
    """Address to listen on; 0.0.0.0 lets other machines in, who still need the token of the printed
    address.
    """
    port: int = 8000
    """0 takes any free one."""
    allow_host: tuple[str, ...] = ()
    """Further names that this server is reached by, e.g. that of a proxy."""
    browser: bool = True
    """Open the page when it is ready."""
    steps: int | None = None
    """K, denoising steps of a frame to begin with, for agents that have a choice."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say which device is used and how fast it is, and what is installed."""


def options_of(pairs: Sequence[str]) -> dict[str, Any]:
    """'sticky=0.0' -> {'sticky': 0.0}. Raises UserError for what is not name=value."""
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition('=')
        if not equals or not name:
            raise UserError(f'environment option {pair!r}: expected name=value')
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


def whole(name: str, value: float | int) -> int:
    """1e6 -> 1000000. Raises UserError unless it is a positive whole number."""
    if value < 1 or value != int(value):
        raise UserError(f'--{name} {value:g}: expected a positive whole number')
    return int(value)


def slug(env: str) -> str:
    return env.replace('/', '_')


def collect(args: Collect) -> None:
    from reverie.agents import ppo
    from reverie.commands import collect
    from reverie.data.summary import inspect, render

    frames = whole('frames', args.frames)
    given = args.ppo_frames
    ppo_frames = (
        collect.frames_of_training(args.env, frames)
        if given is None
        else whole('ppo-frames', given)
    )
    out = args.out or pathlib.Path('datasets') / f'{slug(args.env)}-{args.kind}'
    config = ppo.PPOConfig(env_frames=ppo_frames)
    facts = collect.write_dataset(
        out,
        args.env,
        args.kind,
        frames,
        options=options_of(args.env_options),
        config=config,
        seed=args.seed,
        episodes=args.episodes,
        command=command(),
        overwrite=args.overwrite,
        progress=lambda frames, ret: say(f'ppo  {frames:>11,} frames  return {ret:7.2f}'),
    )
    rich_print(render(inspect(out)))
    for line in facts['warnings']:
        say(f'warning: {line}')
    say(f'wrote {out}')


def train(args: Train, preset: str) -> None:
    from reverie.commands.experiment import Experiment, Recorded, played
    from reverie.training.warm import Init

    if args.from_groups and args.from_ is None:
        raise UserError(
            f'--from-groups {" ".join(args.from_groups)}: expected --from RUN beside it'
        )
    init = None if args.from_ is None else Init.parse(args.from_, args.from_groups)
    run = args.out or pathlib.Path('runs') / f'{preset}-{slug(args.env)}'
    fields = (preset, args.config, args.env, args.seed, args.seeds, command())
    experiment: Experiment
    if isinstance(args, TrainPlayed):
        options, frames = options_of(args.env_options), whole('frames', args.frames)
        every = whole('score-every', args.score_every) if args.score_every else 0
        experiment = played(args.env)(
            *fields, options=options, env_frames=frames, export=args.export, score_every=every,
            score_episodes=whole('score-episodes', args.score_episodes), score_steps=args.max_steps,
        )  # fmt: skip
    else:
        assert isinstance(args, TrainRecorded)
        data = args.data or pathlib.Path('datasets') / f'{slug(args.env)}-mixed'
        if not data.exists():
            raise UserError(
                f'no dataset at {data}; make one with: reverie collect --env {args.env} --out {data}'
            )
        experiment = Recorded(*fields, data, args.label_fraction, args.max_lost)
    params = experiment.train(
        run,
        updates_per_call=args.updates_per_call,
        checkpoint_every_s=args.checkpoint_every_s,
        log_every_s=args.log_every_s,
        tensorboard=args.tensorboard,
        wandb=args.wandb,
        init=init,
        keep_phase_ends=args.keep_phase_ends,
    )
    experiment.evaluate(
        run, params, args.episodes, args.max_steps, say=say, paths=written(args.results, run)
    )
    say(f'report: {experiment.report(run, params)}')


def evaluate(args: Eval) -> None:
    from reverie.commands.experiment import load

    experiment, params = load(args.run)
    if args.env_options:
        experiment = experiment.under(options_of(args.env_options))
    paths = written(args.results, None if args.env_options else args.run)
    experiment.evaluate(
        args.run, params, args.episodes, args.max_steps, eval_seed=args.seed, say=say, paths=paths
    )


def written(results: pathlib.Path | None, run: pathlib.Path | None) -> list[pathlib.Path]:
    """Where scores go."""
    return [path for path in (results, run and run / 'scores.json') if path]


def report(args: Report) -> None:
    from reverie.report.report import write

    say(f'report: {write(args.run)}')


def data(args: Data) -> None:
    from reverie.data import inspect, render, verify

    if args.action == 'inspect':
        rich_print(render(inspect(args.path)))
        return
    found = verify(args.path)
    say(
        f'{args.path}: '
        + ', '.join(f'{v:,} {k}' for k, v in found.items() if isinstance(v, int))
        + '; all sound'
    )


def bench(args: Bench) -> None:
    from reverie.evaluation.returns import save

    if args.what == 'fps':
        from reverie.serve import fps

        options: dict[str, Any] = dict(players=args.players, frames=args.frames, steps=args.steps)
        record = fps.measure(
            args.model, command(), **options, softcap=args.softcap, kernel=args.attention
        )
    else:
        from reverie.commands import speed

        record = speed.measure(args.preset, command())
    rich_print(record)
    if args.out:
        save(args.out, record)


def play(args: Play) -> None:
    from reverie.serve.play import play

    play(
        args.agent,
        env_name=args.env,
        options=options_of(args.env_options),
        host=args.host,
        port=args.port,
        players=args.players,
        pace=args.fps,
        seed=args.seed,
        browser=args.browser,
        names=args.allow_host,
        steps=args.steps,
        say=say,
    )


def doctor(args: Doctor) -> None:
    from reverie.commands.doctor import check

    for line in check():
        say(line)


def say(line: str) -> None:
    print(line, flush=True)


def rich_print(what: Any) -> None:
    from rich.console import Console

    Console().print(what)


def command() -> str:
    """The command as the user typed it."""
    return shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])


COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {
    'collect': (Collect, collect),
    'data': (Data, data),
    'train': (Train, train),  # parsed by `parse_train`
    'eval': (Eval, evaluate),
    'report': (Report, report),
    'play': (Play, play),
    'bench': (Bench, bench),
    'doctor': (Doctor, doctor),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        f'  {name:<{width}}  {(kind.__doc__ or "").splitlines()[0]}'
        for name, (kind, _) in COMMANDS.items()
    ]
    return '\n'.join(
        ['usage: reverie COMMAND [OPTIONS]; reverie COMMAND --help says more', '', *lines]
    )


def parse(kind: type, args: Sequence[str], prog: str, **options: Any) -> Any:
    """tyro, with unknown options as one line. Raises UserError."""
    parsed, unknown = tyro.cli(
        kind, args=list(args), prog=prog, return_unknown_args=True, **options
    )
    if unknown:
        raise UserError(
            f'{prog}: unknown option {unknown[0]!r}; {prog} --help lists the known ones'
        )
    return parsed


def dispatch(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ('-h', '--help'):
        say(usage())
        return
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f'unknown command {name!r}; expected one of {", ".join(COMMANDS)}')
    kind, function = COMMANDS[name]
    if name != 'train':
        function(parse(kind, rest, f'reverie {name}'))
        return
    if not rest or rest[0].startswith('-'):
        from reverie.agents import presets

        raise UserError(
            f'reverie train: expected a preset first, one of {", ".join(presets.PRESETS)}'
        )
    train(parse_train(*rest), rest[0])


def parse_train(preset: str, *rest: str) -> Train:
    """The options of `reverie train`; those of the preset's own configuration among them."""
    from reverie.agents import presets

    sizes = [rest[i + 1] for i, word in enumerate(rest[:-1]) if word == '--size']
    config = presets.get(preset, sizes[-1] if sizes else None)
    kind = TrainPlayed if hasattr(config, 'replay') else TrainRecorded
    typed = dataclasses.make_dataclass(
        'Train', [('config', type(config))], bases=(kind,), frozen=True
    )
    typed.__doc__ = Train.__doc__
    default = typed(config=config, env=tyro.MISSING)
    return parse(
        typed,
        rest,
        f'reverie train {preset}',
        default=default,
        config=(tyro.conf.AvoidSubcommands,),
    )


@contextlib.contextmanager
def requeued() -> Iterator[None]:
    """SIGTERM ends a command in an orderly way with exit code 75: try again later (sysexits), so a
    scheduler requeues.

    What is half written goes, and worker processes end. Training saves first, see
    `training.runner`.
    """

    def leave(number: int, frame: Any) -> None:
        signal.signal(
            number, signal.SIG_IGN
        )  # leaving is under way; a second one must not interrupt it
        print(
            'reverie: SIGTERM: stopped; run the same command to continue',
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(75)

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python delivers signals to the main thread only
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Entry point. A user's mistake is one line on standard error and exit code 2; so are a full
    disk (74), memory that does not suffice (71), SIGTERM (75) and Ctrl-C (130)."""
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s %(message)s')
    code = 0
    try:
        with requeued():
            dispatch(sys.argv[1:])
    except UserError as error:
        said, code = str(error), error.code
    except BrokenPipeError:
        os._exit(141)
    except KeyboardInterrupt:
        said, code = 'interrupted', 130
    except OSError as error:
        if error.errno not in FULL:
            raise
        said, code = f'{error}; free space and run the same command', 74
    except (RuntimeError, MemoryError) as error:
        if 'RESOURCE_EXHAUSTED' not in str(error) and not isinstance(error, MemoryError):
            raise
        said, code = f'out of memory: {" ".join(str(error).split())[:200]}', 71
    if code:
        print(f'error: {said}', file=sys.stderr)
        raise SystemExit(code)


if __name__ == '__main__':
    main()
