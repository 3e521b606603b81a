"""PPO: its advantages against a loop, its masking, and two probes with known optimal returns."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.agents import ppo
from reverie.agents.ppo import PPO, PPOConfig, gae, ppo_loss, train
from reverie.envs.device import TimeLimit, Vector, make
from reverie.types import ActionSpace, EnvSpec, Step, UserError

SMALL = PPOConfig(
    env_frames=16_384, envs=16, rollout=16, minibatches=2, width=16, learning_rate=1e-2, snapshots=4
)


class CountState(NamedTuple):
    count: jax.Array
    time: jax.Array


@dataclasses.dataclass(frozen=True)
class Counter:
    """obs = number of ones played so far, modulo 4, one-hot; the action that equals its parity
    earns 1.
    """

    length: int = 6
    spec: EnvSpec = EnvSpec('counter', (4,), ActionSpace('discrete', 2))

    def _step(self, state, prev_action, reward):
        return Step(
            jax.nn.one_hot(state.count, 4) > 0, prev_action, jnp.float32(reward), state.time == 0,
            state.time == self.length, state.time == self.length,
        )  # fmt: skip

    def reset(self, key):
        state = CountState(jnp.int32(0), jnp.int32(0))
        return state, self._step(state, jnp.zeros(2), 0.0)

    def step(self, state, action, key):
        after = CountState((state.count + action) % 4, state.time + 1)
        return after, self._step(after, jax.nn.one_hot(action, 2), action == state.count % 2)


@dataclasses.dataclass(frozen=True)
class Bandit:
    """One step; action 1 earns 1, action 0 nothing."""

    spec: EnvSpec = EnvSpec('bandit', (2,), ActionSpace('discrete', 2))

    def reset(self, key):
        off = jnp.zeros((), bool)
        return (), Step(jnp.ones(2), jnp.zeros(2), jnp.float32(0), ~off, off, off)

    def step(self, state, action, key):
        on = jnp.ones((), bool)
        return (), Step(jnp.ones(2), jax.nn.one_hot(action, 2), jnp.float32(action), ~on, on, on)


@dataclasses.dataclass(frozen=True)
class Endless(Bandit):
    """Reward 1 at every step."""

    def step(self, state, action, key):
        off = jnp.zeros((), bool)
        return (), Step(jnp.ones(2), jax.nn.one_hot(action, 2), jnp.float32(1), off, off, off)


def advantage_by_definition(reward, is_last, is_terminal, value, t, discount, lam):
    """Sum over k of (discount lam)^k delta[t + k], up to the end of the episode or of the rollout."""
    total, weight = 0.0, 1.0
    for i in range(t, len(reward)):
        bootstrap = 0.0 if is_terminal[i] else value[i + 1]
        total += weight * (reward[i] + discount * bootstrap - value[i])
        weight *= discount * lam
        if is_last[i]:
            break
    return total


def episode_marks():
    """Rows arrive as: 3 steps and death, reset, 2 steps and a time limit, reset, 4 steps of an
    unfinished episode.
    """
    is_last = np.zeros((11, 1), bool)
    is_terminal = np.zeros((11, 1), bool)
    is_last[[2, 5]] = True
    is_terminal[2] = True
    valid = np.ones((11, 1), bool)
    valid[[3, 6]] = False  # the action was ignored: the reset arrived
    return is_last, is_terminal, valid


def test_gae_equals_the_loop_through_death_time_limit_and_reset():
    rng = np.random.default_rng(0)
    is_last, is_terminal, valid = episode_marks()
    reward, value = (
        rng.normal(size=(11, 1)).astype(np.float32),
        rng.normal(size=(12, 1)).astype(np.float32),
    )
    adv = np.asarray(gae(*map(jnp.asarray, (reward, is_last, is_terminal, value)), 0.9, 0.8))
    for t in np.flatnonzero(valid):
        expected = advantage_by_definition(
            reward[:, 0], is_last[:, 0], is_terminal[:, 0], value[:, 0], t, 0.9, 0.8
        )
        assert adv[t, 0] == pytest.approx(expected, abs=1e-5)


def test_a_truncated_step_bootstraps_from_its_own_value_and_a_terminal_one_does_not():
    is_last, is_terminal, _ = episode_marks()
    reward = jnp.ones((11, 1))
    marks = jnp.asarray(is_last), jnp.asarray(is_terminal)
    slope = jax.jacobian(lambda v: gae(reward, *marks, v, 0.9, 0.8)[:, 0])(jnp.zeros((12, 1)))[
        :, :, 0
    ]
    assert slope[5, 6] == pytest.approx(
        0.9
    )  # time limit: the observation that arrived with it is row 6
    assert slope[2, 3] == 0.0
    assert not np.any(slope[:3, 3:]) and not np.any(
        slope[4:6, 7:]
    )  # nothing leaks in from a later episode


def test_returns_of_a_played_rollout_equal_their_definition_through_deaths_and_time_limits():
    """Breakout, where a missed first ball ends an episode at step 6 and the limit ends the others
    at 15.
    """
    config = PPOConfig(env_frames=1024, envs=16, rollout=64, width=16, snapshots=1)
    env = make('minatar/breakout', time_limit=15)
    agent, vector = PPO(env.spec, config), Vector(env, config.envs)

    @jax.jit
    def play(key):
        state, rows = ppo.rollout(agent, vector, ppo.begin(agent, vector, key))
        value = jnp.concatenate([rows.value, agent.bind(state.params)(state.step.obs)[1][None]])
        return rows, value, gae(rows.reward, rows.is_last, rows.is_terminal, value, 0.9, 0.8)

    rows, value, adv = jax.tree.map(np.asarray, play(jax.random.key(0)))

    def lambda_return(t, n):
        ahead = 0.0 if rows.is_terminal[t, n] else value[t + 1, n]
        if not rows.is_last[t, n] and t < 63:
            ahead = 0.2 * ahead + 0.8 * lambda_return(t + 1, n)
        return rows.reward[t, n] + 0.9 * ahead

    assert rows.is_terminal.any() and (rows.is_last & ~rows.is_terminal).any()
    assert np.array_equal(rows.valid[1:], ~rows.is_last[:-1])
    for t, n in np.argwhere(rows.valid):
        assert adv[t, n] + value[t, n] == pytest.approx(lambda_return(t, n), abs=1e-5)


def test_the_pair_across_a_reset_has_no_weight_in_any_loss_term():
    rng = np.random.default_rng(1)
    f = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    valid = jnp.array([True, False, True, True, False, True])
    off = jnp.zeros(6, bool)
    batch = ppo.Transition(
        f(6, 2), jnp.array([0, 1, 2, 0, 1, 2]), f(6), f(6), valid, f(6), off, off
    )
    logits, value, adv, ret = f(6, 3), f(6), f(6), f(6)
    keep = np.flatnonzero(valid)
    kept = jax.tree.map(lambda x: x[keep], (logits, value, batch, adv, ret))
    with_resets, without = ppo_loss(logits, value, batch, adv, ret, SMALL), ppo_loss(*kept, SMALL)
    for name in ('policy', 'value', 'entropy'):
        assert with_resets[name] == pytest.approx(float(without[name]), abs=1e-6)


def test_the_clipped_objective_stops_the_gradient_of_a_ratio_that_went_far_enough():
    off = jnp.zeros(2, bool)
    batch = ppo.Transition(
        jnp.zeros((2, 1)),
        jnp.array([0, 0]),
        jnp.log(jnp.array([0.5, 0.5])),
        jnp.zeros(2),
        ~off,
        jnp.zeros(2),
        off,
        off,
    )
    loss = lambda logits: ppo_loss(
        logits, jnp.zeros(2), batch, jnp.array([1.0, -1.0]), jnp.zeros(2), SMALL
    )['policy']
    # Row 0: good action, already 1.76 times as likely. Row 1: bad action, still 1.76 times as
    # likely.
    slope = jax.grad(loss)(jnp.array([[2.0, 0.0], [2.0, 0.0]]))
    assert not np.any(slope[0])
    assert slope[1, 0] > 0.0


def test_rollout_pairs_each_action_with_what_arrived_after_it():
    agent, vector = PPO(Counter().spec, SMALL), Vector(Counter(), SMALL.envs)
    state = ppo.begin(agent, vector, jax.random.key(0))
    _, rows = jax.jit(lambda s: ppo.rollout(agent, vector, s))(state)
    parity = np.argmax(rows.obs, -1) % 2
    assert np.array_equal(rows.reward, (rows.action == parity) & rows.valid)
    ended = np.arange(16) % 7 == 6  # 6 actions, then one that the reset ignores
    assert np.array_equal(rows.valid, np.broadcast_to(~ended[:, None], (16, 16)))
    assert np.array_equal(
        rows.is_terminal, np.broadcast_to((np.arange(16) % 7 == 5)[:, None], (16, 16))
    )


@pytest.mark.parametrize('discount', [0.0, 0.9])
def test_ppo_earns_the_known_optimum_of_the_counter(discount):
    result = train(Counter(), dataclasses.replace(SMALL, discount=discount), jax.random.key(0))
    assert result.curve['return'][-1] > 5.5  # of 6; a policy blind to the count earns 3


def test_two_seeds_train_in_one_program_on_the_bandit_and_its_value_is_learnt():
    result = train(Bandit(), SMALL, jax.random.split(jax.random.key(0), 2))
    assert result.curve['return'].shape == (2, 4)
    assert np.all(result.curve['return'][:, -1] > 0.95)
    for seed in range(2):
        params = jax.tree.map(lambda x, seed=seed: x[seed], result.params)
        _, value = PPO(Bandit().spec, SMALL).bind(params)(jnp.ones((1, 2)))
        assert value[0] == pytest.approx(1.0, abs=0.1)
    first, second = jax.tree.leaves(result.params)[0]
    assert not np.array_equal(first, second)


def test_each_of_several_seeds_begins_as_it_would_alone():
    keys = jax.random.split(jax.random.key(3), 3)
    still = dataclasses.replace(SMALL, learning_rate=0.0)
    together = train(Bandit(), still, keys).params
    agent, vector = PPO(Bandit().spec, still), Vector(Bandit(), still.envs)
    for seed in range(3):
        alone = jax.jit(lambda key: ppo.begin(agent, vector, key).params)(keys[seed])
        jax.tree.map(
            lambda a, b, seed=seed: np.testing.assert_array_equal(a[seed], b), together, alone
        )


def test_a_time_limit_does_not_lower_the_value_of_the_last_state():
    """Reward 1 for ever, cut after 3 steps: worth 1 / (1 - 0.5) = 2 in every state, as if there
    were no limit.
    """

    config = dataclasses.replace(SMALL, discount=0.5, env_frames=32_768)
    result = train(TimeLimit(Endless(), 3), config, jax.random.key(0))
    _, value = PPO(Endless().spec, config).bind(result.params)(jnp.ones((1, 2)))
    assert value[0] == pytest.approx(2.0, abs=0.1)


def test_the_value_step_is_clipped_or_not():
    off = jnp.zeros(1, bool)
    batch = ppo.Transition(
        jnp.zeros((1, 1)), jnp.array([0]), jnp.zeros(1), jnp.zeros(1), ~off, jnp.zeros(1), off, off
    )

    def slope(value, ret, clip_value):
        config = dataclasses.replace(SMALL, clip_value=clip_value)
        loss = lambda v: ppo_loss(
            jnp.zeros((1, 2)), v[None], batch, jnp.zeros(1), ret[None], config
        )['value']
        return jax.grad(loss)(jnp.float32(value)).item()

    # The old value is 0, the return 3. At 0.5 the step is past its clip, where (0.2 - 3)^2 is the
    # larger error.
    assert slope(0.5, jnp.float32(3.0), 0.2) == 0.0
    assert slope(0.1, jnp.float32(3.0), 0.2) == pytest.approx(-2.9)
    assert slope(0.5, jnp.float32(3.0), None) == pytest.approx(-2.5)


def test_the_rate_falls_to_zero_or_stays_and_gradients_are_clipped_together_or_one_by_one():
    grads = {'a': jnp.array([3.0, 0.1]), 'b': jnp.array([-4.0])}

    def steps(**fields):
        config = dataclasses.replace(SMALL, learning_rate=0.1, adam_eps=1.0, **fields)
        tx = ppo.optimiser(config)
        total = config.updates * config.epochs * config.minibatches
        state = tx.init(grads)
        first, state = tx.update(grads, state)
        # Adam's count is that of the schedule; moments of constant gradients do not change after
        # correction of bias
        state = jax.tree.map(
            lambda x: jnp.full_like(x, total) if x.dtype == jnp.int32 else x, state
        )
        return first, tx.update(grads, state)[0]

    adam = lambda g: -0.1 * g / (abs(g) + 1.0)
    first, last = steps(max_grad_norm=None)
    np.testing.assert_allclose(first['a'], adam(grads['a']), rtol=1e-5)
    assert not np.any(last['a']) and not np.any(last['b'])
    first, last = steps(max_grad_norm=None, anneal=False)
    assert np.all(np.abs(last['a']) > 0)
    first, _ = steps(max_grad_norm=0.5)
    np.testing.assert_allclose(first['b'], adam(-4.0 * 0.5 / np.sqrt(25.01)), rtol=1e-4)
    first, _ = steps(max_grad_norm=None, max_grad_value=0.5)
    np.testing.assert_allclose(first['a'], adam(jnp.array([0.5, 0.1])), rtol=1e-5)


def test_separate_networks_share_no_weight_and_lecun_kernels_have_variance_one_over_inputs():
    config = dataclasses.replace(SMALL, width=64, layers=3, separate=True, init='lecun_normal')
    agent = PPO(make('minatar/breakout').spec, config)
    params = agent.init(jax.random.key(0))
    obs = jax.random.bernoulli(jax.random.key(1), 0.1, (8, 10, 10, 4))
    grads = jax.grad(lambda p: agent.bind(p)(obs)[1].sum())(params)
    assert len(params['hidden']) == len(params['value_hidden']) == 3
    assert not any(np.any(x) for x in jax.tree.leaves((grads['hidden'], grads['policy'])))
    assert all(np.any(x) for x in jax.tree.leaves((grads['value_hidden'], grads['value'])))
    kernel = params['hidden'][0]['kernel']
    assert kernel.shape == (400, 64) and np.std(kernel) == pytest.approx(1 / 20, rel=0.05)
    assert np.std(params['policy']['kernel']) == pytest.approx(
        1 / 8, rel=0.2
    )  # no small gain in front of the logits


def test_a_time_limit_that_counts_as_death_lowers_the_value():
    """Reward 1, cut after 3 steps, discount 0.5, nothing behind the limit: worth 1, 1.5 and 1.75,
    seen as one state.
    """
    config = dataclasses.replace(
        SMALL, discount=0.5, env_frames=32_768, bootstrap_truncated=False, lam=1.0
    )
    result = train(TimeLimit(Endless(), 3), config, jax.random.key(0))
    _, value = PPO(Endless().spec, config).bind(result.params)(jnp.ones((1, 2)))
    assert value[0] == pytest.approx((1 + 1.5 + 1.75) / 3, abs=0.1)


def test_snapshots_are_the_params_along_the_way_and_end_with_the_last():
    result = train(Counter(), dataclasses.replace(SMALL, env_frames=2048), jax.random.key(3))
    assert result.curve['env_frames'].tolist() == [512, 1024, 1536, 2048]
    for all_, last in zip(
        jax.tree.leaves(result.snapshots), jax.tree.leaves(result.params), strict=True
    ):
        assert all_.shape == (4, *last.shape)
        assert np.array_equal(all_[-1], last)
        assert last.size < 4 or not np.array_equal(all_[0], last)


def test_the_actor_is_greedy_or_follows_the_policys_probabilities():
    agent = PPO(Counter().spec, SMALL)
    params = agent.init(jax.random.key(0))
    params['policy']['bias'] = jnp.array([0.0, jnp.log(3.0)])
    _, one = Vector(Counter(), 4000).reset(jax.random.key(1))
    act = jax.jit(agent.act, static_argnums=4)
    state = agent.initial(params, 4000)
    _, greedy = act(params, state, one, jax.random.key(2), True)
    _, sampled = act(params, state, one, jax.random.key(2), False)
    assert np.all(greedy == 1)
    assert np.mean(sampled) == pytest.approx(0.75, abs=0.05)


def test_impossible_configurations_and_continuous_actions_are_refused():
    with pytest.raises(UserError, match='7 minibatches'):
        PPOConfig(minibatches=7)
    with pytest.raises(UserError, match='orthogonal, lecun_normal'):
        PPOConfig(init='zeros')
    with pytest.raises(UserError, match='0 hidden layers'):
        PPOConfig(layers=0)
    with pytest.raises(UserError, match='expected at least 163840, one update'):
        PPOConfig(env_frames=100, envs=64, rollout=128)
    with pytest.raises(UserError, match='expected discrete'):
        PPO(EnvSpec('arm', (3,), ActionSpace('continuous', 2)), SMALL)
