"""Faults on purpose: files of runs and datasets damaged, processes killed, odd command lines.

    make faults                                  # 200 faults and 300 command lines
    python benchmarks/faults.py --faults 20 --lines 30 --seed 1

Every trial is one command in a process of its own. It passes if the command ends as if nothing had
happened (weights and scores bit for bit), or says in a line what is wrong and exits with a code; a
traceback, silence about a changed result, or a process that does not end fails it.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

GAME = 'minatar/breakout'
SHORT = ('--episodes', '2', '--max-steps', '20')
TIMEOUT_S = 240.0
CODES = (0, 2, 71, 74, 75)  # of sysexits and our own; 130 is Ctrl-C


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


def reverie(*args: Any, kill: tuple[float, signal.Signals] | None = None) -> Ended:
    """Run a command; with `kill` send a signal after so many seconds."""
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
    command = [sys.executable, '-m', 'reverie.cli', *map(str, args)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        errors='replace',
    )
    try:
        out, err = process.communicate(timeout=kill[0] if kill else TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(kill[1] if kill else signal.SIGKILL)
        out, err = process.communicate()
        if kill is None:
            return Ended(-99, out, f'{err}\ndid not end within {TIMEOUT_S:g} s')
    return Ended(process.returncode, out, err)


def weights(run: pathlib.Path) -> list[np.ndarray]:
    """Weights of a run's newest sound checkpoint."""
    import jax

    from reverie.training import checkpoint

    return [np.asarray(x) for x in jax.tree.leaves(checkpoint.load(run)[0])]


def equal(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------- damaged files


def flip(path: pathlib.Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes() or b'\0')
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: pathlib.Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(max(path.stat().st_size, 1)))


