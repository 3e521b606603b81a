"""Frames per second of interactive play at the paper's shape and at smaller ones, with random weights."""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.agents.dreamer4 import Dreamer4, Dreamer4Config
from reverie.evaluation.returns import provenance
from reverie.models.shortcut import Ahead, DynamicsConfig
from reverie.models.tokenizer import TokenizerConfig
from reverie.nn.attention import TransformerConfig
from reverie.nn.core import count
from reverie.types import ActionSpace, EnvSpec, Params, UserError

ACTIONS = 144  # Minecraft as the paper has it: 23 keys and 121 ways to move the mouse
GROUPS = ('decoder', 'dynamics', 'policy', 'reward', 'cont', 'value')  # what a dream needs


class Shape(NamedTuple):
    """resolution, patch: pixels. latents x bottleneck numbers a frame, `pack` of them a token."""

    dynamics: TransformerConfig
    tokenizer: TransformerConfig
    resolution: tuple[int, int] = (384, 640)
    patch: tuple[int, int] = (16, 16)
    latents: int = 512
    bottleneck: int = 16
    registers: int = 30


def _transformer(width: int, layers: int, heads: int, kv_heads: int, **more: Any) -> TransformerConfig:
    return TransformerConfig(width, layers, heads, kv_heads, **{'context': 192, **more})


# The paper gives 1.6B + 0.4B, 256 spatial tokens, a context of 192 frames and K = 4, but no widths or depths; those,
# the registers (so that a frame has 288 tokens) and the smaller shapes are not from the paper.
MODELS = {
    'dreamer4-2b': Shape(_transformer(1920, 30, 30, 3), _transformer(1024, 12, 16, 16)),
    'dreamer4-600m': Shape(_transformer(1280, 20, 20, 2), _transformer(768, 8, 12, 12)),
    'dreamer4-200m': Shape(
        _transformer(768, 16, 12, 2, context=96), _transformer(512, 8, 8, 8, context=96), (256, 256), latents=256,
    ),
    'dreamer4-tiny': Shape(
        _transformer(64, 4, 4, 2, context=16, head_dim=16, dtype='float32'),
        _transformer(32, 4, 2, 2, context=16, head_dim=16, dtype='float32'), (64, 64), latents=16, registers=2,
    ),
}  # fmt: skip


def agent_of(name: str, steps: int = 4, softcap: float | None = None) -> Dreamer4:
    """The agent of a shape, without weights. Raises UserError for an unknown one.

    softcap: of the attention's logits, the default's if None.
    """
    if name not in MODELS:
        raise UserError(f'--model {name}: expected one of {", ".join(MODELS)}')
    shape = MODELS[name]
    cap = (lambda t: t) if softcap is None else (lambda t: dataclasses.replace(t, softcap=softcap))
    spec = EnvSpec(name, (*shape.resolution, 3), ActionSpace('discrete', ACTIONS))
    config = Dreamer4Config(
        tokenizer=TokenizerConfig(shape.patch, shape.latents, shape.bottleneck, transformer=cap(shape.tokenizer)),
        dynamics=DynamicsConfig(2, shape.registers, sampling_steps=steps, transformer=cap(shape.dynamics)),
    )
    return Dreamer4(config, spec)


def random_weights(agent: Dreamer4) -> Params:
    """Small random numbers, made on the device one array at a time, in the types that inference uses."""
    outline = jax.eval_shape(agent.init, jax.random.key(0))
    outline = jax.eval_shape(agent.for_inference, {name: outline[name] for name in GROUPS})
    draw = jax.jit(lambda key, like: 0.02 * jax.random.normal(key, like, jnp.float32), static_argnums=1)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(outline))))
    return jax.tree.map(lambda x: draw(next(keys), x.shape).astype(x.dtype), outline)


