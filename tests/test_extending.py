"""Every block of docs/EXTENDING.md runs: its modules, its commands, its comparison."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from reverie.commands.play.setup import resolve_play
from tests.test_cli import ENV

pytestmark = [pytest.mark.slow, pytest.mark.docs, pytest.mark.xdist_group('extending')]

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'EXTENDING.md'
# As on the page, but that the agents are tiny, play little and are scored briefly.
BRIEF = """
set -e
reverie() {
  if [ "$1" = train ]; then set -- "$@" --max-steps 40 --updates-per-call 5; fi
  "$PYTHON" -m reverie.cli "$@" --episodes 4
}
"""
SMALLER = {'dreamer_v3_small': 'dreamer_v3_debug', '1e5': '600', '--seeds 3': '--seeds 2'}


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```', PAGE.read_text(), re.M | re.S)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the page's modules."""
    folder = tmp_path_factory.mktemp('reader')
    for block in blocks('python'):
        name, _, text = block.partition('\n')
        path = folder / re.fullmatch(r'# ([\w/]+\.py)', name)[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(smaller(text))
    return folder


def smaller(text):
    for ours, tiny in SMALLER.items():
        text = text.replace(ours, tiny)
    return text


def run(folder, *command):
    root = str(PAGE.parents[1])
    env = {**ENV, 'PYTHON': sys.executable, 'PYTHONPATH': os.pathsep.join([root, *sys.path[1:]])}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def done(folder):
    """The page's commands, run."""
    for block in blocks('bash'):
        run(folder, 'bash', '-c', BRIEF + smaller(block))
    return folder


def test_every_command_of_the_page_trains_or_scores(done):
    assert {path.name for path in (done / 'runs').iterdir()} == {
        'my_lab.presets.v3_wide-minatar_breakout',
        'my_lab.capped.v3_capped-my_lab.envs.Corridor',
        'inverse-0',
        'inverse-1',
    }
    said = run(done, sys.executable, 'compare.py')
    assert re.fullmatch(r'with minus without: -?\d+\.\d\d \(\S+ to \S+, Welch\)\n', said)


def test_a_run_of_ones_own_agent_and_one_in_ones_own_environment_open_again(done, monkeypatch):
    monkeypatch.chdir(done)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    corridor = 'my_lab.capped.v3_capped-my_lab.envs.Corridor'
    for name, preset in (('inverse-1', 'inverse:v3_inverse'), (corridor, 'capped:v3_capped')):
        saved = json.loads((done / 'runs' / name / 'config.json').read_text())
        assert saved['preset'] == f'my_lab.{preset}'
        setup = resolve_play(f'runs/{name}', None, {}, 0)
        assert setup.params().keys() >= {'policy', 'value'}
        assert f'my_lab.{preset}' in (done / 'runs' / name / 'report.html').read_text()
    assert setup.agent.spec.obs_shape == (6,) and setup.agent.cfg.world.kl.cap == 8.0
    for name in [name for name in sys.modules if name.partition('.')[0] == 'my_lab']:
        del sys.modules[name]


def test_the_page_names_a_file_for_every_module():
    names = [block.partition('\n')[0] for block in blocks('python')]
    assert names[0] == '# my_lab/presets.py' and len(set(names)) == len(names) >= 5
