"""Many small runs of one toy: every program is kept, however fast it compiled."""

import typing

import jax
import pytest

from reverie import types


@pytest.fixture(autouse=True, scope='module')
def keep_every_program():
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    yield
    jax.config.update('jax_persistent_cache_min_compile_time_secs', before)


# The protocols are checked at run time while tests run, so isinstance must work on them.
for protocol in (types.Agent, types.Source):
    typing.runtime_checkable(protocol)
