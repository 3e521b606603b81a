"""Recorded play: PPO is trained, its snapshots along the way play, and their episodes become a
dataset.
"""

import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from reverie.agents.ppo import PPO, PPOConfig, PPOResult, train
from reverie.data.episodes import Splitter, Writer
from reverie.data.manifest import MANIFEST, file_hash, read_manifest, read_schema
from reverie.envs.device import Vector, make
from reverie.evaluation.returns import RandomActor, Scores, evaluate, provenance
from reverie.training.state import finite
from reverie.types import Actor, Env, Params, Step, UserError

# Parts of a dataset as fractions of PPO's final return; None is the random player.
PARTS: dict[str, tuple[float | None, ...]] = {
    'random': (None,),
    'medium': (0.5,),
    'expert': (1.0,),
    'mixed': (None, 0.25, 0.5, 1.0),
}
CHUNK = 512  # steps per jitted call
SNAPSHOTS = 'ppo.npz'  # beside the manifest

# Frames of training after which PPO plays well above twice random; the others need no more than
# `LEAST`.
PPO_FRAMES = {'minatar/asterix': 3_000_000}
LEAST = 200_000


@dataclasses.dataclass(frozen=True)
class DataPlayer:
    """Who plays one part of a dataset. `label` is the kind its episodes carry: random, ppo25, ppo50
    or ppo100.

    Of all of PPO's snapshots (`snapshots`) it is ppo and the frames of training, e.g. ppo8192.
    """

    label: str
    actor: Actor
    params: Params
    env_frames: int = 0  # of training
    online_return: float | None = None  # while training, see `ppo.train`


def check_kind(kind: str) -> None:
    if kind not in PARTS:
        raise UserError(f'kind {kind!r} is unknown; expected one of {", ".join(PARTS)}')


def frames_of_training(env: str, frames: int) -> int:
    """Frames that PPO trains on, unless told, for a dataset of so many: as many, but at least what
    the game needs.
    """
    return max(frames, PPO_FRAMES.get(env, LEAST))


def nearest(returns: np.ndarray, fraction: float) -> int:
    """Index of the snapshot whose return is nearest to `fraction` of the final one; 1.0 is the
    final one itself.
    """
    if fraction == 1.0:
        return len(returns) - 1
    return int(np.nanargmin(np.abs(returns - fraction * returns[-1])))


def players(kind: str, env: Env, ppo: tuple[PPOConfig, PPOResult] | None) -> tuple[DataPlayer, ...]:
    """The players of a kind, who get equal shares of the frames.

    ppo: a finished run of one seed; None will do for 'random'. Snapshots are chosen by the online
    returns of the run's curve (the latest finished episode of every environment), which cost
    nothing and average over all of them; what the chosen ones then score is in the manifest's
    return statistics per kind.
    """
    check_kind(kind)
    chosen = []
    for fraction in PARTS[kind]:
        if fraction is None:
            chosen.append(DataPlayer('random', RandomActor(env.spec.actions), {}))
            continue
        if ppo is None:
            raise UserError(
                f'kind {kind!r} needs a trained PPO, got none; only random does without'
            )
        config, result = ppo
        returns = result.curve['return']
        if np.isnan(returns[-1]):
            raise UserError(
                f'no episode ended in {config.env_frames} env_frames of PPO; expected a longer run'
            )
        i = nearest(returns, fraction)
        if not finite(result.snapshots):
            raise UserError(
                f'PPO came to weights that are not finite; expected a rate below {config.learning_rate:g}'
            )
        params = jax.tree.map(lambda x, i=i: x[i], result.snapshots)
        frames = int(result.curve['env_frames'][i])
        chosen.append(
            DataPlayer(
                f'ppo{fraction:.0%}'[:-1], PPO(env.spec, config), params, frames, float(returns[i])
            )
        )
    return tuple(chosen)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _chunk(
    vector: Vector, actor: Actor, params: Params, carry: tuple, length: int
) -> tuple[tuple, Step]:
    def frame(carry, _):
        env_state, memory, step, key = carry
        key, k_act, k_env = jax.random.split(key, 3)
        memory, action = actor.act(params, memory, step, k_act, False)
        env_state, then = vector.step(env_state, action, k_env)
        return (env_state, memory, then, key), step

    return jax.lax.scan(frame, carry, length=length)


