"""Recurrent state-space models: PlaNet, Dreamer V1, V2 and V3 differ in the recurrence and in the
latent's law.

The state is (h, z): h = f(h, z, action) is deterministic; the prior p(z | h) dreams, the posterior
q(z | h, embed) sees. Actions are those that led to a frame, so nothing shifts. Where `is_first`, h,
z and the action are set to zero.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from reverie.nn.cells import LayerNormGRU, ResetAfterGRU, ResetBeforeGRU, gate
from reverie.nn.core import MLP, BlockLinear, Dense, Linear, Style, blocked, unblocked
from reverie.nn.dists import Normal, OneHots, unimix
from reverie.types import UserError, sg

CELLS = {'reset_after': ResetAfterGRU, 'reset_before': ResetBeforeGRU, 'layer_norm': LayerNormGRU}


@dataclasses.dataclass(frozen=True)
class CategoricalLatent:
    """z is `groups` one-hots of `classes`, straight-through; Dreamer V2, and V3 with unimix 0.01."""

    groups: int = 32
    classes: int = 32
    unimix: float = 0.0

    @property
    def size(self) -> int:
        """Width of z."""
        return self.groups * self.classes

    @property
    def outputs(self) -> int:
        """Numbers a network puts out for the law."""
        return self.size

    def __call__(self, out: Float[Array, '*B outs']) -> OneHots:
        logits = out.astype(jnp.float32).reshape(*out.shape[:-1], self.groups, self.classes)
        return OneHots(unimix(logits, self.unimix))

    def pack(self, z: Float[Array, '*B Z']) -> Array:
        """z as small integers [*B, groups]: the class counted from 1, 0 where all are zero (no
        state yet).
        """
        z = z.reshape(*z.shape[:-1], self.groups, self.classes)
        index = jnp.where(z.max(-1) > 0.5, jnp.argmax(z, -1) + 1, 0)
        return index.astype(jnp.uint8 if self.classes < 256 else jnp.uint16)

    def unpack(self, packed: Array) -> Float[Array, '*B Z']:
        one_hots = jax.nn.one_hot(packed.astype(jnp.int32) - 1, self.classes)
        return one_hots.reshape(*packed.shape[:-1], self.size)


@dataclasses.dataclass(frozen=True)
class GaussianLatent:
    """z is a diagonal Gaussian, std = softplus(s) + min_std; PlaNet, Dreamer V1."""

    size: int = 30
    min_std: float = 0.1

    @property
    def outputs(self) -> int:
        return 2 * self.size

    def __call__(self, out: Float[Array, '*B outs']) -> Normal:
        mean, std = jnp.split(out.astype(jnp.float32), 2, -1)
        return Normal(mean, jax.nn.softplus(std) + self.min_std)

    def pack(self, z: Float[Array, '*B Z']) -> Array:
        return z

    def unpack(self, packed: Array) -> Float[Array, '*B Z']:
        return packed


@dataclasses.dataclass(frozen=True)
class BlockGRU:
    """Dreamer V3's recurrence: a GRU with block-diagonal kernels behind one shared projection of
    (h, z, action).
    """

    blocks: int = 8

    def build(self, cfg: 'RSSMConfig', actions: int, rngs: nnx.Rngs) -> nnx.Module:
        if cfg.deter % self.blocks:
            raise UserError(f'deter={cfg.deter}: expected a multiple of blocks={self.blocks}')
        return BlockGRUCore(cfg, self.blocks, actions, rngs)


@dataclasses.dataclass(frozen=True)
class GRU:
    """One layer over [z, action], then a GRU cell; `cell` is PlaNet's 'reset_before', V1's
    'reset_after' or V2's 'layer_norm'."""

    cell: Literal['reset_before', 'reset_after', 'layer_norm'] = 'reset_after'

    def build(self, cfg: 'RSSMConfig', actions: int, rngs: nnx.Rngs) -> nnx.Module:
        return GRUCore(cfg, self.cell, actions, rngs)


@dataclasses.dataclass(frozen=True)
class RSSMConfig:
    """Shape of an RSSM. `feat`: order of h and z in the features; `post_layers` may not be 0."""

    deter: int = 512
    hidden: int = 64
    latent: CategoricalLatent | GaussianLatent = CategoricalLatent(32, 4, 0.01)
    core: BlockGRU | GRU = BlockGRU(8)
    prior_layers: int = 2
    post_layers: int = 1
    feat: Literal['hz', 'zh'] = 'hz'
    style: Style = Style()

    @property
    def width(self) -> int:
        """Width F of the features."""
        return self.deter + self.latent.size

    def build(self, embed: int, actions: int, rngs: nnx.Rngs) -> 'RSSM':
        """The model, for embeddings and action vectors of these widths."""
        return RSSM(self, embed, actions, rngs=rngs)


