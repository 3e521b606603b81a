"""Players of a dataset: random play, and snapshots of PPO along its training."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from reverie.agents.ppo import PPO, PPOConfig, PPOResult
from reverie.data.episodes import Splitter
from reverie.data.manifest import MANIFEST, read_manifest, read_schema
from reverie.envs.device import Vector
from reverie.evaluation.game import HostGame
from reverie.evaluation.returns import RandomActor
from reverie.io import file_hash
from reverie.training.update import finite
from reverie.types import Actor, Env, EnvSpec, Params, State, Step, UserError

# Parts of a dataset as fractions of PPO's final return; None is the random player.
PARTS: dict[str, tuple[float | None, ...]] = {
    'random': (None,),
    'medium': (0.5,),
    'expert': (1.0,),
    'mixed': (None, 0.25, 0.5, 1.0),
}
CHUNK = 512  # steps per jitted call


@dataclasses.dataclass(frozen=True)
class DataPlayer:
    """Player of one part of a dataset."""

    label: str  # kind of its episodes: random, ppo25, ppo50, ppo100; of a snapshot ppo<env_frames>
    actor: Actor
    params: Params
    env_frames: int = 0  # of training
    online_return: float | None = None  # while training, see `ppo.train`


def check_kind(kind: str) -> None:
    """Raise UserError unless `kind` is one of PARTS."""
    if kind not in PARTS:
        raise UserError(f'kind {kind!r} is unknown; expected one of {", ".join(PARTS)}')


def nearest(returns: np.ndarray, fraction: float) -> int:
    """Index of the snapshot whose return is nearest to `fraction` of the final one.

    1.0 is the final snapshot itself.
    """
    if fraction == 1.0:
        return len(returns) - 1
    return int(np.nanargmin(np.abs(returns - fraction * returns[-1])))


def players(
    kind: str, spec: EnvSpec, ppo: tuple[PPOConfig, PPOResult] | None
) -> tuple[DataPlayer, ...]:
    """Players of a kind, who get equal shares of the frames.

    ppo: a finished run of one seed; 'random' does without. Snapshots are chosen by the online
    returns of the run's curve (the latest finished episode of every environment), which cost
    nothing and average over all of them; what the chosen ones then score is in the manifest's
    return statistics per kind. Raises UserError for an unknown kind or a PPO that cannot serve.
    """
    check_kind(kind)
    random = DataPlayer('random', RandomActor(spec.actions), {})
    fractions = PARTS[kind]
    if fractions == (None,):
        return (random,)
    if ppo is None:
        raise UserError(f'kind {kind!r} needs a trained PPO, got none; only random does without')
    config, result = ppo
    if np.isnan(result.curve['return'][-1]):
        raise UserError(
            f'no episode ended in {config.env_frames} env_frames of PPO; expected a longer run'
        )
    if not finite(result.snapshots):
        raise UserError(
            f'PPO came to weights that are not finite; expected a rate below {config.learning_rate:g}'
        )
    agent = PPO(spec, config)
    return tuple(
        random if fraction is None else _snapshot(agent, result, fraction) for fraction in fractions
    )


def _snapshot(agent: PPO, result: PPOResult, fraction: float) -> DataPlayer:
    returns = result.curve['return']
    i = nearest(returns, fraction)
    params = jax.tree.map(lambda x: x[i], result.snapshots)
    frames = int(result.curve['env_frames'][i])
    return DataPlayer(f'ppo{100 * fraction:.0f}', agent, params, frames, float(returns[i]))


Playing: TypeAlias = tuple[PyTree, State, Step, PRNGKeyArray]  # of environments and the actor


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _chunk(
    vector: Vector, actor: Actor, params: Params, carry: Playing, length: int
) -> tuple[Playing, Step]:
    def frame(carry: Playing, _: None) -> tuple[Playing, Step]:
        env_state, memory, step, key = carry
        key, k_act, k_env = jax.random.split(key, 3)
        memory, action = actor.act(params, memory, step, k_act, False)
        env_state, then = vector.step(env_state, action, k_env)
        return (env_state, memory, then, key), step

    played: tuple[Playing, Step] = jax.lax.scan(frame, carry, length=length)
    return played


def play(env: Env, player: DataPlayer, frames: int, envs: int, key: PRNGKeyArray) -> Iterator[Step]:
    """Yield chunks [T, N] on the host of N = `envs` parallel streams, in order.

    Each stream begins with its reset. The player's policy is sampled. `frames` is rounded up to a
    multiple of `envs`.
    """
    vector = Vector(env, envs)
    steps = math.ceil(frames / envs)
    k_reset, key = jax.random.split(key)
    length = math.ceil(steps / math.ceil(steps / CHUNK))  # equal chunks: one compilation
    env_state, step = vector.reset(k_reset)
    carry = (env_state, player.actor.initial(player.params, envs), step, key)
    for done in range(0, steps, length):
        carry, chunk = _chunk(vector, player.actor, player.params, carry, length)
        yield jax.tree.map(lambda x, n=steps - done: x[:n], jax.device_get(chunk))


def streams_for(frames: int) -> int:
    """Parallel environments for one part: at most 64, fewer for short data, so that most episodes
    come to their end.
    """
    return int(np.clip(frames // 2500, 1, 64))


def collect(
    env: Env,
    chosen: tuple[DataPlayer, ...],
    frames: int,
    key: PRNGKeyArray,
    envs: int | None = None,
) -> Iterator[tuple[str, Step, bool]]:
    """Let each of `chosen` play an equal share of `frames`: yields (label, episode [T], complete).

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


