"""Dreamer 4: tokenizer, shortcut dynamics, agent finetuning, imagination training; arXiv
2509.24527, Algorithm 1.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.models.dynamics import Dynamics, DynamicsConfig
from reverie.models.shortcut import ShortcutModel, ShortcutState
from reverie.models.tokenizer import Decoder, Encoder, TokenizerConfig, draw_mask
from reverie.nn.core import MLP, build, cast_all_kernels
from reverie.nn.dists import Bernoulli, Categorical, TwoHot, symexp_bins
from reverie.objectives.actor import PMPO
from reverie.objectives.behavior import lambda_return, rollout
from reverie.objectives.critic import critic_loss
from reverie.objectives.flow import (
    SignalStep,
    bootstrap_target,
    corrupt,
    draw_signal_step,
    shortcut_loss,
)
from reverie.types import (
    Batch,
    EnvSpec,
    Losses,
    Metrics,
    Params,
    Phase,
    ReadOut,
    State,
    Step,
    UserError,
    sg,
)


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """Length and optimiser of one phase. Nothing of it is in the paper.

    steps: updates of `batch` windows of `length` frames. relevant: share of rows from the task's
    own data.
    muon: orthogonalised momentum for the matrices inside the transformer, else AdamW for all.
    decay: share of the steps, at the end, over which the learning rate falls to zero.
    """

    steps: int = 10_000
    batch: int = 32
    length: int = 64
    relevant: float = 0.0
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    muon: bool = True
    decay: float = 0.2
    ema_decay: float | None = None


@dataclasses.dataclass(frozen=True)
class Dreamer4Config:
    """Everything about a Dreamer 4 agent but the environment. Values marked * are not from the
    paper.

    channel_weighting*: divide the tokenizer's error by the root of each channel's mean square in
    the batch, for symbolic grids where one ball must not drown in thirty bricks.
    multi_token: L, the agent's token predicts L + 1 actions and rewards.
    bins*: of the reward and value laws.
    bootstrap_fraction*: rows trained with coarse steps, after bootstrap_warmup* updates of flow
    alone.
    ramp_floor: w(0) of the ramp weight; 1 weighs pure noise as much as data, which few sampling
    steps live on.
    context_frame_rate*: share of frames at exactly the context's noise, so that small runs see more
    often what sampling sees, a frame to denoise after frames that are given.
    clean_bc_rows*: finetune relevant rows at the context's noise; the paper says only that inputs
    stay noisy.
    isolated: share of windows treated as separate images.
    horizon*: imagined steps per context. lam*: of the lambda-return.
    perceptual: [B, T] distance of two image batches added to the tokenizer's loss with the paper's
    weight 0.2; off for symbolic grids.
    """

    tokenizer: TokenizerConfig = TokenizerConfig()
    dynamics: DynamicsConfig = DynamicsConfig()
    channel_weighting: bool = False
    head_units: int = 256
    head_layers: int = 1
    bins: int = 255
    multi_token: int = 8
    bootstrap_fraction: float = 0.25
    bootstrap_warmup: int = 1000
    ramp_floor: float = 0.1
    context_frame_rate: float = 0.0
    clean_bc_rows: bool = False
    single_image_rate: float = 0.3
    horizon: int = 15
    discount: float = 0.997
    lam: float = 0.95
    pmpo: PMPO = PMPO()
    rms_decay: float = 0.99
    perceptual: Callable[[Array, Array], Array] | None = None
    tokenizer_phase: PhaseConfig = PhaseConfig()
    dynamics_phase: PhaseConfig = PhaseConfig()
    finetune_phase: PhaseConfig = PhaseConfig(relevant=0.5)
    imagine_phase: PhaseConfig = PhaseConfig()
    bc_phase: PhaseConfig = PhaseConfig(relevant=1.0)


ACTING = ('encoder', 'dynamics', 'policy')  # parameter groups that acting needs


class MultiHead(nnx.Module):
    """Small MLP with one output layer for each of `ahead + 1` steps; feat [*B, D] -> [ahead + 1,
    *B, outputs].
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        layers: int,
        outputs: int,
        ahead: int,
        *,
        out_scale=1.0,
        dtype,
        rngs,
    ):
        self.mlp = MLP(
            inputs,
            units,
            layers,
            outputs * (ahead + 1),
            out_scale=out_scale,
            dtype=dtype,
            rngs=rngs,
        )
        self.ahead = ahead

    def __call__(self, feat: Float[Array, '*B D']) -> Float[Array, 'n *B O']:
        out = self.mlp(feat)
        return jnp.moveaxis(out.reshape(*out.shape[:-1], self.ahead + 1, -1), -2, 0)


