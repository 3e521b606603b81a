"""A finished run read back: its experiment and its weights."""

import dataclasses
import pathlib
from typing import Any

import jax

from reverie.agents import registry
from reverie.commands.experiment.base import SAFE, Experiment
from reverie.commands.experiment.played import played
from reverie.commands.experiment.recorded import MAX_LOST, Recorded
from reverie.training import checkpoint, legacy
from reverie.training.legacy import read_config
from reverie.training.run_folder import check_unedited
from reverie.types import Params, UserError


def describe(folder: pathlib.Path) -> Experiment:
    """The experiment of a run folder; weights are not read. Raises UserError if it is no run, or its
    config.json was edited."""
    saved = read_config(folder)
    check_unedited(folder, SAFE)
    try:
        config = restore(registry.get(saved['preset']), saved['config'])
        seeds = (saved['seed'], saved['seeds'])
        fields = (saved['preset'], config, saved['env'], *seeds, saved['command'])
        if 'data' in saved:
            lost = saved.get('max_lost', MAX_LOST)
            return Recorded(*fields, pathlib.Path(saved['data']), saved['label_fraction'], lost)
        return played(saved['env'])(
            *fields, options=saved['env_options'], env_frames=saved['env_frames']
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f'{folder / "config.json"} cannot be read ({type(error).__name__}: {error}); expected the config of a run'
        ) from error


def load(folder: pathlib.Path) -> tuple[Experiment, Params]:
    """The experiment of a finished run and its params [seeds, ...].

    Raises UserError if there is no run, or it was left before its last phase.
    """
    experiment = describe(folder)
    params, meta = checkpoint.load(folder)
    expected = jax.eval_shape(experiment.agent.init, jax.random.key(0))
    params = {k: x for k, x in params.items() if k not in legacy.gone_groups(params, expected)}
    last = experiment.agent.phases[-1].name
    if meta['phase'] != last or not meta['complete']:
        raise UserError(
            f'{folder} stopped in phase {meta["phase"]} at step {meta["step"]}; train it to its end first'
        )
    return experiment, params


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
