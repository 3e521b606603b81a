"""`reverie eval`: score a run's agent again, and measure its dreams."""

import dataclasses
import pathlib

import tyro

from reverie.commands.arguments import check_file, check_seed, options_of, score_paths, whole
from reverie.commands.programs import Compiling, keep_programs
from reverie.commands.terminal import say
from reverie.errors import UserError


@dataclasses.dataclass(frozen=True)
class Eval(Compiling):
    """Score a run's agent in the real environment again, and its dreams beside recordings."""

    run: tyro.conf.Positional[pathlib.Path]
    """Run folder; `demo` is the model that comes with the package."""
    episodes: int = 128
    """Episodes of each seed and read-out."""
    max_steps: int = 5000
    """Environment steps after which an episode is cut."""
    seed: int = 1000
    """Seed of the evaluation episodes."""
    trust: bool = False
    """Measure nothing but whether the dreams can be trusted: the cells that they keep, what the
    heads say, and whether they rank policies as the game does."""
    task: str | None = None
    """Task to tell the agent, of a run on several; the default is every task in turn, the first
    with its scores in scores.json, the others in scores-<task>.json."""
    data: tyro.conf.UseAppendAction[tuple[pathlib.Path, ...]] = ()
    """Dataset of the run, if it is not where it was; once for each of several."""
    results: pathlib.Path | None = None
    """Also write the scores as a results file."""
    env_options: tuple[str, ...] = ()
    """Options that differ from the agent's own, e.g. pays=success; the run keeps its scores."""


def run(args: Eval) -> None:
    """Score every read-out; write the run's scores.json unless the environment's options differ."""
    from reverie.commands.experiment import load, tasks
    from reverie.commands.packaged import run_folder

    whole('episodes', args.episodes), whole('max-steps', args.max_steps)
    check_file('results', args.results)
    check_seed('seed', args.seed)
    keep_programs(args.cache)
    folder = run_folder(args.run)
    experiment, params = load(folder, args.data)
    told = experiment.told(args.task)
    if args.trust:
        tasks.judge(told, folder, params, eval_seed=args.seed, say=say)
        return
    if all(e.unscored is not None and not e.has_recordings for e in told):
        raise UserError(f'{folder} cannot be scored: {told[0].unscored}')
    if args.env_options:
        told = tuple(e.under(options_of(args.env_options)) for e in told)
    paths = score_paths(args.results, None if args.env_options else folder)
    tasks.evaluate(
        told, folder, params, args.episodes, args.max_steps, eval_seed=args.seed, say=say,
        paths=paths,
    )  # fmt: skip
