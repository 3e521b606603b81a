"""Scores of PPO in a game with several seeds, and (--speed) its frames per second.

python benchmarks/ppo.py [--env minatar/breakout] [--env-options protocol=gymnax] [--setting rejax] [--train-frames 1e7]
  [--seeds 3] -> results/ppo/<env>-<protocol>-<setting>-<frames>.json: curve and scores of every
  seed
python benchmarks/ppo.py --speed -> results/bench/ppo_<env>.json: random actions, the policy, policy and learning
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from reverie.agents import ppo
from reverie.commands.arguments import options_of, slug, whole
from reverie.envs.device import Vector, make
from reverie.evaluation.results import provenance, record, save
from reverie.evaluation.returns import RandomActor, evaluate_seeds
from reverie.types import Env, Params, Step

Loop: TypeAlias = Callable[[ppo.PPOState], ppo.PPOState]

# 'rejax' has the settings of rejax 0.1.3 on gymnax' MinAtar, every difference named; see
# docs/LOG.md.
SETTINGS = dict(
    default=ppo.PPOConfig(),
    rejax=ppo.PPOConfig(
        envs=1024,
        learning_rate=1e-3,
        anneal=False,
        adam_eps=1e-8,
        max_grad_norm=None,
        max_grad_value=0.5,
        bootstrap_truncated=False,
        width=256,
        separate=True,
        init='lecun_normal',
    ),
)


def fastest(f: Loop, state: ppo.PPOState, repeats: int = 3) -> tuple[float, float]:
    """Time a call; return seconds of the fastest warm one, and of the first with its compilation."""
    begin = time.perf_counter()
    state = jax.block_until_ready(f(state))
    first, times = time.perf_counter() - begin, []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(f(state))
        times.append(time.perf_counter() - begin)
    return min(times), first


def measure(env: Env, config: ppo.PPOConfig, updates: int) -> dict[str, dict[str, float]]:
    """Measure frames per second of three loops of `updates` rollouts each: random actions, the
    policy, policy and learning.
    """
    agent, vector = ppo.PPO(env.spec, config), Vector(env, config.envs)

    def chance(state: ppo.PPOState) -> ppo.PPOState:
        def frame(
            carry: tuple[PyTree, Step], key: PRNGKeyArray
        ) -> tuple[tuple[PyTree, Step], None]:
            actions = jax.random.randint(key, (config.envs,), 0, env.spec.actions.size)
            return vector.step(carry[0], actions, key), None

        key, k_frames = jax.random.split(state.key)
        keys = jax.random.split(k_frames, config.rollout)
        (env_state, step), _ = jax.lax.scan(frame, (state.env_state, state.step), keys)
        return state._replace(env_state=env_state, step=step, key=key)

    loops: dict[str, Loop] = dict(
        random=chance,
        policy=lambda s: ppo.rollout(agent, vector, s)[0],
        learning=lambda s: ppo.update(agent, vector, s),
    )
    state, found = ppo.begin(agent, vector, jax.random.key(0)), {}
    for label, loop in loops.items():

        def many(state: ppo.PPOState, loop: Loop = loop) -> ppo.PPOState:
            return jax.lax.scan(lambda s, _: (loop(s), None), state, length=updates)[0]

        seconds, first = fastest(jax.jit(many), state)
        fps, compile_s = updates * config.frames / seconds, first - seconds
        found[label] = dict(fps=fps, compile_seconds=compile_s)
        print(f'{label:9} {fps:12,.0f} frames/s, compiled in {compile_s:.1f} s')
    return found


def learn(env: Env, config: ppo.PPOConfig, seed: int, seeds: int, episodes: int) -> dict[str, Any]:
    """Train `seeds` seeds in one program; score the final policies, sampled and greedy, and every
    snapshot in whole episodes.

    Returns the arguments of `returns.record`; `curve` holds every snapshot's score (sampled), and
    as `online_per_seed` the mean return of the latest finished episodes, null before the first.
    """
    agent, begin = ppo.PPO(env.spec, config), time.perf_counter()
    passed: list[float] = []

    def progress(frames: int, ret: float) -> None:
        passed.append(time.perf_counter() - begin)
        print(f'{frames:12,} frames  return {ret:8.2f}  {passed[-1]:8.1f} s', flush=True)

    k_train, k_score = jax.random.split(jax.random.key(seed))
    result = ppo.train(env, config, jax.random.split(k_train, seeds), progress)
    seconds = time.perf_counter() - begin
    keys = jax.random.split(k_score, 4)
    play = functools.partial(evaluate_seeds, env, episodes=episodes)

    # [S, K, ...] -> [S * K, ...]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), result.snapshots)
    along = play(agent, flat, keys[0]).returns.mean(1).reshape(seeds, -1)
    no_weights: Params = {'seeds': np.zeros(seeds)}  # as many random players as seeds
    random = play(RandomActor(env.spec.actions), no_weights, keys[1])
    sampled = play(agent, result.params, keys[2])
    greedy = play(agent, result.params, keys[3], greedy=True)
    scores = dict(random=random, ppo=dict(sampled=sampled, greedy=greedy))
    online = [[None if np.isnan(x) else float(x) for x in row] for row in result.curve['return']]
    curve = dict(
        env_frames=result.curve['env_frames'],
        seconds=passed,
        return_per_seed=along.tolist(),
        online_per_seed=online,
    )
    steps = {'ppo': config.updates * config.epochs * config.minibatches}
    return dict(
        env_frames=int(result.curve['env_frames'][-1]),
        gradient_steps=steps,
        seconds=seconds,
        scores=scores,
        curve=curve,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--env', default='minatar/breakout')
    parser.add_argument('--env-options', nargs='*', default=[], metavar='NAME=VALUE')
    parser.add_argument(
        '--setting', choices=tuple(SETTINGS), default='default', help='values of the fields below'
    )
    fields = (
        'envs', 'rollout', 'epochs', 'minibatches', 'learning_rate', 'entropy_scale', 'width',
        'snapshots',
    )  # fmt: skip
    for name in fields:
        parser.add_argument('--' + name.replace('_', '-'), type=type(getattr(ppo.PPOConfig, name)))
    parser.add_argument('--train-frames', type=float, default=ppo.PPOConfig.env_frames)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--seeds', type=int, default=1, help='trained in one program')
    parser.add_argument(
        '--episodes', type=int, default=128, help='episodes that score every snapshot of a seed'
    )
    parser.add_argument(
        '--speed', action='store_true', help='measure frames per second instead of learning'
    )
    parser.add_argument(
        '--updates', type=int, default=5, help='updates of one measurement of --speed'
    )
    parser.add_argument('--name', help='name of the file, in the place of the setting')
    parser.add_argument('--out', type=pathlib.Path, help='results/ppo, with --speed results/bench')
    args = parser.parse_args()
    options = options_of(tuple(args.env_options))
    env = make(args.env, **options)
    changed = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    frames = whole('train-frames', args.train_frames)
    setting = SETTINGS[args.setting]
    changed = dict(snapshots=max(1, min(setting.snapshots, frames // setting.frames))) | changed
    config = dataclasses.replace(setting, env_frames=frames, **changed)
    common = dict(command=' '.join(['python', *sys.argv]), env=args.env)
    extra = dict(env_options=options, setting=args.setting, config=dataclasses.asdict(config))
    if args.speed:
        result = dict(
            name='ppo', **common, **provenance(), **extra, loops=measure(env, config, args.updates)
        )
        path = (args.out or pathlib.Path('results/bench')) / f'ppo_{slug(args.env)}.json'
    else:
        learnt = learn(env, config, args.seed, args.seeds, args.episodes)
        result = record(
            preset='ppo', seeds=range(args.seeds), **common, **learnt, **extra, seed=args.seed
        )
        protocol = options.get('protocol', 'minatar')
        stem = f'{slug(args.env)}-{protocol}-{args.name or args.setting}-{frames / 1e6:.3g}m'
        path = (args.out or pathlib.Path('results/ppo')) / f'{stem}.json'
    print(save(path, result))


if __name__ == '__main__':
    main()
