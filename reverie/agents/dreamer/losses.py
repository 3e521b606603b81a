"""The losses of Dreamer V1 to V3: the world model on replay, actor and critic in imagination."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from reverie.agents.dreamer.config import DreamerConfig, WorldModelConfig
from reverie.agents.dreamer.networks import Net
from reverie.models.rssm import LatentModel
from reverie.nn.networks import constant
from reverie.objectives.actor_critic import ActorObjective, SlowAverage, SlowCopy
from reverie.objectives.behavior import by_row, rollout, with_root
from reverie.types import Batch, Losses, Metrics, Outcome, Params, Step, sg


def dreamer_loss(
    net: Net,
    batch: Batch,
    key: PRNGKeyArray,
    cfg: DreamerConfig,
    step: Array,
    objective: ActorObjective,
) -> Outcome:
    """World model, actor and critic in one pass; their gradients do not mix.

    objective: what the policy learns by, in the agent's kind of action space.
    """
    key_world, key_imagine = jax.random.split(key)
    losses, metrics, unrolled = world_model_loss(net, batch, key_world, cfg.world)
    imagined = imagination_loss(net, unrolled, batch.step, key_imagine, cfg, objective)
    losses |= imagined.losses
    if cfg.replay_critic is not None:
        losses['replay_value'] = replay_value_loss(
            net, unrolled.feat, batch.step, imagined.root_return, cfg
        )
    memory = unrolled.memory if cfg.remember else None
    return Outcome(losses, metrics | imagined.metrics, memory, {'scale': imagined.scale})


def world_model_loss(
    net: Net, batch: Batch, key: PRNGKeyArray, cfg: WorldModelConfig
) -> tuple[Losses, Metrics, Any]:
    """Reconstruction, reward, end and KL of every step; V1 eq. 10, V2 eq. 2, V3 eqs. 2 to 5.

    -> (terms [B, T], metrics, the unrolled dynamics).
    """
    step = batch.step
    if batch.context is None:
        start = net.dynamics.initial(len(step.is_first))
    else:
        start = net.dynamics.unpack(batch.context)
    obs = net.encoder.prepare(step.obs, key)
    unrolled = net.dynamics.unroll(start, net.encoder(obs), step.prev_action, step.is_first, key)

    losses = reconstruction_loss(net.decoder(unrolled.state.h, unrolled.state.z), obs)
    reward = net.reward(unrolled.feat)
    losses['reward'] = -reward.log_prob(cfg.reward_transform(step.reward))
    if cfg.cont is not None:
        cont = net.cont(unrolled.feat)
        losses['cont'] = -cont.log_prob(cfg.cont_discount * ~step.is_terminal)
    losses |= cfg.kl(unrolled.post, unrolled.prior)

    entropy = dict(post=unrolled.post.entropy(), prior=unrolled.prior.entropy())
    metrics = {f'world/{name}_entropy': x.mean() for name, x in entropy.items()}
    metrics['world/kl'] = unrolled.post.kl(unrolled.prior).mean()
    return losses, metrics, unrolled


def reconstruction_loss(dists: Any, obs: Any) -> Losses:
    """-ln p of the observation: {'obs': [B, T]}, or {'obs/<key>': [B, T]} for a dictionary."""
    if isinstance(dists, Mapping):
        return {f'obs/{key}': -dist.log_prob(obs[key]) for key, dist in dists.items()}
    return {'obs': -dists.log_prob(obs)}


class Imagined(NamedTuple):
    """Results of imagination training."""

    losses: Losses  # policy, value: [B, horizon or so]
    metrics: Metrics
    root_return: Float[Array, 'B K']  # imagined from each root
    scale: Params  # running statistics of returns, updated


def imagination_loss(
    net: Net,
    unrolled: Any,
    seen: Step,
    key: PRNGKeyArray,
    cfg: DreamerConfig,
    objective: ActorObjective,
) -> Imagined:
    """Actor and critic in rollouts that start from replayed steps, the last K of each window.

    The world model and the critic that judges are constants. Where the objective asks for it, the
    gradient passes through imagined states to the actions that led there.
    """
    frozen = constant(net)
    model = LatentModel(frozen)  # its weights are constants, its states are not
    terminal = last_steps(seen.is_terminal, cfg)
    b, k = terminal.shape
    start = sg(model.dynamics.starts(unrolled, k))
    root = model.dynamics.feat(start)

    # Without a gradient through the model nothing is kept for a backward pass.
    acting = net if objective.through_model else frozen
    act = lambda _, feat, key: acting.policy(sg(feat)).sample(key)
    _, action, pred = rollout(model, act, start, root, key, cfg.horizon)
    feat = with_root(root, pred.feat)
    cont_root = model.cont(root)
    if cfg.recorded_root:
        cont_root = (cfg.world.cont_discount * ~terminal).reshape(-1)
    reward = with_root(model.reward(root), pred.reward)
    cont = with_root(cont_root, pred.cont)

    slow = None if cfg.slow is None else frozen.slow_value(feat).mean()
    value = slow if slow is not None and cfg.slow_target else frozen.value(feat).mean()
    targets = cfg.returns(reward, cont, value)
    stats = cfg.scale.update(net.params['scale'], targets.ret)
    policy = net.policy(sg(feat[:-1]))
    actor, metrics = objective(policy, action, targets, value, cfg.scale.stats(stats)[1])
    critic = cfg.critic(net.value(sg(feat)), targets, slow)
    metrics |= {
        'imag/return': targets.ret.mean(),
        'imag/reward': reward.mean(),
        'imag/cont': cont.mean(),
        'imag/value': value.mean(),
        'imag/scale': cfg.scale.stats(stats)[1],
    }
    losses = dict(policy=by_row(actor, b), value=by_row(critic, b))
    return Imagined(losses, metrics, targets.ret[0].reshape(b, k), stats)


def replay_value_loss(
    net: Net,
    feat: Float[Array, 'B T F'],
    step: Step,
    root_return: Float[Array, 'B K'],
    cfg: DreamerConfig,
) -> Float[Array, 'B K-1']:
    """The critic on replayed steps, with gradient to the representation; V3's critic replay loss."""
    assert cfg.replay_critic is not None
    feat, step = last_steps((feat, step), cfg)
    value = net.value(feat)
    slow = constant(net).slow_value(sg(feat)).mean()
    reward = cfg.world.reward_transform(step.reward)
    return cfg.replay_critic(value, slow, reward, step.is_last, step.is_terminal, root_return)


def last_steps(window: Any, cfg: DreamerConfig) -> Any:
    """The steps of a window [B, T, ...] that rollouts start from: [B, K, ...]."""
    k = cfg.imagine_last
    return window if k is None else jax.tree.map(lambda x: x[:, -k:], window)


def update_slow_critic(slow: SlowAverage | SlowCopy, params: Params, step: Array) -> Params:
    """Parameters after an update, the slow critic moved towards the critic."""
    return params | {'slow_value': slow(params['slow_value'], params['value'], step)}
