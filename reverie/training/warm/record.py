"""The entry `from` of config.json: what a run has taken, and from where."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from reverie.io import file_hash
from reverie.training import checkpoint
from reverie.training.legacy import read_config
from reverie.training.warm.request import Init
from reverie.types import Phase, UserError


def remembered(folder: pathlib.Path, init: Init | None) -> dict[str, Any] | None:
    """Return the entry of a run that has saved a checkpoint; None if it has not, or began without a
    warm start.

    Raises UserError if the run was begun in another way than is asked for now.
    """
    if not (folder / 'config.json').exists():
        return None
    saved = read_config(folder).get('from')
    if saved is None and init is None:
        return None
    if not (saved and init and saved['what'] == init.what and _is_run(init.run, saved)):
        began = f'with --from {saved["run"]}{saved["what"]}' if saved else 'without --from'
        given = f'--from {init}' if init else 'none'
        raise UserError(f'{folder} was begun {began}, given {given}; use another folder')
    return saved if checkpoint.steps(folder / 'checkpoints') else None


def _is_run(run: pathlib.Path, saved: Mapping[str, Any]) -> bool:
    """Tell if a run is the one of an entry: it lies where that lay, or has its checkpoints."""
    manifests = {
        run / 'checkpoints' / name / checkpoint.MANIFEST: sha
        for name, sha in saved['checkpoints'].items()
    }
    return saved['run'] == str(run.resolve()) or all(
        path.exists() and file_hash(path) == sha for path, sha in manifests.items()
    )


def outline(phases: Sequence[Phase], record: Mapping[str, Any] | None) -> tuple[Phase, ...]:
    """Return the phases of a run; those taken have the updates and batches of their training."""
    done = (record or {}).get('phases', {})

    def as_trained(phase: Phase) -> Phase:
        if phase.name not in done:
            return phase
        sizes = {name: done[phase.name][name] for name in ('steps', 'batch', 'length')}
        return dataclasses.replace(phase, **sizes)

    return tuple(map(as_trained, phases))


def ancestors(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a config.json, from the run it was taken from back to the first."""
    found = []
    record = config.get('from')
    while record:
        found.append(record)
        record = record['from']
    return found


def summary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a results file: {'from': ...}, with the seconds of training in all runs
    before, or {}.
    """
    chain = ancestors(config)
    if not chain:
        return {}
    record = chain[0]
    taken = {name: list(record[name]) for name in ('phases', 'extended', 'groups')}
    run = pathlib.Path(record['run']).name
    seconds = sum(r['seconds'] for r in chain)
    return {'from': {'run': run, **taken, 'seeds': record['seeds'], 'seconds': seconds}}
