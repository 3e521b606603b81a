"""PPO on the device, the baseline of all agents, which also collects data; arXiv 1707.06347, eqs. 7,
9, 11.

Rollout, advantages and update are one jitted scan. A rollout pairs the action chosen at step t with
the `Step` that arrives after it. Where step t is `is_last` the action is ignored (auto-reset
follows), so that pair is no transition and is masked out of every term of the loss.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from reverie.envs.device import Vector
from reverie.nn.core import build
from reverie.nn.dists import unit_range
from reverie.types import Env, EnvSpec, Params, State, Step, UserError

INITS = ('orthogonal', 'lecun_normal')


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Settings of a PPO run; one update uses envs * rollout frames."""

    env_frames: int = 3_000_000
    """Environment frames of the whole run."""
    envs: int = 64
    """Environments played at once."""
    rollout: int = 128
    """Frames of each environment for one update."""
    epochs: int = 4
    """Passes over the frames of an update."""
    minibatches: int = 8
    """Gradient steps of a pass."""
    learning_rate: float = 5e-3
    """Learning rate of Adam, at the start."""
    anneal: bool = True
    """Let the learning rate fall linearly to 0 over the run."""
    adam_eps: float = 1e-5
    """Epsilon of Adam."""
    discount: float = 0.99
    """Discount of a step."""
    lam: float = 0.95
    """Weight of longer advantages, lambda of GAE."""
    bootstrap_truncated: bool = True
    """Count the value of a step that a time limit cuts, else 0 as for a terminal one."""
    clip: float = 0.2
    """Greatest change of the probabilities' ratio."""
    clip_value: float | None = 0.2
    """Greatest change of the value, in units of return; None for no limit."""
    value_scale: float = 0.5
    """Weight of the value's error."""
    entropy_scale: float = 0.01
    """Weight of the entropy bonus."""
    max_grad_norm: float | None = 0.5
    """Greatest norm of all gradients together; None for no limit."""
    max_grad_value: float | None = None
    """Greatest element of the gradients; None for no limit."""
    width: int = 128
    """Width of the hidden layers."""
    layers: int = 2
    """Hidden layers."""
    separate: bool = False
    """Give policy and value hidden layers of their own."""
    init: str = 'orthogonal'
    """Distribution that kernels are drawn from, orthogonal or lecun_normal."""
    snapshots: int = 20
    """Copies of the weights, equally spaced in frames; the last is the end of training."""

    def __post_init__(self) -> None:
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
        """Frames of one update."""
        return self.envs * self.rollout

    @property
    def updates(self) -> int:
        """Updates of the run: as many whole ones per snapshot as fit into `env_frames`."""
        return self.env_frames // (self.frames * self.snapshots) * self.snapshots


class Transition(NamedTuple):
    """Action and its outcome. Leading dims [T, N] in a rollout, [M] in a minibatch."""

    obs: Array  # [*B, ...] observation that the action was chosen from
    action: Int[Array, '*B']
    log_prob: Float[Array, '*B']
    value: Float[Array, '*B']
    valid: Bool[Array, '*B']  # false where the action was ignored, as an episode had just ended
    reward: Float[Array, '*B']  # from the step that arrived after the action, like the next two
    is_last: Bool[Array, '*B']
    is_terminal: Bool[Array, '*B']


class PPOState(NamedTuple):
    """State between two updates."""

    params: Params
    opt_state: PyTree
    env_state: PyTree
    step: Step  # [N] the last to arrive
    running: Float[Array, ' N']  # return of the episode under way
    finished: Float[Array, ' N']  # return of the latest finished episode, NaN before the first
    key: PRNGKeyArray


class PPOResult(NamedTuple):
    """Result of training, on the host. Leading dims [*S]: none, or one per seed."""

    params: Params
    snapshots: Params  # every leaf [*S, K, ...]: params after each K-th part of the run
    # 'env_frames' [K], 'return' [*S, K]: mean over envs of the latest finished episode
    curve: dict[str, np.ndarray]


