"""PPO on the device: it collects the data, and it is the baseline every other agent is compared
with.

Schulman et al. 2017 (arXiv:1707.06347), eqs. 7, 9, 11. Rollout, advantages and update are one
jitted scan. A rollout pairs the action chosen at step t with the `Step` that arrives after it.
Where step t is `is_last` the action is ignored (auto-reset follows), so that pair is no transition
and is masked out of every term of the loss.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from reverie.envs.device import Vector
from reverie.nn.core import build
from reverie.types import Env, EnvSpec, Params, State, Step, UserError

INITS = ('orthogonal', 'lecun_normal')


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Everything of a PPO run but the environment and the seed; one update uses envs * rollout
    frames.
    """

    env_frames: int = 3_000_000
    envs: int = 64
    rollout: int = 128  # frames per environment and update
    epochs: int = 4
    minibatches: int = 8
    learning_rate: float = 5e-3
    anneal: bool = True  # the rate falls linearly to 0 over the run, else it is constant
    adam_eps: float = 1e-5
    discount: float = 0.99
    lam: float = 0.95
    bootstrap_truncated: bool = (
        True  # a step cut by a time limit is worth its value, else 0 like a terminal one
    )
    clip: float = 0.2  # of the probabilities' ratio
    clip_value: float | None = 0.2  # of the value's step, in units of return; None: off
    value_scale: float = 0.5
    entropy_scale: float = 0.01
    max_grad_norm: float | None = 0.5  # of all gradients together; None: off
    max_grad_value: float | None = None  # of every element of the gradients; None: off
    width: int = 128
    layers: int = 2
    separate: bool = False  # policy and value have hidden layers of their own
    init: str = 'orthogonal'  # of INITS, see `Net`
    snapshots: int = 20  # equally spaced in frames, the last one is the end of training

    def __post_init__(self):
        if self.init not in INITS:
            raise UserError(
                f'PPO: init {self.init!r} is unknown; expected one of {", ".join(INITS)}'
            )
        if self.layers < 1:
            raise UserError(f'PPO: {self.layers} hidden layers; expected at least 1')
        if min(self.minibatches, self.snapshots) < 1 or self.frames % self.minibatches:
            raise UserError(
                f'PPO: {self.minibatches} minibatches and {self.snapshots} snapshots; expected at least 1 of each, and '
                f'minibatches that divide envs * rollout = {self.frames}'
            )
        if self.updates < 1:
            raise UserError(
                f'PPO: {self.env_frames} env_frames; expected at least {self.frames * self.snapshots}, one update '
                f'of {self.frames} frames (envs * rollout) for each of {self.snapshots} snapshots'
            )

    @property
    def frames(self) -> int:
        """Of one update."""
        return self.envs * self.rollout

    @property
    def updates(self) -> int:
        """Updates of the whole run: as many whole ones per snapshot as fit into `env_frames`."""
        return self.env_frames // (self.frames * self.snapshots) * self.snapshots


class Transition(NamedTuple):
    """An action and what came of it. Leading dims [T, N] in a rollout, [M] in a minibatch."""

    obs: Array  # [*B, ...] what the action was chosen from
    action: Int[Array, '*B']
    log_prob: Float[Array, '*B']
    value: Float[Array, '*B']
    valid: Bool[
        Array, '*B'
    ]  # false where the action was ignored, because an episode had just ended
    reward: Float[Array, '*B']  # of the step that arrived after the action, like the next two
    is_last: Bool[Array, '*B']
    is_terminal: Bool[Array, '*B']


class PPOState(NamedTuple):
    """What one update hands to the next."""

    params: Params
    opt_state: PyTree
    env_state: PyTree
    step: Step  # [N] what arrived last
    running: Float[Array, ' N']  # return of the episode under way
    finished: Float[Array, ' N']  # return of the latest finished episode, NaN before the first
    key: PRNGKeyArray


class PPOResult(NamedTuple):
    """What training leaves behind, on the host. Leading dims [*S]: none, or one per seed."""

    params: Params
    snapshots: Params  # every leaf [*S, K, ...]: params after each K-th part of the run
    curve: dict[
        str, np.ndarray
    ]  # 'env_frames' [K], 'return' [*S, K]: mean over envs of the latest finished episode


