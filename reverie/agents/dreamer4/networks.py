"""The networks of a Dreamer 4, its world model made of them, and how it acts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from reverie.agents.dreamer4.config import Dreamer4Config
from reverie.models.dynamics import Dynamics
from reverie.models.shortcut import ShortcutModel, ShortcutState
from reverie.models.tokenizer import Decoder, Encoder
from reverie.nn.dists import BernoulliDist, Categorical, TwoHotDist
from reverie.nn.networks import Bound, MultiTokenHead, Networks
from reverie.types import EnvSpec, Params, Step, UserError


class Net(Bound):
    """Modules with weights. Heads take the agent token's feat [*B, D]."""

    encoder: Encoder
    decoder: Decoder
    dynamics: Dynamics
    policy: MultiTokenHead
    """-> Categorical over actions [*B, A]."""
    prior: MultiTokenHead
    """-> the same of the policy that imagination training starts from."""
    reward: MultiTokenHead
    """-> TwoHot."""
    cont: MultiTokenHead
    """-> Bernoulli: the episode goes on."""
    value: MultiTokenHead
    """-> TwoHot."""


ACTING = ('encoder', 'dynamics', 'policy')  # parameter groups that acting needs


def check_policy(spec: EnvSpec, agent: str) -> None:
    """Raise UserError unless a policy can choose the actions, which are discrete."""
    if spec.actions.kind != 'discrete':
        raise UserError(f'{spec.name} has {spec.actions.kind} actions; {agent} takes discrete ones')


def check_spec(spec: EnvSpec, agent: str) -> tuple[int, int, int]:
    """Shape of an image [h, w, c]. Raises UserError unless observations are images."""
    if isinstance(spec.obs_shape, Mapping) or len(spec.obs_shape) != 3:
        raise UserError(
            f'{spec.name} has observations of shape {spec.obs_shape}; {agent} takes images [h, w, c]'
        )
    h, w, c = spec.obs_shape
    return h, w, c


def networks(cfg: Dreamer4Config, spec: EnvSpec) -> Networks[Net]:
    """The networks of an agent for an environment; of a world model alone where it has no policy.

    Raises UserError if they do not fit it.
    """
    image = check_spec(spec, 'dreamer4')
    policies = has_policy(cfg, spec)
    actions = spec.actions.size

    def make(rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        width = cfg.dynamics.transformer.width
        dtype = jnp.dtype(cfg.dynamics.transformer.dtype)

        def head(
            dist: Callable[[Array], Any], outputs: int, ahead: int, out_scale: float
        ) -> MultiTokenHead:
            return MultiTokenHead(
                dist,
                width,
                cfg.head_units,
                cfg.head_layers,
                outputs,
                ahead,
                out_scale=out_scale,
                dtype=dtype,
                rngs=rngs,
            )

        scalar = TwoHotDist(cfg.bins)
        latents = cfg.tokenizer.latents, cfg.tokenizer.bottleneck
        model: dict[str, nnx.Module] = dict(
            encoder=Encoder(cfg.tokenizer, image, rngs),
            decoder=Decoder(cfg.tokenizer, image, rngs),
            dynamics=Dynamics(cfg.dynamics, *latents, actions, rngs, len(spec.tasks)),
        )
        if not policies:
            return model
        return model | dict(
            policy=head(Categorical, actions, cfg.multi_token, 0.01),
            reward=head(scalar, cfg.bins, cfg.multi_token, scalar.out_scale),
            cont=head(BernoulliDist(), 1, 0, 0.0),
            value=head(scalar, cfg.bins, 0, scalar.out_scale),
        )

    return Networks(Net, make, shared={'prior': 'policy'} if policies else None)


def has_policy(cfg: Dreamer4Config, spec: EnvSpec) -> bool:
    """Whether an agent acts there; else it is a world model alone."""
    return cfg.policy and spec.actions.kind == 'discrete'


def world_model(
    net: Net, *, images: bool = True, task: Int[Array, ' N'] | int = 0
) -> ShortcutModel:
    """The four-method world model; without `images` it neither observes nor decodes frames.

    task: number of the task that the agent token is told, of each row or of all.
    """
    heads = 'reward' in net.params
    return ShortcutModel(
        net.dynamics,
        net.encoder if images else None,
        net.decoder if images else None,
        (lambda feat: net.reward(feat).mean()) if heads else None,
        (lambda feat: net.cont(feat).mean()) if heads else None,
        task,
    )


@dataclasses.dataclass(frozen=True)
class ShortcutActor:
    """Acts in a real environment on the agent token. Parameters: encoder, dynamics, policy."""

    networks: Networks[Net]
    task: int = 0

    def initial(self, params: Params, batch: int) -> ShortcutState:
        net = self.networks(params)
        return ShortcutModel(net.dynamics, net.encoder, task=self.task).initial(batch)

    def act(
        self,
        params: Params,
        state: ShortcutState,
        step: Step,
        key: PRNGKeyArray,
        greedy: Array | bool,
    ) -> tuple[ShortcutState, Array]:
        """-> (state, action index [N])."""
        net = self.networks(params)
        key_observe, key_act = jax.random.split(key)
        model = ShortcutModel(net.dynamics, net.encoder, task=self.task)
        state, feat = model.observe(state, step, key_observe)
        policy = net.policy(feat)
        return state, jnp.where(greedy, policy.logits.argmax(-1), policy.sample_index(key_act))
