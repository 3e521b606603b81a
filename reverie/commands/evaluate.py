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
    """Run folder."""
    episodes: int = 128
    """Episodes of each seed and read-out."""
    max_steps: int = 5000
    """Environment steps after which an episode is cut."""
    seed: int = 1000
    """Seed of the evaluation episodes."""
    data: pathlib.Path | None = None
    """Dataset of the run, if it is not where it was."""
    results: pathlib.Path | None = None
    """Also write the scores as a results file."""
    env_options: tuple[str, ...] = ()
    """Options that differ from the agent's own, e.g. pays=success; the run keeps its scores."""


def run(args: Eval) -> None:
    """Score every read-out; write the run's scores.json unless the environment's options differ."""
    from reverie.commands.experiment import load

    whole('episodes', args.episodes), whole('max-steps', args.max_steps)
    check_file('results', args.results)
    check_seed('seed', args.seed)
    keep_programs(args.cache)
    experiment, params = load(args.run, args.data)
    if experiment.unscored is not None and not experiment.has_recordings:
        raise UserError(f'{args.run} cannot be scored: {experiment.unscored}')
    if args.env_options:
        experiment = experiment.under(options_of(args.env_options))
    paths = score_paths(args.results, None if args.env_options else args.run)
    experiment.evaluate(
        args.run, params, args.episodes, args.max_steps, eval_seed=args.seed, say=say, paths=paths
    )
