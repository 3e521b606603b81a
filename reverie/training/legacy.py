"""Names that changed since runs were written: configurations of older runs, in the words of today."""

from collections.abc import Mapping
from typing import Any

from reverie.types import UserError

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


# Phase and parameter group of Dreamer 4 in version 1, an agent of its own since (`agents.bc`).
GONE = 'bc'


def modernise(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a run of any version, with the keys of this one; values are left as they are."""

    def renamed(tree: Any, path: str) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {_key(f'{path}.{k}', k): renamed(x, f'{path}.{k}') for k, x in tree.items()}

    new = {
        key: renamed(value, 'config') if key == 'config' else value for key, value in config.items()
    }
    if f'{GONE}_phase' in new.get('config', {}):
        new['config'] = {k: x for k, x in new['config'].items() if k != f'{GONE}_phase'}
        new['phases'] = {k: x for k, x in new.get('phases', {}).items() if k != GONE}
    return new


def modernise_meta(meta: dict[str, Any], step: Any) -> dict[str, Any]:
    """meta.json of a checkpoint of any version: the end of a phase that is gone is that of the
    phase before it.

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
    """Parameter groups of a checkpoint that no agent has any more."""
    return {GONE} & (set(saved) - set(expected))


def _key(path: str, key: str) -> str:
    return next((new for old, new in RENAMED.items() if path.endswith(f'.{old}')), key)
