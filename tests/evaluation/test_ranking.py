"""Order of policies by dreamed return: of worlds that are known, and of a player's own arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.evaluation import ranking, trust
from reverie.evaluation.starts import starts
from reverie.types import Step
from tests.evaluation.test_trust import ACTIONS, CONTEXT, SIDE, SPEC, Ring, end_of, reward_of, rules

DISCOUNT = 0.9


class RingEnv:
    """The ring as an environment; the state is (player, ball)."""

    spec = SPEC

    def reset(self, key):
        return self._arrive(jax.random.randint(key, (2,), 0, SIDE), jnp.zeros(ACTIONS), True)

    def step(self, state, action, key):
        player, ball = rules(state[0], state[1], action)
        return self._arrive(jnp.stack([player, ball]), jax.nn.one_hot(action, ACTIONS), False)

    def _arrive(self, state, action, first):
        obs = jnp.stack([jax.nn.one_hot(x, SIDE) for x in state], -1)[None] > 0.5
        over = end_of(*state) & (not first)
        reward = 0.0 if first else reward_of(*state)
        return state, Step(obs, action, jnp.asarray(reward), jnp.array(first), over, over)


@dataclasses.dataclass(frozen=True)
class Chaser:
    """Steps towards the ball with the probability `skill`, else anywhere."""

    def initial(self, params, batch):
        return ()

    def act(self, params, state, step, key, greedy):
        at = step.obs.argmax(2)[:, 0]  # [N, 2]
        towards = jnp.clip((at[:, 1] + 1 - at[:, 0]) % SIDE, 0, ACTIONS - 1)
        key_skill, key_any = jax.random.split(key)
        skilled = jax.random.uniform(key_skill, towards.shape) < params['skill']
        anywhere = jax.random.randint(key_any, towards.shape, 0, ACTIONS)
        return state, jnp.where(skilled, towards, anywhere)


POLICY = ranking.OnFrames(Chaser(), ACTIONS)
SKILLS = (0.0, 0.3, 0.6, 1.0)
PLAYERS = [POLICY.player(f'skill {x}', {'skill': jnp.array(x)}) for x in SKILLS]


def measure(*said, heads=()):
    """One world model for each factor of its reward head."""
    return ranking.measure(
        RingEnv(),
        lambda params: Ring(said=params['said']),
        {'said': jnp.array(said)},
        PLAYERS,
        heads,
        jax.random.key(3),
        context=CONTEXT,
        discount=DISCOUNT,
    )


def test_a_right_dream_ranks_players_as_the_game_does_and_an_inverted_one_upside_down():
    found = measure(1.0, -1.0)
    assert found['correlation']['per_seed'] == [pytest.approx(1.0), pytest.approx(-1.0)]
    assert found['place']['per_seed'] == [1.0, float(len(PLAYERS))]
    assert found['starts'] == 64
    for policy in found['policies']:
        right, inverted = policy['dreamed']['per_seed']
        real = policy['real']['per_seed'][0]
        assert right == pytest.approx(real, abs=0.5) and inverted == pytest.approx(-right, abs=1e-5)
    for row in found['drift']:  # the first seed is right, the second pays what the game takes
        real = row['real_reward']['per_seed'][0]
        assert row['dreamed_reward']['per_seed'] == [
            pytest.approx(real, rel=0.25),
            pytest.approx(-row['dreamed_reward']['per_seed'][0], rel=1e-5),
        ]
        assert row['dreamed_on']['mean'] == pytest.approx(row['real_on']['mean'], abs=0.1)
    real = [policy['real']['mean'] for policy in found['policies']]
    assert sorted(real) == real and real[-1] > real[0] + 1
    assert 't over 2 world models' in ranking.sentence(found)
    assert 'in the best third of the game with 1 of 2 world models' in ranking.sentence(found)


def test_the_policy_of_a_head_is_ranked_beside_the_players_and_acts_in_its_dream():
    """The same chaser as a policy on features is worth the same as on frames."""

    def policy(model, weights, greedy):
        def act(state, feat, key):
            at = feat[:, :-1].reshape(-1, SIDE, 2).argmax(1)
            return jax.nn.one_hot(jnp.clip((at[:, 1] + 1 - at[:, 0]) % SIDE, 0, 2), ACTIONS)

        return act

    weights = {'skill': jnp.array(1.0)}
    head = ranking.Player('head', Chaser(), lambda params: weights, policy, greedy=True)
    found = measure(1.0, heads=[head])
    chaser, own = found['policies'][-2:]
    assert own['name'] == 'head'
    for which in ('dreamed', 'real'):
        assert own[which]['mean'] == pytest.approx(chaser[which]['mean'], abs=1e-5)
    low, high = found['low']['mean'], found['high']['mean']
    assert -1 <= low <= found['correlation']['mean'] <= high <= 1
    assert 'bootstrap over 64 starts of one world model' in ranking.sentence(found)


def begin(count=32):
    return starts(
        RingEnv(),
        Chaser(),
        {'skill': jnp.array(0.5)},
        jax.random.key(5),
        count=count,
        context=CONTEXT,
    )


def test_returns_of_the_best_player_equal_its_steps_counted_one_by_one():
    moments = begin()
    weights = {'skill': jnp.array(1.0)}
    keys = jax.random.split(jax.random.key(0))
    played = ranking.real_course(RingEnv(), Chaser(), weights, moments, keys[0], False)
    acts = POLICY(Ring(), weights, False)
    dreamt = ranking.dreamed_course(Ring(), acts, moments, keys[1])
    real, dreamed = played.total(DISCOUNT), dreamt.total(DISCOUNT)
    np.testing.assert_allclose(played.on, dreamt.on)
    said = []
    for row in range(32):
        player, ball = (int(x) for x in moments.env[row])
        total, weight = 0.0, 1.0
        for _ in range(ranking.STEPS * bool(moments.alive[row])):
            action = min((ball + 1 - player) % SIDE, ACTIONS - 1)
            player, ball = rules(player, ball, action)
            total += weight * reward_of(player, ball)
            weight *= DISCOUNT
            if end_of(player, ball):
                break
        said.append(total)
    assert len(set(said)) == 3  # the ended, those on the ball in one step, and in two
    np.testing.assert_allclose(real, said, atol=1e-4)
    np.testing.assert_allclose(dreamed, said, atol=1e-4)


def test_starts_are_moments_of_play_with_the_frames_before_them():
    moments = begin(64)
    newest = moments.step.obs[:, -1, 0].argmax(1)
    np.testing.assert_array_equal(newest, moments.env)  # the state is that of the newest frame
    ended = np.asarray(moments.step.is_last[:, -1])
    assert 0 < ended.sum() < 64 and (moments.alive == ~ended).all()
    assert len(np.unique(np.asarray(moments.env), axis=0)) > 5
    first = np.asarray(moments.step.is_first[:, 1:])
    went_on = np.asarray(moments.step.is_last[:, :-1])
    np.testing.assert_array_equal(first, went_on)
    acts = POLICY(Ring(), {'skill': jnp.array(1.0)}, False)
    zero = ranking.dreamed_course(Ring(), acts, moments, jax.random.key(0)).total(0.9)
    assert (np.asarray(zero)[ended] == 0).all() and (np.asarray(zero)[~ended] > 0).all()


class SlipperyEnv(RingEnv):
    """The ring, whose player stays where it is in a quarter of the steps."""

    def step(self, state, action, key):
        stays = jax.random.bernoulli(key, 0.25)
        return super().step(state, jnp.where(stays, 0, action), key)


def test_the_ceiling_is_what_the_game_keeps_under_other_dice():
    players = [(Chaser(), {'skill': jnp.array(x)}) for x in (0.0, 1.0)]
    key = jax.random.key(0)
    for channel in trust.ceiling(RingEnv(), players, key):  # which has no dice
        assert [x['recall'] for x in channel] == [x['precision'] for x in channel] == [1.0] * 4
    player, ball = trust.ceiling(SlipperyEnv(), players, key)
    first = player[0]['recall']
    # two draws agree where both slip or neither does, or the action is to stay
    stays = 1 / 3  # of random play; a skilled one has to move, to keep up with the ball
    expected = np.mean([share + (1 - share) * (0.25**2 + 0.75**2) for share in (stays, 0.0)])
    assert first == pytest.approx(expected, abs=0.05)
    assert player[3]['recall'] < first and ball[0]['recall'] > 0.9


def test_agreement_is_spearman_s_and_ties_have_no_order():
    real = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
    found = ranking.rank(real[[1, 0, 2, 3]], real)
    assert found['correlation'] == pytest.approx(
        1 - 6 * 2 / (4 * 15)
    )  # 1 - 6 sum d^2 / n (n^2 - 1)
    assert found['place'] == 1 and found['low'] <= found['correlation'] <= found['high']
    flat = ranking.rank(np.ones((4, 2)), real)
    assert flat['correlation'] == 0 and flat['place'] == 4
