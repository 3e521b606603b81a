"""PPO: frames per second of the environment, of playing and of learning, and optionally a whole run's curve.

python benchmarks/ppo.py [--env minatar/breakout] [--train-frames 10000000] [--env-options protocol=gymnax]
-> results/bench/ppo_<env>.json
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax

from reverie.agents import ppo
from reverie.cli import options_of
from reverie.envs.device import Vector, make
from reverie.evaluation.returns import provenance
from reverie.types import Env


def fastest(f: Callable, state: ppo.TrainState, repeats: int = 3) -> tuple[float, float]:
    """-> (seconds of the fastest warm call, seconds of compilation and the first call)."""
    begin = time.perf_counter()
    state = jax.block_until_ready(f(state))
    first, times = time.perf_counter() - begin, []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(f(state))
        times.append(time.perf_counter() - begin)
    return min(times), first


def measure(env: Env, config: ppo.PPOConfig, updates: int) -> dict[str, dict[str, float]]:
    """Frames per second of three loops of `updates` rollouts each: random actions, the policy, policy and learning."""
    agent, vector = ppo.PPO(env.spec, config), Vector(env, config.envs)

    def chance(state: ppo.TrainState) -> ppo.TrainState:
        def frame(carry, key):
            actions = jax.random.randint(key, (config.envs,), 0, env.spec.actions.size)
            return vector.step(carry[0], actions, key), None

        key, k_frames = jax.random.split(state.key)
        carry = (state.env_state, state.step)
        (env_state, step), _ = jax.lax.scan(frame, carry, jax.random.split(k_frames, config.rollout))
        return state._replace(env_state=env_state, step=step, key=key)

    loops = dict(
        random=chance,
        policy=lambda s: ppo.rollout(agent, vector, s)[0],
        learning=lambda s: ppo.update(agent, vector, s),
    )
    state, found = ppo.begin(agent, vector, jax.random.key(0)), {}
    for label, loop in loops.items():
        many = jax.jit(lambda s, loop=loop: jax.lax.scan(lambda s, _: (loop(s), None), s, length=updates)[0])
        seconds, first = fastest(many, state)
        found[label] = dict(fps=updates * config.frames / seconds, compile_seconds=first - seconds)
        print(f'{label:9} {found[label]["fps"]:12,.0f} frames/s, compiled in {found[label]["compile_seconds"]:.1f} s')
    return found


def learn(env: Env, config: ppo.PPOConfig, seed: int) -> dict[str, list[float]]:
    """Return against frames and seconds of one run, compilation included."""
    curve, begin = {'env_frames': [], 'return': [], 'seconds': []}, time.perf_counter()

    def progress(frames: int, ret: float) -> None:
        for key, value in zip(curve, (frames, ret, time.perf_counter() - begin), strict=True):
            curve[key].append(value)
        print(f'{frames:12,} frames  return {ret:8.2f}  {curve["seconds"][-1]:8.1f} s')

    ppo.train(env, config, jax.random.key(seed), progress)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--env', default='minatar/breakout')
    parser.add_argument('--env-options', nargs='*', default=[], metavar='NAME=VALUE')
    for name in ('envs', 'rollout', 'learning_rate', 'entropy_scale'):
        default = getattr(ppo.PPOConfig, name)
        parser.add_argument('--' + name.replace('_', '-'), type=type(default), default=default)
    parser.add_argument('--updates', type=int, default=5)
    parser.add_argument('--train-frames', type=int, default=0)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('results/bench'))
    args = parser.parse_args()
    options = options_of(tuple(args.env_options))
    env = make(args.env, **options)
    frames = args.train_frames or ppo.PPOConfig.env_frames
    fields = {name: getattr(args, name) for name in ('envs', 'rollout', 'learning_rate', 'entropy_scale')}
    config = ppo.PPOConfig(env_frames=frames, **fields)
    result = dict(
        name='ppo', command=' '.join(['python', *sys.argv]), **provenance(), env=args.env, env_options=options
    )
    result |= dict(config=dataclasses.asdict(config), loops=measure(env, config, args.updates))
    if args.train_frames:
        result |= dict(curve=learn(env, config, args.seed))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f'ppo_{args.env.replace("/", "_")}.json'
    path.write_text(json.dumps(result, indent=1))
    print(path)


if __name__ == '__main__':
    main()