class Net(nnx.Module):
    """Dense layers over the flattened board below the policy (logits) and the value, shared unless
    `separate`.

    Kernels start orthogonal with gain sqrt(2), 0.01 in front of the logits and 1 in front of the
    value, as in OpenAI's baselines, or all with variance 1 / fan-in (lecun_normal). On a board of
    10x10 cells two layers learn as much from a frame as a 3x3 convolution does, for a quarter of
    the time.
    """

    def __init__(self, spec: EnvSpec, config: PPOConfig, *, rngs: nnx.Rngs):
        if isinstance(spec.obs_shape, Mapping):
            raise UserError(f'PPO: {spec.name} observes a dictionary; expected one array')
        widths = [math.prod(spec.obs_shape)] + [config.width] * config.layers

        def dense(inputs: int, outputs: int, gain: float) -> nnx.Linear:
            init = nnx.initializers.lecun_normal()
            if config.init == 'orthogonal':
                init = nnx.initializers.orthogonal(gain)
            return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)

        def hidden() -> nnx.List[nnx.Linear]:
            return nnx.List([dense(i, o, 2**0.5) for i, o in itertools.pairwise(widths)])

        self.hidden = hidden()
        self.policy = dense(config.width, spec.actions.size, 0.01)
        self.value = dense(config.width, 1, 1.0)
        self.value_hidden = hidden() if config.separate else None

    def __call__(self, obs: Array) -> tuple[Float[Array, 'N A'], Float[Array, ' N']]:
        board = unit_range(obs).reshape(obs.shape[0], -1)

        def run(layers: nnx.List[nnx.Linear]) -> Array:
            return functools.reduce(lambda x, layer: jax.nn.relu(layer(x)), layers, board)

        feat = run(self.hidden)
        value_feat = feat if self.value_hidden is None else run(self.value_hidden)
        return self.policy(feat), self.value(value_feat)[..., 0]


