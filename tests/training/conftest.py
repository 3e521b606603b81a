"""Many small runs of one toy: every program is kept, however fast it compiled."""

import jax
import pytest


@pytest.fixture(autouse=True, scope='module')
def keep_every_program():
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    yield
    jax.config.update('jax_persistent_cache_min_compile_time_secs', before)
