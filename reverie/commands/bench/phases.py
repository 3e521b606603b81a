"""Speed of an agent's phases, and of imagination with the cache against recomputing the context."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from reverie.agents import registry
from reverie.agents.dreamer4 import Dreamer4, Dreamer4Config
from reverie.data.source import Dataset
from reverie.envs import device
from reverie.evaluation.results import provenance
from reverie.models.shortcut import ShortcutModel
from reverie.nn.core import count
from reverie.nn.encoders import kind
from reverie.training.state import create, own_buffers
from reverie.training.update import make_program
from reverie.types import Agent, Batch, EnvSpec, Params, Step


class RandomBatches(Dataset):
    """Source of random frames made on the device: the agent is measured, not the data."""

    def __init__(self, spec: EnvSpec):
        self.spec = spec
        self.data: dict[str, Array] = {}

    def draw(
        self,
        data: Any,
        loaded: Any,
        key: PRNGKeyArray,
        batch: int,
        length: int,
        relevant: float = 0.0,
    ) -> Batch:
        lead, size = (batch, length), self.spec.actions.size
        action = jax.nn.one_hot(jax.random.randint(key, lead, 0, size), size)
        no = jnp.zeros(lead, bool)
        step = Step(self.observations(key, lead), action, jnp.zeros(lead), no, no, no)
        yes = jnp.ones(batch, bool)
        return Batch(step, yes, yes, jnp.arange(batch) < round(relevant * batch))

    def observations(self, key: PRNGKeyArray, lead: tuple[int, int]) -> Array:
        """Images as bytes, grids as bits, vectors as numbers."""
        assert isinstance(self.spec.obs_shape, tuple), (
            'a dictionary of observations has no noise here'
        )
        shape = (*lead, *self.spec.obs_shape)
        if kind(self.spec.obs_shape) == 'image':
            return jax.random.bits(key, shape, jnp.uint8)
        if kind(self.spec.obs_shape) == 'grid':
            return jax.random.bernoulli(key, 0.1, shape)
        return jax.random.normal(key, shape)

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        return None


def milliseconds(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """p50, p95 and min of `repeats` calls and their results, after one that is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - begin))
    return dict(p50=float(np.median(times)), p95=float(np.percentile(times, 95)), min=min(times))


def phases(agent: Agent, source: RandomBatches, updates: int, repeats: int) -> dict[str, Any]:
    """Frames per second of every phase, and how often it was compiled."""
    found: dict[str, Any] = {}
    params = agent.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 1)
    for phase in agent.phases:
        program = make_program(phase, source)
        begun = phase.begin(params) if phase.begin else params
        state = own_buffers(jax.tree.map(lambda x: x[None], create(begun, phase)))
        begin = time.perf_counter()
        state, *_ = program.call(state, source.data, None, keys, phase.fixed(), updates=updates)
        jax.block_until_ready(state)
        first = time.perf_counter() - begin
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            state, *_ = program.call(state, source.data, None, keys, phase.fixed(), updates=updates)
            jax.block_until_ready(state)
            times.append((time.perf_counter() - begin) / updates)
        fps = phase.batch * phase.length / float(np.median(times))
        ms = {k: 1e3 * float(f(times)) for k, f in (('p50', np.median), ('min', np.min))}
        found[phase.name] = dict(
            frames_per_s=fps,
            ms_per_update=ms,
            first_call_s=first,
            compilations=len(program.compile_log),
            batch=phase.batch,
            length=phase.length,
        )
    return found


