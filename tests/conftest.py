"""Shapes are checked while tests run; compiled programs are kept between runs."""

import importlib.metadata
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

import jax
import jaxtyping
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent
jax.config.update('jax_compilation_cache_dir', str(ROOT.parent / '.jax_cache'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

jaxtyping.install_import_hook('reverie', 'beartype.beartype')


@pytest.fixture(scope='session')
def golden() -> dict[str, np.ndarray]:
    """Recorded input -> output numbers of the reference implementations; another recording through
    REVERIE_GOLDEN.
    """
    folder = pathlib.Path(os.environ.get('REVERIE_GOLDEN', ROOT / 'golden'))
    with np.load(folder / 'golden.npz', allow_pickle=False) as arrays:
        return dict(arrays)


FIRST = (
    'test_probes.py',
    'test_probes_online.py',
    'test_cli.py',
    'test_cli_online.py',
    'test_online.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest first, so that no worker is left with one of them at the end."""
    rank = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))