def play(env: Env, player: DataPlayer, frames: int, envs: int, key: PRNGKeyArray) -> Iterator[Step]:
    """Chunks [T, N] on the host of N = `envs` parallel streams, in order; each stream begins with
    its reset.

    The player's policy is sampled. `frames` is rounded up to a multiple of `envs`.
    """
    vector, steps = Vector(env, envs), math.ceil(frames / envs)
    k_reset, key = jax.random.split(key)
    length = math.ceil(steps / math.ceil(steps / CHUNK))  # equal chunks: one compilation
    env_state, step = vector.reset(k_reset)
    carry = (env_state, player.actor.initial(player.params, envs), step, key)
    for done in range(0, steps, length):
        carry, chunk = _chunk(vector, player.actor, player.params, carry, length)
        yield jax.tree.map(lambda x, n=steps - done: x[:n], jax.device_get(chunk))


def streams_for(frames: int) -> int:
    """Parallel environments for one part: 64, fewer for short data, so that most episodes come to
    their end.
    """
    return int(np.clip(frames // 2500, 1, 64))


def collect(
    env: Env,
    chosen: tuple[DataPlayer, ...],
    frames: int,
    key: PRNGKeyArray,
    envs: int | None = None,
) -> Iterator[tuple[str, Step, bool]]:
    """Equal shares of `frames` played by each of `chosen`: yields (label, episode [T], complete).

    Deterministic for a key. The tail that each of the `envs` streams of a part is left with comes
    out as incomplete.
    """
    if frames < len(chosen):
        raise UserError(
            f'{frames} frames do not go round {len(chosen)} players; expected at least one each'
        )
    share = frames // len(chosen)
    for player, k_play in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        splitter = Splitter()
        for chunk in play(env, player, share, envs or streams_for(share), k_play):
            for episode, complete in splitter.push(chunk):
                yield player.label, episode, complete
        for episode, complete in splitter.flush():
            yield player.label, episode, complete


def write_dataset(
    path: str | os.PathLike,
    name: str,
    kind: str,
    frames: int,
    *,
    options: dict[str, Any] | None = None,
    config: PPOConfig | None = None,
    seed: int = 0,
    envs: int | None = None,
    episodes: int = 128,
    command: str = '',
    overwrite: bool = False,
    progress: Callable[[int, float], Any] | None = None,
) -> dict[str, Any]:
    """Trains PPO on environment `name` with `options`, lets its snapshots play and writes their
    episodes to `path`.

    Scores of the final PPO (sampled and greedy) and of the random player over `episodes` whole
    episodes go into the provenance, for normalised scores; so do PPO's configuration and curve, and
    `warnings`, a list of lines. PPO's snapshots are kept beside the manifest, see `snapshots`.
    'random' trains no PPO.

    progress: see `ppo.train`.

    Returns: the provenance. Raises UserError for an unknown name, option or kind, or a path in use,
    before training.
    """
    check_kind(kind)
    if frames < len(PARTS[kind]):
        raise UserError(f'{frames} frames of {kind!r}; expected at least {len(PARTS[kind])}')
    config, options = config or PPOConfig(), options or {}
    env = make(name, **options)
    k_train, k_play, k_score = jax.random.split(jax.random.key(seed), 3)
    facts: dict[str, Any] = dict(
        command=command, kind=kind, frames=frames, seed=seed, env=dict(name=name, options=options)
    )
    facts |= provenance()
    with Writer(
        path, env.spec, facts, overwrite=overwrite
    ) as writer:  # first, so that a bad path costs no training
        ppo = None
        if kind != 'random':
            begin = time.perf_counter()
            ppo = config, train(env, config, k_train, progress)
            facts['ppo'] = _run(*ppo, time.perf_counter() - begin)
        chosen = players(kind, env, ppo)
        facts['players'] = [
            dict(kind=p.label, env_frames=p.env_frames, online_return=p.online_return)
            for p in chosen
        ]
        facts['scores'] = scores(env, ppo, k_score, episodes)
        facts['warnings'] = weak(facts['scores'])
        if ppo is not None:
            facts['ppo']['snapshots'] = writer.attach(SNAPSHOTS, _arrays(ppo[1]))
        for label, episode, complete in collect(env, chosen, frames, k_play, envs):
            writer.add(label, episode, complete)
    return facts


def scores(
    env: Env, ppo: tuple[PPOConfig, PPOResult] | None, key: PRNGKeyArray, episodes: int = 128
) -> dict[str, dict[str, dict[str, Any]]]:
    """Whole-episode scores: {'random': {'sampled': ...}, 'ppo': {'sampled': ..., 'greedy': ...}},
    PPO's final policy.

    Each is a dictionary of mean, se (over episodes), episodes, truncated (how many of them) and
    every one of returns.
    """
    keys = jax.random.split(key, 3)
    random = evaluate(env, RandomActor(env.spec.actions), {}, keys[0], episodes=episodes)
    found = {'random': {'sampled': _summary(random)}}
    if ppo is not None:
        config, result = ppo
        run = functools.partial(
            evaluate, env, PPO(env.spec, config), result.params, episodes=episodes
        )
        found['ppo'] = {
            'sampled': _summary(run(keys[1])),
            'greedy': _summary(run(keys[2], greedy=True)),
        }
    return found


def weak(scores: dict[str, Any]) -> list[str]:
    """A line, if PPO's last policy is not above twice random play (of a score below 0: above 0),
    else none.
    """
    if 'ppo' not in scores:
        return []
    random, ppo = (scores[name]['sampled']['mean'] for name in ('random', 'ppo'))
    bar = random + abs(random)
    if ppo > bar:
        return []
    return [
        f'PPO scores {ppo:.2f} and random play {random:.2f}; expected more than {bar:.2f}: give it more ppo-frames'
    ]


def _arrays(result: PPOResult) -> dict[str, np.ndarray]:
    """The snapshots of a run of one seed [K, ...] by name, with what the curve knows of them."""
    named = {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(result.snapshots)
    }
    return named | {f'curve/{name}': values for name, values in result.curve.items()}


def snapshots(path: str | os.PathLike) -> tuple[DataPlayer, ...]:
    """PPO's snapshots kept beside the dataset at `path`, in order: players of all strengths, from
    weak to final.

    Each has its frames of training and its online return (NaN before the first episode ended, see
    `ppo.train`). Raises UserError if there is no dataset, it keeps none (random play, or an older
    dataset), or the file is damaged.
    """
    folder = pathlib.Path(path)
    manifest = read_manifest(folder)
    _, spec = read_schema(folder / MANIFEST, manifest)
    run = manifest['provenance'].get('ppo', {})
    if 'snapshots' not in run:
        raise UserError(
            f'{folder}: no snapshots of PPO are kept here; expected data of a kind other than random'
        )
    file = folder / pathlib.Path(run['snapshots']['file']).name
    if not file.is_file() or file_hash(file) != run['snapshots']['sha256']:
        raise UserError(
            f'{file}: missing or changed since it was written; expected {run["snapshots"]["bytes"]} bytes'
        )
    with np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    agent = PPO(spec, PPOConfig(**run['config']))
    shapes = jax.eval_shape(agent.init, jax.random.key(0))
    stacked = jax.tree.map_with_path(lambda path, _: arrays[jax.tree_util.keystr(path)], shapes)
    rows = zip(arrays['curve/env_frames'].tolist(), arrays['curve/return'].tolist(), strict=True)
    return tuple(
        DataPlayer(f'ppo{frames}', agent, jax.tree.map(lambda x, i=i: x[i], stacked), frames, ret)
        for i, (frames, ret) in enumerate(rows)
    )


def _summary(scores: Scores) -> dict[str, Any]:
    x = np.asarray(scores.returns, np.float64)
    se = float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else None
    truncated = int(np.sum(scores.truncated))
    return dict(
        mean=float(x.mean()), se=se, episodes=len(x), truncated=truncated, returns=x.tolist()
    )


def _run(config: PPOConfig, result: PPOResult, seconds: float) -> dict[str, Any]:
    """JSON of a PPO run; its return is null before the first episode ends."""
    returns = [None if np.isnan(x) else float(x) for x in result.curve['return']]
    curve = {'env_frames': result.curve['env_frames'].tolist(), 'return': returns}
    return dict(config=dataclasses.asdict(config), curve=curve, seconds=seconds)