def recomputed(model: ShortcutModel, z: Array, action: Array, key: PRNGKeyArray) -> Array:
    """The next frame's latents [N, Z, c] with no cache: every denoising pass runs the whole window.

    z [N, C, Z, c] are the context's latents, action [N, C + 1, A] those that led to each frame and
    to the new one.
    """
    dynamics, cfg = model.dynamics, model.dynamics.cfg
    n, c = z.shape[:2]
    steps, first = cfg.sampling_steps, jnp.zeros((n, c + 1), bool)
    labelled = jnp.ones((n, c + 1), bool)
    key_noise, key_new = jax.random.split(key)
    noisy = dynamics.noised(z, key_noise)
    signal_level = jnp.full((n, c), cfg.context_level)
    step_exponent = jnp.concatenate(
        [jnp.full((n, c), cfg.finest), jnp.full((n, 1), steps.bit_length() - 1)], 1
    )

    def step(new: Array, i: Array) -> tuple[Array, None]:
        levels = jnp.concatenate([signal_level, jnp.full((n, 1), i * (cfg.k_max // steps))], 1)
        x, _, _ = dynamics(
            jnp.concatenate([noisy, new[:, None]], 1),
            levels,
            step_exponent,
            action,
            labelled,
            first,
            agent=False,
        )
        return new + (x[:, -1] - new) / (steps - i), None

    noise = jax.random.normal(key_new, z[:, 0].shape)
    new: Array = jax.lax.scan(step, noise, jnp.arange(steps))[0]
    return new


def imagination(
    agent: Dreamer4, params: Params, rows: int, frames: int, repeats: int
) -> dict[str, Any]:
    """Milliseconds per imagined frame with the cache and without, at the preset's context C."""
    context = agent.cfg.dynamics.transformer.context
    shape = agent.model(params, images=False).dynamics
    z = jax.random.normal(jax.random.key(0), (rows, context, shape.tokens, shape.channels))
    action = jax.nn.one_hot(jnp.zeros((rows, context + 1), int), agent.spec.actions.size)
    no = jnp.zeros((rows, context), bool)
    step = Step(None, action[:, :-1], jnp.zeros((rows, context)), no, no, no)
    keys = jax.random.split(jax.random.key(1), frames)

    @jax.jit
    def cached(params: Params, z: Array) -> Array:
        model = agent.model(params, images=False)
        state, _ = model.prefill(z, step, jnp.ones(rows, bool), keys[0])
        return jax.lax.scan(
            lambda s, k: (model.imagine(s, action[:, -1], k)[0], None), state, keys
        )[0].z

    @jax.jit
    def window(params: Params, z: Array) -> Array:
        model = agent.model(params, images=False)

        def one(z: Array, key: PRNGKeyArray) -> tuple[Array, None]:
            new = recomputed(model, z, action, key)
            return jnp.concatenate([z[:, 1:], new[:, None]], 1), None

        return jax.lax.scan(one, z, keys)[0]

    ours = milliseconds(lambda: cached(params, z), repeats)
    theirs = milliseconds(lambda: window(params, z), repeats)

    def per_frame(ms: dict[str, float]) -> dict[str, float]:
        return {k: v / frames for k, v in ms.items()}

    return dict(
        name='imagination',
        ms=per_frame(ours),
        fps=rows * frames / ours['p50'] * 1e3,
        baseline=dict(
            name='recomputing the context',
            ms=per_frame(theirs),
            fps=rows * frames / theirs['p50'] * 1e3,
        ),
        ratio=theirs['p50'] / ours['p50'],
        shape=dict(context=context, rows=rows, frames=frames, prefill='included'),
    )


def measure(preset: str, command: str, *, context: int = 64) -> dict[str, Any]:
    """Speed record of a preset on MinAtar Breakout's shapes; imagination at `context` frames if it
    has a cache.
    """
    spec = device.make('minatar/breakout').spec
    config = registry.get(preset)
    agent = registry.make(config, spec)
    params = agent.init(jax.random.key(0))
    cpu = jax.default_backend() == 'cpu'
    updates, repeats = (4, 3) if cpu else (50, 5)
    record = {
        'name': 'phases', 'preset': preset, 'command': command, **provenance(),
        'params': {name: count(group) for name, group in params.items()},
        'phases': phases(agent, RandomBatches(spec), updates, repeats),
    }  # fmt: skip
    if isinstance(config, Dreamer4Config):
        longer = dataclasses.replace(config.dynamics.transformer, context=context)
        wide = dataclasses.replace(
            config, dynamics=dataclasses.replace(config.dynamics, transformer=longer)
        )
        record['imagination'] = imagination(
            registry.make(wide, spec), params, 8 if cpu else 256, 8, repeats
        )
    return record
