"""`reverie collect`: PPO learns a game, its snapshots play, their episodes become a dataset."""

import dataclasses
import pathlib

from reverie.commands.arguments import check_seed, options_of, slug, whole
from reverie.commands.programs import Compiling, keep_programs
from reverie.commands.terminal import command_line, say, show
from reverie.errors import UserError


@dataclasses.dataclass(frozen=True)
class Collect(Compiling):
    """Train PPO on a game, let its snapshots play, write the episodes as a dataset."""

    env: str
    """Environment, e.g. minatar/breakout."""
    kind: str = 'mixed'
    """random, medium, expert, or mixed (equal parts random, 25%, 50% and 100% of PPO's return)."""
    frames: float = 1e6
    """Frames to record."""
    out: pathlib.Path | None = None
    """Folder of the dataset; datasets/<env>-<kind> if not given."""
    ppo_frames: float | None = None
    """Frames that PPO trains on; by default as many as are recorded, but no fewer than the game
    needs."""
    seed: int = 0
    """Seed of training and play."""
    episodes: int = 128
    """Episodes that score PPO and the random player."""
    holdout: float = 0.0
    """Share of the episodes to train nothing on, on which dreams are measured."""
    overwrite: bool = False
    """Replace a dataset that is already there."""
    env_options: tuple[str, ...] = ()
    """Options of the environment as name=value, e.g. sticky=0.0 protocol=gymnax."""


def run(args: Collect) -> None:
    """Write the dataset and print its summary."""
    from reverie.agents.ppo import PPOConfig
    from reverie.commands.collect import dataset
    from reverie.data.summary import inspect, render

    keep_programs(args.cache)
    frames = whole('frames', args.frames)
    check_seed('seed', args.seed)
    whole('episodes', args.episodes)
    if not 0 <= args.holdout < 1:
        raise UserError(f'--holdout {args.holdout:g}: expected a share from 0 to less than 1')
    if args.ppo_frames is None:
        ppo_frames = dataset.frames_of_training(args.env, frames)
    else:
        ppo_frames = whole('ppo-frames', args.ppo_frames)
    out = args.out or pathlib.Path('datasets') / f'{slug(args.env)}-{args.kind}'
    facts = dataset.write_dataset(
        out,
        args.env,
        args.kind,
        frames,
        options=options_of(args.env_options),
        config=PPOConfig(env_frames=ppo_frames),
        seed=args.seed,
        episodes=args.episodes,
        holdout=args.holdout,
        command=command_line(),
        overwrite=args.overwrite,
        progress=lambda frames, ret: say(f'ppo  {frames:>11,} frames  return {ret:7.2f}'),
    )
    show(render(inspect(out)))
    for line in facts['warnings']:
        say(f'warning: {line}')
    say(f'wrote {out}')
