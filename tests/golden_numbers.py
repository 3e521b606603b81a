"""Recorded input -> output numbers of the reference implementations, and their parameter names in ours.

The arrays lie in `golden.npz` of the folder $REVERIE_GOLDEN (default: tests/golden); `golden.json` says what each is.
"""

import functools
import os
import pathlib

import numpy as np

FOLDER = pathlib.Path(os.environ.get('REVERIE_GOLDEN', pathlib.Path(__file__).parent / 'golden'))


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / 'golden.npz', allow_pickle=False) as arrays:
        return dict(arrays)


def golden(prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `prefix`, by the rest of their names: golden('v3/kl') -> {'post_logits': ..., ...}."""
    start = prefix.rstrip('/') + '/'
    found = {k.removeprefix(start): v for k, v in _arrays().items() if k.startswith(start)}
    if not found:
        raise KeyError(f'no golden numbers under {prefix!r} in {FOLDER}')
    return found