def multi_token_targets(
    x: Array, is_first: Bool[Array, 'B T'], first: int, count: int
) -> tuple[Array, Array]:
    """x[t + first + n] for n < count and whether that step is of t's episode. -> [n, B, T, ...],
    bool [n, B, T]

    The one place where training looks ahead: with `first` = 1 on `prev_action` the action *chosen*
    at t is n = 0.
    """
    t = is_first.shape[1]
    episode = jnp.cumsum(is_first, 1)
    values, valid = [], []
    for shift in range(first, first + count):
        index = jnp.minimum(jnp.arange(t) + shift, t - 1)
        values.append(x[:, index])
        valid.append((episode[:, index] == episode) & (jnp.arange(t) + shift < t))
    return jnp.stack(values), jnp.stack(valid)


def discounted(
    reward: Float[Array, 'H N'], cont: Float[Array, 'H N'], discount: float
) -> Float[Array, ' N']:
    """Sum of dreamed rewards, r_1 + discount c_1 r_2 + ..; without a value at the end."""
    weight = jnp.cumprod(jnp.concatenate([jnp.ones_like(cont[:1]), discount * cont[:-1]]), 0)
    return (weight * reward).sum(0)


def hidden_matrices(params: Params) -> Params:
    """Which weights Muon orthogonalises: the matrices inside transformer layers; embeddings and
    readouts are Adam's.
    """
    inside = lambda path: {'layers', 'kernel'} <= {getattr(entry, 'key', None) for entry in path}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: optax.contrib.MuonDimensionNumbers() if inside(path) else None, params
    )


def optimiser(cfg: PhaseConfig) -> optax.GradientTransformation:
    """Warm-up, then constant; with `decay` the last part of the phase falls linearly to zero."""
    falling = round(cfg.decay * cfg.steps)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(
                cfg.learning_rate / max(cfg.warmup_steps, 1), cfg.learning_rate, cfg.warmup_steps
            ),
            optax.linear_schedule(cfg.learning_rate, 0.0, max(falling, 1)),
        ],
        [max(cfg.steps - falling, cfg.warmup_steps)],
    )
    if cfg.muon:
        method = optax.contrib.muon(
            rate, weight_decay=cfg.weight_decay, adam_b2=0.99, consistent_rms=0.2,
            muon_weight_dimension_numbers=hidden_matrices,
        )  # fmt: skip
    else:
        method = optax.adamw(rate, b2=0.99, weight_decay=cfg.weight_decay)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), method)