class Shown(NamedTuple):
    """What a frame brings: the new image, and the heads' outputs for the frame before it."""

    image: Array  # [N, h, w, 3] uint8
    reward: Float[Array, ' N']
    cont: Float[Array, ' N']
    value: Float[Array, ' N']
    probs: Float[Array, 'N A']


def frame(
    agent: Dreamer4, params: Params, ahead: Ahead, action: Float[Array, 'N A'], key: PRNGKeyArray
) -> tuple[Ahead, Shown]:
    """One frame under a person's action, commit fused with the first denoising step; traced."""
    ahead, pred = _model(agent, params).imagine_ahead(ahead, action, key)
    assert ahead.state.image is not None
    image = jnp.round(255 * jnp.clip(ahead.state.image, 0, 1)).astype(jnp.uint8)
    _, probs = agent.choose(params, None, pred.feat, key)
    return ahead, Shown(image, pred.reward, pred.cont, agent.expected_return(params, pred.feat), probs)


def _model(agent: Dreamer4, params: Params) -> Any:
    """The world model with a decoder and no encoder: nothing real arrives."""
    model = agent.model(params, images=False)
    model.decoder = agent.bind['decoder'](params['decoder'])
    return model


def begin(agent: Dreamer4, params: Params, players: int) -> Ahead:
    """A dream as if the context were full; every leaf has its own buffer."""
    model, size = _model(agent, params), agent.cfg.dynamics.transformer.context
    full = lambda cache: cache._replace(pos=cache.pos + size)
    state = model.initial(players)
    state = state._replace(dynamics=full(state.dynamics), decoder=full(state.decoder))
    return Ahead(state, jnp.zeros((players, ACTIONS)), jax.random.key(1))


def measure(
    name: str, command: str, *, players: int = 1, frames: int = 200, steps: int = 4, softcap: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The speed record of a shape: frames one after another for each of `players`, images fetched to the host.

    A frame is ordered before the one before it has been fetched; what is timed is the time between two images.
    """
    if players < 1 or frames < 2:
        raise UserError(f'--players {players} --frames {frames}: expected at least 1 and 2')
    agent = agent_of(name, steps, softcap)
    params = random_weights(agent)
    ahead = jax.jit(functools.partial(begin, agent, players=players))(params)
    action = jnp.zeros((players, ACTIONS)).at[:, 0].set(1.0)
    started = time.perf_counter()
    call = jax.jit(functools.partial(frame, agent), donate_argnums=1)
    compiled = call.lower(params, ahead, action, jax.random.key(0)).compile()
    compile_s = time.perf_counter() - started
    keys = list(jax.random.split(jax.random.key(2), frames + 3))
    arrivals, waiting = [], None
    for key in keys:
        ahead, shown = compiled(params, ahead, action, key)
        if waiting is not None:
            np.asarray(waiting.image)
            arrivals.append(time.perf_counter())
        waiting = shown
    jax.block_until_ready(waiting)
    ms = 1e3 * np.diff(arrivals)[-frames:]
    shape, memory = MODELS[name], jax.devices()[0].memory_stats() or {}
    return {
        'name': f'{name}, {players} players' if players > 1 else name, 'command': command, **provenance(),
        'params': {'dynamics': count(params['dynamics']), 'decoder': count(params['decoder']), 'all': count(params)},
        'shape': {
            'resolution': list(shape.resolution), 'tokens': 2 + shape.latents // 2 + shape.registers,
            'context': shape.dynamics.context, 'K': steps, 'batch': players, 'dtype': shape.dynamics.dtype,
            'softcap': agent.cfg.dynamics.transformer.softcap,
        },
        'ms': {'p50': float(np.median(ms)), 'p95': float(np.percentile(ms, 95)), 'min': float(ms.min())},
        'fps': players * 1e3 / float(ms.mean()), 'fps_each': 1e3 / float(ms.mean()), 'includes_decode': True,
        'peak_bytes': memory.get('peak_bytes_in_use'), 'compile_seconds': compile_s,
    }  # fmt: skip
