"""Scores: play whole episodes in the real environment, write the results file (its figures:
`statistics`).
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

import reverie
from reverie.evaluation.statistics import Returns, derive
from reverie.io import atomic, plain
from reverie.types import ActionSpace, Actor, Env, Params, Step


@dataclasses.dataclass(frozen=True)
class Scores:
    """One whole episode per copy of the environment; leading dims [episodes] or [seeds, episodes]."""

    returns: np.ndarray  # undiscounted sum of rewards; of an unfinished episode, what it has so far
    lengths: np.ndarray  # env steps
    truncated: (
        np.ndarray
    )  # bool: ended by a time limit (the environment's or max_steps), not by the game


@dataclasses.dataclass(frozen=True)
class RandomActor:
    """Uniform over the actions; the floor of every normalised score."""

    actions: ActionSpace

    def initial(self, params: Params, batch: int) -> tuple:
        return ()

    def act(
        self, params: Params, state: tuple, step: Step, key: PRNGKeyArray, greedy: bool | jax.Array
    ) -> tuple[tuple, jax.Array]:
        return state, self.actions.sample(key, step.reward.shape[0])


class _Static:
    """A static argument of `jit`: equal values share a program; an unhashable one is told by
    identity.
    """

    def __init__(self, value: Any):
        self.value = value
        try:
            self.hash = hash(value)
        except TypeError:
            self.hash = id(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static):
            return False
        return self.value is other.value or (
            self.hash == other.hash and bool(self.value == other.value)
        )


class _Carry(NamedTuple):
    env: Any
    memory: Any
    step: Step
    ret: jax.Array  # [episodes] f32
    length: jax.Array  # [episodes] i32
    done: jax.Array  # [episodes] bool
    terminal: jax.Array  # [episodes] bool
    t: jax.Array  # [] i32


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def _start(
    env: _Static, actor: _Static, params: Params, key: jax.Array, episodes: int, seeded: bool
) -> _Carry:
    def one(params: Params, key: jax.Array) -> _Carry:
        state, step = jax.vmap(env.value.reset)(jax.random.split(key, episodes))
        off = jnp.zeros(episodes, bool)
        memory = actor.value.initial(params, episodes)
        return _Carry(
            state,
            memory,
            step,
            jnp.zeros(episodes),
            jnp.zeros(episodes, jnp.int32),
            off,
            off,
            jnp.zeros((), jnp.int32),
        )

    return jax.vmap(one)(params, key) if seeded else one(params, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 6, 8), donate_argnums=(3,))
def _play(
    env: _Static,
    actor: _Static,
    params: Params,
    carry: _Carry,
    key: jax.Array,
    limit: jax.Array,
    steps: int,
    greedy: jax.Array,
    seeded: bool,
) -> tuple[_Carry, jax.Array]:
    """`steps` more steps of every episode; -> (carry, [] bool: nothing left to play)."""

    def one(params: Params, carry: _Carry, key: jax.Array) -> _Carry:
        def body(c: _Carry, _: None) -> tuple[_Carry, None]:
            act_key, env_key = jax.random.split(
                jax.random.fold_in(key, c.t)
            )  # the same whatever `steps` is
            memory, action = actor.value.act(params, c.memory, c.step, act_key, greedy)
            state, step = jax.vmap(env.value.step)(
                c.env, action, jax.random.split(env_key, c.done.shape[0])
            )
            live = ~c.done & (c.t < limit)
            ret = c.ret + jnp.where(live, step.reward, 0.0)  # a finished copy runs on, unheard
            done, terminal = c.done | (live & step.is_last), c.terminal | (live & step.is_terminal)
            return _Carry(state, memory, step, ret, c.length + live, done, terminal, c.t + 1), None

        return jax.lax.scan(body, carry, None, length=steps)[0]

    carry = (jax.vmap(one) if seeded else one)(params, carry, key)
    return carry, jnp.all(carry.done | (carry.t >= limit)[..., None])


def _evaluate(
    env: Env,
    actor: Actor,
    params: Params,
    key: jax.Array,
    episodes: int,
    max_steps: int,
    greedy: bool,
    seeded: bool,
    chunk: int,
) -> Scores:
    statics = _Static(env), _Static(actor)
    split = jax.vmap(jax.random.split, out_axes=1)(key) if seeded else jax.random.split(key)
    carry = _start(*statics, params, split[0], episodes, seeded)
    limit, over = jnp.int32(max_steps), False
    while not over:
        carry, end = _play(
            *statics, params, carry, split[1], limit, chunk, jnp.bool_(greedy), seeded
        )
        over = bool(end)
    return Scores(np.asarray(carry.ret), np.asarray(carry.length), ~np.asarray(carry.terminal))


def evaluate(
    env: Env,
    actor: Actor,
    params: Params,
    key: PRNGKeyArray | jax.Array,
    *,
    episodes: int = 128,
    max_steps: int = 5000,
    greedy: bool = False,
    chunk: int = 100,
) -> Scores:
    """Plays `episodes` copies of `env` at once, one episode each, so that short episodes are not
    over-counted.

    Args:
        params: of the actor, without a seeds axis.
        key: drives resets, environments and sampling; independent of `chunk`.
        max_steps: env steps after which an unfinished episode counts with its return so far, as
        truncated.
        greedy: the most probable action instead of a sampled one.
        chunk: env steps per jitted call; the host looks after each whether all are done.

    Returns: Scores with fields [episodes].
    """
    return _evaluate(env, actor, params, key, episodes, max_steps, greedy, False, chunk)


def evaluate_seeds(
    env: Env,
    actor: Actor,
    params: Params,
    key: PRNGKeyArray | jax.Array,
    *,
    episodes: int = 128,
    max_steps: int = 5000,
    greedy: bool = False,
    chunk: int = 100,
) -> Scores:
    """`evaluate` of every trained seed in one program: leaves of `params` are [seeds, ...].

    Returns: Scores with fields [seeds, episodes].
    """
    keys = jax.random.split(key, jax.tree.leaves(params)[0].shape[0])
    return _evaluate(env, actor, params, keys, episodes, max_steps, greedy, True, chunk)


def evaluate_host(
    vector: Any,
    actor: Actor,
    params: Params,
    key: PRNGKeyArray,
    *,
    episodes: int = 16,
    max_steps: int = 5000,
    greedy: bool = False,
) -> Scores:
    """As `evaluate`, for environments on the host: has `n`, `reset()` and `step(action)`, see
    `envs.host.HostVector`.

    Each of the n copies plays as many episodes, round(episodes / n) but at least one, so that short
    episodes are not over-counted. An episode is cut after `max_steps` steps of the agent; chance in
    the environments is their own.
    """
    n = vector.n
    act = jax.jit(
        lambda params, state, step, t: actor.act(
            params, state, step, jax.random.fold_in(key, t), greedy
        )
    )
    each, t = max(1, round(episodes / n)), 0
    found: list[list[tuple[float, int, bool]]] = [[] for _ in range(n)]
    while min(map(len, found)) < each:  # a new round of episodes for all copies
        step, state = vector.reset(), jax.jit(actor.initial, static_argnums=1)(params, n)
        ret, length, done = np.zeros(n), np.zeros(n, int), np.zeros(n, bool)
        terminal = np.zeros(n, bool)
        for _ in range(max_steps):
            state, action = act(params, state, step, t)
            step, t = vector.step(np.asarray(action)), t + 1
            ret, length = ret + ~done * step.reward, length + ~done
            terminal |= ~done & step.is_terminal
            done |= step.is_last
            if done.all():
                break
        for i in range(n):
            found[i].append((float(ret[i]), int(length[i]), not terminal[i]))
    rows = [row for of_copy in found for row in of_copy]
    return Scores(*(np.array(column) for column in zip(*rows, strict=True)))


def device_name() -> str:
    """The accelerator, or the processor's model with its number of cores."""
    device = jax.devices()[0]
    if device.platform != 'cpu':
        return device.device_kind
    cpuinfo = pathlib.Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return f'{model[0] if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores'


