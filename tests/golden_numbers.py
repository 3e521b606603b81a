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


def _mlp(flat: dict, linear: str, norm: str, layers: int, out: str | None = None) -> dict:
    """An `MLP`: `linear` and `norm` are names with a {} for the layer's number."""
    tree = dict(
        hidden={i: _leaves(flat, linear.format(i)) for i in range(layers)},
        norms={i: _leaves(flat, norm.format(i)) for i in range(layers)},
    )
    return tree if out is None else dict(tree, out=_leaves(flat, out))


def _leaves(flat: dict, name: str) -> dict:
    """The arrays right under `name`: kernel and bias, or scale."""
    found = {k.removeprefix(f'{name}/'): v for k, v in flat.items() if k.startswith(f'{name}/')}
    assert found and all('/' not in k for k in found), name
    return found


def rssm_from_v3(flat: dict[str, np.ndarray]) -> dict:
    """Our `RSSM`'s weights from V3's, whose names start with 'dyn/'."""
    dense = lambda name: dict(linear=_leaves(flat, name), norm=_leaves(flat, f'{name}norm'))
    core = dict(
        from_h=dense('dyn/dynin0'),
        from_z=dense('dyn/dynin1'),
        from_action=dense('dyn/dynin2'),
        hidden=_leaves(flat, 'dyn/dynhid0'),
        norm=_leaves(flat, 'dyn/dynhid0norm'),
        gates=_leaves(flat, 'dyn/dyngru'),
    )
    if 'dyn/obs0/kernel' not in flat:
        return dict(core=core)
    prior = _mlp(flat, 'dyn/prior{}', 'dyn/prior{}norm', 2, 'dyn/priorlogit')
    post = _mlp(flat, 'dyn/obs{}', 'dyn/obs{}norm', 1, 'dyn/obslogit')
    return dict(core=core, prior=prior, post=post)
