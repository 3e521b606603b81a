"""The configuration of a Dreamer 4, and the optimiser of its phases."""

import dataclasses
from typing import Literal

from reverie.models.dynamics import DynamicsConfig
from reverie.models.tokenizer import TokenizerConfig
from reverie.objectives.pmpo import PMPO


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """Length and optimiser of one phase. No value is from the paper."""

    steps: int = 10_000
    """Updates."""
    batch: int = 32
    """Windows per update."""
    length: int = 64
    """Frames per window."""
    long_length: int = 0
    """Frames of the longer windows, which some updates take fewer of, as many frames in all (paper:
    256 beside 64, Table 2); 0 for none. Imagination has none."""
    long_share: float = 0.1
    """Share of the updates with longer windows (the paper says occasionally)."""
    long_end: float = 0.0
    """Share of the updates, at the end, that all have longer windows."""
    relevant: float = 0.0
    """Share of the windows drawn from the task's own data, the rest uniformly."""
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    """Updates over which the learning rate rises from zero."""
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Largest global norm of the gradients."""
    muon: bool = True
    """Orthogonalised momentum for the matrices inside the transformer, else AdamW for all."""
    decay: float = 0.2
    """Share of the updates, at the end, over which the learning rate falls to zero."""
    ema_decay: float | None = None
    """Decay of the running mean of the weights that the phase leaves behind; None: the last ones."""


@dataclasses.dataclass(frozen=True)
class Dreamer4Config:
    """Everything about a Dreamer 4 but the environment. Values marked * are not from the paper."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    dynamics: DynamicsConfig = DynamicsConfig()
    policy: bool = True
    """*Learn policy, rewards and ends after the dynamics, where actions are discrete. False: a world
    model alone, as it is where they are not."""
    channel_weighting: bool = False
    """*Divide the tokenizer's error by the root of each channel's mean square in the batch, for
    symbolic grids where one ball must not drown in thirty bricks."""
    head_units: int = 256
    """*Units of each hidden layer of a head."""
    head_layers: int = 1
    """*Hidden layers of a head."""
    bins: int = 255
    """*Bins of the two-hot distributions of rewards and values."""
    multi_token: int = 8
    """L: the agent token predicts L + 1 actions and rewards."""
    bootstrap_fraction: float = 0.25
    """*Share of the windows trained with coarse steps."""
    mixed_steps: bool = True
    """Draw the step size of every frame of such a window on its own, the finest included (eq. 4), so
    that coarse steps follow frames at d_min as they do in sampling. False: coarse steps in all of
    its frames, as in version 0.2."""
    bootstrap_warmup: int = 1000
    """*Updates of flow matching alone before coarse steps begin."""
    ramp_floor: float = 0.1
    """w(0) of the ramp weight w(tau); 1 weighs pure noise as much as data."""
    context_frame_rate: float = 0.0
    """*Share of frames at exactly the context's noise: small runs see more often what sampling
    sees, a frame to denoise after frames that are given."""
    clean_bc_rows: bool = False
    """*Finetune on relevant windows at the context's noise; the paper says only that inputs stay
    noisy."""
    single_image_rate: float = 0.3
    """Share of the windows treated as separate images."""
    horizon: int = 15
    """*Imagined steps per context."""
    discount: float = 0.997
    lam: float = 0.95
    """*Lambda of the lambda-return."""
    pmpo: PMPO = PMPO()
    rms_decay: float = 0.99
    """Decay of the running mean square that divides each loss term."""
    perceptual: Literal['alex', 'vgg'] | None = None
    """Network of the LPIPS distance, added to the tokenizer's loss with the paper's weight 0.2 (the
    extra `lpips` has the weights); None for symbolic grids."""
    tokenizer_phase: PhaseConfig = PhaseConfig()
    dynamics_phase: PhaseConfig = PhaseConfig()
    finetune_phase: PhaseConfig = PhaseConfig(relevant=0.5)
    imagine_phase: PhaseConfig = PhaseConfig()
