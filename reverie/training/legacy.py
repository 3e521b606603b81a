"""Configs and checkpoints of older versions, in the words of this one."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from reverie.errors import UserError

# Key of a dictionary, as its path ends -> the new key. The first that fits counts, so longer paths
# come first.
RENAMED = {
    'world.number': 'reward_dist',
    'number': 'value_dist',
    'law': 'dist',
    'squash': 'reward_transform',
    'even_channels': 'channel_weighting',
    'given_frames': 'context_frame_rate',
    'relevant_at_context': 'clean_bc_rows',
    'isolated': 'single_image_rate',
}
# Name of a part of a config -> fields that are newer than a run, as things were before.
NEWER: dict[str, dict[str, Any]] = {
    'tokenizer': {
        'pixel_mean': 0.0, 'pixel_std': 1.0, 'readout_scale': 1.0, 'time_first': False,
        'in_place': False, 'cache_latents': False, 'unit_latents': False,
    },
    'dynamics': {'action_init': 0.0},
    'config': {'mixed_steps': False, 'policy': True},
    **{
        name: {'long_length': 0, 'long_share': 0.1, 'long_end': 0.0}
        for name in ('phase', 'tokenizer_phase', 'dynamics_phase', 'finetune_phase', 'imagine_phase')
    },
}  # fmt: skip
# Part -> a field that tells Dreamer 4's from that of another agent.
MARKED = {'dynamics': 'k_max', 'config': 'bootstrap_fraction', 'phase': 'muon'}
# Phase and parameter group of Dreamer 4 in version 1, an agent of its own since (`agents.bc`).
GONE = 'bc'


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Return config.json of a run of any version, in the keys of this one; values are as they were.

    Raises UserError if there is none, or it is not a JSON object.
    """
    path = folder / 'config.json'
    if not path.exists():
        raise UserError(f'{folder} is not a run folder, expected a config.json in it')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UserError(
            f'{path} cannot be read ({type(error).__name__}: {error}); expected the config of a run'
        ) from error
    if not isinstance(config, dict):
        raise UserError(f'{path} holds a {type(config).__name__}, expected the config of a run')
    try:
        return modernise(config)
    except (AttributeError, TypeError) as error:
        raise UserError(
            f'{path} cannot be read ({type(error).__name__}: {error}); expected the config of a run'
        ) from error


def modernise(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the keys under `config` renamed, groups in order, with what is newer
    and without what is gone.
    """
    new = {k: _renamed(x, k) if k == 'config' else x for k, x in config.items()}
    if f'{GONE}_phase' in new.get('config', {}):
        new['config'] = {k: x for k, x in new['config'].items() if k != f'{GONE}_phase'}
        new['phases'] = {k: x for k, x in new.get('phases', {}).items() if k != GONE}
    outline = new.get('phases')
    if isinstance(outline, Mapping):
        new['phases'] = {name: _in_order(phase) for name, phase in outline.items()}
    return new


def modernise_meta(meta: dict[str, Any], step: Any) -> dict[str, Any]:
    """Return meta.json of a checkpoint with the end of a phase that is gone as that of the phase
    before it.

    Raises UserError inside such a phase.
    """
    if meta.get('phase') != GONE or not meta.get('phase_index'):
        return meta
    if not meta['complete']:
        raise UserError(
            f'{step} stands in phase {GONE}, which version 0.1 of reverie trained; finish the run '
            'with that version, or train the baseline as an agent of its own in another folder'
        )
    before = {'phase': 'imagine', 'phase_index': meta['phase_index'] - 1}
    return meta | before | {'arrays': meta['arrays'] | {'train': None}}


def gone_groups(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> set[str]:
    """Return the parameter groups of a checkpoint that no agent has any more."""
    return {GONE} & (set(saved) - set(expected))


def _in_order(phase: Any) -> Any:
    """Return a phase's outline with its groups sorted; their order means nothing."""
    if not isinstance(phase, Mapping) or 'trains' not in phase:
        return phase
    return {**phase, 'trains': sorted(phase['trains'])}


def _renamed(tree: Any, at: str) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    found = {_key(f'{at}.{name}', name): _renamed(x, f'{at}.{name}') for name, x in tree.items()}
    part = at.rpartition('.')[2]
    newer = NEWER.get(part, {}) if part not in MARKED or MARKED[part] in found else {}
    return {**newer, **found}


def _key(path: str, key: str) -> str:
    return next((new for old, new in RENAMED.items() if path.endswith(f'.{old}')), key)
