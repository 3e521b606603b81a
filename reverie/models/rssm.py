"""Recurrent state-space models: PlaNet, Dreamer V1, V2 and V3 differ in the recurrence and in the
distribution of the latent.

The state is (h, z): h = f(h, z, action) is deterministic, z is drawn from the prior p(z | h) while
imagining and from the posterior q(z | h, embed) while observing. Actions are those that led to a
frame, so nothing shifts. Where `is_first`, h, z and the action are set to zero.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from reverie.nn.cells import LayerNormGRU, ResetAfterGRU, ResetBeforeGRU, gate
from reverie.nn.core import MLP, BlockLinear, Dense, Linear, Style, blocked, unblocked
from reverie.nn.latents import CategoricalLatent, GaussianLatent
from reverie.nn.networks import Bound
from reverie.nn.scan import lean_scan
from reverie.types import Prediction, State, Step, UserError, sg

CELLS: dict[str, type[ResetAfterGRU | ResetBeforeGRU | LayerNormGRU]] = {
    'reset_after': ResetAfterGRU, 'reset_before': ResetBeforeGRU, 'layer_norm': LayerNormGRU,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BlockGRU:
    """Recurrence of Dreamer V3: a GRU with block-diagonal kernels behind one shared projection of
    (h, z, action).
    """

    blocks: int = 8
    """Blocks of the kernels; must divide `deter`."""

    def build(self, cfg: 'RSSMConfig', actions: int, rngs: nnx.Rngs) -> nnx.Module:
        if cfg.deter % self.blocks:
            raise UserError(f'deter={cfg.deter}: expected a multiple of blocks={self.blocks}')
        return BlockGRUCore(cfg, self.blocks, actions, rngs)


@dataclasses.dataclass(frozen=True)
class GRU:
    """Recurrence of PlaNet, Dreamer V1 and V2: one layer over [z, action], then a GRU cell."""

    cell: Literal['reset_before', 'reset_after', 'layer_norm'] = 'reset_after'
    """Cell of PlaNet, of V1, and of V2, in this order."""

    def build(self, cfg: 'RSSMConfig', actions: int, rngs: nnx.Rngs) -> nnx.Module:
        return GRUCore(cfg, self.cell, actions, rngs)


@dataclasses.dataclass(frozen=True)
class RSSMConfig:
    """Shape of an RSSM."""

    deter: int = 512
    """Width of h."""
    hidden: int = 64
    """Width of the layers around the recurrence, of the prior and of the posterior."""
    latent: CategoricalLatent | GaussianLatent = CategoricalLatent(32, 4, 0.01)
    """Distribution of z."""
    core: BlockGRU | GRU = BlockGRU(8)
    """Recurrence of h."""
    prior_layers: int = 2
    """Hidden layers of the prior p(z | h)."""
    post_layers: int = 1
    """Hidden layers of the posterior q(z | h, embed), at least 1."""
    feat: Literal['hz', 'zh'] = 'hz'
    """Order of h and z in the features."""
    style: Style = Style()
    """Form of every layer."""

    @property
    def width(self) -> int:
        """Width F of the features."""
        return self.deter + self.latent.size

    def build(self, embed: int, actions: int, rngs: nnx.Rngs) -> 'RSSM':
        """Build the model for embeddings and action vectors of these widths."""
        return RSSM(self, embed, actions, rngs=rngs)


def features(order: Literal['hz', 'zh'], h: Array, z: Array) -> Float[Array, '*B F']:
    """Concatenate h and z in the order of their letters."""
    parts = dict(h=h, z=z)
    return jnp.concatenate([parts[letter] for letter in order], -1)


class Size(NamedTuple):
    """Row of Dreamer V3's table of model sizes."""

    deter: int
    hidden: int
    classes: int
    depth: int  # channels of the convolutions
    units: int  # width of the MLPs


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
    """Look up a size; `name` is about the number of weights of a whole Dreamer V3 on images.

    Raises UserError for an unknown name.
    """
    if name not in SIZES:
        raise UserError(f'size {name!r}: expected one of {", ".join(SIZES)}')
    return SIZES[name]


class RSSMState(NamedTuple):
    """State that the model carries from frame to frame."""

    h: Float[Array, '*B D']
    z: Float[Array, '*B Z']


class Memory(NamedTuple):
    """Form of an `RSSMState` in replay; all zeros where there is none."""

    h: Float[Array, '*B D']
    z: Array  # [*B, ...], see `pack` of the latent


class Unrolled(NamedTuple):
    """Window observed through the posterior; leading dims [B, T]."""

    feat: Float[Array, 'B T F']
    post: Any  # distribution
    prior: Any  # distribution
    state: RSSMState
    memory: Memory


