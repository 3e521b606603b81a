"""Reverie: world-model agents in JAX.

    run = reverie.train('dreamer_v3_debug', 'minatar/breakout', 'runs/first', frames=4000)
    reverie.evaluate(run, episodes=8)['agent']['mean']
    run.dream()['dream']  # [B, T, h, w, c]
    run.play()

make: an agent for an environment. make_env: an environment by name. train, evaluate, load: runs.
Writer, Episodes: datasets, written and read. The command line does the same: reverie --help.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reverie.api import Run, evaluate, load, make, make_env, train
    from reverie.data import Episodes, Writer

__version__ = '0.2.0'
__all__ = ['Episodes', 'Run', 'Writer', 'evaluate', 'load', 'make', 'make_env', 'train']


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `reverie --help` is quick."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = 'reverie.data' if name in ('Episodes', 'Writer') else 'reverie.api'
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
