"""The queue of experiments: stopped at any moment it goes on where it was, and its list says what
is true.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

RESULTS = pathlib.Path(__file__).parents[2] / 'results'
CONFIGURED = (
    '-c',
    'user.name=test',
    '-c',
    'user.email=test@localhost',
    '-c',
    'commit.gpgsign=false',
)
TOY = """
import json, os, pathlib, signal, sys, time

begin, (name, steps, results) = time.time(), sys.argv[1:]
state, stopped = pathlib.Path('runs', name), []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
step, value = json.loads(state.read_text()) if state.exists() else (0, 1)
while step < int(steps):
    step += 1
    value = (value * 31 + FACTOR * step) % 1000003
    state.with_suffix('.tmp').write_text(json.dumps([step, value]))
    os.replace(state.with_suffix('.tmp'), state)
    time.sleep(0.01)
    if stopped:
        sys.exit(75)
if results != '-':
    pathlib.Path(results).parent.mkdir(exist_ok=True)
    pathlib.Path(results).write_text(json.dumps({'value': value, 'seconds': time.time() - begin}))
"""


def value_of(steps, factor=1):
    """The result of the toy command, by a loop."""
    value = 1
    for step in range(1, steps + 1):
        value = (value * 31 + factor * step) % 1000003
    return value


def git(root, *args):
    subprocess.run(['git', *CONFIGURED, *args], cwd=root, check=True, capture_output=True)


def declare(root, *rows):
    """Replace the list of a toy checkout."""
    text = (RESULTS / 'experiments.py').read_text().split('EXPERIMENTS')[0]
    rows = ', '.join(f'Experiment({row})' for row in rows)
    (root / 'results' / 'experiments.py').write_text(f'{text}\nEXPERIMENTS = [{rows}]\n')


def entry(name, steps, more=''):
    first = f'python toy.py {name.replace("/", "-")}-first {steps} -'
    second = f'python toy.py {name.replace("/", "-")} {steps} {{results}}'
    return f'{name!r}, ({first!r}, {second!r}), "counting works", 0.1, {more}'


@pytest.fixture
def root(tmp_path):
    """A checkout with the runner, three toy experiments and one commit."""
    root = tmp_path / 'checkout'
    (root / 'results').mkdir(parents=True)
    shutil.copy(RESULTS / 'run.py', root / 'results')
    (root / 'toy.py').write_text(TOY.replace('FACTOR', '1'))
    (root / '.gitignore').write_text('/runs/\n')
    declare(root, entry('a/one', 30), entry('a/two', 40), entry('b', 20))
    git(root, 'init', '-q')
    commit(root)
    return root


def commit(root):
    git(root, 'add', '-A')
    git(root, 'commit', '-qm', 'toy', '--allow-empty')


def start(root, *args):
    command = [sys.executable, 'results/run.py', *args]
    return subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(root, *args):
    """-> exit code, what it said."""
    process = start(root, *args)
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def listed(root):
    """{name: state} as --list has it."""
    code, said = run(root, '--list')
    assert code == 0
    rows = [line.split() for line in said.splitlines()]
    return {row[5]: row[0] for row in rows}


def results(root):
    """{name: JSON} without times."""
    found = {}
    for path in (root / 'results').rglob('*.json'):
        found[str(path.relative_to(root / 'results').with_suffix(''))] = record = json.loads(
            path.read_text()
        )
        record.pop('seconds')
    return found


def until(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f'waited in vain for {what}')
        time.sleep(0.02)


def test_killed_at_ten_random_moments_it_ends_with_the_same_results_and_the_list_is_true_after_each(
    root,
):
    seed, seen = time.time_ns(), set()
    print(f'seed {seed}')
    rng = random.Random(seed)
    queue = root / 'runs' / 'queue'
    for i in range(10):
        process = start(root)
        if i == 0:
            until(lambda: list(queue.glob('*-r1/runs')), 'the first experiment')
        else:  # whenever it comes, what follows must hold
            time.sleep(rng.uniform(0.05, 0.6))
        process.kill()
        process.communicate()
        if rng.random() < 0.5:  # else the command lives on, and the next runner has it save
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.killpg(int((queue / 'pid').read_text()), signal.SIGKILL)
        recorded, states = results(root), listed(root)
        begun = {path.name for path in queue.glob('*-r1')}
        for name, state in states.items():
            truth = 'begun' if f'{name.replace("/", "-")}-r1' in begun else 'missing'
            assert state == ('recorded' if name in recorded else truth)
        seen |= set(states.values())
    assert run(root)[0] == 0
    assert results(root) == {
        name: {'value': value_of(steps), 'experiment': {'name': name, 'revision': 1}}
        for name, steps in (('a/one', 30), ('a/two', 40), ('b', 20))
    }
    assert set(listed(root).values()) == {'recorded'} and 'begun' in seen
    assert run(root) == (0, '')


def test_nothing_runs_twice_nor_goes_on_in_other_code_than_it_began_with(root):
    assert run(root, '--budget', '0.5s')[0] == 75
    states = listed(root)
    assert states == {'a/one': 'begun', 'a/two': 'missing', 'b': 'missing'}
    (root / 'toy.py').write_text(TOY.replace('FACTOR', '2'))  # edited, then committed
    declare(root, entry('a/one', 31), entry('a/two', 40), entry('b', 20))
    assert run(root, '--only', 'b')[0] == 0
    commit(root)
    assert run(root)[0] == 0
    values = {name: record['value'] for name, record in results(root).items()}
    assert values == {'a/one': value_of(30), 'b': value_of(20), 'a/two': value_of(40, 2)}


def test_only_a_raised_revision_makes_a_result_stale(root):
    (root / 'results' / 'b.json').write_text(
        '{"value": 7, "seconds": 1}'
    )  # measured before there was a queue
    declare(root, entry('a/one', 3), entry('b', 2, 'revision=0'))
    assert listed(root) == {'a/one': 'missing', 'b': 'recorded'}
    assert run(root)[0] == 0
    (root / 'toy.py').write_text(TOY.replace('FACTOR', '2'))
    commit(root)
    assert listed(root) == {'a/one': 'recorded', 'b': 'recorded'}
    declare(root, entry('a/one', 3, 'revision=2'), entry('b', 2))
    commit(root)
    assert listed(root) == {'a/one': 'stale', 'b': 'stale'}
    assert run(root)[0] == 0
    assert results(root)['a/one'] == {
        'value': value_of(3, 2),
        'experiment': {'name': 'a/one', 'revision': 2},
    }
    assert results(root)['b'] == {
        'value': value_of(2, 2),
        'experiment': {'name': 'b', 'revision': 1},
    }


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_which_saves(root, number):
    process, counter = start(root), root / 'runs' / 'queue' / 'a-one-r1' / 'runs' / 'a-one-first'
    until(counter.exists, 'the first step')
    process.send_signal(number)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 75 and signal.Signals(number).name in said
    step, value = json.loads(counter.read_text())
    assert 0 < step < 30 and value == value_of(step)
    assert not results(root)


def test_a_failed_experiment_is_said_and_passed_over(root):
    commands = '("python -c \'raise SystemExit(3)\'",)'
    nothing = '("python -c pass",)'
    (root / 'results' / 'old.json').write_text('{"seconds": 1}')
    declare(root, f'"bad", {commands}, "", 1', f'"old", {nothing}, "", 1', entry('b', 2))
    commit(root)
    code, said = run(root)
    assert code == 1 and 'bad: failed (exit code 3)' in said and 'failed: bad, old' in said
    assert 'did not write results/old.json' in said  # the committed one is not taken for it
    assert listed(root) == {'bad': 'begun', 'old': 'begun', 'b': 'recorded'}


def test_a_second_runner_is_told_who_holds_the_queue(root):
    process = start(root)
    until((root / 'runs' / 'queue' / 'a-one-r1').exists, 'the first experiment')
    code, said = run(root)
    assert code == 2 and f'process {process.pid} on ' in said
    assert listed(root)['a/one'] == 'begun'  # looking needs no lock
    process.terminate()
    process.communicate(timeout=30)


def test_the_command_of_a_killed_runner_saves_before_another_runner_goes_on(root):
    process, counter = (
        start(root, '--only', 'b'),
        root / 'runs' / 'queue' / 'b-r1' / 'runs' / 'b-first',
    )
    until(counter.exists, 'the first step')
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but its number is still taken
    code, said = run(root, '--only', 'b')
    assert code == 0 and 'waiting for the command of a runner that was killed' in said
    assert results(root)['b']['value'] == value_of(20)
    log = (root / 'runs' / 'queue' / 'b-r1' / 'runs' / 'queue.log').read_text()
    assert log.count('b-first') == 2  # told to save, it was continued
    process.communicate()


def test_an_experiment_for_a_gpu_is_passed_over_without_one(root):
    if any(pathlib.Path('/dev').glob('nvidia[0-9]*')):
        pytest.skip('this machine has a GPU')
    declare(root, entry('a/one', 2, 'device="gpu"'), entry('b', 2))
    commit(root)
    code, said = run(root)
    assert code == 0 and 'a/one: passed over, it needs a GPU' in said
    assert listed(root) == {'a/one': 'missing', 'b': 'recorded'}
    assert run(root, '--device', 'cpu') == (0, '')


def is_stopped(pid):
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    return stat.rpartition(')')[2].split()[0] == 'T'


def test_a_paused_command_does_not_move_and_goes_on(root):
    declare(root, entry('b', 100))
    commit(root)
    process, pid = start(root, '--only', 'b'), root / 'runs' / 'queue' / 'pid'
    counter = root / 'runs' / 'queue' / 'b-r1' / 'runs' / 'b-first'
    until(lambda: counter.exists() and pid.read_text().strip(), 'the first step')
    subprocess.run(f'kill -STOP -$(cat {pid})', shell=True, check=True)
    number = int(pid.read_text())
    until(lambda: is_stopped(number), 'the pause')
    before = json.loads(counter.read_text())[0]
    assert before < 100 and process.poll() is None
    assert os.getpriority(os.PRIO_PROCESS, number) == 19
    group = pathlib.Path(f'/proc/{number}/autogroup')
    assert not group.exists() or group.read_text().split()[-1] in ('19', '')
    subprocess.run(f'kill -CONT -$(cat {pid})', shell=True, check=True)
    process.communicate(timeout=120)
    assert process.returncode == 0 and results(root)['b']['value'] == value_of(100)


@pytest.mark.parametrize('args', [['--budget', '9x'], ['--budget', ''], ['--only', 'c*']])
def test_mistakes_are_refused(root, args):
    code, said = run(root, *args)
    assert code == 2 and args[1] in said
    assert not (root / 'runs').exists()


def test_what_is_measured_names_a_clean_commit(root):
    """The clone's own results file, removed before the run, does not make git call the clone dirty."""
    (root / 'results' / 'b.json').write_text('{"seconds": 1}')
    commit(root)
    describe = 'git describe --always --dirty --abbrev=40'
    script = f'import json, os\nrecord = dict(seconds=1, commit=os.popen("{describe}").read())\n'
    (root / 'toy.py').write_text(script + 'json.dump(record, open("results/b.json", "w"))\n')
    declare(root, '"b", ("python toy.py",), "", 1')
    commit(root)
    assert run(root)[0] == 0
    head = subprocess.run(
        ['git', 'rev-parse', 'HEAD'], cwd=root, capture_output=True, text=True
    ).stdout
    assert results(root)['b']['commit'] == head