@dataclasses.dataclass(frozen=True)
class PPO:
    """Policy as an `Actor`, without memory, for discrete actions; equal ones share compiled
    programs.
    """

    spec: EnvSpec
    config: PPOConfig

    def __post_init__(self) -> None:
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
        """Return () and the action's index [N], the likeliest where `greedy`, else a sample."""
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

    Row t of `reward`, `is_last`, `is_terminal` arrived after action t, row t of `value` belongs to
    the observation the action was chosen from. A terminal step is worth 0; a truncated one is worth
    its value, because with the arrival convention its own observation, not the next episode's, is
    row t + 1. Rows whose action was ignored (auto-reset) hold numbers without a meaning and reach
    no other row.
    """
    delta = reward + discount * value[1:] * ~is_terminal - value[:-1]

    def back(adv: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, is_last = x
        adv = delta + discount * lam * adv * ~is_last
        return adv, adv

    adv: Array
    _, adv = jax.lax.scan(back, jnp.zeros_like(value[0]), (delta, is_last), reverse=True)
    return adv


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

    def mean(x: Array) -> Array:
        return jnp.sum(x * batch.valid) / jnp.maximum(batch.valid.sum(), 1)

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
    """Adam behind the limits of the gradients."""
    steps = config.updates * config.epochs * config.minibatches
    rate: float | optax.Schedule = config.learning_rate
    if config.anneal:
        rate = optax.linear_schedule(config.learning_rate, 0.0, steps)
    norm = value = optax.identity()
    if config.max_grad_norm is not None:
        norm = optax.clip_by_global_norm(config.max_grad_norm)
    if config.max_grad_value is not None:
        value = optax.clip(config.max_grad_value)
    return optax.chain(norm, value, optax.adam(rate, eps=config.adam_eps))


def begin(agent: PPO, vector: Vector, key: PRNGKeyArray) -> PPOState:
    """State before the first update."""
    k_params, k_env, key = jax.random.split(key, 3)
    params = agent.init(k_params)
    opt_state = optimiser(agent.config).init(params)
    env_state, step = vector.reset(k_env)
    zeros = jnp.zeros(agent.config.envs)
    return PPOState(params, opt_state, env_state, step, zeros, zeros * jnp.nan, key)


def rollout(agent: PPO, vector: Vector, state: PPOState) -> tuple[PPOState, Transition]:
    """Play `config.rollout` frames of every environment with the current policy; return the state
    and transitions [T, N].
    """
    net = agent.bind(state.params)

    def frame(carry: Any, key: PRNGKeyArray) -> tuple[Any, Transition]:
        env_state, step, running, finished = carry
        k_act, k_env = jax.random.split(key)
        logits, value = net(step.obs)
        action = jax.random.categorical(k_act, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], -1)[:, 0]
        env_state, then = vector.step(env_state, action, k_env)
        running = jnp.where(then.is_first, 0.0, running) + then.reward
        finished = jnp.where(then.is_last, running, finished)
        arrived = (then.reward, then.is_last, then.is_terminal)
        row = Transition(step.obs, action, log_prob, value, ~step.is_last, *arrived)
        return (env_state, then, running, finished), row

    key, k_frames = jax.random.split(state.key)
    carry = (state.env_state, state.step, state.running, state.finished)
    carry, rows = jax.lax.scan(frame, carry, jax.random.split(k_frames, agent.config.rollout))
    return PPOState(state.params, state.opt_state, *carry, key), rows


def update(agent: PPO, vector: Vector, state: PPOState) -> PPOState:
    """Play one rollout, then learn from it in `epochs` passes of shuffled minibatches."""
    config = agent.config
    state, rows = rollout(agent, vector, state)
    last = agent.bind(state.params)(state.step.obs)[1]
    value = jnp.concatenate([rows.value, last[None]])
    terminal = rows.is_terminal if config.bootstrap_truncated else rows.is_last
    adv = gae(rows.reward, rows.is_last, terminal, value, config.discount, config.lam)
    data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rows, adv, adv + rows.value))

    def loss(params: Params, batch: tuple[Transition, Array, Array]) -> Array:
        rows, adv, ret = batch
        terms = ppo_loss(*agent.bind(params)(rows.obs), rows, adv, ret, config)
        actor = terms['policy'] + config.value_scale * terms['value']
        return actor + config.entropy_scale * terms['entropy']

    def minibatch(carry: tuple[Params, PyTree], rows: Array) -> tuple[tuple[Any, PyTree], None]:
        params, opt_state = carry
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], data))
        updates, opt_state = optimiser(config).update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    key, k_shuffle = jax.random.split(state.key)
    keys = jax.random.split(k_shuffle, config.epochs)
    order = jax.vmap(functools.partial(jax.random.permutation, x=config.frames))(keys)
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
    finished episodes). The returns of the curve are the online estimate: those of the sampled
    policy in the latest finished episode of every environment, NaN before the first one ends.
    """
    agent, vector = PPO(env.spec, config), Vector(env, config.envs)
    part = config.updates // config.snapshots

    def chunk(state: PPOState) -> tuple[PPOState, Params, Array]:
        state, _ = jax.lax.scan(lambda s, _: (update(agent, vector, s), None), state, length=part)
        return state, state.params, jnp.nanmean(state.finished)

    start = jax.jit(functools.partial(begin, agent, vector))
    # Batched, the QR of orthogonal weights can leave XLA's threads waiting for each other.
    if key.ndim:
        state = jax.tree.map(lambda *x: jnp.stack(x), *map(start, key))
    else:
        state = start(key)
    run = jax.jit(jax.vmap(chunk) if key.ndim else chunk)
    snapshots: list[Params] = []
    returns: list[np.ndarray] = []
    frames: list[int] = []
    for i in range(config.snapshots):
        state, params, ret = run(state)
        snapshots.append(jax.device_get(params))
        returns.append(np.asarray(ret))
        frames.append((i + 1) * part * config.frames)
        if progress is not None:
            progress(frames[-1], float(np.mean(returns[-1])))

    def stack(*parts: Any) -> np.ndarray:
        return np.stack(parts, axis=key.ndim)

    curve = {'env_frames': np.array(frames), 'return': stack(*returns)}
    return PPOResult(snapshots[-1], jax.tree.map(stack, *snapshots), curve)
