"""Auto-reset, time limits, action sets, sticky actions and names of device environments."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.agents import registry
from reverie.envs.device import TimeLimit, Vector, make, names
from reverie.envs.minatar import asterix, freeway, seaquest
from reverie.envs.minatar.board import LEFT, RIGHT
from reverie.types import UserError

N, T = 16, 300


@functools.cache
def episodes(limit=40):
    """Random play of Breakout: actions [T, N] and steps [1 + T, N]."""
    vector = Vector(make('minatar/breakout', time_limit=limit), N)
    actions = jax.random.randint(jax.random.key(1), (T, N), 0, 6)

    @jax.jit
    def play(key):
        state, first = vector.reset(key)
        keys = jax.random.split(key, T)
        _, rest = jax.lax.scan(lambda s, x: vector.step(s, x[0], x[1]), state, (actions, keys))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    return np.asarray(actions), jax.tree.map(np.asarray, play(jax.random.key(0)))


def test_a_last_step_is_followed_by_a_first_one_and_nothing_else_is():
    _, step = episodes()
    assert step.is_first[0].all()
    np.testing.assert_array_equal(step.is_first[1:], step.is_last[:-1])
    assert step.is_last.sum() > N


def test_a_first_step_ignores_the_action_and_carries_no_reward():
    _, step = episodes()
    first = step.is_first
    assert not step.prev_action[first].any() and not step.reward[first].any()
    assert not step.is_last[first].any() and not step.is_terminal[first].any()
    paddle, ball = np.zeros((10, 10), bool), step.obs[first][..., 1]
    paddle[9, 4] = True
    assert (step.obs[first][..., 0] == paddle).all()
    assert (ball[:, 3, 0] ^ ball[:, 3, 9]).all() and 0 < ball[:, 3, 0].mean() < 1


def test_prev_action_is_the_one_hot_of_the_action_given():
    actions, step = episodes()
    expected = np.eye(6)[actions] * ~step.is_first[1:, :, None]
    np.testing.assert_array_equal(step.prev_action[1:], expected)


def test_a_time_limit_truncates_and_never_terminates():
    env = TimeLimit(make('minatar/space_invaders'), 5)
    state, _ = env.reset(jax.random.key(0))
    flags = []
    for t in range(5):
        state, step = env.step(state, jnp.asarray(0), jax.random.key(t))
        flags.append((bool(step.is_last), bool(step.is_terminal)))
    assert flags == [(False, False)] * 4 + [(True, False)]


def test_dying_on_the_last_step_of_the_limit_is_terminal():
    _, step = episodes()
    age, on_limit = np.zeros(N, int), []
    for t in range(T + 1):
        age = np.where(step.is_first[t], 0, age + 1)
        assert (step.is_last[t] == (step.is_terminal[t] | (age == 40))).all()
        on_limit += list(step.is_terminal[t][age == 40])
    assert on_limit and step.is_terminal.any()


def test_sticky_actions_repeat_the_executed_action_a_tenth_of_the_time():
    env = make('minatar/breakout', sticky=0.1)
    state, _ = env.reset(jax.random.key(0))
    state = state._replace(executed=jnp.asarray(LEFT, jnp.int32))
    keys = jax.random.split(jax.random.key(1), 20_000)
    after, step = jax.jit(jax.vmap(lambda key: env.step(state, jnp.asarray(RIGHT), key)))(keys)
    stuck = np.asarray(after.executed == LEFT)
    assert abs(stuck.mean() - 0.1) < 4 * (0.09 / 20_000) ** 0.5
    np.testing.assert_array_equal(after.game.paddle, np.where(stuck, 3, 5))
    assert (step.prev_action.argmax(-1) == RIGHT).all()


MINIMAL = {
    'minatar/asterix': ('noop', 'left', 'up', 'right', 'down'),
    'minatar/breakout': ('noop', 'left', 'right'),
    'minatar/freeway': ('noop', 'up', 'down'),
    'minatar/seaquest': ('noop', 'left', 'up', 'right', 'down', 'fire'),
    'minatar/space_invaders': ('noop', 'left', 'right', 'fire'),
}


@pytest.mark.parametrize('name', MINIMAL)
def test_spec_tells_the_actions_and_channels_of_the_game(name):
    full, minimal = make(name).spec, make(name, minimal_actions=True).spec
    assert full.actions.meanings == ('noop', 'left', 'up', 'right', 'down', 'fire')
    assert minimal.actions.meanings == MINIMAL[name] and minimal.actions.size == len(MINIMAL[name])
    assert full.name == name and full.obs_shape == (10, 10, len(full.channels))


def test_every_game_is_among_the_names():
    assert set(MINIMAL) < set(names())


def test_a_minimal_action_does_what_its_name_says():
    env = make('minatar/breakout', minimal_actions=True, sticky=0.0)
    state, _ = env.reset(jax.random.key(0))
    after, step = env.step(
        state, jnp.asarray(env.spec.actions.meanings.index('right')), jax.random.key(1)
    )
    assert after.game.paddle == 5 and step.prev_action.tolist() == [0, 0, 1]


@pytest.mark.parametrize('name, limit', [('minatar/freeway', 2500), ('minatar/asterix', 1000)])
def test_gymnax_protocol_is_minimal_and_truncated_without_sticky_actions(name, limit):
    env = make(name, protocol='gymnax')
    assert isinstance(env, TimeLimit) and env.steps == limit
    assert env.env.sticky == 0.0 and env.env.minimal_actions
    assert make(name, protocol='gymnax', time_limit=None, sticky=0.1) == make(
        name, minimal_actions=True
    )


def test_dice_are_fair():
    keys = jax.random.split(jax.random.key(0), 20_000)
    roll = lambda game: jax.tree.map(np.asarray, jax.jit(jax.vmap(game().draw))(keys))
    speeds = Counter(roll(freeway.Freeway).speed.ravel().tolist())
    assert sorted(speeds) == [-5, -4, -3, -2, -1, 1, 2, 3, 4, 5]
    assert all(abs(count / 160_000 - 0.1) < 0.004 for count in speeds.values())
    chance = roll(seaquest.Seaquest)
    for rows in (chance.enemy_row, chance.diver_row):
        assert np.allclose(np.bincount(rows, minlength=10)[1:9] / 20_000, 1 / 8, atol=0.012)
        assert rows.min() == 1 and rows.max() == 8
    assert abs(chance.enemy_submarine.mean() - 1 / 3) < 0.015
    assert abs(roll(asterix.Asterix).gold.mean() - 1 / 3) < 0.015


@pytest.mark.parametrize(
    'call, words',
    [
        (
            lambda: make('minatar/pong'),
            "'minatar/pong' is unknown; expected one of minatar/asterix",
        ),
        (lambda: make('breakout'), "'breakout' is unknown"),
        (
            lambda: make('minatar/breakout', stickiness=0.1),
            "no option 'stickiness'; expected protocol, sticky",
        ),
        (
            lambda: make('minatar/breakout', protocol='atari'),
            "protocol='atari'; expected one of minatar, gymnax",
        ),
        (lambda: make('minatar/breakout', sticky=1.5), 'sticky=1.5 is not a probability'),
        (lambda: make('minatar/breakout', time_limit=0), 'time_limit=0'),
        (lambda: Vector(make('minatar/breakout'), 0), 'at least 1'),
    ],
)
def test_a_mistake_is_named_in_one_line(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.external('gymnax', 'gymnax')
def test_gymnax_truncation_is_not_terminal_and_shows_the_true_last_observation():
    env = make('gymnax/CartPole-v1', max_steps_in_episode=3)
    state, step = env.reset(jax.random.key(0))
    assert env.spec.obs_shape == (4,) == step.obs.shape and env.spec.actions.size == 2
    for t in range(3):
        before, (state, step) = step, env.step(state, jnp.asarray(1), jax.random.key(t))
    assert bool(step.is_last) and not bool(step.is_terminal)
    # Pushed to the right for three steps, the cart still speeds up; a fresh start would be near
    # rest.
    assert step.obs[1] > before.obs[1] > 0.2
    for call in (lambda: make('gymnax/Pong'), lambda: make('gymnax/Pong-misc', x=1)):
        with pytest.raises(UserError):
            call()


@pytest.mark.external('gymnax', 'gymnax')
def test_every_gymnax_id_without_a_download_steps_and_takes_an_agent():
    import gymnax

    names = [name for name in gymnax.registered_envs if 'MNIST' not in name]
    for name in names:
        env = make(f'gymnax/{name}')
        registry.make(registry.get('dreamer_v3_debug'), env.spec)
        state, step = env.reset(jax.random.key(0))
        action = env.spec.actions.sample(jax.random.key(1), 1)[0]
        _, then = env.step(state, action, jax.random.key(2))
        for x in (step, then):
            assert x.obs.shape == env.spec.obs_shape, name
            assert x.prev_action.shape == (env.spec.actions.size,), name
    assert len(names) >= 25
    assert make('gymnax/FrozenLake-misc').spec.obs_shape == (16,)


@pytest.mark.external('gymnax', 'gymnax')
def test_gymnax_actions_span_their_bounds_and_pictures_are_scaled_by_theirs():
    env = make('gymnax/Pendulum-v1')
    assert env.spec.actions.kind == 'continuous'
    torques = [float(env.move(jnp.full(1, a))[0]) for a in (-3.0, -1.0, 0.5, 1.0)]
    assert torques == [-2.0, -2.0, 1.0, 2.0]
    pong = make('gymnax/Pong-misc')  # float [30, 40, 3] from 0 to 2
    _, step = pong.reset(jax.random.key(0))
    assert step.obs.shape == (64, 64, 3) and step.obs.dtype == jnp.uint8
    assert step.obs.min() == 0 and step.obs.max() > 100
