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
from reverie.nn.core import Linear
from reverie.nn.transformer import BlockCausal, Cache, TransformerConfig
from reverie.types import UserError


@dataclasses.dataclass(frozen=True)
class DynamicsConfig:
    """pack: latents that share one token (paper: 2). k_max: finest grid of signal levels, 1/k_max =
    d_min.

    sampling_steps: K, denoising steps of a frame (paper: 4). context_noise: how far the past is
    corrupted (paper: 0.1). k_max and registers are not from the paper.
    """

    pack: int = 2
    registers: int = 32
    k_max: int = 64
    sampling_steps: int = 4
    context_noise: float = 0.1
    transformer: TransformerConfig = TransformerConfig()

    def __post_init__(self):
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
        """log2(k_max): the exponent e of the finest step size d = 2^-e."""
        return self.k_max.bit_length() - 1

    @property
    def context_level(self) -> int:
        """Grid number of the context's signal level tau = 1 - context_noise; the noise given is the
        one told.
        """
        return min(round((1 - self.context_noise) * self.k_max), self.k_max - 1)


class Dynamics(nnx.Module):
    """f(z~, tau, d, a): tokens of a frame are action, (tau, d), latents, registers and, when asked
    for, the agent's.

    World tokens see each other except that the action's sees itself alone, so that its keys and
    values are the same in all denoising steps; nothing sees the agent's token.
    """

    def __init__(
        self, cfg: DynamicsConfig, latents: int, bottleneck: int, actions: int, rngs: nnx.Rngs
    ):
        if latents % cfg.pack:
            raise UserError(f'pack={cfg.pack} does not divide the {latents} latents of a frame')
        width, dtype = cfg.transformer.width, jnp.dtype(cfg.transformer.dtype)
        self.tokens, self.channels = latents // cfg.pack, bottleneck * cfg.pack
        self.world_tokens = 2 + self.tokens + cfg.registers
        self.embed = Linear(self.channels, width, dtype=dtype, rngs=rngs)
        self.action = Linear(actions, width, bias=False, dtype=dtype, rngs=rngs)
        embedding = lambda *shape: nnx.Param(0.5 * jax.random.normal(rngs.params(), shape))
        self.level = embedding(cfg.k_max, width - width // 2)
        self.stride = embedding(cfg.finest + 1, width // 2)
        self.slots = embedding(self.world_tokens + 1, width)
        angles = rope(
            np.arange(self.world_tokens + 1), cfg.transformer.head_dim, cfg.transformer.rope_base
        )
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
        attention_maps: list[Array] | None = None,
    ) -> tuple[Float[Array, 'B T Z c'], Float[Array, 'B T D'] | None, list]:
        """-> (x-prediction, feat of the agent's token or None, keys and values written).

        level: tau in units of 1/k_max. stride: e of d = 2^-e. action: the one that led to the
        frame, zeros if none; a row without labels has only the learned embedding of the action's
        slot. looks: see `BlockCausal`.
        """
        b, t = signal_level.shape
        x = self.embed(z)
        act = jnp.where(has_action[..., None], self.action(action), 0.0)
        noise = jnp.concatenate(
            [self.level[...][signal_level], self.stride[...][step_exponent]], -1
        )
        spare = jnp.zeros((b, t, self.cfg.registers + agent, x.shape[-1]), x.dtype)
        x = jnp.concatenate(
            [act[:, :, None].astype(x.dtype), noise[:, :, None].astype(x.dtype), x, spare], 2
        )
        x = x + self.slots[...][: self.world_tokens + agent].astype(x.dtype)
        slot = np.arange(self.world_tokens + agent)
        mask = (slot[None] < self.world_tokens) | (slot[:, None] == self.world_tokens)
        mask &= (slot[:, None] != 0) | (slot[None] == 0)
        x, written = self.blocks(x, is_first, jnp.asarray(mask), cache, attention_maps)
        predicted = self.readout(x[:, :, 2 : 2 + self.tokens].astype(jnp.float32))
        return predicted, x[:, :, -1] if agent else None, written

    def noised(self, z: Float[Array, '*B'], key: PRNGKeyArray) -> Float[Array, '*B']:
        """The context's corruption: signal tau = context_level / k_max, the rest noise."""
        if self.cfg.context_noise == 0:
            return z
        tau = self.cfg.context_level / self.cfg.k_max
        return tau * z + (1 - tau) * jax.random.normal(key, z.shape)

    def packed(self, z: Float[Array, 'B T N b']) -> Float[Array, 'B T Z c']:
        return z.reshape(*z.shape[:2], self.tokens, self.channels)
