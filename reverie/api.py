"""The library as Python: what `import reverie` gives."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from reverie.agents import registry
from reverie.commands.arguments import slug
from reverie.commands.experiment import Experiment, Recorded, played
from reverie.commands.experiment import load as load_run
from reverie.data import Episodes
from reverie.data.mixture import acted
from reverie.envs import registry as environments
from reverie.envs.host import HostVector
from reverie.training.warm import Init
from reverie.types import Agent, Env, EnvSpec, Params, UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained agent: the folder of its run, its experiment and its weights."""

    folder: pathlib.Path
    experiment: Experiment
    params: Params
    """Weights by parameter group, leaves [seeds, ...]."""

    @property
    def agent(self) -> Agent:
        return self.experiment.agent

    def dream(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Open-loop dreams beside the real frames, with the weights of the run's first seed.

        'truth' and 'dream' [B, T, ...], of which the first 'context' frames are given; 'action',
        'reward_true', 'reward_pred', 'cont_pred' [B, T]. Empty for agents without a world model.
        """
        first = jax.tree.map(lambda x: x[0], self.params)
        samples = self.experiment.draw(first, jax.random.key(seed))
        prefix = 'dream/'
        return {k.removeprefix(prefix): x for k, x in samples.items() if k.startswith(prefix)}

    def play(self, **options: Any) -> None:
        """Serve the page of `reverie play` for this run until Ctrl-C, e.g. `play(port=8080)`."""
        from reverie.commands.play.serving import play

        play(str(self.folder), **options)


def make(preset: str | registry.Config, spec: EnvSpec, size: str | None = None) -> Agent:
    """An agent for an environment, without weights: `agent.init(key)` draws them.

    preset: name of a preset, or a configuration. size: of a preset that has sizes.
    Raises UserError for an unknown preset, or an environment that does not fit.
    """
    config = registry.get(preset, size) if isinstance(preset, str) else preset
    return registry.make(config, spec)


def make_env(name: str, copies: int | None = None, **options: Any) -> Env | HostVector:
    """A pure-JAX environment (minatar, control, memory, gymnax), or `copies` of one on the host in
    processes of their own (atari, dmc, crafter, gym).

    name: e.g. 'minatar/breakout'. options: e.g. sticky=0.0. Raises UserError for either unknown.
    """
    return environments.make(name, copies, **options)


def train(
    preset: str,
    env: str | None = None,
    folder: str | pathlib.Path | None = None,
    *,
    config: registry.Config | None = None,
    data: str | pathlib.Path | Sequence[str | pathlib.Path] | None = None,
    weights: Sequence[float] = (),
    frames: int = 100_000,
    env_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    seeds: int = 1,
    init: str | Init | None = None,
    **options: Any,
) -> Run:
    """Train an agent; the same call again continues where it was.

    preset: name of a preset. env: name of an environment; agents that learn from a dataset take its
        own if not given.
    folder: of the run; runs/<preset>-<env> if not given.
    config: the configuration, if it is not the preset's own.
    data: dataset, or several, for agents that learn from them. weights: share of the rows of a batch
        for each of several; equal if not given. frames, env_options: for agents that play.
    seed, seeds: seeds seed .. seed + seeds - 1 are trained in one program.
    init: what is taken from another run, as `reverie train --from` writes it.
    options: of the runner, e.g. checkpoint_every_s, log_every_s, tensorboard.
    Raises UserError for whatever does not fit; SystemExit(75) after SIGTERM, once all is saved.
    """
    config = registry.get(preset) if config is None else config
    command = f'reverie.train({preset!r}, {env!r})'
    experiment: Experiment
    if hasattr(config, 'replay'):
        if env is None:
            raise UserError(f'reverie.train({preset!r}): expected env, e.g. minatar/breakout')
        experiment = played(env)(
            preset, config, env, seed, seeds, command, dict(env_options or {}), frames
        )
    else:
        if env is None and data is None:
            raise UserError(f'reverie.train({preset!r}): expected data, the path of a dataset')
        if data is None:
            data = pathlib.Path('datasets') / f'{slug(env or "")}-mixed'
        several = [data] if isinstance(data, str | pathlib.Path) else data
        paths = tuple(pathlib.Path(path) for path in several)
        env = env or acted([Episodes(path) for path in paths])[0].spec.name
        experiment = Recorded(
            *(preset, config, env, seed, seeds, command, paths), weights=tuple(weights)
        )
    folder = pathlib.Path(folder or pathlib.Path('runs') / f'{slug(preset)}-{slug(env)}')
    start = Init.parse(init, ()) if isinstance(init, str) else init
    return Run(folder, experiment, experiment.train(folder, init=start, **options))


def evaluate(
    run: Run, episodes: int = 128, max_steps: int = 5000, **options: Any
) -> dict[str, Any]:
    """Scores of every read-out in the real environment: {read-out: {'mean', 'ci95', 'n', ...}}.

    Written to the run's scores.json with all that `reverie eval` says.
    """
    options = {'say': _silent, 'paths': [run.folder / 'scores.json'], **options}
    record = run.experiment.evaluate(run.folder, run.params, episodes, max_steps, **options)
    scores: dict[str, Any] = record['score']
    return scores


def _silent(line: str) -> None:
    return None


def load(folder: str | pathlib.Path) -> Run:
    """A run, of one that was stopped the weights so far. Raises UserError if there is none."""
    experiment, params = load_run(pathlib.Path(folder))
    return Run(pathlib.Path(folder), experiment, params)
