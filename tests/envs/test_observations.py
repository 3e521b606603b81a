"""Observations and actions of Gymnasium spaces: kinds, layouts, bounds, parts, and what is refused."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

gymnasium = pytest.importorskip('gymnasium')

from reverie.envs import spaces  # noqa: E402
from reverie.envs.host import HostVector, make  # noqa: E402
from reverie.envs.observations import EnvRefusedError, Wishes, form_of  # noqa: E402
from reverie.types import UserError  # noqa: E402

SPACE = gymnasium.spaces
INF = np.inf


def box(low, high, shape, dtype):
    return SPACE.Box(low, high, shape, dtype)


@pytest.mark.parametrize(('space', 'kind', 'shape', 'dtype'), [
    (box(0, 255, (84, 84, 3), np.uint8), 'image', (84, 84, 3), 'uint8'),
    (box(0, 255, (3, 96, 72), np.uint8), 'image', (96, 72, 3), 'uint8'),
    (box(0, 255, (4, 84, 84), np.uint8), 'image', (84, 84, 4), 'uint8'),
    (box(0, 255, (1, 40, 30), np.uint8), 'image', (40, 30, 1), 'uint8'),
    (box(0, 255, (4, 84, 84, 3), np.uint8), 'image', (84, 84, 12), 'uint8'),
    (box(0, 255, (4, 3, 84, 84), np.uint8), 'image', (84, 84, 12), 'uint8'),
    (box(0, 255, (64, 64), np.uint8), 'image', (64, 64, 1), 'uint8'),
    (box(0, 255, (20, 18, 2), np.uint8), 'image', (20, 18, 2), 'uint8'),
    (box(0, 65535, (48, 48, 1), np.uint16), 'image', (48, 48, 1), 'uint8'),
    (box(0, 1, (48, 48, 3), np.float32), 'image', (48, 48, 3), 'uint8'),
    (box(-1, 1, (3, 48, 48), np.float64), 'image', (48, 48, 3), 'uint8'),
    (box(0, 1, (30, 30, 5), np.bool_), 'image', (30, 30, 5), 'uint8'),
    (box(0, 1, (10, 10, 4), np.bool_), 'grid', (10, 10, 4), 'bool'),
    (box(0, 255, (7, 7, 3), np.uint8), 'grid', (7, 7, 3), 'uint8'),
    (box(0, 10, (3, 7, 9), np.int64), 'grid', (7, 9, 3), 'uint8'),
    (box(-2, 2, (5, 5, 2), np.float32), 'grid', (5, 5, 2), 'float32'),
    (box(0, 2**16, (4, 4), np.int64), 'vector', (16,), 'float32'),
    (box(0, 2**16, (4, 4, 1), np.int64), 'vector', (16,), 'float32'),
    (box(-INF, INF, (5, 5, 2), np.float32), 'vector', (50,), 'float32'),
    (box(-INF, INF, (5, 5), np.float32), 'vector', (25,), 'float32'),
    (box(0, 1, (2, 100, 3), np.float32), 'vector', (600,), 'float32'),
    (box(-3, 3, (4,), np.float64), 'vector', (4,), 'float32'),
    (box(0, 1, (), np.float32), 'vector', (1,), 'float32'),
])  # fmt: skip
def test_a_declared_array_becomes_an_image_a_grid_or_a_vector(space, kind, shape, dtype):
    form = spaces.view(space, Wishes(), 'x').forms['']
    assert (form.kind, form.shape, form.dtype) == (kind, shape, dtype)
    assert form.said.startswith(space.dtype.name) or kind == 'vector'


def test_layouts_and_scales_are_those_of_a_picture_moved_by_hand():
    rng = np.random.default_rng(0)
    stacks = rng.integers(0, 256, (2, 3, 20, 24), np.uint8)
    view = spaces.view(box(0, 255, stacks.shape, np.uint8), Wishes(), 'x')
    seen = view.see(stacks)['']
    for n, c in itertools.product(range(2), range(3)):
        np.testing.assert_array_equal(seen[..., 3 * n + c], stacks[n, c])
    depth = rng.uniform(-2, 6, (18, 20, 1)).astype(np.float32)
    seen = spaces.view(box(-2, 6, depth.shape, np.float32), Wishes(), 'x').see(depth)['']
    np.testing.assert_allclose(seen / 255, (depth + 2) / 8, atol=0.5 / 255 + 1e-6)
    board = rng.integers(3, 8, (6, 5, 2))
    seen = spaces.view(box(3, 7, board.shape, np.int64), Wishes(), 'x').see(board)['']
    np.testing.assert_allclose(seen / 255, (board - 3) / 4, atol=0.5 / 255)
    field = rng.uniform(-1, 1, (6, 5, 2)).astype(np.float32)
    seen = spaces.view(box(-1, 1, field.shape, np.float32), Wishes(), 'x').see(field)['']
    np.testing.assert_allclose(seen, (field + 1) / 2, atol=1e-6)


def test_traced_pictures_are_those_of_the_host():
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 2, (30, 40, 3)).astype(np.float32)
    how = ('x', image.shape, image.dtype, 0.0, 2.0, Wishes(size=(16, 24)))
    ours, theirs = form_of(*how).convert(image), form_of(*how, jnp).convert(jnp.asarray(image))
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize(('space', 'says'), [
    (box(-INF, INF, (64, 64, 3), np.float32), "pictures without bounds.*obs='state'"),
    (box(-2**40, 2**40, (64, 64, 1), np.int64), 'pictures without bounds'),
    (box(0, 1, (300, 5, 300), np.float32), 'a vector of 450,000'),
    (SPACE.Dict(a=box(0, 1, (2,), np.float32), mission=SPACE.Text(9)), 'keys=a leaves mission out'),
    (SPACE.Graph(SPACE.Discrete(2), None), 'numbers or choices of a fixed count$'),
])  # fmt: skip
def test_what_no_model_can_take_is_refused(space, says):
    with pytest.raises(EnvRefusedError, match=says):
        spaces.view(space, Wishes(), 'x')


def test_codes_become_one_hots_and_others_are_refused():
    space = box(0, 255, (3, 4, 2), np.uint8)
    view = spaces.view(space, Wishes(codes=5), 'x')
    codes = np.random.default_rng(0).integers(0, 5, (3, 4, 2), np.uint8)
    seen = view.see(codes)['']
    assert seen.dtype == bool and seen.shape == view.forms[''].shape == (3, 4, 10)
    np.testing.assert_array_equal(seen.reshape(3, 4, 2, 5).argmax(-1), codes)
    assert (seen.reshape(3, 4, 2, 5).sum(-1) == 1).all()
    with pytest.raises(EnvRefusedError, match='has the numbers 5 to 5; expected 0 to 4'):
        view.see(np.full((3, 4, 2), 5, np.uint8))
    with pytest.raises(EnvRefusedError, match='expected whole numbers in a grid'):
        spaces.view(box(0, 1, (3, 4, 2), np.float32), Wishes(codes=5), 'x')


PARTS = SPACE.Dict(
    camera=box(0, 255, (40, 40, 3), np.uint8),
    inner=SPACE.Dict(grid=box(0, 1, (5, 5, 1), np.bool_), speed=box(-9, 9, (2,), np.float32)),
    mode=SPACE.Discrete(3, start=1),
)
SEEN = dict(
    camera=np.full((40, 40, 3), 7, np.uint8),
    inner=dict(grid=np.ones((5, 5, 1), bool), speed=np.array([1.5, -2], np.float32)),
    mode=3,
)


def test_parts_stay_apart_beside_a_picture_and_join_without():
    view = spaces.view(PARTS, Wishes(), 'x')
    kinds = {name: form.kind for name, form in view.forms.items()}
    assert kinds == {
        'camera': 'image', 'inner.grid': 'grid', 'inner.speed': 'vector', 'mode': 'vector',
    }  # fmt: skip
    seen = view.see(SEEN)
    assert seen['mode'].tolist() == [0, 0, 1] and seen['inner.speed'].tolist() == [1.5, -2]
    chosen = spaces.view(PARTS, Wishes(keys=('mode', 'inner.speed')), 'x')
    assert chosen.see(SEEN)[''].tolist() == [1.5, -2, 0, 0, 1]
    camera = spaces.view(PARTS, Wishes(obs='image'), 'x')
    assert camera.forms[''].shape == (40, 40, 3)
    with pytest.raises(EnvRefusedError, match='keys=speed given; expected some of camera'):
        spaces.view(PARTS, Wishes(keys=('speed',)), 'x')


class Shown(gymnasium.Env):
    """Declares one space and shows something."""

    action_space = SPACE.Discrete(2)

    def __init__(self, space, first, then):
        self.observation_space, self.first, self.then = space, first, then

    def reset(self, *, seed=None, options=None):
        return self.first, {}

    def step(self, action):
        return self.then, 1e39 if action else 0.0, False, False, {}


BYTES = box(0, 255, (40, 40, 3), np.uint8)


@pytest.mark.parametrize(('space', 'shown', 'says'), [
    (BYTES, np.zeros((40, 40, 3), np.float32), 'an observation of float32 was returned; expected uint8'),
    (BYTES, np.full((40, 40, 3), 300), 'numbers from 300 to 300 was returned; expected 0 to 255'),
    (BYTES, np.zeros((3, 40, 40), np.uint8), r'an observation \[3, 40, 40\] was returned'),
    (box(0, 1, (40, 40, 3), np.float32), np.full((40, 40, 3), 255.0), 'numbers from 255 to 255'),
    (box(0, 4, (5, 5, 1), np.int64), np.full((5, 5, 1), 9), 'expected 0 to 4'),
])  # fmt: skip
def test_what_arrives_must_be_what_was_declared_and_is_told_at_once(space, shown, says):
    right = np.zeros(space.shape, space.dtype)
    for first, then in ((shown, right), (right, shown)):
        envs = HostVector(functools.partial(Shown, space, first, then), 1)
        with pytest.raises(UserError, match=says):
            envs.reset()
            envs.step(np.array([0]))
        assert envs.restarts == 0


@pytest.mark.parametrize('shown', [np.full(3, 1e300), np.array([0, np.inf, 0])])
def test_numbers_beyond_float32_count_as_a_fault(shown):
    space = box(-INF, INF, (3,), np.float64)
    for first, action, says in ((shown, 0, 'not finite'), (np.zeros(3), 1, r'reward of 1e\+39')):
        with (
            pytest.raises(UserError, match=says),
            HostVector(functools.partial(Shown, space, first, np.zeros(3)), 1, max_restarts=0) as envs,
        ):  # fmt: skip
            envs.reset()
            envs.step(np.array([action]))


def test_mappings_pass_through_shared_memory_and_small_codes_are_hinted_at(capfd):
    grid = np.arange(25, dtype=np.uint8).reshape(5, 5, 1) % 6
    space = SPACE.Dict(view=box(0, 255, (5, 5, 1), np.uint8), speed=box(-9, 9, (2,), np.float32))
    shown = dict(view=grid, speed=np.array([1, -1], np.float32))
    with HostVector(functools.partial(Shown, space, shown, shown), 2) as envs:
        step = envs.reset()
        for _ in range(64):
            step = envs.step(np.array([0, 0]))
    assert envs.spec.obs_shape == {'speed': (2,), 'view': (5, 5, 1)}
    np.testing.assert_array_equal(step.obs['view'], [grid, grid])
    np.testing.assert_array_equal(step.obs['speed'], [[1, -1]] * 2)
    said = capfd.readouterr().err
    assert said.count('obs=codes:6 makes one-hots') == 1
    assert [line.partition(' -> ')[2] for line in envs.spec.seen] == [
        'grid [5, 5, 1]',
        'vector [2]',
    ]


# ------------------------------------------------------------------------------------------ actions


@pytest.mark.parametrize(('low', 'high', 'dtype'), [
    ([0.0, -INF, -1.0], [INF, 2.0, INF], np.float32), ([-2.0, 0.0], [4.0, 1.0], np.float64),
    ([-3.4e38], [3.4e38], np.float32), ([0.0], [1e7], np.float32), ([-1e-9, 0.3], [1e-9, 0.3000001], np.float32),
    ([0, -5], [4, 5], np.int64), ([3], [3], np.int32), ([0], [255], np.uint8),
])  # fmt: skip
def test_every_action_lies_in_its_space(low, high, dtype):
    space = SPACE.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    kind, size, convert = spaces.action_converter(space, 'x')
    assert (kind, size) == ('continuous', len(low))
    for a in (-1e30, -3.0, -1.0, -0.123, 0.0, 0.7, 1.0, 3.0, 1e30):
        assert space.contains(convert(np.full(size, a, np.float32))), a


def test_whole_numbers_get_equal_shares_and_ends_of_bounds_are_reached():
    _, _, convert = spaces.action_converter(box(2, 6, (1,), np.int64), 'x')
    found = [int(convert(np.array([a]))[0]) for a in np.linspace(-1, 1, 1001)]
    counts = np.bincount(found, minlength=7)
    assert counts[:2].sum() == 0 and (np.abs(counts[2:] - 200) <= 1).all()
    _, _, convert = spaces.action_converter(box(0.0, INF, (1,), np.float32), 'x')
    assert [float(convert(np.array([a]))[0]) for a in (-1, 0, 1)] == [0, 1, 2]


@pytest.mark.parametrize('space', [
    SPACE.MultiDiscrete([2, 3]), SPACE.Dict(a=SPACE.Discrete(2)), SPACE.Text(3),
    box(-2**40, 2**40, (1,), np.int64),
])  # fmt: skip
def test_actions_that_no_policy_can_give_are_refused(space):
    with pytest.raises(EnvRefusedError, match='has actions'):
        spaces.action_converter(space, 'x')


# -------------------------------------------------------------------------------------- environments


@pytest.mark.parametrize(('name', 'options', 'says'), [
    ('gym/FrozenLake-v1', dict(map_name='9x9'), '9x9'),
    ('gym/FrozenLake-v1', dict(is_slippery='maybe'), 'true or false'),
    ('gym/FrozenLake-v1', dict(slippery=False), "no option 'slippery'; expected .*is_slippery"),
    ('gym/CartPole-v1', dict(obs='codes:x'), r'codes:<n>'),
    ('gym/CartPole-v1', dict(obs='codes:3'), 'whole numbers in a grid'),
    ('gym/CartPole-v1', dict(keys='a'), 'keys=a given'),
])  # fmt: skip
def test_arguments_of_an_environment_are_checked(name, options, says):
    with pytest.raises(UserError, match=says):
        make(name, 1, **options).close()


def test_arguments_of_an_environment_reach_it_as_people_write_them():
    for word in ('no', 'False', 0):
        with make('gym/FrozenLake-v1', 1, is_slippery=word, **{'make.map_name': '8x8'}) as lake:
            assert lake.spec.obs_shape == (64,)
            lake.reset(0)
            cells = [int(lake.step(np.array([a])).obs[0].argmax()) for a in (1, 2, 1)]
            assert cells == [8, 9, 17]
