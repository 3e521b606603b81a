"""The device's pendulum and cart-pole against dm_control, and against what must hold of any of
them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.envs import control, device
from reverie.types import Env, UserError

ORIGINAL = {'pendulum': ('pendulum', 'swingup'), 'cartpole_swingup': ('cartpole', 'swingup')}
PROGRAMS = {name: jax.jit(control.build(name)[0].step) for name in ORIGINAL}
KEY = jax.random.key(0)


def noise(n: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1.3, 1.3, (n, 1)).astype(np.float32)


@pytest.mark.external('dm_control', 'dmc')
@pytest.mark.parametrize(
    ('name', 'begin', 'actions'),
    [
        ('pendulum', ([2.0], [-1.0]), noise(300)),
        ('pendulum', ([0.1], [0.0]), np.zeros((100, 1), np.float32)),
        ('cartpole_swingup', ([0.01, 3.1], [0.0, 0.02]), noise(300)),
        (
            'cartpole_swingup',
            ([1.7, 1.0], [2.0, 3.0]),
            np.ones((300, 1), np.float32),
        ),  # into the end of the rail
        ('cartpole_swingup', ([-1.7, 0.2], [-1.0, -3.0]), -np.ones((300, 1), np.float32)),
    ],
)
def test_trajectory_stays_with_dm_controls(name, begin, actions):
    from dm_control import suite

    original = suite.load(*ORIGINAL[name])
    original.reset()
    with original.physics.reset_context():
        original.physics.data.qpos[:], original.physics.data.qvel[:] = begin
    state, farthest = control.State(*map(jnp.array, begin)), 0.0
    for action in actions:
        theirs = original.step(action)
        state, ours = PROGRAMS[name](state, jnp.asarray(action), KEY)
        seen = np.concatenate(
            [np.ravel(theirs.observation[key]) for key in sorted(theirs.observation)]
        )
        np.testing.assert_allclose(ours.obs, seen, atol=3e-4)
        np.testing.assert_allclose(ours.reward, theirs.reward, atol=1e-4)
        farthest = max(farthest, abs(seen[0]))
    if begin[0][0] in (1.7, -1.7):
        assert farthest > 1.8, 'the cart never met the end of the rail'


@pytest.mark.external('dm_control', 'dmc')
@pytest.mark.parametrize('name', ORIGINAL)
def test_first_states_are_spread_as_dm_controls(name):
    from dm_control import suite

    original, theirs = suite.load(*ORIGINAL[name], task_kwargs=dict(random=0)), []
    for _ in range(300):
        first = original.reset().observation
        theirs.append(np.concatenate([np.ravel(first[key]) for key in sorted(first)]))
    ours = jax.vmap(control.build(name)[0].reset)(jax.random.split(KEY, 300))[1].obs
    spread = np.std(theirs, 0)
    np.testing.assert_allclose(np.mean(ours, 0), np.mean(theirs, 0), atol=0.3 * spread.max())
    np.testing.assert_allclose(np.std(ours, 0), spread, rtol=0.25, atol=1e-4)


@pytest.mark.parametrize('name', ORIGINAL)
def test_an_environment_in_the_arrival_convention(name):
    env, limit = control.build(name)
    assert isinstance(env, Env) and limit == 1000
    state, first = env.reset(KEY)
    assert first.is_first and not first.reward and not first.prev_action.any()
    state, step = PROGRAMS[name](state, jnp.array([1.7]), KEY)
    assert (
        step.obs.shape == env.spec.obs_shape
        and env.spec.actions.kind == 'continuous'
        and env.spec.actions.size == 1
    )
    assert step.prev_action == jnp.array([1.7], jnp.float32)  # as given; the system clips it
    assert not (step.is_first | step.is_last | step.is_terminal)
    assert jax.tree.map(jnp.dtype, step) == jax.tree.map(jnp.dtype, first)


def test_a_repeated_action_adds_its_rewards_up():
    env, limit = control.build('cartpole_swingup', action_repeat=2)
    state = begin = control.State(jnp.array([0.1, 0.3]), jnp.array([0.0, 0.1]))
    total = 0.0
    for _ in range(2):
        state, step = PROGRAMS['cartpole_swingup'](state, jnp.array([0.4]), KEY)
        total += step.reward
    _, both = jax.jit(env.step)(begin, jnp.array([0.4]), KEY)
    np.testing.assert_allclose(both.reward, total, rtol=1e-6)
    np.testing.assert_allclose(both.obs, step.obs, rtol=1e-5)
    assert limit == 500


def test_standing_still_upright_earns_the_highest_return():
    for name, system in control.SYSTEMS.items():
        dof = 1 if name == 'pendulum' else 2
        _, step = PROGRAMS[name](control.State(jnp.zeros(dof), jnp.zeros(dof)), jnp.zeros(1), KEY)
        np.testing.assert_allclose(step.reward, 1.0, atol=1e-6)
        assert control.Control(system()).spec.max_return == 1000.0


def test_many_copies_restart_after_their_time():
    envs = device.Vector(device.TimeLimit(control.build('pendulum', damping=0.5)[0], 3), 2)
    state, step = envs.reset(KEY)
    move, firsts, lasts = jax.jit(envs.step), [], []
    for i in range(5):
        state, step = move(state, jnp.ones((2, 1)), jax.random.key(i))
        firsts.append(step.is_first.tolist())
        lasts.append(step.is_last.tolist())
        assert not step.is_terminal.any()
    assert lasts == [[False] * 2, [False] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert firsts == [[False] * 2, [False] * 2, [False] * 2, [True] * 2, [False] * 2]


@pytest.mark.parametrize('options', [dict(sticky=0.1), dict(action_repeat=0)])
def test_wrong_options_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        control.build('pendulum', **options)
