"""Tasks that one agent is told, each with the environment it is scored in."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from reverie.commands.experiment.base import Experiment, Say
from reverie.data.episodes import Episodes
from reverie.data.mixture import acted
from reverie.envs.registry import nearest, on_host
from reverie.evaluation import results, trust
from reverie.types import Params, UserError


class Task(NamedTuple):
    """A task and the environment that its datasets name."""

    name: str
    env: str
    options: Mapping[str, Any]  # that the environment was recorded with


def tasks_of(datasets: Sequence[Episodes]) -> tuple[Task, ...]:
    """The tasks of datasets, in their order; the environment is that of a task's first dataset."""
    found: dict[str, Task] = {}
    for episodes in acted(datasets):
        env = episodes.spec.name
        if episodes.task not in found:
            found[episodes.task] = Task(episodes.task, env, recorded_options(episodes, env))
    return tuple(found.values())


def recorded_options(episodes: Episodes, env_name: str) -> dict[str, Any]:
    """Options that a game was recorded with; the size of the pictures, where nothing is known."""
    recorded = episodes.game_options(env_name)
    if recorded is not None:
        return recorded
    shape = episodes.spec.obs_shape
    assert isinstance(shape, tuple)
    pictures = on_host(env_name) and len(shape) == 3
    return {'size': (shape[0], shape[1])} if pictures else {}


def number_of(name: str, tasks: Sequence[Task]) -> int:
    """Number of the task with this name. Raises UserError with the names near one that is none."""
    names = [task.name for task in tasks]
    if name in names:
        return names.index(name)
    if near := nearest(name, names):
        raise UserError(f'--task {name!r}: no task of the run; did you mean {" or ".join(near)}?')
    raise UserError(f'--task {name!r}: no task of the run, expected one of {", ".join(names)}')


def file_of(path: pathlib.Path, tasks: Sequence[Task], number: int) -> pathlib.Path:
    """The file of a task beside that of the first: scores.json -> scores-<task>.json."""
    if number == 0:
        return path
    slugs = [re.sub(r'[^\w.-]+', '_', task.name)[:60] for task in tasks]
    same = slugs[number] in slugs[1:number]
    return path.with_stem(f'{path.stem}-{slugs[number]}' + (f'-{number}' if same else ''))


def evaluate(
    experiments: Sequence[Experiment],
    folder: pathlib.Path,
    params: Params,
    episodes: int,
    max_steps: int,
    *,
    paths: Sequence[pathlib.Path],
    say: Say,
    **how: Any,
) -> list[dict[str, Any]]:
    """Evaluate an experiment told one task after the other, each with files of its own."""
    records = []
    for experiment in experiments:
        if experiment.task_name is not None:
            say(f'eval  task {experiment.task_name}')
        mine = [experiment.file_of(path) for path in paths]
        records.append(
            experiment.evaluate(folder, params, episodes, max_steps, say=say, paths=mine, **how)
        )
    return records


def judge(
    experiments: Sequence[Experiment],
    folder: pathlib.Path,
    params: Params,
    *,
    eval_seed: int,
    say: Say,
) -> None:
    """Measure whether the dreams can be trusted, and nothing else, told one task after the other.

    scores.json of the run, where there is one, gets these numbers in the place of its own. Raises
    UserError where they are not taken.
    """
    for experiment in experiments:
        measured = experiment.trust(params, jax.random.key(eval_seed))
        if measured is None:
            raise UserError(
                f'{folder} has no trust numbers; expected a dynamics trained on boolean grids of a '
                'dataset that is there'
            )
        for line in trust.lines(measured):
            say(line)
        path = experiment.file_of(folder / 'scores.json')
        if path.exists():
            results.save(path, json.loads(path.read_text(encoding='utf-8')) | {'trust': measured})
