"""Warm start: the weights of finished phases, or of parameter groups by name, come from another
run.

The other run is only read, and only until this one has saved its first checkpoint; config.json
keeps what was taken, from which checkpoints, and the other run's own entry, so that the chain back
to the first run is in every run.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from reverie.training import checkpoint
from reverie.training.legacy import read_config
from reverie.training.state import TrainState
from reverie.types import Agent, Params, Phase, UserError

NUMERICS = (
    'dtype',
    'kernel',
)  # fields of a config that say how a network is computed, not what it is
TOLD = (
    'env',
    'env_options',
    'dataset',
    'label_fraction',
    'seed',
)  # of config.json, beside the agent's own config
ORIGIN = ('preset', 'env', 'dataset', 'label_fraction', 'command', 'commit', 'date')
LISTED = 8  # differences in a line


@dataclasses.dataclass(frozen=True)
class Init:
    """What a run takes from another.

    run: folder of the other run.
    phases: the first of them and all before it count as done, and so does each of the others; none:
        every phase that the run has finished, from the first on. Each phase that is not taken is
        trained.
    extend: the first of `phases` is trained on, to the updates it has here, from the optimiser's
    state at its end.
    groups: only the weights of these parameter groups are taken, as they were at the end of the
        first of `phases` (of the newest checkpoint, if none is given); every phase is trained.
    """

    run: pathlib.Path
    phases: tuple[str, ...] = ()
    extend: bool = False
    groups: tuple[str, ...] = ()

    def __post_init__(self):
        if not all(self.phases):
            raise UserError(
                f'--from {self}: expected RUN, RUN:PHASE, RUN:PHASE+ or RUN:PHASE,PHASE'
            )
        if self.groups and (self.extend or len(self.phases) > 1):
            raise UserError(
                f'--from {self}: groups are taken from the end of one phase, expected RUN or RUN:PHASE'
            )

    @classmethod
    def parse(cls, text: str, groups: Iterable[str] = ()) -> 'Init':
        """Of 'RUN', 'RUN:finetune', 'RUN:imagine+' or 'RUN:finetune,bc'.

        Raises UserError for anything else.
        """
        run, colon, what = text.rpartition(':')
        if not colon or pathlib.Path(text).exists():
            return cls(pathlib.Path(text), groups=tuple(groups))
        first, *others = what.split(',')
        return cls(
            pathlib.Path(run),
            (first.removesuffix('+'), *others),
            first.endswith('+'),
            tuple(groups),
        )

    @property
    def what(self) -> str:
        """What is asked for, as it follows the run on the command line."""
        phases = (
            ':' + ','.join((self.phases[0] + '+' * self.extend, *self.phases[1:]))
            if self.phases
            else ''
        )
        return phases + (f' --from-groups {" ".join(self.groups)}' if self.groups else '')

    def __str__(self) -> str:
        return f'{self.run}{self.what}'


@dataclasses.dataclass(frozen=True)
class Saved:
    """One checkpoint of the other run.

    names: the run's phases in order. given: those it had itself taken.
    """

    path: pathlib.Path
    meta: checkpoint.Meta
    names: tuple[str, ...]
    given: tuple[str, ...]

    @property
    def done(self) -> set[str]:
        """Phases whose weights are in it or were, whole."""
        return {*self.names[: self.meta['phase_index'] + self.meta['complete']], *self.given}

    def as_after(self, name: str, group: str, touches: Mapping[str, set[str]]) -> bool:
        """Whether the weights of `group` are those of the end of phase `name`: no later phase has
        changed them.
        """
        begun = self.done | {self.names[self.meta['phase_index']]}
        later = self.names[self.names.index(name) + 1 :] if name in self.names else ()
        return name in self.done and not any(group in touches[n] for n in later if n in begun)


@dataclasses.dataclass(frozen=True)
class Start:
    """A warm start that was looked up and found to fit; weights are not read yet.

    record: what config.json says of it. line: the same for people.
    found: parameter group -> the checkpoint it comes from. rows: of each seed here, its row there.
    first: number of the first phase to train. extends: that phase goes on from its end there, in
    this checkpoint.
    """

    record: dict[str, Any]
    line: str
    found: Mapping[str, Saved]
    rows: Sequence[int]
    first: int
    extends: Saved | None

    def weights(self, fresh: Params) -> Params:
        """`fresh` [seeds, ...] with the groups taken in their places."""
        read: Params = {}
        for saved in {s.path: s for s in self.found.values()}.values():
            params = checkpoint.read(saved.path, saved.meta)
            mine = [group for group, s in self.found.items() if s is saved]
            read |= self._of_seeds({group: params[group] for group in mine})
        return {**fresh, **read}

    def _of_seeds(self, tree: PyTree) -> PyTree:
        """[seeds there, ...] -> [seeds, ...]."""
        return jax.tree.map(lambda x: np.asarray(x)[np.array(self.rows)], tree)

    def resume(self, params: Params, expected: TrainState, phase: Phase) -> TrainState:
        """The train state at the end of the phase that goes on.

        expected: shapes [seeds, ...] and where they lie.
        """
        assert self.extends is not None
        one, there = SingleDeviceSharding(jax.devices()[0]), self.extends.meta['seeds']
        rest = {name: x for name, x in expected._asdict().items() if name != 'params'}
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((there, *x.shape[1:]), x.dtype, sharding=one), rest
        )
        rest = self._of_seeds(checkpoint.read_train(self.extends.path, self.extends.meta, like))
        if rest['ema'] is not None:  # `params` are the mean, and the weights lie where the mean was
            rest['ema'], weights = {group: params[group] for group in phase.trains}, rest['ema']
            params = {**params, **weights}
        return jax.device_put(
            TrainState(params, **rest), jax.tree.map(lambda x: x.sharding, expected)
        )


def touched(phase: Phase, params: Params) -> set[str]:
    """Parameter groups that a phase changes: those it trains, and those that `begin` or `after`
    replaces.
    """
    changed = set(phase.trains)

    def trace(params: Params) -> None:
        after = [phase.begin(params)] if phase.begin else []
        after += [phase.after(params, jnp.zeros((), jnp.int32))] if phase.after else []
        changed.update(
            group for new in after for group, tree in new.items() if tree is not params.get(group)
        )

    jax.eval_shape(trace, params)
    return changed


def remembered(folder: pathlib.Path, init: Init | None) -> dict[str, Any] | None:
    """The entry 'from' of a run that has saved a checkpoint; None if it has not, or began without a
    warm start.

    Raises UserError if the run was begun in another way than is asked for now.
    """
    if not (folder / 'config.json').exists():
        return None
    saved = read_config(folder).get('from')
    if not (saved or init):
        return None
    if (
        saved is None
        or init is None
        or saved['what'] != init.what
        or not _same_run(saved, init.run)
    ):
        began = f'with --from {saved["run"]}{saved["what"]}' if saved else 'without --from'
        raise UserError(
            f'{folder} was begun {began}, given {f"--from {init}" if init else "none"}; use another folder'
        )
    return saved if checkpoint.steps(folder / 'checkpoints') else None


def _same_run(saved: Mapping[str, Any], run: pathlib.Path) -> bool:
    """Whether a run is the one taken from: it lies where that one lay, or holds the same
    checkpoints.
    """
    paths = [
        (run / 'checkpoints' / name / checkpoint.MANIFEST, sha)
        for name, sha in saved['checkpoints'].items()
    ]
    return saved['run'] == str(run.resolve()) or all(
        p.exists() and checkpoint.digest(p) == sha for p, sha in paths
    )


def outline(phases: Sequence[Phase], record: Mapping[str, Any] | None) -> tuple[Phase, ...]:
    """The phases of a run; those taken have the updates and batches they were trained with."""
    done = (record or {}).get('phases', {})
    size = lambda phase: {name: done[phase.name][name] for name in ('steps', 'batch', 'length')}
    return tuple(dataclasses.replace(p, **size(p)) if p.name in done else p for p in phases)


def plan(init: Init, agent: Agent, config: Mapping[str, Any]) -> Start:
    """Look up a warm start. config: what config.json of this run will say, without 'from'.

    Raises UserError, in one line, if the other run does not have what is asked for, or it does not
    fit this one: another shape or configuration of the groups taken, other seeds, or a damaged
    checkpoint.
    """
    there, saved = _open(init.run)
    params = jax.eval_shape(agent.init, jax.random.key(0))
    phases = {phase.name: phase for phase in agent.phases}
    touches = {name: touched(phase, params) for name, phase in phases.items()}
    theirs = {n: set(p['trains']) | touches.get(n, set()) for n, p in there['phases'].items()}
    taken = [] if init.groups else _taken(init, list(phases), saved[-1], touches)
    extended = phases[init.phases[0]] if init.extend else None
    if init.groups:
        if unknown := sorted(set(init.groups) - set(params)):
            raise UserError(
                f'--from {init}: the groups {unknown} are unknown, expected some of {sorted(params)}'
            )
        wanted: dict[str, str | None] = dict.fromkeys(
            init.groups, init.phases[0] if init.phases else None
        )
    else:
        wanted = {group: name for name in taken for group in sorted(touches[name])}
    extends = _end_of(init, saved, extended, there['phases']) if extended else None
    found = _find(init, saved, wanted, theirs, extends)
    for step in {s.path for s in found.values()}:
        if fault := checkpoint.fault_of(step):
            raise UserError(f'--from {init}: checkpoint {step} is damaged ({fault})')
    _check_fit(init, agent, params, found, there, config)
    rows, numbers = _rows(init, there, config)
    done = [name for name in taken if extended is None or name != extended.name]
    record = {
        'run': str(init.run.resolve()),
        'what': init.what,
        'phases': {name: there['phases'][name] for name in done},
        'extended': {extended.name: there['phases'][extended.name]} if extended else {},
        'groups': {group: s.path.name for group, s in sorted(found.items())},
        'checkpoints': {
            s.path.name: checkpoint.digest(s.path / checkpoint.MANIFEST) for s in found.values()
        },
        'seeds': numbers,
        'differs': _differs(there, config, [name for name in phases if name not in taken]),
        'of': {name: there[name] for name in ORIGIN if name in there},
        'seconds': max(s.meta['seconds'] for s in found.values()),
        'from': there.get('from'),
    }
    left = [name for name in phases if name not in done]
    first = list(phases).index(left[0])
    return Start(record, _line(init, record, left, extended, config), found, rows, first, extends)


def ancestors(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries 'from' of a config.json, from the run it was taken from back to the first."""
    found, record = [], config.get('from')
    while record:
        found.append(record)
        record = record['from']
    return found