class Net(nnx.Module):
    """Dense layers over the flattened board under the policy (logits) and the value, shared unless
    `separate`.

    Kernels start orthogonal with gain sqrt(2), 0.01 in front of the logits and 1 in front of the
    value, as in OpenAI's baselines, or all with variance 1 / fan-in (lecun_normal). On a board of
    10x10 cells two layers learn as much from a frame as a 3x3 convolution does, for a quarter of
    the time.
    """

    def __init__(self, spec: EnvSpec, config: PPOConfig, *, rngs: nnx.Rngs):
        lecun = config.init == 'lecun_normal'
        kernel = lambda gain: (
            nnx.initializers.lecun_normal() if lecun else nnx.initializers.orthogonal(gain)
        )
        dense = lambda inputs, outputs, gain: nnx.Linear(
            inputs, outputs, kernel_init=kernel(gain), rngs=rngs
        )
        widths = [math.prod(spec.obs_shape)] + [config.width] * config.layers
        hidden = lambda: nnx.List(dense(i, o, 2**0.5) for i, o in itertools.pairwise(widths))
        self.hidden = hidden()
        self.policy = dense(config.width, spec.actions.size, 0.01)
        self.value = dense(config.width, 1, 1.0)
        self.value_hidden = hidden() if config.separate else None

    def __call__(self, obs: Array) -> tuple[Float[Array, 'N A'], Float[Array, ' N']]:
        board = obs.reshape(obs.shape[0], -1).astype(jnp.float32)
        run = lambda layers: functools.reduce(lambda x, layer: jax.nn.relu(layer(x)), layers, board)
        feat = run(self.hidden)
        value_feat = feat if self.value_hidden is None else run(self.value_hidden)
        return self.policy(feat), self.value(value_feat)[..., 0]


@dataclasses.dataclass(frozen=True)
class PPO:
    """The policy as an `Actor`, without memory; equal ones share compiled programs. Discrete
    actions only.
    """

    spec: EnvSpec
    config: PPOConfig

    def __post_init__(self):
        if self.spec.actions.kind != 'discrete':
            raise UserError(
                f'PPO: {self.spec.name} has {self.spec.actions.kind} actions; expected discrete ones'
            )

    @functools.cached_property
    def bind(self) -> Callable[[Params], Net]:
        return build(Net(self.spec, self.config, rngs=nnx.Rngs(0)))[1]

    def init(self, key: PRNGKeyArray) -> Params:
        return build(Net(self.spec, self.config, rngs=nnx.Rngs(key)))[0]

    def initial(self, params: Params, batch: int) -> State:
        return ()

    def act(
        self, params: Params, state: State, step: Step, key: PRNGKeyArray, greedy: bool | Array
    ) -> tuple[State, Array]:
        """-> ((), action index [N]): the likeliest action where `greedy`, else a sample."""
        logits, _ = self.bind(params)(step.obs)
        return state, jnp.where(greedy, jnp.argmax(logits, -1), jax.random.categorical(key, logits))


def gae(
    reward: Float[Array, 'T N'],
    is_last: Bool[Array, 'T N'],
    is_terminal: Bool[Array, 'T N'],
    value: Float[Array, 'T1 N'],
    discount: float,
    lam: float,
) -> Float[Array, 'T N']:
    """Generalised advantage estimation, PPO eqs. 11-12; `value` has T + 1 rows.

    Row t of `reward`, `is_last`, `is_terminal` is what arrived after action t, row t of `value`
    belongs to the observation the action was chosen from. A terminal step is worth 0; a truncated
    one is worth its value, because with the arrival convention its own observation, not the next
    episode's, is row t + 1. Rows whose action was ignored (auto-reset) hold numbers without a
    meaning and reach no other row.
    """
    delta = reward + discount * value[1:] * ~is_terminal - value[:-1]

    def back(adv, x):
        delta, is_last = x
        adv = delta + discount * lam * adv * ~is_last
        return adv, adv

    return jax.lax.scan(back, jnp.zeros_like(value[0]), (delta, is_last), reverse=True)[1]