def delete(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()


def blank(path: pathlib.Path, rng: random.Random) -> None:
    """A block of zeros, as a disk that lost power leaves it."""
    data = bytearray(path.read_bytes())
    begin = rng.randrange(max(len(data), 1))
    data[begin : begin + 512] = bytes(len(data[begin : begin + 512]))
    path.write_bytes(data)


def garble(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(200))


def folder_instead(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (flip, truncate, delete, blank, garble, folder_instead)


class Base(NamedTuple):
    """A sound dataset and run, and what commands make of them."""

    data: pathlib.Path
    run: pathlib.Path
    weights: list[np.ndarray]
    scores: dict[str, Any]


def train_command(data: pathlib.Path, run: pathlib.Path) -> tuple[Any, ...]:
    where = ('--env', GAME, '--data', data, '--out', run)
    return ('train', 'bc_debug', *where, *SHORT, '--updates-per-call', 1, '--checkpoint-every-s', 0)


def make_base(folder: pathlib.Path) -> Base:
    """Record random play and train an agent on it."""
    data, run = folder / 'data', folder / 'run'
    for command in (
        ('collect', '--env', GAME, '--kind', 'random', '--frames', 1000, '--episodes', 2, '--out', data),
        train_command(data, run),
    ):  # fmt: skip
        done = reverie(*command)
        if done.code:
            raise SystemExit(f'{command}: {done.err}')
    return Base(data, run, weights(run), json.loads((run / 'scores.json').read_text())['score'])


def commands(data: pathlib.Path, run: pathlib.Path) -> dict[str, tuple[Any, ...]]:
    return {
        'train': train_command(data, run),
        'eval': ('eval', run, '--data', data, *SHORT),
        'report': ('report', run),
        'verify': ('data', 'verify', data),
        'inspect': ('data', 'inspect', data),
        'play': ('play', run, '--port', 0, '--no-browser'),
    }


def wrong(ended: Ended) -> str | None:
    """Say what is wrong about how a command ended, whatever its result."""
    if 'Traceback' in ended.err:
        return 'traceback'
    if ended.code not in CODES:
        return f'exit code {ended.code}'
    if ended.code and not ended.said:
        return 'silent failure'
    return None


def damage(base: Base, rng: random.Random, folder: pathlib.Path) -> tuple[str, str | None, str]:
    """One damaged file, then one command; return (kind, what is wrong, how it ended)."""
    data, run = folder / 'data', folder / 'run'
    shutil.copytree(base.data, data)
    shutil.copytree(base.run, run)
    files = [path for path in folder.rglob('*') if path.is_file()]
    path, how = rng.choice(sorted(files)), rng.choice(DAMAGES)
    name = rng.choice(sorted(commands(data, run)))
    where = path.relative_to(folder)
    kind = f'{how.__name__} {where}, then {name}'
    how(path, rng)
    config = where.name in ('config.json', 'scores.json', 'metrics.jsonl')
    if name == 'play':
        # It serves until it is stopped; a minute is enough to load or to refuse.
        ended = reverie(*commands(data, run)[name], kill=(25.0, signal.SIGINT))
        if ended.code == 130:
            ended = ended._replace(code=0)
    else:
        ended = reverie(*commands(data, run)[name])
    fault = wrong(ended)
    if fault is None and ended.code == 0:
        fault = silence(base, run, name, where, ended, config)
    return kind, fault, ended.err[-300:]


def silence(
    base: Base, run: pathlib.Path, name: str, where: pathlib.Path, ended: Ended, config: bool
) -> str | None:
    """Say if a command that ended well gave another result than before, without a word."""
    quiet = not ended.said
    if name == 'train' and not equal(weights(run), base.weights):
        return 'other weights'
    if name == 'eval' and quiet:
        scores = json.loads((run / 'scores.json').read_text())['score']
        if any(scores[key] != base.scores[key] for key in ('bc', 'random')):
            return 'other scores in silence'
    if name == 'verify' and where.parts[0] == 'data':
        return 'verify finds nothing'
    return None


def killed(base: Base, rng: random.Random, folder: pathlib.Path) -> tuple[str, str | None, str]:
    """A training killed at random moments, then finished; the weights must be the same bits."""
    run, number = folder / 'run', rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    after = rng.uniform(0.2, 14.0)
    first = reverie(*train_command(base.data, run), kill=(after, number))
    kind = f'{number.name} while training'
    if 'Traceback' in first.err:
        return kind, 'traceback', first.err[-300:]
    last = reverie(*train_command(base.data, run))
    fault = wrong(last) or (None if last.code == 0 else f'exit code {last.code}')
    if fault is None and not equal(weights(run), base.weights):
        fault = 'other weights'
    return kind, fault, f'{after:.2f} s; {last.err[-300:]}'


# --------------------------------------------------------------------------------- command lines

# Runs a command line in this process up to the first update, and says how it ended.
UP_TO_TRAINING = """
import sys
from reverie import cli
from reverie.commands.experiment import base
def stop(self, *args, **options):
    self.agent
    raise SystemExit(0)
base.Experiment.train = stop
sys.argv = ['reverie', *sys.argv[1:]]
cli.main()
"""
WORDS = st.sampled_from(
    [
        'nan', 'inf', '-inf', '-1', '0', '1', '2', '0.5', '1.5', '1e30', '99999999999999999999', 'abc',
        '', 'true', 'None', '[]', '../..', '/', '/dev/null', '/proc/1/mem', 'a' * 300, '\u2603', '--', '%s',
        'minatar/breakout', 'minatar/Breakout', 'gym/CartPole-v1', 'ALE/Pong-v5', 'a/b', 'os:system',
    ]
)  # fmt: skip
OPTIONS = {
    'train dreamer_v3_debug': (
        'env', 'out', 'seed', 'seeds', 'episodes', 'max-steps', 'updates-per-call', 'frames', 'from', 'score-every',
        'checkpoint-every-s', 'export', 'env-options', 'size', 'results', 'add-to', 'config.horizon',
        'config.replay.ratio', 'config.replay.envs', 'config.replay.capacity', 'config.discount',
    ),
    'train bc_debug': (
        'env', 'data', 'out', 'seed', 'label-fraction', 'max-lost', 'config.tokenizer.patch', 'config.multi-token',
        'config.dynamics.transformer.width', 'config.dynamics.transformer.layers', 'wait-lock',
    ),
    'eval RUN': ('episodes', 'max-steps', 'seed', 'results', 'env-options', 'data'),
    'report RUN': ('cache',),
    'data verify': ('', ),
    'collect': ('env', 'kind', 'frames', 'out', 'ppo-frames', 'seed', 'episodes', 'env-options'),
    'play RUN': ('port', 'host', 'players', 'fps', 'seed', 'steps', 'env'),
}  # fmt: skip
DEFAULTS = {
    'train dreamer_v3_debug': {'env': GAME},
    'train bc_debug': {'data': 'DATA'},
    'collect': {'env': GAME, 'kind': 'random', 'frames': '200', 'episodes': '2'},
    'eval RUN': {'episodes': '2', 'max-steps': '20'},
    'play RUN': {'port': 'x'},  # no server is started
}


@st.composite
def command_lines(draw: Callable[..., Any]) -> list[str]:
    """A command with a few options of odd values; `RUN` and `DATA` stand for sound ones."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    known = OPTIONS[command]
    chosen = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    given_options = dict(DEFAULTS.get(command, {})) | {name: draw(WORDS) for name in chosen}
    words: list[str] = command.split()
    for name, value in given_options.items():
        words += [f'--{name}', value] if name else [value]
    return words


def draw_lines(count: int, seed: int) -> list[list[str]]:
    """Command lines that Hypothesis draws from a seed."""
    found: list[list[str]] = []

    @hypothesis_seed(seed)
    @settings(
        max_examples=count, database=None, phases=[Phase.generate], deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(command_lines())
    def keep(line: list[str]) -> None:
        found.append(line)

    keep()
    return found


def odd_line(base: Base, line: list[str], folder: pathlib.Path) -> tuple[str, str | None, str]:
    """One odd command line, up to the first update; return (kind, what is wrong, its end)."""
    places = {'RUN': str(folder / 'run'), 'DATA': str(base.data)}
    if 'RUN' in line:
        shutil.copytree(base.run, folder / 'run')
    words = [places.get(word, word) for word in line]
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
    try:
        done = subprocess.run(
            [sys.executable, '-c', UP_TO_TRAINING, *words], capture_output=True, text=True, env=env,
            cwd=folder, timeout=TIMEOUT_S, errors='replace',
        )  # fmt: skip
        ended = Ended(done.returncode, done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        ended = Ended(-99, '', 'did not end')
    except ValueError as error:  # a word that no process can be given
        ended = Ended(2, '', str(error))
    fault = wrong(ended)
    if fault is None and ended.code and not ended.said[-1].startswith(('error: ', 'reverie: ')):
        fault = 'more than a line'
    return ' '.join(line[:2]), fault, f'{" ".join(line)[:200]} -> {ended.err[-300:]}'


# ------------------------------------------------------------------------------------- the campaign


class Trial(NamedTuple):
    """One trial: its sort, and the function that runs it in an empty folder."""

    sort: str
    run: Callable[[pathlib.Path], tuple[str, str | None, str]]


def trials(base: Base, faults: int, lines: int, seed: int) -> Iterator[Trial]:
    kills = faults // 4
    for i in range(faults):
        rng = random.Random(f'{seed} {i}')
        sort, function = ('kill', killed) if i < kills else ('damage', damage)
        yield Trial(sort, functools.partial(function, base, rng))
    for line in draw_lines(lines, seed):
        yield Trial('line', functools.partial(odd_line, base, line))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--faults', type=int, default=200, help='damaged files and kills')
    parser.add_argument('--lines', type=int, default=300, help='odd command lines')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument('--results', type=pathlib.Path)
    args = parser.parse_args()
    begin, counts = time.perf_counter(), collections.Counter[str]()
    failures: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory(prefix='faults-') as place:
        base = make_base(pathlib.Path(place))

        def one(trial: Trial) -> None:
            folder = pathlib.Path(tempfile.mkdtemp(dir=place))
            kind, fault, said = trial.run(folder)
            shutil.rmtree(folder, ignore_errors=True)
            counts[trial.sort] += 1
            if fault is not None:
                counts[f'{trial.sort}, failed'] += 1
                failures.append(dict(sort=trial.sort, kind=kind, fault=fault, said=said))
                print(f'FAILED {trial.sort}: {fault}: {kind}: {said}', flush=True)

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, trials(base, args.faults, args.lines, args.seed)))
    record = dict(
        seed=args.seed, counts=dict(counts), failures=failures,
        seconds=round(time.perf_counter() - begin),
    )  # fmt: skip
    print(json.dumps(record['counts']), f'{record["seconds"]} s')
    if args.results:
        args.results.write_text(json.dumps(record, indent=1) + '\n')
    raise SystemExit(bool(failures))


if __name__ == '__main__':
    main()
