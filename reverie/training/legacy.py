"""Names that changed since runs were written: configurations of older runs, in the words of today."""

from collections.abc import Mapping
from typing import Any

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


def modernise(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a run of any version, with the keys of this one; values are left as they are."""

    def renamed(tree: Any, path: str) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {_key(f'{path}.{k}', k): renamed(x, f'{path}.{k}') for k, x in tree.items()}

    return {
        key: renamed(value, 'config') if key == 'config' else value for key, value in config.items()
    }


def _key(path: str, key: str) -> str:
    return next((new for old, new in RENAMED.items() if path.endswith(f'.{old}')), key)
