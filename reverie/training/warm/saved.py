"""Checkpoints of the run that is taken from: which phases and groups each of them holds."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from reverie.training import checkpoint
from reverie.training.legacy import read_config
from reverie.training.warm.request import Init
from reverie.types import Params, Phase, UserError


@dataclasses.dataclass(frozen=True)
class Saved:
    """One checkpoint of the other run."""

    path: pathlib.Path
    meta: checkpoint.Meta
    names: tuple[str, ...]  # the run's phases in order
    given: tuple[str, ...]  # phases it had itself taken

    @property
    def done(self) -> set[str]:
        """Phases that are complete in it."""
        return {*self.names[: self.meta['phase_index'] + self.meta['complete']], *self.given}

    def is_after(self, name: str, group: str, touches: Mapping[str, set[str]]) -> bool:
        """Tell if the weights of `group` are those of the end of phase `name`: no later phase has
        changed them.
        """
        if name not in self.done:
            return False
        begun = self.done | {self.names[self.meta['phase_index']]}
        later = self.names[self.names.index(name) + 1 :] if name in self.names else ()
        return not any(group in touches[n] for n in later if n in begun)


def open_run(run: pathlib.Path) -> tuple[dict[str, Any], list[Saved]]:
    """Return config.json and the checkpoints of a run, oldest first.

    Raises UserError if there are none.
    """
    if not (run / 'config.json').exists():
        raise UserError(f'--from {run}: not a run folder, expected a config.json in it')
    try:
        config = read_config(run)
        names = tuple(config['phases'])
        given = tuple((config.get('from') or {}).get('phases', ()))
        saved = [
            Saved(step, checkpoint.meta_of(step), names, given)
            for step in checkpoint.steps(run / 'checkpoints')
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'--from {run}: is damaged or of another version ({type(error).__name__}: {error})'
        ) from error
    if not saved:
        raise UserError(f'--from {run}: it has no checkpoint yet')
    return config, saved


def touched(phase: Phase, params: Params) -> set[str]:
    """Return the parameter groups that a phase changes: those it trains, and those that `begin` or
    `after` replaces.
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


def taken_phases(
    init: Init, names: list[str], newest: Saved, touches: Mapping[str, set[str]]
) -> list[str]:
    """Return the names of the phases taken, in order, one that is extended among them.

    Raises UserError if they cannot be.
    """
    if unknown := [name for name in init.phases if name not in names]:
        raise UserError(
            f'--from {init}: phase {unknown[0]!r} is unknown, this agent has {", ".join(names)}'
        )
    if init.phases:
        first = names.index(init.phases[0])
        taken = [n for i, n in enumerate(names) if i <= first or n in init.phases]
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
        before = [n for n in left if names.index(n) < names.index(name)]
        if clash := [n for n in before if touches[n] & touches[name]]:
            raise UserError(
                f'--from {init}: {name} cannot be taken, it comes after {clash[0]}, which is to be trained'
            )
    return taken


def end_of(init: Init, saved: Sequence[Saved], phase: Phase, phases: Mapping[str, Any]) -> Saved:
    """Return the checkpoint of the end of a phase, with the optimiser's state.

    Raises UserError if it was not kept, or has as many updates as there are to be.
    """
    steps = phases[phase.name]['steps']
    if phase.steps <= steps:
        raise UserError(
            f'--from {init}: {phase.name} has had {steps} updates, expected more than {phase.steps} here'
        )
    for s in saved:
        ends = s.meta['phase'] == phase.name and s.meta['complete']
        arrays = s.meta['arrays']['train']
        if ends and any(x['path'][0] in ('live', 'host') for x in arrays or ()):
            raise UserError(
                f'--from {init}: {phase.name} plays and cannot go on in another folder; its own command '
                f'with more --frames goes on in {init.run}'
            )
        if ends and arrays is not None:
            return s
    raise UserError(
        f'--from {init}: {phase.name} cannot go on, the optimiser at its end was not kept; runs on '
        'datasets that keep phase ends have it'
    )


def find(
    init: Init,
    saved: Sequence[Saved],
    wanted: Mapping[str, str | None],
    touches: Mapping[str, set[str]],
    extends: Saved | None,
) -> dict[str, Saved]:
    """Return the checkpoint to take each group from, as few different ones as will do.

    wanted: group -> the phase after which, or None for the newest checkpoint. Raises UserError if
    none holds a group.
    """

    def fits(s: Saved, group: str) -> bool:
        name = wanted[group]
        if extends is not None and name == extends.meta['phase']:
            return s is extends
        return s is saved[-1] if name is None else s.is_after(name, group, touches)

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