class Dreamer4:
    """The agent as the runner sees it: parameter groups, phases, and the policies to evaluate.

    Parameter groups: encoder, decoder, dynamics, policy, reward, cont, value, prior (the frozen
    copy of the policy that imagination training starts from) and bc (encoder, dynamics and policy
    of the baseline without a world model).
    """

    def __init__(self, cfg: Dreamer4Config, spec: EnvSpec):
        if spec.actions.kind != 'discrete':
            raise UserError(
                f'{spec.name} has {spec.actions.kind} actions; dreamer4 takes discrete ones'
            )
        if isinstance(spec.obs_shape, Mapping) or len(spec.obs_shape) != 3:
            raise UserError(
                f'{spec.name} has observations of shape {spec.obs_shape}; dreamer4 takes images [h, w, c]'
            )
        if cfg.finetune_phase.relevant >= 1:
            raise UserError(
                f'finetune_phase.relevant={cfg.finetune_phase.relevant:g}: expected less than 1; dynamics, rewards and '
                'ends learn from uniform rows'
            )
        self.cfg, self.spec = cfg, spec
        self.bins = symexp_bins(cfg.bins)
        outlines = nnx.eval_shape(
            lambda: self._modules(nnx.Rngs(0))
        )  # no weights: seconds less at every start
        self.bind = {name: build(module)[1] for name, module in outlines.items()}
        self.phases = self._phases()
        tokenizer = tuple(
            f'tokenizer.{name}' for name in ('patch', 'latents', 'bottleneck', 'transformer')
        )
        dynamics = tuple(
            f'dynamics.{name}' for name in ('pack', 'registers', 'k_max', 'transformer')
        )
        head = ('head_units', 'head_layers')
        self.shaped_by: Mapping[str, tuple[str, ...]] = {
            'encoder': tokenizer, 'decoder': (*tokenizer, 'tokenizer.pixels'),
            'dynamics': tokenizer + dynamics, 'bc': tokenizer + dynamics,
            'policy': (*head, 'multi_token'), 'prior': (*head, 'multi_token'), 'cont': head,
            'reward': (*head, 'multi_token', 'bins'), 'value': (*head, 'bins'),
        }  # fmt: skip
        with_model = ShortcutActor(self._bind, cfg.dynamics.context_noise)
        self.readouts: Mapping[str, ReadOut] = {
            'imagination': ReadOut(with_model, lambda p: {name: p[name] for name in ACTING}),
            'wm_bc': ReadOut(
                with_model, lambda p: {name: p[name] for name in ACTING} | {'policy': p['prior']}
            ),
            'bc': ReadOut(ShortcutActor(self._bind, 0.0), lambda p: p['bc']),
        }

    def _bind(self, name: str, params: Params) -> Any:
        """The module `name` with the weights params[name]."""
        return self.bind[name](params[name])

    def _modules(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        cfg, actions = self.cfg, self.spec.actions.size
        width, dtype = cfg.dynamics.transformer.width, jnp.dtype(cfg.dynamics.transformer.dtype)
        head = lambda outputs, ahead, scale: MultiHead(
            width,
            cfg.head_units,
            cfg.head_layers,
            outputs,
            ahead,
            out_scale=scale,
            dtype=dtype,
            rngs=rngs,
        )
        latents, bottleneck = cfg.tokenizer.latents, cfg.tokenizer.bottleneck
        assert not isinstance(self.spec.obs_shape, Mapping)
        h, w, c = self.spec.obs_shape
        return dict(
            encoder=Encoder(cfg.tokenizer, (h, w, c), rngs),
            decoder=Decoder(cfg.tokenizer, (h, w, c), rngs),
            dynamics=Dynamics(cfg.dynamics, latents, bottleneck, actions, rngs),
            policy=head(actions, cfg.multi_token, 0.01),
            reward=head(cfg.bins, cfg.multi_token, 0.0),
            cont=head(1, 0, 0.0),
            value=head(cfg.bins, 0, 0.0),
        )

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh weights of every group."""
        key_main, key_bc = jax.random.split(key)
        params = {name: build(m)[0] for name, m in self._modules(nnx.Rngs(key_main)).items()}
        other = {name: build(m)[0] for name, m in self._modules(nnx.Rngs(key_bc)).items()}
        params['prior'] = jax.tree.map(jnp.copy, params['policy'])
        params['bc'] = {name: other[name] for name in ACTING}
        return params

    def _phases(self) -> tuple[Phase, ...]:
        def phase(name, trains, loss, scales, begin=None, rms_decay=self.cfg.rms_decay):
            c: PhaseConfig = getattr(self.cfg, f'{name}_phase')
            return Phase(
                name,
                trains,
                loss,
                scales,
                optimiser(c),
                c.steps,
                c.batch,
                c.length,
                relevant=c.relevant,
                rms_decay=rms_decay,
                ema_decay=c.ema_decay,
                begin=begin,
                scheduled=c.decay > 0,
            )

        tokenizer_scales = (
            dict(recon=1.0) if self.cfg.perceptual is None else dict(recon=1.0, lpips=0.2)
        )
        return (
            phase('tokenizer', ('encoder', 'decoder'), self.tokenizer_loss, tokenizer_scales),
            phase('dynamics', ('dynamics',), self.dynamics_loss, dict(shortcut=1.0)),
            phase(
                'finetune',
                ('dynamics', 'policy', 'reward', 'cont'),
                self.finetune_loss,
                dict(shortcut=1.0, policy=1.0, reward=1.0, cont=1.0),
            ),
            phase(
                'imagine',
                ('policy', 'value'),
                self.imagination_loss,
                dict(policy=1.0, prior=1.0, value=1.0),
                begin=lambda params: {**params, 'prior': jax.tree.map(jnp.copy, params['policy'])},
                # beta KL starts at 0: dividing it by its own size would forbid every change
                rms_decay=None,
            ),
            phase('bc', ('bc',), self.bc_loss, dict(policy=1.0)),
        )

    def twohot(self, logits: Float[Array, '*B bins']) -> TwoHot:
        return TwoHot(logits, self.bins)

    def encode(self, params: Params, step: Step) -> Float[Array, 'B T Z c']:
        """Latents of a window of frames, packed as the dynamics takes them; without gradient."""
        z, _ = self._bind('encoder', params)(step.obs.astype(jnp.float32), step.is_first)
        dynamics = self.cfg.dynamics
        return sg(z.reshape(*z.shape[:2], self.cfg.tokenizer.latents // dynamics.pack, -1))

    def model(self, params: Params, *, images: bool = True) -> ShortcutModel:
        """The world model; without `images` it neither observes nor decodes frames."""
        reward, cont = self._bind('reward', params), self._bind('cont', params)
        return ShortcutModel(
            self._bind('dynamics', params),
            self._bind('encoder', params) if images else None,
            self._bind('decoder', params) if images else None,
            lambda feat: self.twohot(reward(feat)[0]).mean(),
            lambda feat: Bernoulli(cont(feat)[0, ..., 0]).mean(),
        )

    def expected_return(self, params: Params, feat: Float[Array, '*B D']) -> Float[Array, '*B']:
        """The value head's mean."""
        return self.twohot(self._bind('value', params)(feat)[0]).mean()

    def choose(self, params: Params, state: State, feat: Float[Array, 'N D'], key: PRNGKeyArray):
        """The policy's draw, one-hot [N, A], and the probabilities it was drawn with [N, A]."""
        dist = Categorical(self._bind('policy', params)(feat)[0])
        return dist.sample(key), jax.nn.softmax(dist.logits, -1)

    def for_inference(self, params: Params) -> Params:
        """Kernels in the type they are multiplied in, see `nn.core.cast_kernels`; without the prior
        and the baseline.
        """
        return cast_all_kernels(self._modules, params)

    @property
    def sampling_steps(self) -> tuple[int, ...]:
        """The numbers K of denoising steps that the model knows."""
        return tuple(2**i for i in range(self.cfg.dynamics.finest + 1))

    def with_sampling_steps(self, steps: int) -> 'Dreamer4':
        """The same agent, dreaming with another K."""
        dynamics = dataclasses.replace(self.cfg.dynamics, sampling_steps=steps)
        return Dreamer4(dataclasses.replace(self.cfg, dynamics=dynamics), self.spec)

    # ---------------------------------------------------------------- losses, one per phase

    def tokenizer_loss(
        self, params: Params, batch: Batch, key: PRNGKeyArray, step: Array
    ) -> tuple[Losses, Metrics]:
        """Masked autoencoding, MSE over all patches (+ perceptual distance); Dreamer 4 eq. 5.

        Bernoulli pixels have their cross-entropy in the place of the squared error.
        """
        if self.cfg.tokenizer.pixels == 'bernoulli' and batch.step.obs.dtype != bool:
            dtype = batch.step.obs.dtype
            raise UserError(
                f'{self.spec.name} has observations of {dtype}; pixels=bernoulli takes boolean ones'
            )
        encoder, decoder = (self._bind(name, params) for name in ('encoder', 'decoder'))
        image = batch.step.obs.astype(jnp.float32)
        key_mask, key_single = jax.random.split(key)
        mask = draw_mask(
            key_mask, image.shape[:2], encoder.patches, self.cfg.tokenizer.max_mask_rate
        )
        is_first = self._single_images(batch.step.is_first, key_single)
        z, _ = encoder(image, is_first, mask.hidden)
        dist, _ = decoder.dist(z, is_first)
        error = -dist.log_prob(image)
        output = dist.mean() if isinstance(dist, Bernoulli) else dist.mean
        if self.cfg.channel_weighting:
            share = jnp.square(image).mean((0, 1, 2, 3))
            error = error * sg(jnp.sqrt(share.mean() / (share + 0.01 * share.mean())))
        losses = dict(recon=error.mean((-3, -2, -1)))
        if self.cfg.perceptual is not None:
            losses['lpips'] = self.cfg.perceptual(output, image)
        wrong = ((output > 0.5) != (image > 0.5)).any((-3, -2, -1))
        clear = mask.rate < 0.1
        return losses, {
            'tokenizer/wrong_frames_unmasked': (wrong & clear).sum() / jnp.maximum(clear.sum(), 1)
        }

    def _single_images(self, is_first: Bool[Array, 'B T'], key: PRNGKeyArray) -> Bool[Array, 'B T']:
        """A share of the rows as separate images: every frame begins an episode; Dreamer 4 section
        4.
        """
        return is_first | jax.random.bernoulli(key, self.cfg.single_image_rate, (len(is_first), 1))

    def _denoise(
        self, params: Params, batch: Batch, key: PRNGKeyArray, step: Array, agent: bool = True
    ):
        """One noisy pass over a window. -> (shortcut loss [B, T], feat [B, T, D], None without
        `agent`, metrics)

        Bootstrap rows are the first ones. Relevant rows, which finetuning puts last, have no
        dynamics loss; with `clean_bc_rows` they are as noisy as the frames that the agent will act
        on.
        """
        cfg, dynamics = self.cfg, self._bind('dynamics', params)
        z1, k_max, finest = self.encode(params, batch.step), cfg.dynamics.k_max, cfg.dynamics.finest
        key_noise, key_context, key_z0, key_single = jax.random.split(key, 4)
        b, t = z1.shape[:2]
        rows = round(cfg.bootstrap_fraction * b) if k_max > 1 else 0
        noise = draw_signal_step(key_noise, (b, t), k_max, rows, step >= cfg.bootstrap_warmup)
        at = jax.random.bernoulli(key_context, cfg.context_frame_rate, (b, t))
        if cfg.clean_bc_rows:
            at |= batch.relevant[:, None]
        if cfg.context_frame_rate or cfg.clean_bc_rows:
            noise = SignalStep(
                jnp.where(at, cfg.dynamics.context_level, noise.signal_level),
                jnp.where(at, finest, noise.step_exponent),
            )
        z = corrupt(jax.random.normal(key_z0, z1.shape), z1, noise.signal_level / k_max)
        is_first = self._single_images(batch.step.is_first, key_single)
        labelled = jnp.broadcast_to(batch.has_action[:, None], (b, t))
        context = (batch.step.prev_action, labelled, is_first)
        x, feat, _ = dynamics(z, noise.signal_level, noise.step_exponent, *context, agent=agent)
        target = z1
        if rows:
            head = lambda tree: jax.tree.map(lambda a: a[:rows], tree)
            teacher = lambda z, signal_level, step_exponent: dynamics(
                z, signal_level, step_exponent, *head(context), agent=False
            )[0]
            coarse = bootstrap_target(teacher, head(z), head(noise), k_max)
            is_coarse = (noise.step_exponent[:rows] < finest)[..., None, None]
            target = target.at[:rows].set(jnp.where(is_coarse, coarse, z1[:rows]))
        loss = shortcut_loss(x, target, noise, k_max, cfg.ramp_floor)
        metrics = {
            'dynamics/flow': loss[rows:].mean(),
            'dynamics/bootstrap': loss[:rows].mean() if rows else 0.0,
        }
        return loss, feat, metrics

    def dynamics_loss(
        self, params: Params, batch: Batch, key: PRNGKeyArray, step: Array
    ) -> tuple[Losses, Metrics]:
        """Shortcut forcing; Dreamer 4 eq. 8. The agent's token comes with finetuning; nothing sees
        it anyway.
        """
        loss, _, metrics = self._denoise(params, batch, key, step, agent=False)
        return dict(shortcut=loss), metrics

    def finetune_loss(
        self, params: Params, batch: Batch, key: PRNGKeyArray, step: Array
    ) -> tuple[Losses, Metrics]:
        """Multi-token prediction of actions (relevant rows), rewards and shortcut forcing (other
        rows); eq. 9.

        Rewards and ends are learnt from uniform rows alone: relevant rows are drawn around rewards,
        and heads that learn from both say rewards too often. The paper leaves this open.
        """
        batch = jax.tree.map(
            lambda x: x[::-1], batch
        )  # relevant rows last: bootstrap rows come first
        shortcut, feat, metrics = self._denoise(
            params, batch, key, step + self.cfg.bootstrap_warmup
        )
        losses = dict(shortcut=jnp.where(batch.relevant[:, None], 0.0, shortcut))
        losses['policy'], accuracy = self._clone(params, feat, batch)
        count = self.cfg.multi_token + 1
        reward = self.twohot(self._bind('reward', params)(feat))
        target, valid = multi_token_targets(batch.step.reward, batch.step.is_first, 0, count)
        uniform = ~batch.relevant[:, None]
        valid &= uniform & batch.has_reward[:, None]
        losses['reward'] = -jnp.where(valid, reward.log_prob(target), 0.0).sum(0)
        cont = Bernoulli(self._bind('cont', params)(feat)[0, ..., 0])
        losses['cont'] = jnp.where(uniform, -cont.log_prob(~batch.step.is_terminal), 0.0)
        return losses, metrics | {'finetune/action_accuracy': accuracy}

    def _clone(
        self, params: Params, feat: Array, batch: Batch
    ) -> tuple[Float[Array, 'B T'], Array]:
        """Behaviour cloning of the next L + 1 actions on relevant, labelled rows.

        -> (loss, accuracy at n = 0)
        """
        dist = Categorical(self._bind('policy', params)(feat))
        target, valid = multi_token_targets(
            batch.step.prev_action, batch.step.is_first, 1, self.cfg.multi_token + 1
        )
        valid &= (batch.relevant & batch.has_action)[:, None]
        hit = (dist.logits[0].argmax(-1) == target[0].argmax(-1)) & valid[0]
        return -jnp.where(valid, dist.log_prob(target), 0.0).sum(0), hit.sum() / jnp.maximum(
            valid[0].sum(), 1
        )

    def imagination_loss(
        self, params: Params, batch: Batch, key: PRNGKeyArray, step: Array
    ) -> tuple[Losses, Metrics]:
        """PMPO on one rollout per context with the transformer frozen; Dreamer 4 eqs. 10 and 11.

        An eighth of the contexts is dreamed on a second time with the prior's actions, only to be
        compared with.
        """
        cfg = self.cfg
        model, value_head = self.model(params, images=False), self._bind('value', params)
        policy_head, prior_head = (
            self.bind['policy'](params[name]) for name in ('policy', 'prior')
        )
        key_context, key_roll = jax.random.split(key)
        state, context = model.prefill(
            self.encode(params, batch.step), batch.step, batch.has_action, key_context
        )
        start = context[:, -1]
        b, again = len(start), max(1, len(start) // 8)

        def act(_, feat, key):
            logits = jnp.concatenate([policy_head(feat[:b])[0], prior_head(feat[b:])[0]])
            return Categorical(logits).sample(key)

        begin, feat = jax.tree.map(lambda x: jnp.concatenate([x, x[:again]]), (state, start))
        _, action, both = sg(rollout(model, act, begin, feat, key_roll, cfg.horizon))
        pred = jax.tree.map(lambda x: x[:, :b], both)
        action = action[:, :b]
        feat = sg(jnp.concatenate([start[None], pred.feat[:-1]]))  # what each action was chosen on
        value, value_next = (self.twohot(value_head(f)[0]) for f in (feat, pred.feat))
        ret = sg(lambda_return(pred.reward, pred.cont, value_next.mean(), cfg.discount, cfg.lam))
        alive = (~batch.step.is_last[:, -1]).astype(jnp.float32)
        weight = jnp.cumprod(jnp.concatenate([alive[None], pred.cont[:-1]]), 0)
        adv = ret - sg(value.mean())
        policy, prior = (Categorical(head(feat)[0]) for head in (policy_head, prior_head))
        losses = cfg.pmpo(policy, prior, action, adv, weight) | dict(
            value=critic_loss(value, ret, weight)
        )
        sums = discounted(both.reward, both.cont, cfg.discount)
        metrics = {
            'imag/return': sums[:b].mean(),
            'imag/return_prior': sums[b:].mean(),
            'imag/lambda_return': ret.mean(),
            'imag/reward': pred.reward.mean(),
            'imag/cont': pred.cont.mean(),
            'imag/value': value.mean().mean(),
            'imag/entropy': policy.entropy().mean(),
            'imag/positive': (adv >= 0).mean(),
            'imag/kl': policy.kl(prior).mean(),
        }
        return jax.tree.map(lambda x: x.swapaxes(0, 1), losses), metrics

    def bc_loss(
        self, params: Params, batch: Batch, key: PRNGKeyArray, step: Array
    ) -> tuple[Losses, Metrics]:
        """Behaviour cloning from scratch: the same networks, trained on the actions alone, from
        clean frames.
        """
        encoder, dynamics = (self._bind(name, params['bc']) for name in ('encoder', 'dynamics'))
        seen, shape = batch.step, batch.step.is_first.shape
        z, _ = encoder(seen.obs.astype(jnp.float32), seen.is_first)
        signal_level, step_exponent = (
            jnp.full(shape, self.cfg.dynamics.k_max - 1),
            jnp.full(shape, self.cfg.dynamics.finest),
        )
        labelled = jnp.broadcast_to(batch.has_action[:, None], shape)
        _, feat, _ = dynamics(
            dynamics.packed(z),
            signal_level,
            step_exponent,
            seen.prev_action,
            labelled,
            seen.is_first,
        )
        loss, accuracy = self._clone(params['bc'], feat, batch)
        return dict(policy=loss), {'bc/action_accuracy': accuracy}


@dataclasses.dataclass(frozen=True)
class ShortcutActor:
    """Acts in a real environment on the agent's token. Parameters: encoder, dynamics, policy."""

    bind: Callable[[str, Params], Any]
    context_noise: float

    def _model(self, params: Params) -> ShortcutModel:
        dynamics = self.bind('dynamics', params)
        dynamics.cfg = dataclasses.replace(dynamics.cfg, context_noise=self.context_noise)
        return ShortcutModel(dynamics, self.bind('encoder', params))

    def initial(self, params: Params, batch: int) -> ShortcutState:
        return self._model(params).initial(batch)

    def act(
        self,
        params: Params,
        state: ShortcutState,
        step: Step,
        key: PRNGKeyArray,
        greedy: Array | bool,
    ):
        """-> (state, action index [N])."""
        key_observe, key_act = jax.random.split(key)
        state, feat = self._model(params).observe(state, step, key_observe)
        dist = Categorical(self.bind('policy', params)(feat)[0])
        return state, jnp.where(greedy, dist.logits.argmax(-1), dist.sample_index(key_act))
