"""Dreamer 4 as the runner, the evaluation and the player see it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.agents.dreamer4 import losses
from reverie.agents.dreamer4.config import Dreamer4Config, PhaseConfig
from reverie.agents.dreamer4.networks import (
    ACTING,
    ShortcutActor,
    has_policy,
    networks,
    world_model,
)
from reverie.models.shortcut import ShortcutModel
from reverie.models.tokenizer import scale_latents
from reverie.nn.lpips import load as weights
from reverie.nn.networks import copy
from reverie.nn.optim import muon_or_adamw
from reverie.types import EnvSpec, LongWindows, Params, Phase, ReadOut, State, UserError

TOKENIZER = tuple(
    f'tokenizer.{name}'
    for name in (
        'patch',
        'latents',
        'bottleneck',
        'transformer',
        'pixel_mean',
        'pixel_std',
        'in_place',
        'unit_latents',
    )
)
DYNAMICS = (
    *TOKENIZER,
    *(f'dynamics.{name}' for name in ('pack', 'registers', 'k_max', 'transformer')),
)
HEAD = ('head_units', 'head_layers')


class Dreamer4:
    """Parameter groups: encoder, decoder, dynamics, policy, reward, cont, value, and prior, the
    frozen copy of the policy that imagination training starts from.

    Where actions are not discrete, or it is to have no policy, it is a world model alone: encoder,
    decoder and dynamics, and the phases that train them. task: number, among those of the spec, that
    it acts and dreams for.

    Raises UserError for environments without images.
    """

    shaped_by: Mapping[str, tuple[str, ...]] = {
        'encoder': TOKENIZER,
        'decoder': (*TOKENIZER, 'tokenizer.pixels', 'tokenizer.time_first'),
        'dynamics': DYNAMICS,
        'policy': (*HEAD, 'multi_token'),
        'prior': (*HEAD, 'multi_token'),
        'cont': HEAD,
        'reward': (*HEAD, 'multi_token', 'bins'),
        'value': (*HEAD, 'bins'),
    }

    def __init__(self, cfg: Dreamer4Config, spec: EnvSpec, task: int = 0):
        if cfg.finetune_phase.relevant >= 1:
            raise UserError(
                f'finetune_phase.relevant={cfg.finetune_phase.relevant:g}: expected less than 1; '
                'dynamics, rewards and ends learn from uniform rows'
            )
        self.cfg = cfg
        self.spec = spec
        self.task = task
        self.networks = networks(cfg, spec)
        self.has_policy = has_policy(cfg, spec)
        self.phases = self._phases()
        actor = ShortcutActor(self.networks, task)
        acting: Callable[[Params], Params] = lambda params: {name: params[name] for name in ACTING}
        self.readouts: Mapping[str, ReadOut] = {}
        if self.has_policy:
            prior: Callable[[Params], Params] = lambda params: (
                acting(params) | {'policy': params['prior']}
            )
            self.readouts = {'imagination': ReadOut(actor, acting), 'wm_bc': ReadOut(actor, prior)}
        self.reach: int = self.networks.outlines['encoder'].reach
        self.caches_latents = cfg.tokenizer.cache_latents
        self.scales_latents = cfg.tokenizer.unit_latents

    def _phases(self) -> tuple[Phase, ...]:
        """Algorithm 1: tokenizer and dynamics (pretraining), finetuning, imagination."""
        cfg = self.cfg
        lpips = {} if cfg.perceptual is None else {'lpips': 0.2}
        pretraining = (
            self._phase(
                'tokenizer',
                cfg.tokenizer_phase,
                losses.tokenizer_loss,
                ('encoder', 'decoder'),
                {'recon': 1.0} | lpips,
                fixed=functools.partial(_perceptual, cfg.perceptual),
                tokenizes=True,
            ),
            self._phase(
                'dynamics',
                cfg.dynamics_phase,
                losses.dynamics_loss,
                ('dynamics',),
                {'shortcut': 1.0},
            ),
        )
        if not self.has_policy:
            return pretraining
        return (
            *pretraining,
            self._phase(
                'finetune',
                cfg.finetune_phase,
                losses.finetune_loss,
                ('dynamics', 'policy', 'reward', 'cont'),
                {'shortcut': 1.0, 'policy': 1.0, 'reward': 1.0, 'cont': 1.0},
            ),
            self._phase(
                'imagine',
                cfg.imagine_phase,
                losses.imagination_loss,
                ('policy', 'value'),
                {'policy': 1.0, 'prior': 1.0, 'value': 1.0},
                begin=lambda params: {**params, 'prior': copy(params['policy'])},
                # beta KL starts at 0: divided by its own size it would forbid every change
                rms_decay=None,
                held_out=False,
            ),
        )

    def _phase(
        self,
        name: str,
        phase: PhaseConfig,
        loss: Callable[..., Any],
        trains: tuple[str, ...],
        scales: Mapping[str, float],
        **options: Any,
    ) -> Phase:
        return phase_of(
            name,
            phase,
            self.networks.loss(loss, self.cfg),
            trains,
            scales,
            **{'rms_decay': self.cfg.rms_decay, **options},
        )

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh weights of every group."""
        key, _ = jax.random.split(key)  # the other half is `agents.bc`'s
        params = self.networks.init(nnx.Rngs(key))
        return params | {'prior': copy(params['policy'])} if self.has_policy else params

    def model(self, params: Params, *, images: bool = True) -> ShortcutModel:
        """The four-method world model; without `images` it neither observes nor decodes frames."""
        return world_model(self.networks(params), images=images, task=self.task)

    def tokenize(
        self, params: Params, obs: Array, is_first: Bool[Array, 'B T']
    ) -> Float[Array, 'B T Z b']:
        """Latents of frames, as `Tokenizing` says."""
        latents: Array = self.networks(params).encoder(obs, is_first)[0]
        return latents

    def with_latent_scale(self, params: Params, scale: Float[Array, '']) -> Params:
        """Weights of a tokenizer whose latents are so many times as large."""
        return scale_latents(params, scale)

    def expected_return(
        self, params: Params, feat: Float[Array, '*B D']
    ) -> Float[Array, '*B'] | None:
        """The critic's mean; None for a world model alone."""
        if not self.has_policy:
            return None
        mean: Array = self.networks(params).value(feat).mean()
        return mean

    def choose(
        self, params: Params, state: State, feat: Float[Array, 'N D'], key: PRNGKeyArray
    ) -> tuple[Float[Array, 'N A'], Float[Array, 'N A'] | None]:
        """A draw of the policy, one-hot, and the probabilities it was drawn with; a world model alone
        takes the action of all zeros.
        """
        if not self.has_policy:
            return jnp.zeros((len(feat), self.spec.actions.size)), None
        policy = self.networks(params).policy(feat)
        return policy.sample(key), jax.nn.softmax(policy.logits, -1)

    def for_inference(self, params: Params) -> Params:
        """Kernels in the type they are multiplied in, see `nn.core.cast_kernels`; no prior."""
        return self.networks.for_inference(params)

    @property
    def sampling_choices(self) -> tuple[int, ...]:
        """The numbers K of denoising steps that the model knows."""
        return tuple(2**i for i in range(self.cfg.dynamics.finest + 1))

    @property
    def sampling_steps(self) -> int:
        """K, denoising steps of a frame."""
        return self.cfg.dynamics.sampling_steps

    def with_sampling_steps(self, steps: int) -> 'Dreamer4':
        """The same agent, dreaming with K = `steps`."""
        dynamics = dataclasses.replace(self.cfg.dynamics, sampling_steps=steps)
        return Dreamer4(dataclasses.replace(self.cfg, dynamics=dynamics), self.spec, self.task)

    def with_task(self, task: int) -> 'Dreamer4':
        """The same agent, told another task."""
        return Dreamer4(self.cfg, self.spec, task)


@functools.cache
def _perceptual(net: str | None) -> Params:
    """Weights of the LPIPS distance, read when they are first needed."""
    return {} if net is None else {'lpips': weights(net)}


def phase_of(
    name: str,
    cfg: PhaseConfig,
    loss: Callable[..., Any],
    trains: tuple[str, ...],
    scales: Mapping[str, float],
    **options: Any,
) -> Phase:
    """A phase of the length and with the optimiser of its configuration."""
    return Phase(
        name,
        trains,
        loss,
        scales,
        muon_or_adamw(
            steps=cfg.steps,
            learning_rate=cfg.learning_rate,
            warmup_steps=cfg.warmup_steps,
            decay=cfg.decay,
            weight_decay=cfg.weight_decay,
            clip_norm=cfg.clip_norm,
            muon=cfg.muon,
        ),
        cfg.steps,
        cfg.batch,
        cfg.length,
        relevant=cfg.relevant,
        ema_decay=cfg.ema_decay,
        scheduled=cfg.decay > 0,
        long=LongWindows(cfg.long_length, cfg.long_share, cfg.long_end)
        if cfg.long_length
        else None,
        **options,
    )
