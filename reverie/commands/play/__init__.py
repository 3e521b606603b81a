"""`reverie play`: play in an agent's dream, in the browser."""

import dataclasses
import pathlib

import tyro

from reverie.commands.arguments import options_of
from reverie.commands.programs import Compiling
from reverie.commands.terminal import say


@dataclasses.dataclass(frozen=True)
class Play(Compiling):
    """Play inside an agent's dream, or beside it in the real game, in the browser."""

    agent: tyro.conf.Positional[str]
    """A run folder, a preset to see with random weights, or `demo`, the model of the package."""
    env: str | None = None
    """Environment for a preset, e.g. minatar/asterix."""
    env_options: tuple[str, ...] = ()
    """Options of that environment as name=value."""
    task: str | None = None
    """Task to tell the agent, of a run on several; the default is the first."""
    data: tyro.conf.UseAppendAction[tuple[pathlib.Path, ...]] = ()
    """Recordings of a run to begin dreams from, if they are not where they were; once for each of
    several."""
    seed: int = 0
    """Which of a run's seeds."""
    players: int = 2
    """Places; all players share one forward pass."""
    fps: float = 20.0
    """Frames per second that a page begins with."""
    host: str = '127.0.0.1'
    """Address to listen on; 0.0.0.0 lets other machines in, with the printed address's token."""
    port: int = 8000
    """0 takes any free one."""
    allow_host: tuple[str, ...] = ()
    """Further names that this server is reached by, e.g. that of a proxy."""
    browser: bool = True
    """Open the page when it is ready."""
    recordings: float = 2.0
    """Gigabytes of saved recordings that the run's folder may have; each place has an equal part."""
    steps: int | None = None
    """K, denoising steps of a frame to begin with, for agents that have a choice."""


def run(args: Play) -> None:
    """Serve the page until Ctrl-C."""
    from reverie.commands.play.serving import play

    play(
        args.agent,
        env_name=args.env,
        options=options_of(args.env_options),
        data=args.data,
        task=args.task,
        host=args.host,
        port=args.port,
        players=args.players,
        pace=args.fps,
        seed=args.seed,
        browser=args.browser,
        names=args.allow_host,
        steps=args.steps,
        recordings=args.recordings,
        cache=args.cache,
        say=say,
    )
