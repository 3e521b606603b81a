"""Behaviour cloning without a world model: the networks of Dreamer 4, trained on actions alone."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from reverie.agents.dreamer4.agent import DYNAMICS, HEAD, TOKENIZER, phase_of
from reverie.agents.dreamer4.config import Dreamer4Config, PhaseConfig
from reverie.agents.dreamer4.losses import Terms, cloning_loss
from reverie.agents.dreamer4.networks import ACTING, Net, ShortcutActor, check_policy, check_spec
from reverie.agents.dreamer4.presets import dreamer4, dreamer4_debug, dreamer4_demo
from reverie.models.dynamics import Dynamics, DynamicsConfig
from reverie.models.tokenizer import Encoder, TokenizerConfig
from reverie.nn.dists import Categorical
from reverie.nn.networks import MultiTokenHead, Networks
from reverie.types import Batch, EnvSpec, Params, Phase, ReadOut


@dataclasses.dataclass(frozen=True)
class BCConfig:
    """A behaviour-cloning agent: an encoder of its own, from pixels, a transformer and a policy."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    """Shape of the encoder."""
    dynamics: DynamicsConfig = DynamicsConfig()
    """Shape of the transformer; frames are not corrupted."""
    head_units: int = 256
    """Units of each hidden layer of the policy."""
    head_layers: int = 1
    """Hidden layers of the policy."""
    multi_token: int = 8
    """L: L + 1 actions are predicted."""
    rms_decay: float = 0.99
    """Decay of the running mean square that divides the loss."""
    phase: PhaseConfig = PhaseConfig(relevant=1.0)


def like(cfg: Dreamer4Config, phase: PhaseConfig) -> BCConfig:
    """The same shapes as a Dreamer 4's, with clean frames."""
    return BCConfig(
        cfg.tokenizer,
        dataclasses.replace(cfg.dynamics, context_noise=0.0),
        cfg.head_units,
        cfg.head_layers,
        cfg.multi_token,
        cfg.rms_decay,
        phase,
    )


class BC:
    """Parameter groups: encoder, dynamics and policy.

    task: number, among those of the spec, that it acts for.
    """

    shaped_by: Mapping[str, tuple[str, ...]] = {
        'encoder': TOKENIZER,
        'dynamics': DYNAMICS,
        'policy': (*HEAD, 'multi_token'),
    }

    def __init__(self, cfg: BCConfig, spec: EnvSpec, task: int = 0):
        self.cfg = cfg
        self.spec = spec
        self.networks: Networks[Net] = networks(cfg, spec)
        loss = self.networks.loss(bc_loss, cfg)
        self.phases: tuple[Phase, ...] = (
            phase_of('bc', cfg.phase, loss, ACTING, {'policy': 1.0}, rms_decay=cfg.rms_decay),
        )
        self.readouts: Mapping[str, ReadOut] = {
            'bc': ReadOut(ShortcutActor(self.networks, task), lambda params: params)
        }

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh weights of every group, other ones than a Dreamer 4 of the same seed has."""
        _, key = jax.random.split(key)
        return self.networks.init(nnx.Rngs(key))

    def with_task(self, task: int) -> 'BC':
        """The same agent, told another task."""
        return BC(self.cfg, self.spec, task)


def networks(cfg: BCConfig, spec: EnvSpec) -> Networks[Net]:
    """The networks for an environment. Raises UserError if they do not fit it."""
    check_policy(spec, 'bc')
    image = check_spec(spec, 'bc')
    actions = spec.actions.size
    transformer = cfg.dynamics.transformer

    def make(rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return dict(
            encoder=Encoder(cfg.tokenizer, image, rngs),
            dynamics=Dynamics(
                cfg.dynamics,
                cfg.tokenizer.latents,
                cfg.tokenizer.bottleneck,
                actions,
                rngs,
                len(spec.tasks),
            ),
            policy=MultiTokenHead(
                Categorical,
                transformer.width,
                cfg.head_units,
                cfg.head_layers,
                actions,
                cfg.multi_token,
                out_scale=0.01,
                dtype=jnp.dtype(transformer.dtype),
                rngs=rngs,
            ),
        )

    return Networks(Net, make)


def bc_loss(net: Net, batch: Batch, key: PRNGKeyArray, cfg: BCConfig, step: Array) -> Terms:
    """-ln p of the next L + 1 actions, from clean frames."""
    s = batch.step
    shape = s.is_first.shape
    z, _ = net.encoder(s.obs, s.is_first)
    signal_level = jnp.full(shape, cfg.dynamics.context_level)
    step_exponent = jnp.full(shape, cfg.dynamics.finest)
    labelled = jnp.broadcast_to(batch.has_action[:, None], shape)
    _, feat, _ = net.dynamics(
        net.dynamics.packed(z),
        signal_level,
        step_exponent,
        s.prev_action,
        labelled,
        s.is_first,
        task=batch.task,
    )
    assert feat is not None
    loss, accuracy = cloning_loss(net.policy.all_steps(feat), batch, cfg.multi_token)
    return dict(policy=loss), {'bc/action_accuracy': accuracy}


def bc() -> BCConfig:
    """Behaviour cloning with the networks of `dreamer4`.

    Run:      reverie train bc --env minatar/breakout --seeds 3 --add-to runs/dreamer4-minatar_breakout
    Expect:   not measured yet
    Differs from the paper: sizes, as `dreamer4`.
    """
    return like(dreamer4(), PhaseConfig(1500, 64, 24, relevant=1.0, learning_rate=6e-4))


def bc_demo() -> BCConfig:
    """Behaviour cloning with the networks of `dreamer4_demo`.

    Run:      make demo
    Expect:   results/dreamer4_demo/minatar_breakout.json, beside the agent
    Differs from the paper: sizes, as `dreamer4_demo`.
    """
    phase = PhaseConfig(500, 16, 16, relevant=1.0, learning_rate=4e-3, warmup_steps=20, decay=0.3)
    return like(dreamer4_demo(), phase)


def bc_debug() -> BCConfig:
    """Behaviour cloning of a few thousand weights that runs in seconds. Nothing is learnt.

    Run:      reverie train bc_debug --env minatar/breakout
    Expect:   no score; it shows that everything works
    Differs from the paper: in every size
    """
    return like(dreamer4_debug(), PhaseConfig(4, 4, 6, relevant=1.0, warmup_steps=2))
