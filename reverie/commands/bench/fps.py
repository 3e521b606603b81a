"""Frames per second of play at the paper's shape and at smaller ones, with random weights."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reverie.agents.dreamer4 import Dreamer4, Dreamer4Config
from reverie.evaluation.results import provenance
from reverie.models.dynamics import DynamicsConfig
from reverie.models.tokenizer import TokenizerConfig
from reverie.nn.attention import Kernel, chosen
from reverie.nn.core import count
from reverie.nn.transformer import TransformerConfig
from reverie.serve.session import Session
from reverie.types import ActionSpace, EnvSpec, Params, Step, UserError

ACTIONS = 144  # Minecraft as the paper has it: 23 keys and 121 ways to move the mouse


class Shape(NamedTuple):
    """Shape of an agent."""

    dynamics: TransformerConfig
    tokenizer: TransformerConfig
    resolution: tuple[int, int] = (384, 640)  # pixels
    patch: tuple[int, int] = (16, 16)
    latents: int = 512  # tokens of a frame, two of them one token of the dynamics
    bottleneck: int = 16  # numbers of a latent token
    registers: int = 30


def _transformer(
    width: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> TransformerConfig:
    return TransformerConfig(width, layers, heads, kv_heads, **{'context': 192, **more})


# The paper gives 1.6B + 0.4B, 256 spatial tokens, a context of 192 frames and K = 4, but no widths
# or depths; those, the registers (so that a frame has 288 tokens) and the smaller shapes are not
# from the paper.
MODELS = {
    'dreamer4-2b': Shape(_transformer(1920, 30, 30, 3), _transformer(1024, 12, 16, 16)),
    'dreamer4-600m': Shape(_transformer(1280, 20, 20, 2), _transformer(768, 8, 12, 12)),
    'dreamer4-200m': Shape(
        _transformer(768, 16, 12, 2, context=96),
        _transformer(512, 8, 8, 8, context=96),
        (256, 256),
        latents=256,
    ),
    'dreamer4-tiny': Shape(
        _transformer(64, 4, 4, 2, context=16, head_dim=16, dtype='float32'),
        _transformer(32, 4, 2, 2, context=16, head_dim=16, dtype='float32'),
        (64, 64),
        latents=16,
        registers=2,
    ),
}


def agent_of(
    name: str, steps: int = 4, softcap: float | None = None, kernel: Kernel = 'xla'
) -> Dreamer4:
    """The agent of a shape, without weights. Raises UserError for an unknown one.

    softcap: of the attention's logits, the default's if None. kernel: of attention.
    """
    if name not in MODELS:
        raise UserError(f'--model {name}: expected one of {", ".join(MODELS)}')
    shape = MODELS[name]
    changes: dict[str, Any] = {'kernel': kernel} | ({} if softcap is None else {'softcap': softcap})

    def changed(t: TransformerConfig) -> TransformerConfig:
        return dataclasses.replace(t, **changes)

    spec = EnvSpec(name, (*shape.resolution, 3), ActionSpace('discrete', ACTIONS))
    config = Dreamer4Config(
        tokenizer=TokenizerConfig(
            shape.patch, shape.latents, shape.bottleneck, transformer=changed(shape.tokenizer)
        ),
        dynamics=DynamicsConfig(
            2, shape.registers, sampling_steps=steps, transformer=changed(shape.dynamics)
        ),
    )
    return Dreamer4(config, spec)


def random_weights(agent: Dreamer4) -> Params:
    """Small random weights in inference's types, made on the device one array at a time."""
    outline = jax.eval_shape(lambda key: agent.for_inference(agent.init(key)), jax.random.key(0))
    draw = jax.jit(
        lambda key, like: 0.02 * jax.random.normal(key, like, jnp.float32), static_argnums=1
    )
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(outline))))
    params: Params = jax.tree.map(lambda x: draw(next(keys), x.shape).astype(x.dtype), outline)
    return params


def blank(agent: Dreamer4) -> Step:
    """A recording [1, 1] of one black frame to begin from.

    A frame's cost does not depend on how full the context is.
    """
    assert isinstance(agent.spec.obs_shape, tuple)
    obs = jnp.zeros((1, 1, *agent.spec.obs_shape))
    action = jnp.zeros((1, 1, agent.spec.actions.size))
    yes, no = jnp.ones((1, 1), bool), jnp.zeros((1, 1), bool)
    return Step(obs, action, jnp.zeros((1, 1)), yes, no, no)


def measure(
    name: str,
    command: str,
    *,
    players: int = 1,
    frames: int = 200,
    steps: int = 4,
    softcap: float | None = None,
    kernel: Kernel = 'xla',
) -> dict[str, Any]:
    """Speed record of a shape: a person's frames for each of `players`, played and fetched as by a
    server.

    A frame is ordered before the one before it has been fetched; the time between two frames is
    measured.
    """
    if players < 1 or frames < 2:
        raise UserError(f'--players {players} --frames {frames}: expected at least 1 and 2')
    agent = agent_of(name, steps, softcap, kernel)
    recording = lambda number: blank(agent)
    session = Session(agent, random_weights(agent), contexts=recording, slots=players)
    for slot in range(players):
        session.start(slot, 0, 'data')
    started = time.perf_counter()
    session.compile()
    compile_s = time.perf_counter() - started
    ms = intervals(session, frames)
    params, shape = session.params, MODELS[name]
    memory = jax.devices()[0].memory_stats() or {}
    counts = {group: count(params[group]) for group in ('dynamics', 'encoder', 'decoder')}
    return {
        'name': f'{name}, {players} players' if players > 1 else name,
        'command': command,
        **provenance(),
        'params': {'all': count(params)} | counts,
        'shape': {
            'resolution': list(shape.resolution),
            'tokens': 2 + shape.latents // 2 + shape.registers,
            'context': shape.dynamics.context,
            'K': steps,
            'batch': players,
            'dtype': shape.dynamics.dtype,
            'softcap': agent.cfg.dynamics.transformer.softcap,
            'kernel': chosen(kernel, shape.dynamics.dtype),
        },
        'ms': {
            'p50': float(np.median(ms)),
            'p95': float(np.percentile(ms, 95)),
            'min': float(ms.min()),
        },
        'fps': players * 1e3 / float(ms.mean()),
        'fps_each': 1e3 / float(ms.mean()),
        'includes_decode': True,
        'peak_bytes': memory.get('peak_bytes_in_use'),
        'compile_seconds': compile_s,
    }


def intervals(session: Session, frames: int) -> np.ndarray:
    """Milliseconds between two frames [frames] of a dream in which all players take one action."""
    n = session.slots
    action = np.tile(np.eye(session.agent.spec.actions.size, dtype=np.float32)[0], (n, 1))
    yes = np.ones(n, bool)
    arrivals: list[float] = []
    waiting = session.frame(action, ~yes, yes)
    for _ in range(frames + 2):
        following = session.frame(action, ~yes, yes)
        jax.device_get(waiting)
        arrivals.append(time.perf_counter())
        waiting = following
    jax.block_until_ready(waiting)
    return 1e3 * np.diff(arrivals)[-frames:]