class BlockGRUCore(nnx.Module):
    """Block-GRU on x = silu(norm(.)) of h, z and action, side by side; every block of h reads its
    own part of h and all of x.
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
        """Compute the part that depends on actions alone, known for all time steps at once.

        Actions beyond [-1, 1] are scaled back.
        """
        action = action / sg(jnp.maximum(1, jnp.abs(action)))
        return self.hidden.part(self.from_action(action), 2 * self.cfg.hidden)

    def __call__(self, state: RSSMState, prepared: Float[Array, '*B D']) -> Float[Array, '*B D']:
        x = jnp.concatenate([self.from_h(state.h), self.from_z(state.z)], -1)
        x = self.hidden(state.h, self.hidden.part(x, 0) + prepared).astype(self.cfg.style.dtype)
        x = blocked(self.cfg.style.activate(self.norm(x)), self.blocks)
        r, c, u = jnp.split(self.gates.on_blocks(x), 3, -1)  # side by side within each block
        return unblocked(gate(r, c, u, blocked(state.h, self.blocks)))


class GRUCore(nnx.Module):
    """Recurrence h' = cell(act(norm(W [z, action])), h)."""

    def __init__(self, cfg: RSSMConfig, cell: str, actions: int, rngs: nnx.Rngs):
        self.input = Dense(cfg.latent.size + actions, cfg.hidden, cfg.style, rngs)
        self.cell = CELLS[cell](cfg.hidden, cfg.deter, cfg.style, rngs)
        self.latent_size = cfg.latent.size

    def prepare(self, action: Float[Array, '*B A']) -> Float[Array, '*B hidden']:
        """Compute the part that depends on actions alone, known for all time steps at once."""
        return self.input.linear.part(action, self.latent_size, bias=True)

    def __call__(
        self, state: RSSMState, prepared: Float[Array, '*B hidden']
    ) -> Float[Array, '*B D']:
        x = self.input.finish(self.input.linear.part(state.z, 0) + prepared)
        return self.cell(x, state.h)


