"""A warm start, looked up and checked, and the reading of its weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from reverie.io import file_hash
from reverie.training import checkpoint
from reverie.training.state import TrainState, swap_mean
from reverie.training.warm import differences
from reverie.training.warm.request import Init
from reverie.training.warm.saved import Saved, end_of, find, open_run, taken_phases, touched
from reverie.types import Agent, Params, Phase, UserError

# Entries of the other run's config.json that are kept in this one's.
ORIGIN = ('preset', 'env', 'dataset', *differences.LABELS, 'command', 'commit', 'date')


@dataclasses.dataclass(frozen=True)
class Start:
    """A warm start that was found to fit; its weights are not read yet."""

    record: dict[str, Any]  # the entry `from` of config.json
    line: str  # the same for people
    found: Mapping[str, Saved]  # parameter group -> the checkpoint it comes from
    rows: Sequence[int]  # of each seed here: its row there
    first: int  # number of the first phase to train
    extends: Saved | None  # the end of that phase there, if it goes on from it

    @property
    def same_data(self) -> bool:
        """Whether the other run learnt from the same episodes and the same labels."""
        return not {'dataset', 'weights', *differences.LABELS} & set(self.record['differs'])

    def weights(self, fresh: Params) -> Params:
        """Return `fresh` [seeds, ...] with the groups taken in their places."""
        read: Params = {}
        for saved in {s.path: s for s in self.found.values()}.values():
            params = checkpoint.read(saved.path, saved.meta)
            mine = [group for group, s in self.found.items() if s is saved]
            read |= self._of_seeds({group: params[group] for group in mine})
        return {**fresh, **read}

    def resume(self, params: Params, expected: TrainState, phase: Phase) -> TrainState:
        """Return the train state at the end of the phase that goes on.

        expected: shapes [seeds, ...] and shardings.
        """
        assert self.extends is not None
        one, there = SingleDeviceSharding(jax.devices()[0]), self.extends.meta['seeds']
        rest = {name: x for name, x in expected._asdict().items() if name != 'params'}
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((there, *x.shape[1:]), x.dtype, sharding=one), rest
        )
        rest = self._of_seeds(checkpoint.read_train(self.extends.path, self.extends.meta, like))
        where = jax.tree.map(lambda x: x.sharding, expected)
        ended = swap_mean(TrainState(params, **rest), phase)
        train: TrainState = jax.device_put(ended, where)
        return train

    def _of_seeds(self, tree: PyTree) -> PyTree:
        """[seeds there, ...] -> [seeds, ...]."""
        return jax.tree.map(lambda x: np.asarray(x)[np.array(self.rows)], tree)


def plan(init: Init, agent: Agent, config: Mapping[str, Any]) -> Start:
    """Look up a warm start. config: config.json of this run, without `from`.

    Raises UserError, in one line, if the other run does not have what is asked for, or it does not
    fit this one: another shape or configuration of the groups taken, other seeds, or a damaged
    checkpoint.
    """
    there, saved = open_run(init.run)
    params = jax.eval_shape(agent.init, jax.random.key(0))
    phases = {phase.name: phase for phase in agent.phases}
    touches = {name: touched(phase, params) for name, phase in phases.items()}
    theirs = {n: set(p['trains']) | touches.get(n, set()) for n, p in there['phases'].items()}
    taken = [] if init.groups else taken_phases(init, list(phases), saved[-1], touches)
    extended = phases[init.phases[0]] if init.extend else None
    extends = end_of(init, saved, extended, there['phases']) if extended else None
    wanted = _wanted(init, params, taken, touches)
    found = find(init, saved, wanted, theirs, extends)
    for step in {s.path for s in found.values()}:
        if fault := checkpoint.fault_of(step):
            raise UserError(f'--from {init}: checkpoint {step} is damaged ({fault})')
    differences.check_fit(init, agent, params, found, there, config)
    rows, numbers = differences.seed_rows(init, there, config)
    done = [name for name in taken if extended is None or name != extended.name]
    record = {
        'run': str(init.run.resolve()),
        'what': init.what,
        'phases': {name: there['phases'][name] for name in done},
        'extended': {extended.name: there['phases'][extended.name]} if extended else {},
        'groups': {group: s.path.name for group, s in sorted(found.items())},
        'checkpoints': {
            s.path.name: file_hash(s.path / checkpoint.MANIFEST) for s in found.values()
        },
        'seeds': numbers,
        'differs': differences.told(there, config, [name for name in phases if name not in taken]),
        'of': {name: there[name] for name in ORIGIN if name in there},
        'seconds': max(s.meta['seconds'] for s in found.values()),
        'from': there.get('from'),
    }
    left = [name for name in phases if name not in done]
    first = list(phases).index(left[0])
    line = differences.line(init, record, left, extended, config)
    return Start(record, line, found, rows, first, extends)


def _wanted(
    init: Init, params: Params, taken: Sequence[str], touches: Mapping[str, set[str]]
) -> dict[str, str | None]:
    """Return the groups to take, each with the phase after which; None for the newest weights.

    Raises UserError for a group that the agent does not have.
    """
    if not init.groups:
        return {group: name for name in taken for group in sorted(touches[name])}
    if unknown := sorted(set(init.groups) - set(params)):
        raise UserError(
            f'--from {init}: the groups {unknown} are unknown, expected some of {sorted(params)}'
        )
    return dict.fromkeys(init.groups, init.phases[0] if init.phases else None)
