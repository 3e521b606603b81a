"""Hidden orders and cues: the rules as stated, against play written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.envs import device
from reverie.envs.memory import COLOURS, MOVES, Cue, HiddenOrder, OrderState
from reverie.types import UserError

KEY = jax.random.key(0)
STEP = {n: jax.jit(HiddenOrder(n).step) for n in (2, 4)}


def line_of_balls(order, progress=0):
    """The player at the left end of the second row, a ball in each of the next columns."""
    n = len(order)
    balls = jnp.array([(1, 1 + i) for i in range(n)], jnp.int32)
    as_int = lambda x: jnp.asarray(x, jnp.int32)
    return OrderState(as_int([1, 0]), balls, as_int(order), as_int(progress), jnp.asarray(False))


def walk(state, actions):
    """Take actions; return (state, rewards, balls that lie there after each action)."""
    rewards, lying = [], []
    for action in actions:
        state, step = STEP[len(state.order)](state, jnp.asarray(action), KEY)
        rewards.append(float(step.reward))
        lying.append(np.asarray(step.obs[..., 1:].any((0, 1))).tolist())
    return state, rewards, lying


STAY, LEFT, UP, RIGHT, DOWN = range(5)


def test_the_right_order_pays_each_ball_and_pays_again():
    state, rewards, lying = walk(line_of_balls([0, 1]), [RIGHT, RIGHT])
    assert rewards == [3, 3] and lying == [[False, True], [True, True]]
    assert bool(state.solved) and int(state.progress) == 0
    # the second ball has returned under the player; the first one is right again
    state, rewards, lying = walk(state, [STAY, LEFT, RIGHT])
    assert rewards == [0, 3, 3] and lying[1:] == [[False, True], [True, True]]


def test_a_wrong_ball_pays_nothing_and_all_return():
    state, rewards, lying = walk(line_of_balls([0, 2, 1, 3]), [RIGHT, RIGHT])
    assert rewards == [3, 0] and lying == [[False, True, True, True], [True] * 4]
    assert int(state.progress) == 0 and not bool(state.solved)


def test_a_ball_that_is_gone_does_not_count_as_wrong():
    state, rewards, _ = walk(line_of_balls([0, 3, 1, 2]), [RIGHT, LEFT, RIGHT])
    assert rewards == [3, 0, 0] and int(state.progress) == 1


def test_walls_stop_the_player_and_standing_still_takes_nothing():
    state, rewards, _ = walk(
        line_of_balls([0, 1])._replace(place=jnp.array([0, 0])), [UP, LEFT, STAY]
    )
    assert rewards == [0, 0, 0] and state.place.tolist() == [0, 0]
    onto = line_of_balls([0, 1])._replace(
        place=jnp.array([1, 7]), balls=jnp.array([(1, 7), (1, 2)])
    )
    state, rewards, _ = walk(onto, [RIGHT, STAY])  # against the wall, on top of a ball
    assert rewards == [0, 0] and int(state.progress) == 0


def test_success_pays_once_and_only_for_the_whole_order():
    env = HiddenOrder(2, pays='success')
    state, rewards = line_of_balls([0, 1]), []
    for action in (RIGHT, RIGHT, LEFT, RIGHT):
        state, step = env.step(state, jnp.asarray(action), KEY)
        rewards.append(float(step.reward))
    assert rewards == [0, 1, 0, 0]


def test_episodes_are_a_hundred_steps_and_differ_in_places_and_orders():
    env = device.make('hidden_order/4')
    vector = device.Vector(env, 64)
    state, step = jax.jit(vector.reset)(KEY)
    assert step.obs.shape == (64, 8, 8, 5) and step.obs.dtype == bool
    assert (step.obs.sum((1, 2)) == 1).all() and (
        step.obs.sum(-1) <= 1
    ).all()  # nothing lies on anything else
    order = state.env.env.order
    assert (jnp.sort(order) == jnp.arange(4)).all() and len(np.unique(order, axis=0)) > 15

    def play(state, key):
        return vector.step(state, jax.random.randint(key, (64,), 0, 5), key)

    _, steps = jax.jit(lambda s: jax.lax.scan(play, s, jax.random.split(KEY, 101)))(state)
    assert np.flatnonzero(steps.is_last.all(1)).tolist() == [99] and np.flatnonzero(
        steps.is_first.all(1)
    ).tolist() == [100]
    assert not steps.is_terminal.any() and steps.is_last.sum() == 64
    assert set(np.unique(steps.reward)) == {0, 3}


def test_the_image_shows_what_the_grid_shows():
    grid, image = HiddenOrder(6), HiddenOrder(6, 'image')
    for i in range(5):
        key = jax.random.key(i)
        cells, picture = np.asarray(grid.reset(key)[1].obs), np.asarray(image.reset(key)[1].obs)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        for y, x in np.ndindex(8, 8):
            corner, middle = picture[8 * y, 8 * x], picture[8 * y + 4, 8 * x + 4]
            ball = np.flatnonzero(cells[y, x, 1:])
            assert (corner == (COLOURS[ball[0]] if len(ball) else 0)).all()
            assert (middle == 255).all() == cells[y, x, 0]


def test_moves_are_what_their_names_say():
    spec = HiddenOrder().spec
    named = {'noop': (0, 0), 'left': (0, -1), 'up': (-1, 0), 'right': (0, 1), 'down': (1, 0)}
    assert [tuple(m) for m in MOVES.tolist()] == [named[m] for m in spec.actions.meanings]


@pytest.mark.parametrize('right', [True, False])
def test_a_cue_is_not_seen_until_it_was_chosen_and_pays_if_it_was(right):
    env, key = Cue(3), jax.random.key(1)
    state, step = env.reset(key)
    cue = int(state.cue)
    half = [cue == 0] * 2 + [cue == 1] * 2
    assert step.obs[:, :, 0].all(0).tolist() == half and bool(step.is_first)
    rewards = []
    for t in range(1, 5):
        action = cue if right == (t == 4) else 1 - cue  # what is done before does not matter
        state, step = env.step(state, jnp.asarray(action), key)
        assert step.obs[:, :, 0].all(0).tolist() == (
            half if t == 4 else [False] * 4
        )  # the answer, right or wrong
        assert bool(step.obs[..., 1].all()) == bool(step.obs[..., 1].any()) == (
            t in (2, 3)
        ) and not bool(step.is_first)
        rewards.append(float(step.reward))
        assert bool(step.is_terminal) == bool(step.is_last) == (t == 4)
    assert rewards == [0, 0, 0, float(right)]


@pytest.mark.parametrize(
    ('name', 'options', 'expected'),
    [
        ('hidden_order/7', {}, '4, 5, 6 balls'),
        ('hidden_order/4', dict(obs='sound'), 'grid, image'),
        ('hidden_order/4', dict(sticky=0.1), 'obs, pays'),
        ('memory/x', {}, 'memory/32'),
        ('memory/8', dict(obs='grid'), 'expected none'),
    ],
)
def test_what_does_not_exist_is_named(name, options, expected):
    with pytest.raises(UserError, match=expected):
        device.make(name, **options)
