"""Actor, critic and their targets in Dreamer V1, V2 and V3 against the references' numbers and
plain loops.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.nn.action_dists import BoundedNormalDist
from reverie.nn.dists import Categorical, Normal, TwoHot, symexp_bins
from reverie.objectives.actor_critic import (
    Backprop,
    Critic,
    MeanStdScale,
    Mixed,
    NoScale,
    PercentileScale,
    Reinforce,
    ReplayCritic,
    SlowAverage,
    SlowCopy,
)
from reverie.objectives.behavior import (
    ExclusiveReturn,
    InclusiveReturn,
    by_row,
    lambda_return,
    with_root,
)
from tests.golden_numbers import golden

pytestmark = pytest.mark.compat

BINS = symexp_bins(255)


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def arrays(prefix):
    return {name: jnp.asarray(x) for name, x in golden(prefix).items()}


def time_major(g):
    return {name: x.swapaxes(0, 1) if x.ndim > 1 else x for name, x in g.items()}


# ---------------------------------------------------------------- V3


def v3():
    g = time_major(arrays('v3/imag'))
    value, slow = TwoHot(g['value_logits'], BINS), TwoHot(g['slow_logits'], BINS)
    return g, value, slow, ExclusiveReturn()(g['rew'], g['con'], value.mean())


def v3_policy_loss(logits, state):
    """Return (loss [H, N], metrics) with the return scale after `state`."""
    g, value, _, targets = v3()
    scale = PercentileScale()
    _, spread = scale.stats(scale.update(state, targets.ret))
    action = jax.nn.one_hot(g['act'][:-1], 5)
    return Reinforce(3e-4)(Categorical(logits[:-1]), action, targets, value.mean(), spread)


def test_v3_returns_equal_the_references():
    g, *_, targets = v3()
    close(targets.ret, g['ret'])


def test_v3_actor_loss_and_gradient_equal_the_references():
    g = time_major(arrays('v3/imag'))
    fresh = PercentileScale().initial()
    loss, metrics = v3_policy_loss(g['policy_logits'], fresh)
    close(loss, g['policy_loss'])
    close(metrics['imag/adv'], g['adv_mean'])
    grad = jax.grad(lambda x: v3_policy_loss(x, fresh)[0].mean())(g['policy_logits'])
    close(grad, g['policy_grad'])


def test_v3_actor_loss_is_scaled_by_the_running_range_of_returns():
    g = time_major(arrays('v3/imag'))
    wide = {**PercentileScale().initial(), 'low': jnp.array(-3.0), 'high': jnp.array(9.0)}
    close(v3_policy_loss(g['policy_logits'], wide)[0], g['policy_loss_scaled'])


def test_v3_actor_loss_with_continuous_actions_equals_the_references():
    g, value, _, targets = v3()
    policy = BoundedNormalDist()(g['cont_raw'][:-1])
    scale = PercentileScale()
    _, spread = scale.stats(scale.update(scale.initial(), targets.ret))
    loss, _ = Reinforce(3e-4)(policy, g['cont_act'][:-1], targets, value.mean(), spread)
    close(loss, g['cont_policy_loss'])


def test_v3_critic_loss_and_gradient_equal_the_references():
    g, _, slow, targets = v3()
    loss = lambda logits: Critic(slow=1.0)(TwoHot(logits, BINS), targets, slow.mean())
    close(loss(g['value_logits']), g['value_loss'])
    close(jax.grad(lambda x: loss(x).mean())(g['value_logits']), g['value_grad'])


def test_v3_replay_critic_equals_the_references():
    g, m = arrays('v3/repl'), arrays('v3/imag')
    critic = ReplayCritic()
    rest = (m['rew'], g['last'], g['term'], g['boot'])
    close(critic.returns(*rest), g['ret'])
    value, slow = TwoHot(m['value_logits'], BINS), TwoHot(m['slow_logits'], BINS)
    close(critic(value, slow.mean(), *rest), g['loss'])


def test_v3_replay_returns_equal_the_references_where_episodes_end():
    g = arrays('v3/lambda')
    close(ReplayCritic().returns(g['rew'], g['last'] > 0, g['term'] > 0, g['boot']), g['ret'])


def test_v3_replay_gradient_reaches_the_values_but_not_their_targets():
    g, m = arrays('v3/repl'), arrays('v3/imag')

    def loss(logits, slow, boot):
        return ReplayCritic()(
            TwoHot(logits, BINS), slow, m['rew'], g['last'], g['term'], boot
        ).mean()

    to_value, to_slow, to_boot = jax.grad(loss, (0, 1, 2))(m['value_logits'], m['rew'], g['boot'])
    assert to_value.any() and not to_slow.any() and not to_boot.any()
    assert not to_value[np.asarray(g['last'])].any()


# ---------------------------------------------------------------- V2


def mlp(g, name, x):
    for layer in ('dense0', 'dense1'):
        x = jax.nn.elu(x @ g[f'{name}/{layer}/kernel'] + g[f'{name}/{layer}/bias'])
    return x @ g[f'{name}/out/kernel'] + g[f'{name}/out/bias']


def v2():
    g = arrays('v2/ac')
    slow = mlp(g, 'target', g['feat'])[..., 0]
    return g, slow, InclusiveReturn()(g['reward'], g['discount'], slow)


def test_v2_targets_and_weights_equal_the_references():
    g, _, targets = v2()
    close(targets.ret, g['target'])
    close(targets.weight, g['weight'][:-1])
    close(targets.acted, g['target'][1:])
    close(targets.acted_weight, g['weight'][:-2])


V2 = {'reinforce': Reinforce(1e-3), 'dynamics': Backprop(1e-3), 'both': Mixed(0.9, 1e-3)}


@pytest.mark.parametrize('kind', V2)
def test_v2_actor_losses_equal_the_references(kind):
    g, slow, targets = v2()
    policy = Categorical(mlp(g, 'actor', g['feat'][:-1]))
    loss, _ = V2[kind](
        policy, g['action'][1:], targets, slow
    )  # the reference's action 0 led to the root
    close(loss.mean(), g[f'{kind}/actor_loss'])


def test_v2_critic_loss_equals_the_references():
    g, _, targets = v2()
    value = Normal(mlp(g, 'critic', g['feat'])[..., 0], 1.0, 0)
    close(Critic()(value, targets).mean(), g['critic_loss'])


def test_v2_returns_equal_the_references():
    g = arrays('v2/lambda')
    add = lambda x, last: jnp.concatenate([x, last[None]])
    ends = jnp.zeros(4)  # neither reward nor cont of the last state enters
    targets = InclusiveReturn()(
        add(g['reward'], ends), add(g['pcont'], ends), add(g['value'], g['bootstrap'])
    )
    close(targets.ret, g['ret'])


# ---------------------------------------------------------------- V1


def v1(scale=1.0):
    """The references' six imagined states, behind a root that must not matter.

    -> (targets, values with the root)
    """
    g = arrays('v2/lambda')
    root = jnp.full((1, 4), 1e3)
    reward, value = (jnp.concatenate([root, g[name]]) for name in ('reward', 'value'))
    return InclusiveReturn(discount=0.99, root=False)(
        reward * scale, jnp.ones_like(reward), value
    ), value


def test_v1_returns_weights_and_losses_equal_the_references():
    targets, value = v1()
    close(targets.ret, golden('v1/lambda')['ret'])
    close(targets.weight, golden('v1')['discount'])
    uniform = Categorical(jnp.zeros((6, 4, 2)))
    loss, _ = Backprop()(uniform, jnp.zeros((6, 4, 2)), targets, value)
    close(loss.mean(), golden('v1')['actor_loss'])
    close(Critic()(Normal(value, 1.0, 0), targets).mean(), golden('v1')['value_loss'])


def test_v1_actor_gradient_passes_through_rewards_and_the_critics_does_not():
    uniform, action = Categorical(jnp.zeros((6, 4, 2))), jnp.zeros((6, 4, 2))
    actor = lambda scale: Backprop()(uniform, action, *v1(scale))[0].mean()
    critic = lambda scale: Critic()(Normal(v1()[1], 1.0, 0), v1(scale)[0]).mean()
    slope = (actor(1.01) - actor(0.99)) / 0.02
    np.testing.assert_allclose(jax.grad(actor)(1.0), slope, rtol=1e-2)
    assert jax.grad(critic)(1.0) == 0


# ---------------------------------------------------------------- all three against a loop

RETURNS = {
    'v1': InclusiveReturn(0.9, 0.8, root=False),
    'v2': InclusiveReturn(0.9, 0.8),
    'v3': ExclusiveReturn(0.9, 0.8),
}


@pytest.mark.parametrize('agent', RETURNS)
def test_targets_equal_a_loop_over_states(agent):
    rng = np.random.default_rng(3)
    h = 5
    reward, value, cont = rng.normal(size=h + 1), rng.normal(size=h + 1), rng.random(h + 1)

    def ret(t):  # of state t
        if t == h:
            return value[h]
        own = t + (agent == 'v3')
        return reward[own] + 0.9 * cont[own] * (0.2 * value[t + 1] + 0.8 * ret(t + 1))

    start = 1 if agent == 'v1' else 0
    odds = lambda t: np.prod([0.9 * cont[i] for i in range(start, t)])
    if agent == 'v3':
        odds = lambda t: cont[0] * np.prod([0.9 * cont[i] for i in range(1, t + 1)])
    states = range(start, h)
    targets = RETURNS[agent](*(jnp.asarray(x, jnp.float32)[:, None] for x in (reward, cont, value)))
    close(targets.ret[:, 0], [ret(t) for t in states])
    close(targets.weight[:, 0], [odds(t) for t in states])
    actions = range(h if agent == 'v3' else h - 1)
    close(targets.acted[:, 0], [ret(t if agent == 'v3' else t + 1) for t in actions])
    close(targets.acted_weight[:, 0], [odds(t + start) for t in actions])


def test_reinforce_is_blind_to_how_the_action_was_made_and_backprop_sees_nothing_else():
    key = jax.random.key(0)
    reward, cont, value = (jax.random.uniform(k, (5, 3)) for k in jax.random.split(key, 3))
    policy = lambda mean: Normal(mean, jnp.ones_like(mean))

    def loss(objective, mean):
        action = mean + 0.5  # reparametrised, and the reward depends on it
        got = reward.at[1:].add(action[..., 0] ** 2)
        return objective(
            policy(jax.lax.stop_gradient(mean)), action, ExclusiveReturn()(got, cont, value), value
        )[0].mean()

    mean = jax.random.normal(key, (4, 3, 2))
    assert not jax.grad(lambda m: loss(Reinforce(0.0), m))(mean).any()
    path = jax.grad(lambda m: loss(Backprop(0.0), m))(mean)
    assert path[..., 0].any() and not path[..., 1].any()
    close(jax.grad(lambda m: loss(Mixed(0.7, 0.0), m))(mean), 0.3 * path)
    assert (Reinforce.through_model, Backprop.through_model, Mixed.through_model) == (
        False,
        True,
        True,
    )


# ---------------------------------------------------------------- running statistics and slow copie


@pytest.mark.parametrize(
    ('name', 'scale', 'batches'),
    [
        ('perc', PercentileScale(), 'seq'),
        ('perc_big', PercentileScale(), 'seq_big'),
        ('perc_debias', PercentileScale(debias=True), 'seq'),
        ('meanstd', MeanStdScale(), 'seq'),
    ],
)
def test_running_scales_equal_the_references(name, scale, batches):
    g = arrays('v3/norm')
    state, update = scale.initial(), jax.jit(scale.update)
    for batch, expected in zip(g[batches], g[name], strict=True):
        state = update(state, batch)
        close(jnp.stack(scale.stats(state)), expected)


def test_no_scale_changes_nothing():
    assert [float(x) for x in NoScale().stats(NoScale().update({}, jnp.ones(3)))] == [0.0, 1.0]


def test_the_slow_average_forgets_at_its_rate():
    slow, new = {'w': jnp.zeros(2)}, {'w': jnp.ones(2)}
    for step in range(50):
        slow = SlowAverage(0.02)(slow, new, step)
    close(slow['w'], 1 - 0.98**50)


def test_the_slow_copy_follows_at_the_first_update_and_every_third():
    copy = jax.jit(SlowCopy(3))
    slow, seen = {'w': jnp.array(-1)}, []
    for step in range(7):
        slow = copy(slow, {'w': jnp.array(step)}, step)
        seen.append(int(slow['w']))
    assert seen == [0, 0, 0, 3, 3, 3, 6]


def test_rows_of_an_imagined_loss_stay_with_their_window():
    h, batch = 2, 2
    starts = jnp.arange(6.0)  # start i belongs to window i // 3
    rows = by_row(with_root(starts, jnp.stack([starts] * (h - 1))), batch)
    assert rows.tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]


def test_transdreamers_returns_are_those_of_the_next_state():
    g = {name: jnp.asarray(x[..., 0]).T for name, x in golden('td/lambda').items()}  # [time, rows]
    ours = jax.jit(lambda *xs: lambda_return(*xs, 1.0, 0.95))(
        g['reward'], g['discount'][1:], g['value'][1:]
    )
    np.testing.assert_allclose(ours, g['ret'], rtol=1e-4)