class Size(NamedTuple):
    """What one dial sets; Dreamer V3's table of model sizes."""

    deter: int
    hidden: int
    classes: int
    depth: int  # of convolutions
    units: int  # of MLPs


SIZES = {
    '1m': Size(512, 64, 4, 4, 64),
    '12m': Size(2048, 256, 16, 16, 256),
    '25m': Size(3072, 384, 24, 24, 384),
    '50m': Size(4096, 512, 32, 32, 512),
    '100m': Size(6144, 768, 48, 48, 768),
    '200m': Size(8192, 1024, 64, 64, 1024),
    '400m': Size(12288, 1536, 96, 96, 1536),
}


def size(name: str) -> Size:
    """`name` is about the number of weights of a whole Dreamer V3 on images."""
    if name not in SIZES:
        raise UserError(f'size {name!r}: expected one of {", ".join(SIZES)}')
    return SIZES[name]


class RSSMState(NamedTuple):
    """What the model carries from frame to frame."""

    h: Float[Array, '*B D']
    z: Float[Array, '*B Z']


class Memory(NamedTuple):
    """An `RSSMState` as replay stores it; all zeros where there is none."""

    h: Float[Array, '*B D']
    z: Array  # [*B, ...], see `pack` of the latent


class Unrolled(NamedTuple):
    """A window seen through the posterior; leading dims [B, T]."""

    feat: Float[Array, 'B T F']
    post: Any  # law
    prior: Any  # law
    state: RSSMState
    memory: Memory


class BlockGRUCore(nnx.Module):
    """x = silu(norm(.)) of h, z and action, side by side; every block of h sees its own part of h
    and all of x.
    """

    def __init__(self, cfg: RSSMConfig, blocks: int, actions: int, rngs: nnx.Rngs):
        self.from_h = Dense(cfg.deter, cfg.hidden, cfg.style, rngs)
        self.from_z = Dense(cfg.latent.size, cfg.hidden, cfg.style, rngs)
        self.from_action = Dense(actions, cfg.hidden, cfg.style, rngs)
        dtype = cfg.style.dtype
        self.hidden = BlockLinear(
            cfg.deter, cfg.deter, blocks, shared=3 * cfg.hidden, dtype=dtype, rngs=rngs
        )
        self.norm = cfg.style.normaliser(cfg.deter)
        self.gates = BlockLinear(cfg.deter, 3 * cfg.deter, blocks, dtype=dtype, rngs=rngs)
        self.cfg, self.blocks = cfg, blocks

    def prepare(self, action: Float[Array, '*B A']) -> Float[Array, '*B D']:
        """What depends on actions alone, known for all time steps at once.

        Actions beyond [-1, 1] are scaled back.
        """
        action = action / sg(jnp.maximum(1, jnp.abs(action)))
        return self.hidden.part(self.from_action(action), 2 * self.cfg.hidden)

    def __call__(self, state: RSSMState, prepared: Float[Array, '*B D']) -> Float[Array, '*B D']:
        x = jnp.concatenate([self.from_h(state.h), self.from_z(state.z)], -1)
        x = self.hidden(state.h, self.hidden.part(x, 0) + prepared).astype(self.cfg.style.dtype)
        x = blocked(self.cfg.style.activate(self.norm(x)), self.blocks)
        r, c, u = jnp.split(
            self.gates.of_blocks(x), 3, -1
        )  # the three gates lie side by side within each block
        return unblocked(gate(r, c, u, blocked(state.h, self.blocks)))


class GRUCore(nnx.Module):
    """h' = cell(act(norm(W [z, action])), h)."""

    def __init__(self, cfg: RSSMConfig, cell: str, actions: int, rngs: nnx.Rngs):
        self.input = Dense(cfg.latent.size + actions, cfg.hidden, cfg.style, rngs)
        self.cell = CELLS[cell](cfg.hidden, cfg.deter, cfg.style, rngs)
        self.latent_size = cfg.latent.size

    def prepare(self, action: Float[Array, '*B A']) -> Float[Array, '*B hidden']:
        """What depends on actions alone, known for all time steps at once."""
        return self.input.linear.part(action, self.latent_size, bias=True)

    def __call__(
        self, state: RSSMState, prepared: Float[Array, '*B hidden']
    ) -> Float[Array, '*B D']:
        return self.cell(self.input.finish(self.input.linear.part(state.z, 0) + prepared), state.h)