def summary(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a results file says of a warm start: {} or {'from': ...}. seconds: of training in all
    runs before.
    """
    chain = ancestors(config)
    if not chain:
        return {}
    record = chain[0]
    taken = {name: list(record[name]) for name in ('phases', 'extended', 'groups')}
    seconds = sum(r['seconds'] for r in chain)
    return {
        'from': {
            'run': pathlib.Path(record['run']).name,
            **taken,
            'seeds': record['seeds'],
            'seconds': seconds,
        }
    }


def _open(run: pathlib.Path) -> tuple[dict[str, Any], list[Saved]]:
    """config.json and the checkpoints of a run, oldest first.

    Raises UserError if there are none.
    """
    path = run / 'config.json'
    if not path.exists():
        raise UserError(f'--from {run}: not a run folder, expected a config.json in it')
    try:
        config = read_config(run)
        names, given = tuple(config['phases']), tuple((config.get('from') or {}).get('phases', ()))
        saved = [
            Saved(p, checkpoint.meta_of(p), names, given)
            for p in checkpoint.steps(run / 'checkpoints')
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'--from {run}: is damaged or of another version ({type(error).__name__}: {error})'
        ) from error
    if not saved:
        raise UserError(f'--from {run}: it has no checkpoint yet')
    return config, saved


def _taken(
    init: Init, names: list[str], newest: Saved, touches: Mapping[str, set[str]]
) -> list[str]:
    """Names of the phases taken, in order, one that is extended among them.

    Raises UserError if that cannot be.
    """
    if unknown := [name for name in init.phases if name not in names]:
        raise UserError(
            f'--from {init}: phase {unknown[0]!r} is unknown, this agent has {", ".join(names)}'
        )
    if init.phases:
        taken = [
            n for i, n in enumerate(names) if i <= names.index(init.phases[0]) or n in init.phases
        ]
    else:
        taken = list(itertools.takewhile(newest.done.__contains__, names))
    if missing := [name for name in taken or names[:1] if name not in newest.done]:
        has = ', '.join(n for n in newest.names if n in newest.done) or 'none'
        raise UserError(
            f'--from {init}: {init.run} has not finished the phase {missing[0]}; finished: {has}'
        )
    left = [name for name in names if name not in taken or (init.extend and name == init.phases[0])]
    if not left:
        fewer = f'{init.run}:{taken[-2]}' if len(taken) > 1 else f'{init.run} with --from-groups'
        raise UserError(
            f'--from {init}: every phase ({", ".join(taken)}) is taken and nothing is left to train; '
            f'take fewer, e.g. {fewer}, or train one on: {init.run}:{taken[-1]}+'
        )
    for name in taken:
        if clash := [
            n for n in left if names.index(n) < names.index(name) and touches[n] & touches[name]
        ]:
            raise UserError(
                f'--from {init}: {name} cannot be taken, it comes after {clash[0]}, which is to be trained'
            )
    return taken


def _end_of(init: Init, saved: Sequence[Saved], phase: Phase, phases: Mapping[str, Any]) -> Saved:
    """The checkpoint of the end of a phase, with the optimiser's state.

    Raises UserError if that was not kept.
    """
    steps = phases[phase.name]['steps']
    if phase.steps <= steps:
        raise UserError(
            f'--from {init}: {phase.name} has had {steps} updates, expected more than {phase.steps} here'
        )
    for s in saved:
        if (
            s.meta['phase'] == phase.name
            and s.meta['complete']
            and s.meta['arrays']['train'] is not None
        ):
            return s
    raise UserError(
        f'--from {init}: {phase.name} cannot go on, the optimiser at its end was not kept; runs on datasets that keep '
        'phase ends have it'
    )


def _find(
    init: Init,
    saved: Sequence[Saved],
    wanted: Mapping[str, str | None],
    touches: Mapping[str, set[str]],
    extends: Saved | None,
) -> dict[str, Saved]:
    """Which checkpoint to take each group from, as few as will do.

    wanted: group -> phase after which, or None.
    """

    def fits(s: Saved, group: str) -> bool:
        name = wanted[group]
        if extends is not None and name == extends.meta['phase']:
            return s is extends
        return s is saved[-1] if name is None else s.as_after(name, group, touches)

    found: dict[str, Saved] = {}
    while left := [group for group in wanted if group not in found]:
        best = max(saved, key=lambda s: sum(fits(s, group) for group in left))
        if not any(fits(best, group) for group in left):
            name = wanted[left[0]]
            raise UserError(
                f'--from {init}: no checkpoint holds {", ".join(g for g in left if wanted[g] == name)} as after phase '
                f'{name}; they were trained on, and the end of that phase was not kept'
            )
        found |= {group: best for group in left if fits(best, group)}
    return found


def _check_fit(
    init: Init, agent: Agent, params: Params, found: Mapping[str, Saved], there: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raise UserError naming what differs if the groups are not those of this agent."""
    fields = {f for group in found for f in getattr(agent, 'shaped_by', {}).get(group, ())}
    differing = [
        f'{key} is {a!r} there, {b!r} here'
        for key, (a, b) in _compare(there.get('config', {}), config.get('config', {})).items()
        if any(key == f or key.startswith(f'{f}.') for f in fields)
        and key.split('.')[-1] not in NUMERICS
    ]
    if not differing:  # else shapes say the same again
        shapes = lambda arrays, skip: {
            '/'.join(map(str, a['path'])): [*a['shape'][skip:], a['dtype']] for a in arrays
        }
        for group, s in found.items():
            theirs = shapes(
                [a for a in s.meta['arrays']['params'] if str(a['path'][0]) == group], 1
            )
            mine = shapes(checkpoint.describe({group: params[group]}), 0)
            differing += [
                f'{key} is {a} there, {b} here' for key, (a, b) in _compare(theirs, mine).items()
            ]
    if differing:
        more = f'; and {len(differing) - LISTED} more' if len(differing) > LISTED else ''
        raise UserError(f'--from {init} does not fit: {"; ".join(differing[:LISTED])}{more}')


def _compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Keys, dotted, whose values differ -> [of a, of b]."""
    x, y, absent = checkpoint.flatten(a), checkpoint.flatten(b), '(absent)'
    keys = [
        key
        for key in (*x, *(k for k in y if k not in x))
        if x.get(key, absent) != y.get(key, absent)
    ]
    return {key: [x.get(key, absent), y.get(key, absent)] for key in keys}


def _differs(
    there: Mapping[str, Any], config: Mapping[str, Any], left: Sequence[str]
) -> dict[str, list[Any]]:
    """What else differs between the runs, but for the settings `<phase>_phase` of phases that are
    trained here.
    """
    own = tuple(f'{name}_phase.' for name in left)
    found = _compare(there.get('config', {}), config.get('config', {}))
    told = _compare(
        {k: there[k] for k in TOLD if k in there}, {k: config[k] for k in TOLD if k in config}
    )
    return {**told, **{key: values for key, values in found.items() if not key.startswith(own)}}


def _rows(
    init: Init, there: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Of each seed here, its row there and that row's seed.

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


def _line(
    init: Init,
    record: Mapping[str, Any],
    left: Sequence[str],
    extended: Phase | None,
    config: Mapping[str, Any],
) -> str:
    """The warm start in one line."""
    names, seeds = ', '.join((*record['phases'], *record['extended'])), record['seeds']
    whose = (
        f'of seed {seeds[0]}' if len(set(seeds)) == 1 else f'of seeds {" ".join(map(str, seeds))}'
    )
    whose += f', one model for all {len(seeds)} seeds' * (len(set(seeds)) < len(seeds))
    what = (
        f'phases {names} ({", ".join(record["groups"])})'
        if names
        else f'groups {", ".join(record["groups"])}'
    )
    parts = [f'taken from {init.run}: {what} {whose}']
    anew = [name for name in left if extended is None or name != extended.name]
    parts += [f'trained anew: {", ".join(anew)}'] if anew else []
    differs = dict(record['differs'])
    if extended:
        before = record['extended'][extended.name]
        sizes = {k: before[k] for k in ('batch', 'length')} != {
            k: getattr(extended, k) for k in ('batch', 'length')
        }
        differs.pop(f'{extended.name}_phase.steps', None)
        parts.append(f'{extended.name} goes on after {before["steps"]} of {extended.steps} updates')
        why = ['its learning rate, which follows their number'] if extended.scheduled else []
        why += [f'batches of {before["batch"]} x {before["length"]} there'] if sizes else []
        why += (
            ['other seeds']
            if seeds != list(range(config['seed'], config['seed'] + config['seeds']))
            else []
        )
        why += ['what differs'] if differs else []
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