def commit_name() -> str:
    """The commit this package runs from (with -dirty if files were changed), or its version outside
    a checkout.
    """
    package = pathlib.Path(reverie.__file__).resolve().parent
    git = functools.partial(subprocess.run, cwd=package, capture_output=True, text=True, timeout=10)
    try:
        top = git(['git', 'rev-parse', '--show-toplevel'])
        # an environment inside somebody's own repository must not be quoted as ours
        if top.returncode == 0 and pathlib.Path(top.stdout.strip()).resolve() == package.parent:
            name = git(['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'])
            if name.returncode == 0:
                return name.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return f'v{reverie.__version__}'
    return f'v{reverie.__version__}'


def provenance() -> dict[str, Any]:
    """Where a figure comes from: `device, date, commit, versions`."""
    names = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    versions = {'python': platform.python_version(), 'reverie': reverie.__version__}
    versions |= {name: importlib.metadata.version(name) for name in names}
    date = datetime.date.today().isoformat()
    return {'device': device_name(), 'date': date, 'commit': commit_name(), 'versions': versions}


def _rows(scores: Any) -> Returns:
    rows = scores.returns if isinstance(scores, Scores) else scores
    rows = [rows] if np.ndim(rows[0]) == 0 else rows
    return [np.asarray(row, float) for row in rows]


def record(*, preset: str, env: str, command: str, seeds: Sequence[int], env_frames: int,
           gradient_steps: Mapping[str, int], seconds: float | int, scores: Mapping[str, Any],
           reference: float | int | None = None,
           curve: Mapping[str, Any] | None = None, **extra: Any) -> dict[str, Any]:  # fmt: skip
    """The results file of one preset on one environment.

    Args:
        scores: read-out -> Scores or returns [seeds][episodes] or [episodes]; or {'sampled': ...,
            'greedy': ...}, of which the sampled one takes the main keys and the greedy one a
            sub-dictionary.
        reference: score of PPO at 10M frames, 1 on the normalised scale; the mean of
        `scores['ppo']` if not given.
        curve: {'env_frames': [...], 'seconds': [...], 'return_per_seed': [[...], ...]}.
        extra: more entries, e.g. of the dataset.
    """
    played = {
        k: {mode: _rows(of) for mode, of in v.items()}
        if isinstance(v, Mapping)
        else {'sampled': _rows(v)}
        for k, v in scores.items()
    }
    if reference is None and 'ppo' in played:
        reference = float(np.mean([np.mean(row) for row in played['ppo']['sampled']]))
    return {
        'preset': preset,
        'env': env,
        'command': command,
        **provenance(),
        'seeds': [int(x) for x in seeds],
        'env_frames': int(env_frames),
        'gradient_steps': {k: int(v) for k, v in gradient_steps.items()},
        'seconds': float(seconds),
        'reference': reference,
        **derive(played, reference),
        'curve': dict(curve or {'env_frames': [], 'seconds': [], 'return_per_seed': []}),
        **extra,
    }


def save(path: str | os.PathLike[str], record: Mapping[str, Any]) -> pathlib.Path:
    """Write a results file, whole or not at all; return its path.

    Raises ValueError naming the first number that is not finite.
    """
    path = pathlib.Path(path)
    text = json.dumps(plain(record, 'results'), allow_nan=False, indent=1) + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(text)
    return path