class RSSM(nnx.Module):
    """A world model without eyes: `embed` [*B, E] comes from an encoder, decoders and heads read
    `feat` or (h, z).
    """

    def __init__(self, cfg: RSSMConfig, embed: int, actions: int, *, rngs: nnx.Rngs):
        style, outputs = cfg.style, cfg.latent.outputs
        self.core: Any = cfg.core.build(cfg, actions, rngs)
        self.prior = MLP(cfg.deter, cfg.hidden, cfg.prior_layers, outputs, style=style, rngs=rngs)
        self.post = MLP(
            cfg.deter + embed, cfg.hidden, cfg.post_layers, outputs, style=style, rngs=rngs
        )
        self.cfg = cfg

    def initial(self, batch: int) -> RSSMState:
        """Zeros; each leaf has its own buffer."""
        return RSSMState(
            jnp.zeros((batch, self.cfg.deter)), jnp.zeros((batch, self.cfg.latent.size))
        )

    def feat(self, state: RSSMState) -> Float[Array, '*B F']:
        return jnp.concatenate(state if self.cfg.feat == 'hz' else state[::-1], -1)

    def pack(self, state: RSSMState) -> Memory:
        """What replay stores of a state: h in the dtype of the products, a categorical z as small
        integers.
        """
        return Memory(state.h.astype(self.cfg.style.dtype), self.cfg.latent.pack(state.z))

    def unpack(self, memory: Memory) -> RSSMState:
        """The state after the last of the remembered steps [B, C, ...]."""
        return RSSMState(
            memory.h[:, -1].astype(jnp.float32), self.cfg.latent.unpack(memory.z[:, -1])
        )

    def starts(self, unrolled: Unrolled, last: int) -> RSSMState:
        """The states of the last so many steps of a window, as rows: [B, T, ...] -> [B * last,
        ...].
        """
        return jax.tree.map(lambda x: x[:, -last:].reshape(-1, *x.shape[2:]), unrolled.state)

    def observe(
        self,
        state: RSSMState,
        embed: Float[Array, 'N E'],
        prev_action: Float[Array, 'N A'],
        is_first: Bool[Array, ' N'],
        key: PRNGKeyArray,
    ) -> tuple[RSSMState, Any, Any]:
        """A real frame arrives: -> (state, post, prior)."""
        prepared, seen = self._prepare(embed, prev_action, is_first)
        state, out = self._see(state, prepared, seen, is_first, key)
        return state, self.cfg.latent(out), self.cfg.latent(self.prior(state.h))

    def imagine(
        self, state: RSSMState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[RSSMState, Any]:
        """The state that `action` leads to, drawn from the prior: -> (state, prior)."""
        h = self.core(state, self.core.prepare(action))
        prior = self.cfg.latent(self.prior(h))
        return self._drawn(h, prior, key), prior

    def unroll(
        self,
        state: RSSMState,
        embed: Float[Array, 'B T E'],
        prev_action: Float[Array, 'B T A'],
        is_first: Bool[Array, 'B T'],
        key: PRNGKeyArray,
    ) -> Unrolled:
        """`observe` over T frames: only what depends on the state is left inside of the scan;
        priors come after it.
        """
        prepared, seen = self._prepare(embed, prev_action, is_first)
        by_time = lambda x: x.swapaxes(0, 1)
        xs = (
            by_time(prepared),
            by_time(seen),
            by_time(is_first),
            jax.random.split(key, is_first.shape[1]),
        )

        def step(state, x):
            state, out = self._see(state, *x)
            return state, (state, out)

        _, ys = jax.lax.scan(step, state, xs)
        state, out = jax.tree.map(by_time, ys)
        prior = self.cfg.latent(self.prior(state.h))
        return Unrolled(self.feat(state), self.cfg.latent(out), prior, state, sg(self.pack(state)))

    def _prepare(self, embed: Array, prev_action: Array, is_first: Array) -> tuple[Array, Array]:
        """The share of actions and embeddings in what follows, for any leading dims."""
        action = jnp.where(is_first[..., None], 0, prev_action)
        return self.core.prepare(action), self._first_of_post.part(embed, self.cfg.deter, bias=True)

    @property
    def _first_of_post(self) -> Linear:
        return self.post.hidden[0]

    def _see(
        self, state: RSSMState, prepared: Array, seen: Array, is_first: Array, key
    ) -> tuple[RSSMState, Array]:
        """One frame, given what `_prepare` made of it: -> (state, the posterior's numbers)."""
        state = jax.tree.map(lambda x: jnp.where(is_first[:, None], 0, x), state)
        h = self.core(state, prepared)
        out = self.post.finish(self._first_of_post.part(h, 0) + seen)
        return self._drawn(h, self.cfg.latent(out), key), out

    def _drawn(self, h: Array, dist: PyTree, key: PRNGKeyArray) -> RSSMState:
        return RSSMState(h, dist.sample(key).reshape(*h.shape[:-1], -1))
