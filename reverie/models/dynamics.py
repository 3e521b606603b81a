"""Denoiser of the interactive dynamics: a transformer over actions, noise levels and latents;
Dreamer 4 section 3.2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie.nn.attention import rope
from reverie.nn.core import Linear, embedding
from reverie.nn.transformer import BlockCausal, Cache, KeysValues, TransformerConfig
from reverie.types import UserError


@dataclasses.dataclass(frozen=True)
class DynamicsConfig:
    """Shape of the denoiser, and its sampling. `k_max`, `registers` and fields marked * are not from
    the paper.
    """

    pack: int = 2
    """Latents that share one token (paper: 2)."""
    registers: int = 32
    """Register tokens of a frame."""
    k_max: int = 64
    """Signal levels of the finest grid: d_min = 1 / k_max; a power of two."""
    sampling_steps: int = 4
    """Denoising steps K of a frame (paper: 4); a power of two."""
    action_init: float = 0.5
    """*Deviation of the action embedding's first weights, that of the slots beside it; 0 for one that
    falls with the number of actions A, A^-1/2, as in version 0.2."""
    context_noise: float = 0.1
    """Share of noise in past frames while sampling (paper: 0.1)."""
    transformer: TransformerConfig = TransformerConfig()
    """Shape of the transformer."""

    def __post_init__(self) -> None:
        for name in ('k_max', 'sampling_steps'):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise UserError(f'{name}={value}: expected a power of two')
        if self.sampling_steps > self.k_max:
            raise UserError(
                f'sampling_steps={self.sampling_steps}: expected at most k_max={self.k_max}'
            )

    @property
    def finest(self) -> int:
        """Exponent e = log2(k_max) of the finest step size d = 2^-e."""
        return self.k_max.bit_length() - 1

    @property
    def context_level(self) -> int:
        """Grid number of the context's signal level tau = 1 - context_noise, rounded; noise is
        added at this level, too.
        """
        return min(round((1 - self.context_noise) * self.k_max), self.k_max - 1)


class Dynamics(nnx.Module):
    """Denoiser f(z~, tau, d, a) over the tokens of a frame: action, (tau, d), latents, registers
    and, when asked for, the agent token.

    World tokens attend to each other, save the action's, which attends to itself alone: its keys
    and values are the same in all denoising steps. Nothing attends to the agent token but itself.
    """

    def __init__(
        self,
        cfg: DynamicsConfig,
        latents: int,
        bottleneck: int,
        actions: int,
        rngs: nnx.Rngs,
        tasks: int = 1,
    ):
        if latents % cfg.pack:
            raise UserError(f'pack={cfg.pack} does not divide the {latents} latents of a frame')
        width, dtype = cfg.transformer.width, jnp.dtype(cfg.transformer.dtype)
        self.tokens, self.channels = latents // cfg.pack, bottleneck * cfg.pack
        self.world_tokens = 2 + self.tokens + cfg.registers
        self.embed = Linear(self.channels, width, dtype=dtype, rngs=rngs)
        self.action = Linear(actions, width, bias=False, dtype=dtype, rngs=rngs)
        if cfg.action_init:
            kernel = self.action.kernel
            kernel[...] *= cfg.action_init / jnp.maximum(kernel[...].std(), 1e-8)
        self.task = embedding(rngs, tasks, width) if tasks > 1 else None
        self.level = embedding(rngs, cfg.k_max, width - width // 2)
        self.stride = embedding(rngs, cfg.finest + 1, width // 2)
        self.slots = embedding(rngs, self.world_tokens + 1, width)
        slot = np.arange(self.world_tokens + 1)
        angles = rope(slot, cfg.transformer.head_dim, cfg.transformer.rope_base)
        self.blocks = BlockCausal(cfg.transformer, angles, rngs=rngs)
        self.readout = Linear(width, self.channels, rngs=rngs)
        self.cfg = cfg

    def empty(self, batch: int) -> Cache:
        return self.blocks.empty(batch, self.world_tokens + 1)

    def __call__(
        self,
        z: Float[Array, 'B T Z c'],
        signal_level: Int[Array, 'B T'],
        step_exponent: Int[Array, 'B T'],
        action: Float[Array, 'B T A'],
        has_action: Bool[Array, 'B T'],
        is_first: Bool[Array, 'B T'],
        cache: Cache | None = None,
        *,
        agent: bool = True,
        task: Int[Array, ' B'] | None = None,
        attention_maps: list[Array] | None = None,
    ) -> tuple[Float[Array, 'B T Z c'], Float[Array, 'B T D'] | None, KeysValues]:
        """Return the x-prediction, feat of the agent token (None without `agent`), and keys and
        values of the new frames.

        signal_level: tau in units of 1/k_max. step_exponent: e of d = 2^-e. action: the one that
        led to the frame, zeros if none; a row without labels has only the learned embedding of the
        action's slot. task: number of the row's task, the agent token's, where there are several.
        attention_maps: see `BlockCausal`.
        """
        b, t = signal_level.shape
        x = self.embed(z)
        act = jnp.where(has_action[..., None], self.action(action), 0.0)
        level, stride = self.level[...][signal_level], self.stride[...][step_exponent]
        noise = jnp.concatenate([level, stride], -1)
        spare = jnp.zeros((b, t, self.cfg.registers + agent, x.shape[-1]), x.dtype)
        first = [act[:, :, None].astype(x.dtype), noise[:, :, None].astype(x.dtype)]
        x = jnp.concatenate([*first, x, spare], 2)
        x = x + self.slots[...][: self.world_tokens + agent].astype(x.dtype)
        if self.task is not None and agent:
            assert task is not None, 'an agent of several tasks is told which'
            told = self.task[...][task].astype(x.dtype)
            x = x.at[:, :, -1].add(told[:, None])
        slot = np.arange(self.world_tokens + agent)
        mask = (slot[None] < self.world_tokens) | (slot[:, None] == self.world_tokens)
        mask &= (slot[:, None] != 0) | (slot[None] == 0)
        x, written = self.blocks(x, is_first, jnp.asarray(mask), cache, attention_maps)
        predicted = self.readout(x[:, :, 2 : 2 + self.tokens].astype(jnp.float32))
        return predicted, x[:, :, -1] if agent else None, written

    def noised(self, z: Float[Array, '*B'], key: PRNGKeyArray) -> Float[Array, '*B']:
        """Corrupt context frames: signal tau = context_level / k_max, the rest noise."""
        if self.cfg.context_noise == 0:
            return z
        tau = self.cfg.context_level / self.cfg.k_max
        return tau * z + (1 - tau) * jax.random.normal(key, z.shape)

    def packed(self, z: Float[Array, 'B T N b']) -> Float[Array, 'B T Z c']:
        return z.reshape(*z.shape[:2], self.tokens, self.channels)
