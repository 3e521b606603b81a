"""Shapes are checked while tests run; compiled programs are kept between runs.

Markers are declared in pyproject.toml.
"""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most of the time goes into compiling. JAX 0.10 still has older emitters, which compile twice as
# fast.
os.environ.setdefault(
    'XLA_FLAGS',
    '--xla_backend_optimization_level=0'
    + ' --xla_cpu_use_fusion_emitters=false'
    * importlib.metadata.version('jaxlib').startswith('0.10.'),
)

# Shared by all workers, by the processes that tests start, and with the next run.
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.jax_cache')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

import jaxtyping
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent
# Tracing makes many objects that live long: collected as often as by default, they cost a tenth of
# the time.
gc.set_threshold(50_000, 20, 20)

jaxtyping.install_import_hook('reverie', 'beartype.beartype')


@pytest.fixture(scope='session')
def golden() -> dict[str, np.ndarray]:
    """Recorded input -> output numbers of the reference implementations; another recording through
    REVERIE_GOLDEN.
    """
    folder = pathlib.Path(os.environ.get('REVERIE_GOLDEN', ROOT / 'golden'))
    with np.load(folder / 'golden.npz', allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """`external(package, extra)`: skipped where the package of that extra is not installed."""
    for mark in item.iter_markers('external'):
        package, extra = mark.args
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'reverie[{extra}]'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test first, so that no worker is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)
