"""Speed of Dreamer V3: milliseconds of a training step, and frames per second of playing and
learning with one seed and five.

    python benchmarks/dreamer_v3.py --out results/bench/dreamer_v3_gpu.json
      [--presets dreamer_v3] [--steps image-12m vector-1m] [--no-play]

`steps`: updates on random batches of 16 x 64, six actions, bf16, from 64x64 images (sizes 12m and
200m) and from vectors of 400 numbers, a flattened MinAtar grid (1m and 12m). `beside` are the
released code's milliseconds on an H100. Each is followed by TransDreamerV3 with as many weights;
`ratio` is its time against Dreamer V3's.
`play`: MinAtar Breakout with size 1m; environments, replay and updates in one program, at train
ratios 32 and 128.
--out is written after each row; rows that are in it and are not measured now stay as they are, so
that each can be measured by a process of its own.
--quick: tiny networks and batches, to see on any machine that it runs; its figures mean nothing.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from reverie.agents.dreamer import Dreamer, DreamerConfig
from reverie.agents.dreamer.presets import (
    dreamer_v3,
    dreamer_v3_debug,
    transdreamer_v3,
    transdreamer_v3_small,
)
from reverie.commands.bench.phases import RandomBatches
from reverie.data.source import Source
from reverie.envs.device import make
from reverie.evaluation.results import provenance, save
from reverie.io import plain
from reverie.nn.core import count
from reverie.training.online import CollectConfig, Online
from reverie.training.state import TrainState, create, own_buffers
from reverie.training.update import make_program
from reverie.types import ActionSpace, EnvSpec

IMAGE, VECTOR = (64, 64, 3), (400,)
STEPS = {
    'image-12m': ('12m', IMAGE, 31.0),
    'image-200m': ('200m', IMAGE, 105.0),
    'vector-1m': ('1m', VECTOR, 13.0),
    'vector-12m': ('12m', VECTOR, 20.0),
}
PRESETS = ('dreamer_v3', 'transdreamer_v3')
RATIOS = (32, 128)


def call(agent: Dreamer, source: Source, seeds: int, updates: int) -> Callable[[], Any]:
    """Function that makes `updates` more gradient steps of every seed with each call."""
    (phase,) = agent.phases
    keys = jax.random.split(jax.random.key(0), seeds)

    def begin(key: PRNGKeyArray) -> TrainState:
        params = agent.init(key)
        live = source.begin(params, key, phase.batch, phase.length)
        own: TrainState = own_buffers(create(params, phase)._replace(live=live))
        return own

    state, program = jax.jit(jax.vmap(begin))(keys), make_program(phase, source)

    def more() -> jax.Array:
        nonlocal state
        state, *_ = program.call(state, source.data, None, keys, phase.fixed(), updates=updates)
        step: jax.Array = jax.block_until_ready(state.step)
        return step

    return more


def timed(more: Callable[[], Any], updates: int, repeats: int) -> dict[str, Any]:
    """Measure milliseconds of one update, and seconds of compilation with the first call."""
    begin = time.perf_counter()
    more()
    first, times = time.perf_counter() - begin, []
    for _ in range(repeats):
        begin = time.perf_counter()
        more()
        times.append(1e3 * (time.perf_counter() - begin) / updates)
    p50, p95 = (float(np.percentile(times, q)) for q in (50, 95))
    return dict(ms=dict(p50=p50, p95=p95, min=min(times)), first_call_s=first)


def peak_bytes() -> int | None:
    """Peak memory of the process so far, where the device counts it."""
    return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


def config(preset: str, size: str, quick: bool) -> DreamerConfig:
    """Config of `dreamer_v3` or `transdreamer_v3`; with `quick` a debug Dreamer V3, with the
    dynamics of either.
    """
    if not quick:
        return dreamer_v3(size) if preset == 'dreamer_v3' else transdreamer_v3(size)
    tiny, small = dreamer_v3_debug(), transdreamer_v3_small()
    if preset == 'dreamer_v3':
        return tiny
    world = dataclasses.replace(tiny.world, dynamics=small.world.dynamics)
    return dataclasses.replace(tiny, world=world)


def train_steps(
    names: Sequence[str], presets: Sequence[str], quick: bool, updates: int, repeats: int
) -> Iterator[dict[str, Any]]:
    for name in names:
        size, shape, released = STEPS[name]
        rssm = None
        for preset in presets:
            cfg = config(preset, size, quick)
            agent = Dreamer(cfg, EnvSpec('noise', shape, ActionSpace('discrete', 6)))
            params = jax.eval_shape(agent.init, jax.random.key(0))
            found = timed(call(agent, RandomBatches(agent.spec), 1, updates), updates, repeats)
            rssm = found['ms']['p50'] if preset == PRESETS[0] else rssm
            beside = dict(name='released code, one H100', ms=released)
            yield dict(
                preset=preset,
                size=size,
                obs=shape,
                params=count(params),
                batch=cfg.replay.batch,
                length=cfg.replay.length,
                dtype=cfg.world.dynamics.style.dtype,
                **found,
                peak_bytes=peak_bytes(),
                ratio=rssm and found['ms']['p50'] / rssm,
                beside=beside if preset == 'dreamer_v3' else None,
            )


def with_ratio(cfg: DreamerConfig, ratio: int) -> DreamerConfig:
    """Set the train ratio, and as many environments as one update has frames, 16 at most."""
    frames = cfg.replay.batch * cfg.replay.length // ratio
    replay = dataclasses.replace(cfg.replay, ratio=ratio, envs=min(16, frames))
    return dataclasses.replace(cfg, replay=replay)


def play(
    quick: bool, seeds: tuple[int, ...], updates: int, repeats: int
) -> Iterator[dict[str, Any]]:
    env = make('minatar/breakout')
    for ratio in (8,) if quick else RATIOS:
        cfg = with_ratio(dreamer_v3_debug() if quick else dreamer_v3('1m'), ratio)
        agent, r = Dreamer(cfg, env.spec), cfg.replay
        collect = CollectConfig(r.envs, min(r.capacity, 100_000), ratio, r.prefill, False)
        alone = None
        for n in seeds:
            source = Online(env, agent.explorer, collect)
            found = timed(call(agent, source, n, updates), updates, repeats)
            alone = alone or found['ms']['p50']
            fps = n * r.batch * r.length / ratio / found['ms']['p50'] * 1e3
            cost = found['ms']['p50'] / alone
            yield dict(ratio=ratio, seeds=n, envs=r.envs, env_fps=fps, **found, cost=cost)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--updates', type=int, default=50, help='of one timed call')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--presets', nargs='+', default=PRESETS, choices=PRESETS)
    parser.add_argument('--steps', nargs='*', default=list(STEPS), choices=STEPS)
    parser.add_argument('--play', action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 5])
    parser.add_argument('--out', type=pathlib.Path)
    args = parser.parse_args()
    updates, repeats = (2, 2) if args.quick else (args.updates, args.repeats)
    record: dict[str, Any] = dict(
        name='dreamer_v3', command=' '.join(['python', *sys.argv]), **provenance()
    )
    record |= dict(quick=args.quick, updates=updates, repeats=repeats, steps=[], play=[])
    if args.out and args.out.exists():
        known = json.loads(args.out.read_text())
        record |= {part: known[part] for part in ('steps', 'play')}

    def keep(part: str, row: dict[str, Any], by: tuple[str, ...]) -> None:
        """Put a row into the record, in the place of an earlier one of the same name."""
        name = [plain(row[key], key) for key in by]
        record[part] = [old for old in record[part] if [old[key] for key in by] != name]
        record[part].append(plain(row, part))
        if args.out:
            save(args.out, record)

    for row in train_steps(args.steps, args.presets, args.quick, updates, repeats):
        keep('steps', row, ('preset', 'size', 'obs'))
        if row['beside']:
            beside = f'released code, H100: {row["beside"]["ms"]:.0f}'
        else:
            beside = f'{row["ratio"]:.2f} times Dreamer V3' if row['ratio'] else 'alone'
        what = f'{row["preset"]:>15} {row["size"]:>5} {"x".join(map(str, row["obs"])):>8}'
        ms = f'{row["ms"]["p50"]:8.2f} ms a step ({beside})'
        print(f'{what}  {ms}, {row["params"]:,} weights', flush=True)
    for row in play(args.quick, tuple(args.seeds), updates, repeats) if args.play else ():
        keep('play', row, ('ratio', 'seeds'))
        print(
            f'ratio {row["ratio"]:>4}, {row["seeds"]} seeds: {row["env_fps"]:10,.0f} frames/s of all seeds together, '
            f'{row["ms"]["p50"]:.2f} ms an update, {row["cost"]:.2f} times one seed',
            flush=True,
        )
    if args.out:
        print(args.out)


if __name__ == '__main__':
    main()
