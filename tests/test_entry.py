"""The console script from its first moment: Ctrl-C never shows a traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.test_cli import ENV

WAITING = """
import sys, reverie.cli, reverie.entry
def wait():
    print('here', flush=True)
    {what}
reverie.cli.dispatch = lambda argv: wait()
reverie.entry.main()
"""
IMPORTS = 'import slow_module'
WORKS = """
    import time
    try:
        time.sleep(60)
    finally:
        time.sleep(1)  # cleaning up, which a second Ctrl-C interrupts
"""


@pytest.mark.parametrize('what', [IMPORTS, WORKS], ids=['importing', 'working'])
def test_two_interrupts_end_with_one_line_and_130(tmp_path, what):
    slow = "import time\nprint('slow', flush=True)\ntime.sleep(60)\n"
    (tmp_path / 'slow_module.py').write_text(slow)
    root = os.path.dirname(os.path.dirname(__file__))
    env = ENV | {'PYTHONPATH': os.pathsep.join([root, str(tmp_path)])}
    process = subprocess.Popen(
        [sys.executable, '-c', WAITING.format(what=what)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    assert process.stdout.readline() == 'here\n'
    if what == IMPORTS:
        assert process.stdout.readline() == 'slow\n'
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == 'error: interrupted\n'
