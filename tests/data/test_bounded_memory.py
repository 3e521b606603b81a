"""A dataset three times as large as the memory it may take is read within its bound."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from reverie.data import Writer
from reverie.types import ActionSpace, EnvSpec, Step

SIDE, FRAMES, EPISODES, MEGABYTE = 192, 100, 48, 1 << 20
BUDGET = 160 * MEGABYTE
READER = """
import resource, sys
import numpy as np
from reverie.data import Episodes, open_source
from reverie.data.sources import Streaming

budget = int(sys.argv[2])
episodes = Episodes(sys.argv[1])
assert episodes.frames * episodes.bytes_per_frame > 3 * budget
Streaming(episodes, group_bytes=1).load(1, 1, 2, 1)  # starts threads, a few episodes large
taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
limit = taken + budget
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
source = open_source(episodes, episodes.spec, memory_budget_bytes=int(sys.argv[3]) * budget)
assert isinstance(source, Streaming)
updates = source.most_updates(8, 16, 1)
drawn, seen = 0, set()
while drawn < 2 * episodes.frames:
    windows = source.load(updates, 8, 16, 1)
    seen |= set(windows.obs[..., 0, 0, 0].ravel().tolist())
    drawn += updates * 8 * 16
print('drawn', drawn, 'episodes', len(seen))
"""


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp('large') / 'd'
    space = ActionSpace.composite(())
    spec = EnvSpec('synthetic', (SIDE, SIDE, 3), space)
    first, last = np.arange(FRAMES) == 0, np.arange(FRAMES) == FRAMES - 1
    no, zero = np.zeros(FRAMES, bool), np.zeros(FRAMES)
    with Writer(path, spec, compressed=True) as writer:
        for number in range(EPISODES):
            obs = np.full((FRAMES, SIDE, SIDE, 3), 5 * number, np.uint8)
            step = Step(obs, np.zeros((FRAMES, 0)), zero, first, last, no)
            writer.add('video', step, has_action=False, has_reward=False)
    return path


@pytest.mark.parametrize('told', [1, 6])
def test_streaming_keeps_to_its_budget_in_bytes(dataset, told):
    """Told that it may take six times as much it runs into the limit, so the limit is one."""
    command = [sys.executable, '-c', textwrap.dedent(READER), str(dataset), str(BUDGET), str(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if told > 1:
        assert done.returncode != 0 and 'emory' in done.stderr
        return
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 0.9 * EPISODES
