"""A finished run read back: its experiment and its weights."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from reverie.agents import registry
from reverie.commands.experiment.base import SAFE, Experiment
from reverie.commands.experiment.played import played
from reverie.commands.experiment.recorded import MAX_LOST, Recorded
from reverie.data.fields import Declared, misfit
from reverie.data.labels import Labels
from reverie.training import checkpoint, legacy
from reverie.training.legacy import read_config
from reverie.training.run_folder import check_unedited
from reverie.types import Params, UserError

REACHED: dict[Any, Declared] = {'phase': str, 'step': int, 'complete': bool}


def describe(folder: pathlib.Path, data: Sequence[pathlib.Path] = ()) -> Experiment:
    """The experiment of a run folder; weights are not read.

    data: datasets of the run, if they are not where they were. Raises UserError if the folder is no run,
    or its config.json was edited.
    """
    saved = read_config(folder)
    check_unedited(folder, SAFE)
    try:
        config = restore(registry.get(saved['preset']), saved['config'])
        seeds = (saved['seed'], saved['seeds'])
        fields = (saved['preset'], config, saved['env'], *seeds, saved['command'])
        if 'data' in saved:
            lost = saved.get('max_lost', MAX_LOST)
            paths = _datasets(folder, saved['data'], data)
            known = saved.get('game')
            known = known and known | {k: saved[k] for k in ('tasks',) if k in saved}
            weights = tuple(saved.get('weights', ()))
            labels = Labels(
                saved['label_fraction'],
                saved.get('label_stretch', 0),
                tuple(saved.get('labelled_files', ())),
            )
            return Recorded(*fields, paths, labels, lost, known, weights)
        if data:
            raise UserError(f'--data {data[0]}: {folder} is a run of an agent that plays')
        return played(saved['env'])(
            *fields, options=saved['env_options'], env_frames=saved['env_frames']
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f'{folder / "config.json"} cannot be read ({type(error).__name__}: {error}); expected the config of a run'
        ) from error


def _datasets(
    folder: pathlib.Path, known: str | list[str], given: Sequence[pathlib.Path]
) -> tuple[pathlib.Path, ...]:
    """The datasets where they are given to be, or where config.json says."""
    names = [known] if isinstance(known, str) else known
    if given and len(given) != len(names):
        raise UserError(
            f'--data {" ".join(map(str, given))}: expected {len(names)}, as {folder} was trained on'
        )
    return tuple(given) or tuple(_dataset(folder, name) for name in names)


def _dataset(folder: pathlib.Path, path: str) -> pathlib.Path:
    """The dataset where config.json says, also beside a folder that was moved with it."""
    found = pathlib.Path(path)
    beside = folder.absolute().parent / found.name
    return found if found.exists() or not beside.exists() else beside


def load(folder: pathlib.Path, data: Sequence[pathlib.Path] = ()) -> tuple[Experiment, Params]:
    """The experiment of a run and its params [seeds, ...], of one that was stopped as they are.

    Phases that have not begun get what they begin with, e.g. a prior that is the policy so far.
    Raises UserError if there is no run.
    """
    experiment = describe(folder, data)
    params, meta = checkpoint.load(folder)
    expected = jax.eval_shape(experiment.agent.init, jax.random.key(0))
    params = {k: x for k, x in params.items() if k not in legacy.gone_groups(params, expected)}
    phases = experiment.agent.phases
    if wrong := misfit(meta, REACHED):
        raise UserError(f'{folder}: checkpoint at step {meta.get("gradient_steps")}: {wrong}')
    names = [phase.name for phase in phases]
    if meta['phase'] not in names:
        raise UserError(f'{folder} stands in phase {meta["phase"]!a:.40}, expected one of {names}')
    index = names.index(meta['phase'])
    if index == len(phases) - 1 and meta['complete']:
        return experiment, params
    for phase in phases[index + 1 :]:
        if phase.begin is not None:
            params = jax.vmap(phase.begin)(params)
    return dataclasses.replace(experiment, reached=meta | {'phase_index': index}), params


def restore(like: Any, value: dict[str, Any]) -> Any:
    """A nested frozen dataclass from its JSON; classes are those of `like`, the preset's own value.

    A field that the JSON lacks is newer than the run: it takes its class's default, which is how
    things were before. Raises UserError for a field that the class does not have.
    """
    fields = {f.name for f in dataclasses.fields(like)}
    unknown = sorted(set(value) - fields)
    if unknown:
        raise UserError(
            f'config of the run has {unknown}, which {type(like).__name__} does not know; of another version?'
        )

    def of(sample: Any, x: Any) -> Any:
        if dataclasses.is_dataclass(sample):
            return restore(sample, x)
        if isinstance(sample, tuple):
            return type(sample)(*x) if hasattr(sample, '_fields') else tuple(x)
        return x

    newer = {f.name: f.default for f in dataclasses.fields(like) if f.name not in value}
    defaults = {name: x for name, x in newer.items() if x is not dataclasses.MISSING}
    given = {name: of(getattr(like, name), x) for name, x in value.items()}
    return dataclasses.replace(like, **defaults, **given)