class RSSM(nnx.Module):
    """Latent dynamics: `embed` [*B, E] comes from an encoder, decoders and heads read `feat` or
    (h, z).
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
        h, z = jnp.zeros((batch, self.cfg.deter)), jnp.zeros((batch, self.cfg.latent.size))
        return RSSMState(h, z)

    def feat(self, state: RSSMState) -> Float[Array, '*B F']:
        return features(self.cfg.feat, state.h, state.z)

    def pack(self, state: RSSMState) -> Memory:
        """Convert a state for replay: h in the dtype of the products, a categorical z as small
        integers.
        """
        return Memory(state.h.astype(self.cfg.style.dtype), self.cfg.latent.pack(state.z))

    def unpack(self, memory: Memory) -> RSSMState:
        """Restore the state after the last of the remembered steps [B, C, ...]."""
        h = memory.h[:, -1].astype(jnp.float32)
        return RSSMState(h, self.cfg.latent.unpack(memory.z[:, -1]))

    def starts(self, unrolled: Unrolled, last: int) -> RSSMState:
        """States of the last so many steps of a window, as rows: [B, T, ...] -> [B * last, ...]."""
        h, z = (x[:, -last:].reshape(-1, *x.shape[2:]) for x in unrolled.state)
        return RSSMState(h, z)

    def observe(
        self,
        state: RSSMState,
        embed: Float[Array, 'N E'],
        prev_action: Float[Array, 'N A'],
        is_first: Bool[Array, ' N'],
        key: PRNGKeyArray,
    ) -> tuple[RSSMState, Any, Any]:
        """Infer the state that a real frame leads to; return (state, post, prior)."""
        prepared, embedded = self._prepare(embed, prev_action, is_first)
        state, out = self._observe(state, prepared, embedded, is_first, key)
        return state, self.cfg.latent(out), self.cfg.latent(self.prior(state.h))

    def imagine(
        self, state: RSSMState, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[RSSMState, Any]:
        """Draw the state that `action` leads to from the prior; return (state, prior)."""
        h = self.core(state, self.core.prepare(action))
        prior = self.cfg.latent(self.prior(h))
        return self._draw(h, prior, key), prior

    def unroll(
        self,
        state: RSSMState,
        embed: Float[Array, 'B T E'],
        prev_action: Float[Array, 'B T A'],
        is_first: Bool[Array, 'B T'],
        key: PRNGKeyArray,
    ) -> Unrolled:
        """Observe T frames; the scan holds only the part that depends on the state, and priors are
        computed after it.
        """
        prepared, embedded = self._prepare(embed, prev_action, is_first)
        xs = [x.swapaxes(0, 1) for x in (prepared, embedded, is_first)]

        def step(state: RSSMState, x: Any) -> tuple[RSSMState, tuple[RSSMState, Array]]:
            state, out = self._observe(state, *x)
            return state, (state, out)

        _, ys = lean_scan(step, state, (*xs, jax.random.split(key, is_first.shape[1])))
        state, out = jax.tree.map(lambda y: y.swapaxes(0, 1), ys)
        prior = self.cfg.latent(self.prior(state.h))
        return Unrolled(self.feat(state), self.cfg.latent(out), prior, state, sg(self.pack(state)))

    def _prepare(self, embed: Array, prev_action: Array, is_first: Array) -> tuple[Array, Array]:
        """Compute the parts that depend on actions and on embeddings alone, for any leading dims."""
        action = jnp.where(is_first[..., None], 0, prev_action)
        return self.core.prepare(action), self._first_of_post.part(embed, self.cfg.deter, bias=True)

    @property
    def _first_of_post(self) -> Linear:
        return self.post.hidden[0]

    def _observe(
        self, state: RSSMState, prepared: Array, embedded: Array, is_first: Array, key: PRNGKeyArray
    ) -> tuple[RSSMState, Array]:
        """Observe one frame, given its parts from `_prepare`; return the state and the posterior
        network's output.
        """
        state = jax.tree.map(lambda x: jnp.where(is_first[:, None], 0, x), state)
        h = self.core(state, prepared)
        out = self.post.finish(self._first_of_post.part(h, 0) + embedded)
        return self._draw(h, self.cfg.latent(out), key), out

    def _draw(self, h: Array, dist: PyTree, key: PRNGKeyArray) -> RSSMState:
        return RSSMState(h, dist.sample(key).reshape(*h.shape[:-1], -1))


class LatentModel:
    """World model of every agent that infers a state from each observation and predicts the next.

    net: networks with weights. `dynamics` has `initial`, `observe`, `imagine`, `unroll` and `feat`,
    see `RSSM`; `encoder` and `decoder` are asked for only where they are needed; without `reward`
    the reward is 0, without `cont` every step goes on.
    """

    def __init__(self, net: Bound):
        self.net = net
        self.dynamics = net.dynamics

    def reward(self, feat: Float[Array, '*B F']) -> Float[Array, '*B']:
        """Expected reward."""
        if 'reward' not in self.net.params:
            return jnp.zeros(feat.shape[:-1])
        mean: Array = self.net.reward(feat).mean()
        return mean

    def cont(self, feat: Float[Array, '*B F']) -> Float[Array, '*B']:
        """Probability of going on."""
        if 'cont' not in self.net.params:
            return jnp.ones(feat.shape[:-1])
        mean: Array = self.net.cont(feat).mean()
        return mean

    def initial(self, batch: int) -> State:
        return self.dynamics.initial(batch)

    def embed(self, obs: Any, key: PRNGKeyArray) -> Float[Array, '*B E']:
        """Embed observations for the dynamics."""
        embed: Array = self.net.encoder(self.net.encoder.prepare(obs, key))
        return embed

    def observe(
        self, state: State, step: Step, key: PRNGKeyArray
    ) -> tuple[State, Float[Array, 'N F']]:
        """Infer the state that a real frame leads to."""
        embed = self.embed(step.obs, key)
        state, _, _ = self.dynamics.observe(state, embed, step.prev_action, step.is_first, key)
        return state, self.dynamics.feat(state)

    def imagine(
        self, state: State, action: Float[Array, 'N A'], key: PRNGKeyArray
    ) -> tuple[State, Prediction]:
        """Draw the next state from the prior."""
        state, _ = self.dynamics.imagine(state, action, key)
        feat = self.dynamics.feat(state)
        return state, Prediction(feat, self.reward(feat), self.cont(feat))

    def attention(self, step: Step, key: PRNGKeyArray) -> Float[Array, 'L B heads T T'] | None:
        """Attention weights of each step of a window [B, T] over the steps, None if the dynamics
        does not attend.
        """
        if not hasattr(self.dynamics, 'attention'):
            return None
        start, embed = self.initial(len(step.is_first)), self.embed(step.obs, key)
        seen = self.dynamics.unroll(start, embed, step.prev_action, step.is_first, key)
        weights: Array = self.dynamics.attention(
            start, seen.state.z, step.prev_action, step.is_first
        )
        return weights

    def decode(self, state: State) -> Any:
        """Likeliest observation of a state."""
        dists = self.net.decoder(state.h, state.z)
        if isinstance(dists, dict):
            return {key: dist.mode() for key, dist in dists.items()}
        return dists.mode()
