"""Frames per second of play at the paper's shape and at smaller ones, with random weights."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reverie.agents.dreamer4 import Dreamer4, Dreamer4Config
from reverie.agents.dreamer4.presets import dreamer4_paper
from reverie.evaluation.results import provenance
from reverie.nn.attention import Kernel, chosen
from reverie.nn.core import count
from reverie.nn.transformer import TransformerConfig
from reverie.serve.session import Session
from reverie.types import ActionSpace, EnvSpec, Params, Step, UserError

ACTIONS = 144  # Minecraft as the paper has it: 23 keys and 121 ways to move the mouse


class Model(NamedTuple):
    """Configuration of an agent, and the pixels it sees."""

    config: Dreamer4Config
    resolution: tuple[int, int] = (384, 640)


def _smaller(
    dynamics: TransformerConfig,
    tokenizer: TransformerConfig,
    latents: int = 512,
    registers: int = 30,
) -> Dreamer4Config:
    """`dreamer4_paper` with other transformers, tokens of a frame and registers."""
    paper, change = dreamer4_paper(), dataclasses.replace
    return change(
        paper,
        tokenizer=change(paper.tokenizer, latents=latents, transformer=tokenizer),
        dynamics=change(paper.dynamics, registers=registers, transformer=dynamics),
    )


# The smaller shapes are not from the paper.
MODELS = {
    'dreamer4_paper': Model(dreamer4_paper()),
    'dreamer4_600m': Model(
        _smaller(
            TransformerConfig(1280, 20, 20, 2, context=192),
            TransformerConfig(768, 8, 12, 12, context=192),
        )
    ),
    'dreamer4_200m': Model(
        _smaller(
            TransformerConfig(768, 16, 12, 2, context=96),
            TransformerConfig(512, 8, 8, 8, context=96),
            latents=256,
        ),
        (256, 256),
    ),
    'dreamer4_tiny': Model(
        _smaller(
            TransformerConfig(64, 4, 4, 2, context=16, head_dim=16, dtype='float32'),
            TransformerConfig(32, 4, 2, 2, context=16, head_dim=16, dtype='float32'),
            latents=16,
            registers=2,
        ),
        (64, 64),
    ),
}


def agent_of(
    name: str, steps: int = 4, softcap: float | None = None, kernel: Kernel = 'xla'
) -> Dreamer4:
    """The agent of a model, without weights. Raises UserError for an unknown one.

    softcap: of the attention's logits, the default's if None. kernel: of attention.
    """
    if name not in MODELS:
        raise UserError(f'--model {name}: expected one of {", ".join(MODELS)}')
    config, resolution = MODELS[name]
    change = dataclasses.replace
    options: dict[str, Any] = {'kernel': kernel} | ({} if softcap is None else {'softcap': softcap})
    spec = EnvSpec(name, (*resolution, 3), ActionSpace('discrete', ACTIONS))
    seen, dreamt = config.tokenizer, config.dynamics
    tokenizer = change(seen, transformer=change(seen.transformer, **options))
    transformer = change(dreamt.transformer, **options)
    dynamics = change(dreamt, sampling_steps=steps, transformer=transformer)
    return Dreamer4(change(config, tokenizer=tokenizer, dynamics=dynamics), spec)


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
    """Speed record of a model: a person's frames for each of `players`, played and fetched as by a
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
    params = session.params
    dynamics, tokenizer = agent.cfg.dynamics, agent.cfg.tokenizer
    memory = jax.devices()[0].memory_stats() or {}
    counts = {group: count(params[group]) for group in ('dynamics', 'encoder', 'decoder')}
    return {
        'name': f'{name}, {players} players' if players > 1 else name,
        'command': command,
        **provenance(),
        'params': {'all': count(params)} | counts,
        'shape': {
            'resolution': list(MODELS[name].resolution),
            'tokens': 2 + tokenizer.latents // dynamics.pack + dynamics.registers,
            'context': dynamics.transformer.context,
            'K': steps,
            'batch': players,
            'dtype': dynamics.transformer.dtype,
            'softcap': dynamics.transformer.softcap,
            'kernel': chosen(kernel, dynamics.transformer.dtype),
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