def ppo_loss(
    logits: Float[Array, 'M A'],
    value: Float[Array, ' M'],
    batch: Transition,
    adv: Float[Array, ' M'],
    ret: Float[Array, ' M'],
    config: PPOConfig,
) -> dict[str, Float[Array, '']]:
    """Terms of PPO eq. 9, means over the valid transitions: clipped objective, value error,
    negative entropy.

    Not in the paper: advantages are normalised per minibatch, and the value's step is clipped like
    the policy's.
    """
    mean = lambda x: jnp.sum(x * batch.valid) / jnp.maximum(batch.valid.sum(), 1)
    adv = (adv - mean(adv)) / (jnp.sqrt(mean((adv - mean(adv)) ** 2)) + 1e-8)
    log_probs = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_probs, batch.action[:, None], -1)[:, 0]
    ratio = jnp.exp(log_prob - batch.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    error = (value - ret) ** 2
    if config.clip_value is not None:
        near = batch.value + jnp.clip(value - batch.value, -config.clip_value, config.clip_value)
        error = jnp.maximum(error, (near - ret) ** 2)
    return dict(
        policy=mean(-jnp.minimum(ratio * adv, clipped * adv)),
        value=0.5 * mean(error),
        entropy=mean(jnp.sum(jnp.exp(log_probs) * log_probs, -1)),
    )


def optimiser(config: PPOConfig) -> optax.GradientTransformation:
    steps = config.updates * config.epochs * config.minibatches
    rate = (
        optax.linear_schedule(config.learning_rate, 0.0, steps)
        if config.anneal
        else config.learning_rate
    )
    return optax.chain(
        optax.identity()
        if config.max_grad_norm is None
        else optax.clip_by_global_norm(config.max_grad_norm),
        optax.identity() if config.max_grad_value is None else optax.clip(config.max_grad_value),
        optax.adam(rate, eps=config.adam_eps),
    )


def begin(agent: PPO, vector: Vector, key: PRNGKeyArray) -> PPOState:
    k_params, k_env, key = jax.random.split(key, 3)
    params = agent.init(k_params)
    env_state, step = vector.reset(k_env)
    zeros = jnp.zeros(agent.config.envs)
    return PPOState(
        params, optimiser(agent.config).init(params), env_state, step, zeros, zeros * jnp.nan, key
    )


def rollout(agent: PPO, vector: Vector, state: PPOState) -> tuple[PPOState, Transition]:
    """`config.rollout` frames of every environment with the current policy: -> (state, [T, N])."""
    net = agent.bind(state.params)

    def frame(carry, key):
        env_state, step, running, finished = carry
        k_act, k_env = jax.random.split(key)
        logits, value = net(step.obs)
        action = jax.random.categorical(k_act, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], -1)[:, 0]
        env_state, then = vector.step(env_state, action, k_env)
        running = jnp.where(then.is_first, 0.0, running) + then.reward
        finished = jnp.where(then.is_last, running, finished)
        row = Transition(
            step.obs,
            action,
            log_prob,
            value,
            ~step.is_last,
            then.reward,
            then.is_last,
            then.is_terminal,
        )
        return (env_state, then, running, finished), row

    key, k_frames = jax.random.split(state.key)
    carry = (state.env_state, state.step, state.running, state.finished)
    carry, rows = jax.lax.scan(frame, carry, jax.random.split(k_frames, agent.config.rollout))
    return PPOState(state.params, state.opt_state, *carry, key), rows


def update(agent: PPO, vector: Vector, state: PPOState) -> PPOState:
    """One rollout, then `epochs` passes over it in shuffled minibatches."""
    config = agent.config
    state, rows = rollout(agent, vector, state)
    last = agent.bind(state.params)(state.step.obs)[1]
    value = jnp.concatenate([rows.value, last[None]])
    terminal = rows.is_terminal if config.bootstrap_truncated else rows.is_last
    adv = gae(rows.reward, rows.is_last, terminal, value, config.discount, config.lam)
    data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rows, adv, adv + rows.value))

    def loss(params, batch):
        rows, adv, ret = batch
        terms = ppo_loss(*agent.bind(params)(rows.obs), rows, adv, ret, config)
        return (
            terms['policy']
            + config.value_scale * terms['value']
            + config.entropy_scale * terms['entropy']
        )

    def minibatch(carry, rows):
        params, opt_state = carry
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], data))
        updates, opt_state = optimiser(config).update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    key, k_shuffle = jax.random.split(state.key)
    size = config.frames
    order = jax.vmap(lambda k: jax.random.permutation(k, size))(
        jax.random.split(k_shuffle, config.epochs)
    )
    order = order.reshape(config.epochs * config.minibatches, -1)
    (params, opt_state), _ = jax.lax.scan(minibatch, (state.params, state.opt_state), order)
    return state._replace(params=params, opt_state=opt_state, key=key)


def train(
    env: Env,
    config: PPOConfig,
    key: PRNGKeyArray | jax.Array,
    progress: Callable[[int, float], Any] | None = None,
) -> PPOResult:
    """Train on `env`; with a key [S], S seeds in one program.

    progress: called after every snapshot with (env frames so far, mean return of the latest
    finished episodes). The returns of the curve are the online estimate: the sampled policy, the
    latest finished episode of every environment, NaN before the first one ends.
    """
    agent, vector = PPO(env.spec, config), Vector(env, config.envs)
    part = config.updates // config.snapshots

    def chunk(state: PPOState) -> tuple[PPOState, Params, Array]:
        state, _ = jax.lax.scan(lambda s, _: (update(agent, vector, s), None), state, length=part)
        return state, state.params, jnp.nanmean(state.finished)

    start = jax.jit(functools.partial(begin, agent, vector))
    # seed by seed: the QR of orthogonal weights, batched, can leave XLA's threads waiting for each
    # other
    if key.ndim:
        state = jax.tree.map(lambda *x: jnp.stack(x), *map(start, key))
    else:
        state = start(key)
    run = jax.jit(jax.vmap(chunk) if key.ndim else chunk)
    snapshots, returns, frames = [], [], []
    for i in range(config.snapshots):
        state, params, ret = run(state)
        snapshots.append(jax.device_get(params))
        returns.append(np.asarray(ret))
        frames.append((i + 1) * part * config.frames)
        if progress is not None:
            progress(frames[-1], float(np.mean(returns[-1])))
    stack = lambda *xs: np.stack(xs, axis=key.ndim)
    curve = {'env_frames': np.array(frames), 'return': stack(*returns)}
    return PPOResult(snapshots[-1], jax.tree.map(stack, *snapshots), curve)
