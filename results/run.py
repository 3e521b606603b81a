"""Run the experiments of `experiments.py` that are not recorded yet, one after the other.

    python results/run.py [--list] [--budget 9m] [--only 'dreamer_v3_small/*'] [--device cpu]

An experiment is recorded when `results/NAME.json` carries its name and its revision or a later one
(a file without a revision has 0). Each runs at nice 19 in `runs/queue/NAME-rREVISION`, a clone of
the commit that was checked out when it began, with the commands of that moment, and is continued
there by the exact resume of the commands themselves. After the last one its JSON is copied here
with name and revision in one rename, so neither is ever there alone.

`runs/queue/lock` names the process that runs the queue, `runs/queue/pid` the process group that
computes. Exit codes: 0 done; 1 some failed; 2 a mistake, or another runs the queue; 75 stopped by
budget or signal, the same command continues.
"""

import argparse
import contextlib
import fcntl
import fnmatch
import functools
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from experiments import EXPERIMENTS, Experiment

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUEUE = ROOT / 'runs' / 'queue'
FAILED, REFUSED, STOPPED = 1, 2, 75
say = functools.partial(print, 'results:', flush=True)


def save(path: pathlib.Path, value: Any) -> None:
    """Write JSON; a process killed at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'w') as file:
        file.write(json.dumps(value, indent=1) + '\n')
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def clone_of(e: Experiment) -> pathlib.Path:
    """Folder in which an experiment runs."""
    return QUEUE / f'{e.name.replace("/", "-")}-r{e.revision}'


def state(e: Experiment) -> str:
    """Say 'recorded', 'begun' (at this revision), 'stale' (recorded at a lower one) or 'missing'."""
    path = ROOT / e.results
    if path.exists():
        stamp = json.loads(path.read_text()).get('experiment', {'name': e.name, 'revision': 0})
        if stamp['name'] == e.name and stamp['revision'] >= e.revision:
            return 'recorded'
    return 'begun' if clone_of(e).exists() else 'stale' if path.exists() else 'missing'


def begin(e: Experiment) -> None:
    """Clone the commit that is checked out; all at once or not at all."""
    for unfinished in QUEUE.glob('.clone-*'):  # left by a runner that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    unfinished = QUEUE / f'.clone-{os.getpid()}'
    subprocess.run(['git', 'clone', '--quiet', ROOT, unfinished], check=True)
    old = unfinished / e.results
    # The commands must write the file again; git must not call the clone dirty for its absence.
    if old.exists():
        ignore = ['git', 'update-index', '--assume-unchanged', e.results]
        subprocess.run(ignore, cwd=unfinished, check=True)
        old.unlink()
    save(unfinished / 'runs' / 'queue.json', {'commands': e.commands, 'done': 0})
    os.replace(unfinished, clone_of(e))


class Stop:
    """Flag that is true when SIGTERM or SIGINT came, or the budget in seconds is spent; `reason`
    says which.
    """

    def __init__(self, budget: float):
        self.deadline, self.reason = time.monotonic() + budget, ''
        signal.signal(signal.SIGTERM, self.caught)
        signal.signal(signal.SIGINT, self.caught)

    def caught(self, number: int, frame: Any) -> None:
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if time.monotonic() > self.deadline:
            self.reason = self.reason or 'the budget is spent'
        return bool(self.reason)


def execute(command: str, e: Experiment, lock: int, stop: Stop) -> int:
    """Run one command in the clone, with the clone's code, holding the lock; return the exit code,
    75 if it was stopped.
    """
    program, *rest = shlex.split(command)
    clone, here = clone_of(e), pathlib.Path(sys.executable).with_name(program)
    env = {**os.environ, 'PYTHONPATH': str(clone)}
    env['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # seconds on record count compiling
    if e.device == 'cpu':
        env['JAX_PLATFORMS'] = 'cpu'
    with open(clone / 'runs' / 'queue.log', 'a') as log:
        print(f'$ {command}', file=log, flush=True)
        child = subprocess.Popen(
            [here if here.exists() else program, *rest], cwd=clone, env=env, pass_fds=[lock],
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    (QUEUE / 'pid').write_text(f'{child.pid}\n')
    # where Linux groups sessions, nice counts within one, and this is a new one
    with contextlib.suppress(OSError):
        pathlib.Path(f'/proc/{child.pid}/autogroup').write_text('19')
    told = False
    while child.poll() is None:
        if stop and not told:
            os.killpg(child.pid, signal.SIGTERM)
            told = True
        time.sleep(0.05)
    stopped = child.returncode and (told or child.returncode == STOPPED)
    return STOPPED if stopped else child.returncode


def attempt(e: Experiment, lock: int, stop: Stop) -> int:
    """Begin or continue an experiment, and record it; return the exit code, 75 if it was stopped."""
    if not clone_of(e).exists():
        begin(e)
    path, measured = clone_of(e) / 'runs' / 'queue.json', clone_of(e) / e.results
    plan = json.loads(path.read_text())
    for command in plan['commands'][plan['done'] :]:
        code = STOPPED if stop else execute(command, e, lock, stop)
        if code:
            return code
        plan['done'] += 1
        save(path, plan)
    if not measured.exists():
        say(f'{e.name}: its commands did not write {e.results}')
        save(path, {**plan, 'done': 0})
        return FAILED
    stamp = {'experiment': {'name': e.name, 'revision': e.revision}}
    save(ROOT / e.results, json.loads(measured.read_text()) | stamp)
    return 0


def hold() -> int:
    """Take the queue, and return the descriptor that commands inherit.

    The command of a runner that was killed is told to save, and waited for. Exits with 2 if another
    process runs the queue.
    """
    QUEUE.mkdir(parents=True, exist_ok=True)
    runner, command = (os.open(QUEUE / name, os.O_RDWR | os.O_CREAT) for name in ('lock', 'pid'))
    try:
        fcntl.flock(runner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = (QUEUE / 'lock').read_text().strip()
        print(f'error: process {owner} runs the queue', file=sys.stderr)
        raise SystemExit(REFUSED) from None
    (QUEUE / 'lock').write_text(f'{os.getpid()} on {socket.gethostname()}\n')
    try:
        fcntl.flock(command, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say('waiting for the command of a runner that was killed')
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int((QUEUE / 'pid').read_text()), signal.SIGTERM)
        fcntl.flock(command, fcntl.LOCK_EX)
    return command


def seconds(text: str) -> float:
    """Read a time in s, m or h: '9m' is 540.0."""
    unit: int = 60 ** 'smh'.index(text[-1:])
    return float(text[:-1]) * unit


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--list', action='store_true', help='list recorded, stale, begun and missing experiments'
    )
    parser.add_argument(
        '--budget', type=seconds, default=float('inf'), help='stop after this time: 90s, 9m, 2h'
    )
    parser.add_argument('--only', default='*', help='names to run, e.g. "dreamer_v3_small/*"')
    parser.add_argument(
        '--device', choices=['cpu', 'gpu'], help='run the experiments of this device only'
    )
    args = parser.parse_args()
    chosen = [
        e
        for e in EXPERIMENTS
        if fnmatch.fnmatch(e.name, args.only) and args.device in (None, e.device)
    ]
    if not chosen:
        parser.error(
            f'no experiment is called {args.only!r} on {args.device or "any device"}; see --list'
        )
    if args.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--list | head` is no error
        for e in chosen:
            print(
                f'{state(e):8} {e.minutes:5.0f} min  {e.device}  r{e.revision}  {e.name:46} {e.proves}'
            )
        return 0
    lock, stop, failed = hold(), Stop(args.budget), []
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    for e in chosen:
        if stop or state(e) == 'recorded':
            continue
        if e.device == 'gpu' and not any(pathlib.Path('/dev').glob('nvidia[0-9]*')):
            say(f'{e.name}: passed over, it needs a GPU')
            continue
        say(f'{e.name}: {state(e)}, about {e.minutes:.0f} minutes in all')
        code = attempt(e, lock, stop)
        said = {0: 'recorded', STOPPED: 'stopped'}.get(code, f'failed (exit code {code})')
        say(f'{e.name}: {said}; {(clone_of(e) / "runs" / "queue.log").relative_to(ROOT)}')
        failed += [e.name] if code not in (0, STOPPED) else []
        if code == STOPPED:
            stop.reason = stop.reason or 'its command was stopped'
    if failed:
        say('failed:', ', '.join(failed))
    if stop.reason:
        say(f'stopped ({stop.reason}); the same command continues')
    return STOPPED if stop.reason else FAILED if failed else 0


if __name__ == '__main__':
    sys.exit(main())
