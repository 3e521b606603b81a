"""Recorded play: PPO is trained, its snapshots play, and their episodes become a dataset."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from reverie.agents.ppo import PPO, PPOConfig, PPOResult, train
from reverie.commands.collect.players import (
    PARTS,
    check_kind,
    collect,
    collect_host,
    players,
    snapshot_arrays,
)
from reverie.data.episodes import Writer
from reverie.envs.registry import on_host
from reverie.evaluation.game import AnyGame, DeviceGame, HostGame, game
from reverie.evaluation.results import provenance
from reverie.evaluation.returns import RandomActor, Scores, evaluate
from reverie.types import UserError

SNAPSHOTS = 'ppo.npz'  # beside the manifest

# Frames of training after which PPO plays well above twice random; other games need `LEAST` at most
PPO_FRAMES = {'minatar/asterix': 3_000_000}
LEAST = 200_000


def frames_of_training(env: str, frames: int) -> int:
    """Frames that PPO trains on by default for a dataset of `frames`: as many, but at least what
    the game needs.
    """
    return max(frames, PPO_FRAMES.get(env, LEAST))


def write_dataset(
    path: str | os.PathLike[str],
    name: str,
    kind: str,
    frames: int,
    *,
    options: dict[str, Any] | None = None,
    config: PPOConfig | None = None,
    seed: int = 0,
    envs: int | None = None,
    episodes: int = 128,
    holdout: float = 0.0,
    command: str = '',
    overwrite: bool = False,
    progress: Callable[[int, float], Any] | None = None,
) -> dict[str, Any]:
    """Train PPO on environment `name` with `options`, let its snapshots play, write their episodes
    to `path`; return the provenance.

    Scores of the final PPO (sampled and greedy) and of the random player over `episodes` whole
    episodes go into the provenance, for normalised scores; so do PPO's configuration and curve, and
    `warnings`, a list of lines. PPO's snapshots are kept beside the manifest, see
    `players.snapshots`. 'random' trains no PPO. holdout: share of the episodes, spread evenly, that
    nothing is to be trained on. progress: see `ppo.train`.

    Raises UserError for an unknown name, option or kind, or a path in use, before training.
    """
    check_kind(kind)
    if on_host(name) and kind != 'random':
        raise UserError(
            f'PPO plays on the device, {name} runs on the host; expected --kind random, or what an '
            f'agent plays: reverie train dreamer_v3 --env {name} --export {path}'
        )
    if frames < len(PARTS[kind]):
        raise UserError(f'{frames} frames of {kind!r}; expected at least {len(PARTS[kind])}')
    config, options = config or PPOConfig(), options or {}
    played = game(name, options)
    k_train, k_play, k_score = jax.random.split(jax.random.key(seed), 3)
    facts: dict[str, Any] = dict(
        command=command, kind=kind, frames=frames, seed=seed, env=dict(name=name, options=options)
    )
    facts |= provenance()
    # opened first, so that a bad path costs no training
    with Writer(path, played.spec, facts, overwrite=overwrite) as writer:
        ppo = None
        if kind != 'random':
            assert isinstance(played, DeviceGame)
            begin = time.perf_counter()
            ppo = config, train(played.env, config, k_train, progress)
            facts['ppo'] = _run(*ppo, time.perf_counter() - begin)
        chosen = players(kind, played.spec, ppo)
        facts['players'] = [
            dict(kind=p.label, env_frames=p.env_frames, online_return=p.online_return)
            for p in chosen
        ]
        facts['scores'] = scores(played, ppo, k_score, episodes)
        facts['warnings'] = weak(facts['scores'])
        if ppo is not None:
            facts['ppo']['snapshots'] = writer.attach(SNAPSHOTS, snapshot_arrays(ppo[1]))
        if isinstance(played, HostGame):
            recorded = collect_host(played, frames, seed, envs)
        else:
            recorded = collect(played.env, chosen, frames, k_play, envs)
        for i, (label, episode, complete) in enumerate(recorded):
            held_out = int((i + 1) * holdout) > int(i * holdout)
            writer.add(label, episode, complete, held_out=held_out)
    return facts


def scores(
    played: AnyGame, ppo: tuple[PPOConfig, PPOResult] | None, key: PRNGKeyArray, episodes: int = 128
) -> dict[str, dict[str, dict[str, Any]]]:
    """Whole-episode scores: {'random': {'sampled': ...}, 'ppo': {'sampled': ..., 'greedy': ...}},
    PPO's final policy.

    Each is a dictionary of mean, se (over episodes), episodes, truncated (how many of them) and
    every one of returns.
    """
    keys = jax.random.split(key, 3)
    spec = played.spec
    if isinstance(played, HostGame):
        how: dict[str, Any] = dict(episodes=episodes, max_steps=5000, greedy=False)
        random = played.score(RandomActor(spec.actions), {'none': np.zeros(1)}, keys[0], **how)
        return {'random': {'sampled': _summary(random)}}
    random = evaluate(played.env, RandomActor(spec.actions), {}, keys[0], episodes=episodes)
    found = {'random': {'sampled': _summary(random)}}
    if ppo is not None:
        config, result = ppo
        agent = PPO(spec, config)
        run = functools.partial(evaluate, played.env, agent, result.params, episodes=episodes)
        sampled, greedy = run(keys[1]), run(keys[2], greedy=True)
        found['ppo'] = {'sampled': _summary(sampled), 'greedy': _summary(greedy)}
    return found


def weak(scores: dict[str, Any]) -> list[str]:
    """One warning if PPO's last policy is not above twice random play (above 0, if that is
    negative), else none.
    """
    if 'ppo' not in scores:
        return []
    random, ppo = (scores[name]['sampled']['mean'] for name in ('random', 'ppo'))
    bar = random + abs(random)
    if ppo > bar:
        return []
    return [
        f'PPO scores {ppo:.2f} and random play {random:.2f}; expected more than {bar:.2f}: '
        'give it more ppo-frames'
    ]


def _summary(scores: Scores) -> dict[str, Any]:
    x = np.asarray(scores.returns, np.float64).ravel()
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
