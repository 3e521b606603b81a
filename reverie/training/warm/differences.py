"""Differences between a run and the one it takes from: those that are refused, those that are told."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from reverie.training import checkpoint
from reverie.training.warm.request import Init
from reverie.training.warm.saved import Saved
from reverie.types import Agent, Params, Phase, UserError

NUMERICS = ('dtype', 'kernel')  # fields that say how a network is computed, not what it is
LABELS = ('label_fraction', 'label_stretch', 'labelled_files')
# Entries of config.json to tell of, beside the agent's own config.
TOLD = ('env', 'env_options', 'dataset', 'weights', 'tasks', *LABELS, 'seed')
LISTED = 8  # differences in a line


def check_fit(
    init: Init, agent: Agent, params: Params, found: Mapping[str, Saved], there: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raise UserError naming what differs if the groups are not those of this agent."""
    fields = {f for group in found for f in getattr(agent, 'shaped_by', {}).get(group, ())}
    differing = [
        f'{key} is {a!r} there, {b!r} here'
        for key, (a, b) in compare(there.get('config', {}), config.get('config', {})).items()
        if any(key == f or key.startswith(f'{f}.') for f in fields)
        and key.split('.')[-1] not in NUMERICS
    ]
    if not differing:  # else shapes say the same again
        for group, s in found.items():
            mine = _shapes(checkpoint.describe({group: params[group]}))
            theirs = [a for a in s.meta['arrays']['params'] if str(a['path'][0]) == group]
            theirs = [{**a, 'shape': a['shape'][1:]} for a in theirs]  # without seeds
            differing += [
                f'{key} is {a} there, {b} here'
                for key, (a, b) in compare(_shapes(theirs), mine).items()
            ]
    if differing:
        more = f'; and {len(differing) - LISTED} more' if len(differing) > LISTED else ''
        raise UserError(f'--from {init} does not fit: {"; ".join(differing[:LISTED])}{more}')


def _shapes(arrays: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return [*shape, dtype] of arrays as meta.json has them, by their path."""
    return {'/'.join(map(str, a['path'])): [*a['shape'], a['dtype']] for a in arrays}


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the keys, dotted, whose values differ, with [that of a, that of b]."""
    x, y = checkpoint.flatten(a), checkpoint.flatten(b)
    both = {key: [x.get(key, '(absent)'), y.get(key, '(absent)')] for key in {**x, **y}}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def told(
    there: Mapping[str, Any], config: Mapping[str, Any], left: Sequence[str]
) -> dict[str, list[Any]]:
    """Return what else differs between the runs, but for the settings `<phase>_phase` of the phases
    that are trained here.
    """
    own = tuple(f'{name}_phase.' for name in left)
    found = compare(there.get('config', {}), config.get('config', {}))

    def some(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {name: entries[name] for name in TOLD if name in entries}

    found = {key: values for key, values in found.items() if not key.startswith(own)}
    return compare(some(there), some(config)) | found


def seed_rows(
    init: Init, there: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Return (row there, its seed) of each seed here.

    Raises UserError if the other run does not have it.
    """
    theirs, mine = (list(range(c['seed'], c['seed'] + c['seeds'])) for c in (there, config))
    if len(theirs) == 1:
        return [0] * len(mine), theirs * len(mine)
    if missing := sorted(set(mine) - set(theirs)):
        raise UserError(
            f'--from {init}: it has the seeds {theirs}, not {missing}; expected --seed and --seeds within them, '
            'or a run of one seed, whose model every seed gets'
        )
    return [theirs.index(seed) for seed in mine], mine


def line(
    init: Init,
    record: Mapping[str, Any],
    left: Sequence[str],
    extended: Phase | None,
    config: Mapping[str, Any],
) -> str:
    """Return the warm start in one line."""
    parts = [f'taken from {init.run}: {_taken(record)} {_whose(record["seeds"])}']
    fresh = [name for name in left if extended is None or name != extended.name]
    parts += [f'trained afresh: {", ".join(fresh)}'] if fresh else []
    differs = dict(record['differs'])
    if extended:
        differs.pop(f'{extended.name}_phase.steps', None)
        before = record['extended'][extended.name]
        parts.append(f'{extended.name} goes on after {before["steps"]} of {extended.steps} updates')
        why = _why_not_whole(record, extended, config, differs)
        parts.append(
            f'not what {extended.steps} at once give: {", ".join(why)}' if why else 'as all at once'
        )
    if differs:
        shown = [
            f'{key} {a!r} there, {b!r} here'
            for key, (a, b) in itertools.islice(differs.items(), LISTED)
        ]
        more = f' and {len(differs) - LISTED} more (config.json)' if len(differs) > LISTED else ''
        parts.append(f'differs: {", ".join(shown)}{more}')
    return '; '.join(parts)


def _taken(record: Mapping[str, Any]) -> str:
    phases, groups = (*record['phases'], *record['extended']), ', '.join(record['groups'])
    return f'phases {", ".join(phases)} ({groups})' if phases else f'groups {groups}'


def _whose(seeds: Sequence[int]) -> str:
    if len(set(seeds)) > 1:
        return f'of seeds {" ".join(map(str, seeds))}'
    shared = f', one model for all {len(seeds)} seeds' if len(seeds) > 1 else ''
    return f'of seed {seeds[0]}{shared}'


def _why_not_whole(
    record: Mapping[str, Any],
    extended: Phase,
    config: Mapping[str, Any],
    differs: Mapping[str, Any],
) -> list[str]:
    """Return why a phase that goes on will not equal one that was trained at once."""
    before = record['extended'][extended.name]
    why = ['its learning rate, which follows their number'] if extended.scheduled else []
    if (before['batch'], before['length']) != (extended.batch, extended.length):
        why.append(f'batches of {before["batch"]} x {before["length"]} there')
    if record['seeds'] != list(range(config['seed'], config['seed'] + config['seeds'])):
        why.append('other seeds')
    return why + (['what differs'] if differs else [])
