"""The losses of Dreamer 4's phases: functions (net, batch, key, cfg, step) -> (losses, metrics).

Losses are terms [B, T] by name. step: updates of the phase before this one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from reverie.agents.dreamer4.config import Dreamer4Config
from reverie.agents.dreamer4.networks import Net, world_model
from reverie.models.tokenizer import draw_mask
from reverie.nn import lpips
from reverie.nn.dists import Bernoulli, Categorical, unit_range
from reverie.objectives.behavior import lambda_return, rollout
from reverie.objectives.flow import (
    SignalStep,
    bootstrap_target,
    corrupt,
    draw_signal_step,
    shortcut_loss,
)
from reverie.objectives.pmpo import critic_loss
from reverie.types import Batch, Losses, Metrics, State, UserError, sg

Terms = tuple[Losses, Metrics]


def tokenizer_loss(
    net: Net, batch: Batch, key: PRNGKeyArray, cfg: Dreamer4Config, step: Array
) -> Terms:
    """Masked autoencoding; Dreamer 4 eq. 5.

    Squared error over all patches (+ perceptual distance); cross-entropy if pixels are Bernoulli.
    """
    if cfg.tokenizer.pixels == 'bernoulli' and batch.step.obs.dtype != bool:
        dtype = batch.step.obs.dtype
        raise UserError(f'observations are of {dtype}; pixels=bernoulli takes boolean ones')
    image = unit_range(batch.step.obs)
    key_mask, key_single = jax.random.split(key)
    lead = batch.step.is_first.shape
    mask = draw_mask(key_mask, (lead[0], lead[1]), net.encoder.patches, cfg.tokenizer.max_mask_rate)
    is_first = single_images(batch.step.is_first, key_single, cfg)

    z, _ = net.encoder(image, is_first, mask.hidden)
    pixels, _ = net.decoder.dist(z, is_first)
    error = -pixels.log_prob(image)
    if cfg.channel_weighting:
        square = jnp.square(image).mean((0, 1, 2, 3))
        error = error * sg(jnp.sqrt(square.mean() / (square + 0.01 * square.mean())))
    losses = dict(recon=error.mean((-3, -2, -1)))

    output = pixels.mean() if isinstance(pixels, Bernoulli) else pixels.mean
    if cfg.perceptual is not None:
        losses['lpips'] = lpips.distance(net.params['lpips'], output, image)
    if cfg.tokenizer.pixels == 'mse':
        error = jnp.square(jnp.clip(output, 0, 1) - image).mean((-3, -2, -1))
        metrics: Metrics = {'tokenizer/psnr': -10 * jnp.log10(jnp.maximum(error, 1e-10)).mean()}
        return losses, metrics
    wrong = ((output > 0.5) != (image > 0.5)).any((-3, -2, -1))
    clear = mask.rate < 0.1
    wrong_clear = (wrong & clear).sum() / jnp.maximum(clear.sum(), 1)
    return losses, {'tokenizer/wrong_frames_unmasked': wrong_clear}


def dynamics_loss(
    net: Net, batch: Batch, key: PRNGKeyArray, cfg: Dreamer4Config, step: Array
) -> Terms:
    """Shortcut forcing; Dreamer 4 eq. 8. Without the agent token, which nothing attends to."""
    loss, _, metrics = shortcut_forcing(net, batch, key, cfg, step, agent=False)
    return dict(shortcut=loss), metrics


def finetune_loss(
    net: Net, batch: Batch, key: PRNGKeyArray, cfg: Dreamer4Config, step: Array
) -> Terms:
    """Multi-token prediction of actions and rewards beside shortcut forcing; Dreamer 4 eq. 9.

    Actions are learnt from relevant rows, everything else from uniform ones: relevant rows are
    drawn around rewards, and heads that learn from both predict rewards too often. The paper
    leaves this open.
    """
    # Bootstrap rows are the first ones, so relevant rows go last.
    batch = jax.tree.map(lambda x: x[::-1], batch)
    uniform = ~batch.relevant[:, None]
    step = step + cfg.bootstrap_warmup
    shortcut, feat, metrics = shortcut_forcing(net, batch, key, cfg, step)
    assert feat is not None
    losses = dict(shortcut=jnp.where(batch.relevant[:, None], 0.0, shortcut))

    losses['policy'], accuracy = cloning_loss(net.policy.all_steps(feat), batch, cfg.multi_token)

    reward = net.reward.all_steps(feat)
    target, valid = multi_token_targets(
        batch.step.reward, batch.step.is_first, 0, cfg.multi_token + 1
    )
    valid &= uniform & batch.has_reward[:, None]
    losses['reward'] = -jnp.where(valid, reward.log_prob(target), 0.0).sum(0)

    cont = net.cont(feat)
    losses['cont'] = jnp.where(uniform, -cont.log_prob(~batch.step.is_terminal), 0.0)
    return losses, metrics | {'finetune/action_accuracy': accuracy}


def imagination_loss(
    net: Net, batch: Batch, key: PRNGKeyArray, cfg: Dreamer4Config, step: Array
) -> Terms:
    """PMPO and the critic on one rollout per context, the transformer frozen; eqs. 10 and 11.

    An eighth of the contexts is dreamed on a second time with the prior's actions, for comparison.
    """
    task: Array | int = 0 if batch.task is None else batch.task
    model = world_model(net, images=False, task=task)
    key_context, key_rollout = jax.random.split(key)
    state, context = model.prefill(encode(net, batch), batch.step, batch.has_action, key_context)
    start = context[:, -1]
    b = len(start)
    compared = max(1, b // 8)

    def act(_: State, feat: Array, key: PRNGKeyArray) -> Array:
        policy, prior = net.policy(feat[:b]), net.prior(feat[b:])
        return Categorical(jnp.concatenate([policy.logits, prior.logits])).sample(key)

    if batch.task is not None:
        both_tasks = jnp.concatenate([batch.task, batch.task[:compared]])
        model = world_model(net, images=False, task=both_tasks)
    begin, feat = jax.tree.map(lambda x: jnp.concatenate([x, x[:compared]]), (state, start))
    _, action, both = sg(rollout(model, act, begin, feat, key_rollout, cfg.horizon))
    action = action[:, :b]
    pred = jax.tree.map(lambda x: x[:, :b], both)

    feat = sg(
        jnp.concatenate([start[None], pred.feat[:-1]])
    )  # of the state each action was chosen in
    value = net.value(feat)
    next_value = net.value(pred.feat).mean()
    ret = sg(lambda_return(pred.reward, pred.cont, next_value, cfg.discount, cfg.lam))
    adv = ret - sg(value.mean())
    alive = (~batch.step.is_last[:, -1]).astype(jnp.float32)
    weight = jnp.cumprod(jnp.concatenate([alive[None], pred.cont[:-1]]), 0)
    policy = net.policy(feat)
    prior = net.prior(feat)
    losses = cfg.pmpo(policy, prior, action, adv, weight)
    losses |= dict(value=critic_loss(value, ret, weight))

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


def encode(net: Net, batch: Batch) -> Float[Array, 'B T Z c']:
    """Latents of a window of frames, packed as the dynamics takes them; without gradient."""
    if batch.latents is not None:
        return net.dynamics.packed(batch.latents.astype(jnp.float32))
    z, _ = net.encoder(batch.step.obs, batch.step.is_first)
    return sg(net.dynamics.packed(z))


def single_images(
    is_first: Bool[Array, 'B T'], key: PRNGKeyArray, cfg: Dreamer4Config
) -> Bool[Array, 'B T']:
    """A share of the rows as separate images: every frame begins an episode; Dreamer 4 section 4."""
    return is_first | jax.random.bernoulli(key, cfg.single_image_rate, (len(is_first), 1))


def shortcut_forcing(
    net: Net, batch: Batch, key: PRNGKeyArray, cfg: Dreamer4Config, step: Array, agent: bool = True
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T D'] | None, Metrics]:
    """One noisy pass over a window -> (loss, feat or None without `agent`, metrics); eqs. 7 and 8.

    Bootstrap rows are the first ones. Relevant rows, which finetuning puts last, are as noisy as
    the frames that the agent will act on if `clean_bc_rows`.
    """
    k_max = cfg.dynamics.k_max
    finest = cfg.dynamics.finest
    z1 = encode(net, batch)
    b, t = z1.shape[:2]
    key_noise, key_context, key_z0, key_single = jax.random.split(key, 4)
    rows = round(cfg.bootstrap_fraction * b) if k_max > 1 else 0

    warm = step >= cfg.bootstrap_warmup
    noise = draw_signal_step(key_noise, (b, t), k_max, rows, warm, cfg.mixed_steps)
    at_context = jax.random.bernoulli(key_context, cfg.context_frame_rate, (b, t))
    if cfg.clean_bc_rows:
        at_context |= batch.relevant[:, None]
    if cfg.context_frame_rate or cfg.clean_bc_rows:
        noise = SignalStep(
            jnp.where(at_context, cfg.dynamics.context_level, noise.signal_level),
            jnp.where(at_context, finest, noise.step_exponent),
        )
    z = corrupt(jax.random.normal(key_z0, z1.shape), z1, noise.signal_level / k_max)
    is_first = single_images(batch.step.is_first, key_single, cfg)
    labelled = jnp.broadcast_to(batch.has_action[:, None], (b, t))
    context = (batch.step.prev_action, labelled, is_first)

    x, feat, _ = net.dynamics(
        z, noise.signal_level, noise.step_exponent, *context, agent=agent, task=batch.task
    )

    target = z1
    if rows:
        z_rows, noise_rows, context_rows = jax.tree.map(lambda a: a[:rows], (z, noise, context))

        def teacher(z: Array, signal_level: Array, step_exponent: Array) -> Array:
            return net.dynamics(z, signal_level, step_exponent, *context_rows, agent=False)[0]

        coarse = bootstrap_target(teacher, z_rows, noise_rows, k_max)
        is_coarse = (noise.step_exponent[:rows] < finest)[..., None, None]
        target = target.at[:rows].set(jnp.where(is_coarse, coarse, z1[:rows]))
    loss = shortcut_loss(x, target, noise, k_max, cfg.ramp_floor)
    metrics: Metrics = {
        'dynamics/flow': loss[rows:].mean(),
        'dynamics/bootstrap': loss[:rows].mean() if rows else jnp.zeros(()),
    }
    return loss, feat, metrics


def cloning_loss(
    policy: Categorical, batch: Batch, multi_token: int
) -> tuple[Float[Array, 'B T'], Float[Array, '']]:
    """Behaviour cloning of the next L + 1 actions on relevant, labelled rows; eq. 9.

    policy: [L + 1, B, T, A]. -> (loss, accuracy of the present step's action).
    """
    target, valid = multi_token_targets(
        batch.step.prev_action, batch.step.is_first, 1, multi_token + 1
    )
    valid &= (batch.relevant & batch.has_action)[:, None]
    hit = (policy.logits[0].argmax(-1) == target[0].argmax(-1)) & valid[0]
    loss = -jnp.where(valid, policy.log_prob(target), 0.0).sum(0)
    return loss, hit.sum() / jnp.maximum(valid[0].sum(), 1)


def multi_token_targets(
    x: Array, is_first: Bool[Array, 'B T'], first: int, count: int
) -> tuple[Array, Array]:
    """x[t + first + n] for n < count, and whether that step is of t's episode.

    -> [n, B, T, ...], bool [n, B, T]. The one place where training looks ahead: with `first` = 1
    on `prev_action` the action *chosen* at t is n = 0.
    """
    t = is_first.shape[1]
    episode = jnp.cumsum(is_first, 1)
    values = []
    valid = []
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
