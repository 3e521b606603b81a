"""Steps per second of the MinAtar games under random play, next to gymnax where it is installed.

    python benchmarks/minatar.py --out results/minatar_cpu.json

1,024 copies take random actions in one `lax.scan`; the best of several runs counts.
`cpu_us_per_step` is processor time over all cores: on a busy machine it tells more than the clock.
`loop` is this scan around an environment that does nothing, the cost of drawing actions and keys.
"""

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from reverie.envs.device import Vector, make, names
from reverie.types import ActionSpace, Env, EnvSpec, Step

GYMNAX = dict(
    asterix='Asterix', breakout='Breakout', freeway='Freeway', seaquest='Seaquest',
    space_invaders='SpaceInvaders',
)  # fmt: skip


Arrived: TypeAlias = tuple[PyTree, Array, Array]  # observation, reward, the episode is over
Move: TypeAlias = Callable[[PyTree, PRNGKeyArray], tuple[PyTree, Arrived]]


@dataclasses.dataclass(frozen=True)
class Still:
    """Environment in which nothing happens."""

    spec: EnvSpec = EnvSpec('still', (10, 10, 4), ActionSpace('discrete', 6))

    def reset(self, key: PRNGKeyArray) -> tuple[PyTree, Step]:
        no = jnp.asarray(False)
        return no, Step(jnp.zeros((10, 10, 4), bool), jnp.zeros(6), jnp.zeros(()), ~no, no, no)

    def step(self, state: PyTree, action: Array, key: PRNGKeyArray) -> tuple[PyTree, Step]:
        no, board = jnp.asarray(False), jnp.zeros((10, 10, 4), bool)
        step = Step(board, jax.nn.one_hot(action, 6), jnp.zeros(()), no, no, no)
        return state, step


def ours(env: Env, n: int) -> tuple[PyTree, Move]:
    """Return the initial state and the step of n copies that reset by themselves."""
    vector = Vector(env, n)

    def step(state: PyTree, key: PRNGKeyArray) -> tuple[PyTree, Arrived]:
        act_key, key = jax.random.split(key)
        action = jax.random.randint(act_key, (n,), 0, vector.spec.actions.size)
        state, out = vector.step(state, action, key)
        return state, (out.obs, out.reward, out.is_last)

    return vector.reset(jax.random.key(0))[0], step


def theirs(game: str, n: int) -> tuple[PyTree, Move]:
    """Return the initial state and the step of n copies with gymnax's own auto-reset."""
    import gymnax

    env, params = gymnax.make(f'{GYMNAX[game]}-MinAtar')

    def step(state: PyTree, key: PRNGKeyArray) -> tuple[PyTree, Arrived]:
        act_key, key = jax.random.split(key)
        action = jax.random.randint(act_key, (n,), 0, env.num_actions)
        keys = jax.random.split(key, n)
        step_all = jax.vmap(env.step, (0, 0, 0, None))
        obs, state, reward, end, cut, _ = step_all(keys, state, action, params)
        return state, (obs, reward, end | cut)

    keys = jax.random.split(jax.random.key(0), n)
    return jax.vmap(env.reset, (0, None))(keys, params)[1], step


def measure(state: PyTree, step: Move, n: int, length: int, runs: int) -> dict[str, float]:
    """Measure steps per second by the clock, and microseconds of processor time a step."""
    run = jax.jit(lambda state, key: jax.lax.scan(step, state, jax.random.split(key, length))[1])
    jax.block_until_ready(run(state, jax.random.key(0)))
    wall, cpu = [], []
    for i in range(runs):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(run(state, jax.random.key(i)))
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return dict(
        steps_per_s=round(n * length / min(wall)),
        cpu_us_per_step=round(min(cpu) / (n * length) * 1e6, 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--envs', type=int, default=1024)
    parser.add_argument('--length', type=int, default=100, help='steps of one scan')
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--out', help='write the figures here as JSON')
    args = parser.parse_args()
    size = (args.envs, args.length, args.runs)

    try:
        import gymnax  # noqa: F401

        baseline = True
    except ImportError:
        baseline = False
    device = jax.devices()[0]
    report: dict[str, Any] = dict(
        device=f'{device.platform}: {device.device_kind}',
        machine=platform.machine(),
        jax=jax.__version__,
    )
    report.update(
        envs=args.envs, length=args.length, loop=measure(*ours(Still(), args.envs), *size), games={}
    )
    print(
        f'{report["device"]}, {args.envs} envs, loop {report["loop"]["steps_per_s"]:,} steps/s',
        flush=True,
    )
    for name in (name for name in names() if name.startswith('minatar/')):
        game = name.split('/')[1]
        row: dict[str, Any] = dict(reverie=measure(*ours(make(name), args.envs), *size))
        row['ratio_to_loop'] = round(
            row['reverie']['steps_per_s'] / report['loop']['steps_per_s'], 3
        )
        if baseline:
            row['gymnax'] = measure(*theirs(game, args.envs), *size)
        report['games'][game] = row
        figures = ', '.join(
            f'{who} {row[who]["steps_per_s"]:,} steps/s ({row[who]["cpu_us_per_step"]} us of processor time)'
            for who in ('reverie', 'gymnax')
            if who in row
        )
        print(f'{game:15} {figures}', flush=True)
    if args.out:
        with open(args.out, 'w') as file:
            json.dump(report, file, indent=1)


if __name__ == '__main__':
    main()
