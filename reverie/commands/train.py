"""`reverie train`: train an agent, score it, write its report."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from reverie.commands.arguments import (
    check_file,
    check_seed,
    options_of,
    parse,
    score_paths,
    slug,
    whole,
)
from reverie.commands.programs import Compiling, keep_programs
from reverie.commands.terminal import command_line, say
from reverie.errors import ExportError, UserError

if TYPE_CHECKING:
    from reverie.commands.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Train(Compiling):
    """Train an agent, score it in the real environment, write the report.

    The same command continues.
    """

    config: Any
    """The experiment; every field can be changed, e.g. --config.dynamics-phase.steps 5000."""
    env: str | None = None
    """Environment, e.g. minatar/breakout; agents that learn from a dataset take its own."""
    out: pathlib.Path | None = None
    """Run folder; runs/<preset>-<env> if not given."""
    size: str | None = None
    """Size of a preset that has sizes, e.g. 12m; the default is the preset's own."""
    seed: int = 0
    """First seed."""
    seeds: int = 1
    """Agents trained in one program, with seeds seed, seed + 1, .."""
    from_: Annotated[str | None, tyro.conf.arg(name='from', metavar='RUN[:PHASE]')] = None
    """Begin with what another run has learnt; every phase not taken is trained.
    RUN: all phases it has finished. RUN:PHASE: those up to and with PHASE.
    RUN:PHASE,PHASE: others as well. RUN:PHASE+: PHASE is trained on, to the updates it has here.
    Seeds get their own models, or all that of a run with one seed."""
    from_groups: tuple[str, ...] = ()
    """With --from: take only the weights of these parameter groups, and train every phase."""
    keep_phase_ends: bool = True
    """Keep weights and optimiser at the end of each phase, for --from; four times the disk."""
    episodes: int = 128
    """Evaluation episodes of each seed and read-out."""
    max_steps: int = 5000
    """Environment steps after which an evaluation episode is cut."""
    updates_per_call: int = 50
    """Gradient steps between two looks at the clock."""
    checkpoint_every_s: float = 120.0
    """Seconds between two checkpoints."""
    log_every_s: float = 5.0
    """Seconds between two lines of metrics."""
    tensorboard: bool = False
    """Log to RUN/tensorboard as well."""
    wandb: str | None = None
    """W&B project to log to as well; WANDB_MODE=offline needs no account."""
    wait_lock: float | None = None
    """Seconds to wait for another process that trains in this folder (exit code 75 after them)."""
    results: pathlib.Path | None = None
    """Also write the scores, and what dreams were measured, as a results file, e.g.
    results/dreamer4/minatar_breakout.json."""
    add_to: tuple[pathlib.Path, ...] = ()
    """Add the scores to these runs or results files of the same environment, seeds and dataset,
    e.g. a baseline's to an agent's; reports of runs are written again."""


@dataclasses.dataclass(frozen=True)
class TrainRecorded(Train):
    __doc__ = Train.__doc__

    data: tyro.conf.UseAppendAction[tuple[pathlib.Path, ...]] = ()
    """Dataset; once for each of several, e.g. --data A --data B; datasets/<env>-mixed if not given.
    An agent of several tasks is told which; `task` in their manifests, else the environment."""
    weights: tuple[float, ...] = ()
    """Share of the rows of a batch for each dataset, e.g. 1 2; equal if not given."""
    memory_gb: float = 8.0
    """GiB that all datasets may take on the device; of larger ones parts are read as they are needed."""
    label_fraction: float = 1.0
    """Share of the episodes whose actions are used; the others count as unlabelled video."""
    label_stretch: int = 0
    """With --label-fraction: frames of the stretches that it counts in each episode, for recordings
    of few and long episodes; 0 for whole episodes."""
    labelled_files: tuple[str, ...] = ()
    """Imported files whose actions alone are used, without suffix, e.g. E1M4 E2M3; all by default."""
    max_lost: float = 0.01
    """Share of the episodes that may be damaged and left out; beyond it nothing is trained."""


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


def parse_train(preset: str, *rest: str) -> Train:
    """The options of `reverie train`, with those of the preset's own configuration."""
    from reverie.agents import registry

    sizes = [rest[i + 1] for i, word in enumerate(rest[:-1]) if word == '--size']
    config = registry.get(preset, sizes[-1] if sizes else None)
    kind = TrainPlayed if hasattr(config, 'replay') else TrainRecorded
    typed = dataclasses.make_dataclass(
        'Train', [('config', type(config))], bases=(kind,), frozen=True
    )
    typed.__doc__ = Train.__doc__
    default = typed(config=config)
    prog, conf = f'reverie train {preset}', (tyro.conf.AvoidSubcommands,)
    options: Train = parse(typed, rest, prog, default=default, config=conf)
    return options


def main(args: list[str]) -> None:
    """Parse what follows `reverie train`, the preset first, and run it."""
    if not args or args[0].startswith('-'):
        from reverie.agents import registry

        raise UserError(
            f'reverie train: expected a preset first, one of {", ".join(registry.PRESETS)}'
        )
    run(parse_train(*args), args[0])


