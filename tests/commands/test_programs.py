"""Programs that one command compiled are loaded by the next."""

import json
import os
import subprocess
import sys

import pytest

from reverie.data import Episodes

pytestmark = [pytest.mark.slow, pytest.mark.compat, pytest.mark.whole]

COUNT = """
import json, sys
import jax
from reverie import cli
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition('/')[2]))
sys.argv = ['reverie', *sys.argv[1:]]
cli.main()
print(json.dumps([events.count('cache_misses'), events.count('cache_hits')]))
"""


def collect(folder, home, *options, **environment):
    """-> (what was said, programs compiled and kept, programs loaded)."""
    env = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    env |= {'XDG_CACHE_HOME': str(home), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    game = ('--env', 'minatar/breakout', '--kind', 'random', '--frames', '100', '--episodes', '2')
    command = [sys.executable, '-c', COUNT, 'collect', *game, '--out', str(folder), *options]
    done = subprocess.run(
        command, env=env | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *said, counts = done.stdout.splitlines()
    return said, *json.loads(counts)


def test_a_second_process_compiles_nothing_and_plays_the_same(tmp_path):
    home = tmp_path / 'home'
    said, compiled, loaded = collect(tmp_path / 'a', home)
    assert compiled > loaded  # some are asked for twice
    folder = home / 'reverie' / 'programs'
    assert [line for line in said if str(folder) in line] == [
        f'compiled programs are kept in {folder}; not with --no-cache'
    ]
    kept = sorted(folder.iterdir())
    assert collect(tmp_path / 'b', home)[1:] == (0, compiled + loaded)
    assert {p.name for p in kept} == {p.name for p in folder.iterdir()}
    assert Episodes(tmp_path / 'a').fingerprint == Episodes(tmp_path / 'b').fingerprint


def test_the_user_may_keep_programs_elsewhere_or_not_at_all(tmp_path):
    home, elsewhere = tmp_path / 'home', tmp_path / 'elsewhere'
    said, compiled, _ = collect(tmp_path / 'a', home, JAX_COMPILATION_CACHE_DIR=str(elsewhere))
    assert compiled > 0 and any(elsewhere.iterdir()) and not any('compiled' in x for x in said)
    before = sorted(elsewhere.iterdir())
    off = collect(tmp_path / 'b', home, '--no-cache', JAX_COMPILATION_CACHE_DIR=str(elsewhere))
    assert off[1:] == (0, 0) and sorted(elsewhere.iterdir()) == before
    assert not home.exists()


def test_a_program_of_another_processor_has_another_key():
    """JAX's key holds the topology's fingerprint, which follows the instruction sets."""
    look = (
        'import jax; from jax._src.lib import xla_client;'
        'print(xla_client.get_topology_for_devices(jax.devices()).fingerprint())'
    )
    seen = set()
    for flags in ('', '--xla_cpu_max_isa=SSE4_2'):
        env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
        seen.add(subprocess.check_output([sys.executable, '-c', look], env=env, text=True))
    assert len(seen) == 2