def collect_host(
    game: HostGame, frames: int, seed: int, envs: int | None = None
) -> Iterator[tuple[str, Step, bool]]:
    """Random play of an environment on the host: yields (label, episode [T], complete).

    Deterministic for a seed, if the environment is.
    """
    n = envs or min(8, streams_for(frames))
    rng, splitter = np.random.default_rng(seed), Splitter()
    with game.vector(n, 'collect', seed) as vector:
        steps = [vector.reset()]
        for left in range(math.ceil(frames / n), 0, -1):
            if len(steps) == CHUNK or left == 1:
                for episode, complete in splitter.push(_stacked(steps)):
                    yield 'random', episode, complete
                steps = []
            if left > 1:
                steps.append(vector.step(game.spec.actions.draw(rng, n)))
    for episode, complete in splitter.flush():
        yield 'random', episode, complete


def _stacked(steps: list[Step]) -> Step:
    stacked: Step = jax.tree.map(lambda *x: np.stack(x), *steps)
    return stacked


def snapshot_arrays(result: PPOResult) -> dict[str, np.ndarray]:
    """Snapshots of a run of one seed [K, ...] by name, with the curve's entry for each."""
    named = {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(result.snapshots)
    }
    return named | {f'curve/{name}': values for name, values in result.curve.items()}


def snapshots(path: str | os.PathLike[str]) -> tuple[DataPlayer, ...]:
    """PPO's snapshots kept beside the dataset at `path`, from weak to final: players of all
    strengths.

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
    arrays = _read_snapshots(folder, run['snapshots'])
    agent = PPO(spec, PPOConfig(**run['config']))
    shapes = jax.eval_shape(agent.init, jax.random.key(0))
    stacked = jax.tree.map_with_path(lambda path, _: arrays[jax.tree_util.keystr(path)], shapes)
    rows = zip(arrays['curve/env_frames'].tolist(), arrays['curve/return'].tolist(), strict=True)
    return tuple(
        DataPlayer(f'ppo{frames}', agent, jax.tree.map(lambda x, i=i: x[i], stacked), frames, ret)
        for i, (frames, ret) in enumerate(rows)
    )


def _read_snapshots(folder: pathlib.Path, entry: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of the file that a manifest's entry names; raises UserError if it was changed."""
    file = folder / pathlib.Path(entry['file']).name
    if not file.is_file() or file_hash(file) != entry['sha256']:
        raise UserError(
            f'{file}: missing or changed since it was written; expected {entry["bytes"]} bytes'
        )
    with np.load(file, allow_pickle=False) as archive:
        return dict(archive)