def run(args: Train, preset: str) -> None:
    """Train, score and report the experiment that the options describe."""
    from reverie.commands.experiment import tasks
    from reverie.commands.packaged import run_folder
    from reverie.training.warm import Init

    if args.from_groups and args.from_ is None:
        raise UserError(
            f'--from-groups {" ".join(args.from_groups)}: expected --from RUN beside it'
        )
    whole('episodes', args.episodes), whole('max-steps', args.max_steps), whole('seeds', args.seeds)
    check_seed('seed', args.seed, args.seeds)
    check_file('results', args.results)
    check_add_to(args.add_to)
    init = None if args.from_ is None else Init.parse(args.from_, args.from_groups)
    if init is not None:
        init = dataclasses.replace(init, run=run_folder(init.run))
    keep_programs(args.cache)
    experiment = experiment_of(args, preset)
    if experiment.unscored is not None and (
        args.add_to or (args.results and not experiment.has_recordings)
    ):
        raise UserError(f'--results and --add-to take scores, but {experiment.unscored}')
    if experiment.unscored is not None:
        say(f'the agent is trained and not scored: {experiment.unscored}')
    for line in experiment.spec.seen:
        say(f'observations: {line}')
    folder = args.out or pathlib.Path('runs') / f'{slug(preset)}-{slug(experiment.env_name)}'
    failure = None
    try:
        params = experiment.train(
            folder,
            updates_per_call=args.updates_per_call,
            checkpoint_every_s=args.checkpoint_every_s,
            log_every_s=args.log_every_s,
            tensorboard=args.tensorboard,
            wandb=args.wandb,
            init=init,
            keep_phase_ends=args.keep_phase_ends,
            wait_lock_s=args.wait_lock,
        )
    except ExportError as error:
        params, failure = error.params, error
    paths = score_paths(args.results, folder)
    record, *_ = tasks.evaluate(
        experiment.told(), folder, params, args.episodes, args.max_steps, paths=paths, say=say
    )
    say(f'report: {experiment.report(folder, params)}')
    for other in args.add_to:
        add_scores(other, record)
    if failure is not None:
        raise failure


def check_add_to(paths: Sequence[pathlib.Path]) -> None:
    """Raise UserError for a run or results file to add scores to that is not there."""
    for path in paths:
        if not (scores_of(path)).exists():
            raise UserError(f'--add-to {path}: expected a run with scores.json, or a results file')


def scores_of(path: pathlib.Path) -> pathlib.Path:
    """The scores of a run folder, or the results file itself."""
    return path / 'scores.json' if path.is_dir() else path


def add_scores(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Add the read-outs of a record to a run or results file; write the run's report again."""
    from reverie.evaluation import results, statistics
    from reverie.report import write

    file = scores_of(path)
    results.save(file, statistics.add_scores(json.loads(file.read_text()), record))
    say(f'added to {write(path) if path.is_dir() else file}')


def experiment_of(args: Train, preset: str) -> 'Experiment':
    """The experiment that the options describe; raises UserError if its dataset is missing."""
    from reverie.commands.experiment import Recorded, played
    from reverie.data.episodes import Episodes
    from reverie.data.labels import Labels
    from reverie.data.mixture import acted

    rest = (args.seed, args.seeds, command_line())
    if isinstance(args, TrainPlayed):
        if args.env is None:
            raise UserError(f'reverie train {preset}: expected --env, e.g. minatar/breakout')
        return played(args.env)(
            *(preset, args.config, args.env, *rest),
            options=options_of(args.env_options),
            env_frames=whole('frames', args.frames),
            export=args.export,
            score_every=whole('score-every', args.score_every) if args.score_every else 0,
            score_episodes=whole('score-episodes', args.score_episodes),
            score_steps=args.max_steps,
        )
    assert isinstance(args, TrainRecorded)
    if args.env is None and not args.data:
        raise UserError(
            f'reverie train {preset}: expected --data, a dataset, or --env, a game that '
            '`reverie collect` has recorded'
        )
    paths = args.data or (pathlib.Path('datasets') / f'{slug(args.env or "")}-mixed',)
    for path in paths:
        if not path.exists():
            made = args.env or '<game>'
            raise UserError(
                f'no dataset at {path}; make one with: reverie collect --env {made} --out {path}'
            )
    if not 0 < args.memory_gb < math.inf:
        raise UserError(f'--memory-gb {args.memory_gb:g}: expected a positive number')
    env = args.env or acted([Episodes(path, args.max_lost) for path in paths])[0].spec.name
    labels = Labels(args.label_fraction, args.label_stretch, args.labelled_files)
    return Recorded(
        *(preset, args.config, env, *rest, paths, labels, args.max_lost),
        weights=args.weights,
        memory_bytes=int(args.memory_gb * 2**30),
    )
