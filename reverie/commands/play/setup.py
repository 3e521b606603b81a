"""Players' setup: the agent, its environment and its weights, from a run folder or a preset."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from reverie.agents import registry
from reverie.commands.arguments import slug
from reverie.commands.experiment import Experiment, Recorded, describe, load, played
from reverie.commands.packaged import run_folder
from reverie.evaluation.game import DeviceGame, HostGame
from reverie.serve.contexts import Contexts
from reverie.serve.hosted import HostSession
from reverie.serve.session import Session
from reverie.types import Agent, Params, Playable, Step, UserError

CONTEXT = 8  # frames before a start


@dataclasses.dataclass
class PlaySetup:
    """An agent to be played in, and where."""

    title: str
    agent: Playable
    experiment: Experiment  # has the environment
    params: Callable[[], Params]  # of one seed; a function, so that reading them can wait
    contexts: Callable[[int], Step] | None
    folder: pathlib.Path  # for recordings
    facts: dict[str, Any]  # provenance of recordings


def resolve_play(
    name: str,
    env_name: str | None,
    options: dict[str, Any],
    seed: int,
    data: Sequence[pathlib.Path] = (),
    task: str | None = None,
) -> PlaySetup:
    """The setup of a run folder, or of a preset with random weights.

    Raises UserError if it is neither.
    """
    folder = run_folder(name)
    if registry.known(name) and not (folder / 'config.json').exists():
        if task is not None:
            raise UserError(f'--task {task}: a preset has no tasks, expected a run of several')
        return _of_preset(name, env_name, options, seed)
    if not folder.exists():
        raise UserError(
            f'{name!r} is neither a run folder nor a preset; presets are {", ".join(registry.PRESETS)}'
        )
    if env_name or options:
        raise UserError('--env and --env-options go with a preset; a run has its own environment')
    experiment = describe(folder, data)
    if task is not None:
        (experiment,) = experiment.told(task)
    if not 0 <= seed < experiment.seeds:
        raise UserError(
            f'--seed {seed}: expected 0 to {experiment.seeds - 1}, the seeds of the run'
        )
    agent = playable(experiment.agent, name)

    def params() -> Params:
        found: Params = jax.tree.map(lambda x: x[seed], load(folder, data)[1])
        check_params(agent, found, str(folder))
        return found

    contexts = None
    if isinstance(experiment, Recorded) and experiment.has_data:
        contexts = Contexts(experiment.episodes, CONTEXT)
    facts = {'source': 'play', 'run': folder.name, 'env': {'name': experiment.env_name}}
    title = f'{experiment.preset} on {experiment.env_name}'
    title += '' if experiment.task_name is None else f', task {experiment.task_name}'
    return PlaySetup(title, agent, experiment, params, contexts, folder / 'plays', facts)


def _of_preset(name: str, env_name: str | None, options: dict[str, Any], seed: int) -> PlaySetup:
    config = registry.get(name)
    env_name = env_name or ('control/pendulum' if name.startswith('planet') else 'minatar/breakout')
    experiment = played(env_name)(name, config, env_name, options=options)
    agent = playable(registry.make(config, experiment.spec), name)
    params = lambda: agent.init(jax.random.key(seed))
    facts = {'source': 'play', 'preset': name, 'env': {'name': env_name, 'options': options}}
    folder = pathlib.Path('runs') / 'plays' / slug(name)
    title = f'{name} on {env_name}, random weights'
    return PlaySetup(title, agent, experiment, params, None, folder, facts)


def playable(agent: Agent, name: str) -> Playable:
    """The agent itself. Raises UserError if it has no world model to play in."""
    if not isinstance(agent, Playable):
        raise UserError(f'{name} has no world model to play in; expected an agent that has one')
    return agent


def open_session(setup: PlaySetup, players: int, seed: int) -> Session:
    """A session of shapes, without weights yet."""
    shapes = jax.eval_shape(setup.agent.init, jax.random.key(0))
    how: dict[str, Any] = dict(slots=players, context=CONTEXT, seed=seed)
    experiment = setup.experiment
    game = experiment.game
    if isinstance(game, HostGame) and setup.contexts is None:
        return HostSession(
            setup.agent, shapes, lambda slot: game.vector(1, 'play', seed + slot), **how
        )
    env = game.env if isinstance(game, DeviceGame) else None
    if env is None and setup.contexts is None:
        raise UserError(
            f'{setup.title}: neither its environment nor its recordings are there to begin a dream '
            f'from ({experiment.unscored}); --data says where recordings are'
        )
    return Session(setup.agent, shapes, env, setup.contexts, **how)


def check_params(agent: Playable, params: Params, where: str) -> None:
    """Raise UserError naming the first array that does not fit the agent."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        named = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): x.shape for path, x in named}

    given, expected = shapes(params), shapes(jax.eval_shape(agent.init, jax.random.key(0)))
    for name in sorted(given.keys() | expected.keys()):
        if given.get(name) != expected.get(name):
            raise UserError(
                f'{where}: weights{name} have shape {given.get(name)}, the agent of its config expects '
                f'{expected.get(name)}; a checkpoint of another config?'
            )
