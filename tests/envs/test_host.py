"""Host environments: the arrival convention, faults of workers, and the suites that are installed."""

import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

gymnasium = pytest.importorskip('gymnasium')

from reverie.envs import spaces, suites, worker  # noqa: E402
from reverie.envs.host import HostVector  # noqa: E402
from reverie.envs.observations import EnvRefusedError, Wishes, area_resizer  # noqa: E402
from reverie.types import UserError  # noqa: E402
from tests.envs import toys  # noqa: E402


def pids(envs: HostVector) -> list[int]:
    return [process.process.pid for process in envs._processes]


def gone(pid: int) -> bool:
    """True if there is no such process, not even one that is not reaped."""
    return not pathlib.Path(f'/proc/{pid}').exists()


def setup(name: str | None = None, factory=None, **options) -> worker.Setup:
    wishes = Wishes(size=options.pop('size', (64, 64)))
    full = dict(arguments={}, action_repeat=None, time_limit=None, seed=3) | options
    return worker.Setup(name=name, factory=factory, wishes=wishes, **full)


def test_steps_arrive_and_episodes_follow_each_other_as_on_the_device():
    with HostVector(
        [functools.partial(toys.Clock, 2), functools.partial(toys.Clock, 3)], seed=5
    ) as envs:
        first = envs.reset()
        steps = [envs.step(np.array([1, 2])) for _ in range(6)]
    assert envs.spec.obs_shape == (4,) and envs.spec.actions.size == 3
    assert (
        first.is_first.all()
        and not first.is_last.any()
        and not first.reward.any()
        and not first.prev_action.any()
    )
    seeds = first.obs[:, 0]
    assert seeds[0] != seeds[1]
    # copy 0: steps 1, 2, then the first step of episode 2, ...; copy 1 the same with three steps
    time_of = [(1, 1), (2, 2), (0, 3), (1, 0), (2, 1), (0, 2)]
    episode = [(1, 1), (1, 1), (2, 1), (2, 2), (2, 2), (3, 2)]
    for step, now, part in zip(steps, time_of, episode, strict=True):
        now = np.array(now)
        new, end = now == 0, now == np.array([2, 3])
        action = np.where(new, -1, [1, 2])
        np.testing.assert_array_equal(step.obs, np.stack([seeds, part, now, action], 1))
        np.testing.assert_array_equal(step.reward, now)
        np.testing.assert_array_equal(step.prev_action, np.eye(3)[[1, 2]] * ~new[:, None])
        np.testing.assert_array_equal(step.is_first, new)
        np.testing.assert_array_equal(step.is_last, end)
        np.testing.assert_array_equal(step.is_terminal, end)
    assert step.obs.dtype == step.reward.dtype == step.prev_action.dtype == np.float32


def test_repeated_actions_add_their_rewards_up_and_stop_at_the_end():
    player = worker.EnvWorker(setup(factory=toys.Clock, action_repeat=3))
    player.reset()
    obs, reward, last, terminal = player.step(np.int32(1))
    assert (obs[2], reward, last, terminal) == (3, 1 + 2 + 3, False, False)
    obs, reward, last, terminal = player.step(np.int32(1))
    assert (obs[2], reward, last, terminal) == (5, 4 + 5, True, True)


def test_a_time_limit_truncates_and_does_not_terminate():
    player = worker.EnvWorker(setup(factory=toys.Clock, action_repeat=2, time_limit=3))
    player.reset()
    assert player.step(np.int32(0))[2:] == (False, False)
    obs, reward, last, terminal = player.step(np.int32(0))
    assert (obs[2], reward, last, terminal) == (3, 3, True, False)
    player.reset()
    assert player.step(np.int32(0))[2:] == (False, False)
    at_its_end = worker.EnvWorker(setup(factory=toys.Clock, time_limit=5))
    at_its_end.reset()
    assert [at_its_end.step(np.int32(0))[2:] for _ in range(5)][-1] == (True, True)


def test_actions_from_minus_one_to_one_span_the_bounds_of_the_environment():
    inf = float('inf')
    with HostVector(functools.partial(toys.Lever, (-2.0, 0.0, -inf), (4.0, 1.0, inf)), 2) as envs:
        assert envs.spec.actions.kind == 'continuous' and envs.spec.obs_shape == (6,)
        first = envs.reset()
        given = np.array([[-1.0, 1.0, 7.5], [3.0, -0.5, -1.0]])
        step = envs.step(given)
    np.testing.assert_allclose(
        first.obs, [[0, 1, 0, 0, 0, 0]] * 2
    )  # keys sorted, choices as one-hot
    np.testing.assert_allclose(step.obs[:, 3:], [[-2.0, 1.0, 7.5], [4.0, 0.25, -1.0]])
    np.testing.assert_allclose(step.reward, [6.5, 3.25])
    np.testing.assert_allclose(step.prev_action, given)


def test_a_number_for_a_state_becomes_one_hot():
    """FrozenLake tells the cell, 4 * row + column; without slipping, down is 1 and right is 2."""
    with HostVector(
        functools.partial(gymnasium.make, 'FrozenLake-v1', is_slippery=False), 2
    ) as envs:
        assert envs.spec.obs_shape == (16,) and envs.reset(0).obs.dtype == np.float32
        cells = [envs.reset().obs, *(envs.step(np.array(a)).obs for a in ([1, 2], [1, 2]))]
    np.testing.assert_array_equal(
        cells, [np.eye(16)[[0, 0]], np.eye(16)[[4, 1]], np.eye(16)[[8, 2]]]
    )


SPACE = gymnasium.spaces


@pytest.mark.parametrize(('space', 'seen', 'expected'), [
    (SPACE.Discrete(3, start=-1), -1, [1, 0, 0]), (SPACE.MultiDiscrete([2, 3]), [1, 2], [0, 1, 0, 0, 1]),
    (SPACE.Tuple([SPACE.Discrete(2), SPACE.MultiBinary(2)]), (1, [1, 0]), [0, 1, 1, 0]),
    (SPACE.Box(0, 9, (2,), np.int64), [4, 9], [4, 9]),
])  # fmt: skip
def test_choices_become_one_hot_and_numbers_stay_numbers(space, seen, expected):
    view = spaces.view(space, Wishes(), 'x')
    seen = np.array(seen) if not isinstance(seen, tuple) else tuple(map(np.array, seen))
    got = view.see(seen)['']
    assert view.forms[''].shape == (len(expected),)
    assert got.dtype == np.float32 and got.tolist() == expected


@pytest.mark.parametrize(('space', 'says'), [
    (SPACE.Text(5), 'Text'), (SPACE.Sequence(SPACE.Discrete(2)), 'Sequence'),
    (SPACE.Dict(a=SPACE.Discrete(2), b=SPACE.Text(3)), 'numbers or choices of a fixed count'),
    (SPACE.Discrete(10**9), 'a vector of 1,000,000,000; expected at most 65,536'),
])  # fmt: skip
def test_observations_that_are_no_vector_are_named(space, says):
    with pytest.raises(EnvRefusedError, match=f'x has observations .*{says}'):
        spaces.view(space, Wishes(), 'x')


def test_images_shrink_by_area():
    image = np.random.default_rng(0).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    small = area_resizer((7, 10), (3, 4))(image)
    fine = image.repeat(3 * 4, 0).repeat(4, 1)  # every border of both grids is a border of this one
    slow = [
        [fine[28 * r : 28 * r + 28, 10 * c : 10 * c + 10].mean((0, 1)) for c in range(4)]
        for r in range(3)
    ]
    np.testing.assert_allclose(small, slow, atol=0.51)
    with HostVector(toys.Screen, 2, size=(30, 20)) as envs:
        seen = envs.reset().obs
    assert seen.shape == (2, 30, 20, 3) and seen.dtype == np.uint8
    np.testing.assert_allclose(seen[0, 0, :, 0], np.arange(20) * 2 + 0.5, atol=0.51)


def test_one_seed_gives_one_sequence_and_another_seed_another():
    def play(seed: int) -> np.ndarray:
        with HostVector('gym/CartPole-v1', 2, seed=seed) as envs:
            seen = [envs.reset().obs] + [envs.step(np.array([i % 2, 1])).obs for i in range(40)]
        return np.stack(seen)

    once, again, other = play(0), play(0), play(1)
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once[0], other[0]) and not np.allclose(once[0, 0], once[0, 1])


def test_episodes_of_one_seed_begin_alike_and_chance_goes_on_after_them():
    with HostVector('gym/CartPole-v1', 2) as envs:
        once, after, again, after_again, other = (
            envs.reset(seed).obs for seed in (3, None, 3, None, 4)
        )
    np.testing.assert_array_equal([once, after], [again, after_again])
    assert len(np.unique([*once, *after, *other], axis=0)) == 6


def test_a_limit_of_the_environment_truncates():
    with HostVector('gym/Pendulum-v1', 1, action_repeat=50) as envs:
        envs.reset()
        steps = [envs.step(np.zeros((1, 1))) for _ in range(5)]
    assert [bool(step.is_last[0]) for step in steps] == [False, False, False, True, False]
    assert not any(step.is_terminal[0] for step in steps) and steps[4].is_first[0]


@pytest.mark.parametrize('how', ['raise', 'exit', 'crash', 'hang'])
def test_a_lost_worker_ends_its_episode_and_no_other(how, tmp_path):
    broken = functools.partial(toys.Faulty, how, 3, str(tmp_path / 'scar'))
    with HostVector(
        [broken, toys.Clock], timeout_s=2.0 if how == 'hang' else 60.0, max_restarts=1
    ) as envs:
        first, before = envs.reset(), pids(envs)
        envs.step(np.array([0, 1]))
        good = envs.step(np.array([2, 1]))
        began = time.monotonic()
        lost = envs.step(np.array([1, 1]))
        assert time.monotonic() - began < 60.0
        fresh, onward = envs.step(np.array([1, 1])), envs.step(np.array([1, 1]))
        after = pids(envs)
    assert (
        lost.is_last.tolist() == [True, False]
        and not lost.is_terminal.any()
        and not lost.is_first.any()
    )
    np.testing.assert_array_equal(lost.obs[0], good.obs[0])  # the last one seen
    np.testing.assert_array_equal(lost.prev_action[0], [0, 1, 0])
    assert lost.reward.tolist() == [0.0, 3.0]
    assert (
        fresh.is_first.tolist() == [True, False]
        and fresh.reward[0] == 0
        and not fresh.prev_action[0].any()
    )
    assert fresh.obs[0, 0] != first.obs[0, 0], 'a replacement must not play the same episode again'
    assert fresh.obs[1, 2] == 4 and onward.obs[:, 2].tolist() == [1, 5]
    assert envs.restarts == 1 and before[1] == after[1] and gone(before[0]) and gone(after[0])


@pytest.mark.parametrize(
    ('how', 'at', 'says'), [('raise', 2, 'the wheel came off'), ('exit', 0, 'no fuel left')]
)
def test_after_the_cap_the_error_names_the_environment(how, at, says):
    envs = HostVector([toys.Clock, functools.partial(toys.Faulty, how, at)], max_restarts=1)
    born = pids(envs)
    with pytest.raises(
        UserError, match=rf'environment Clock, copy 1, failed 2 times.*max_restarts=1.*{says}'
    ):
        envs.reset()
        for _ in range(20):
            envs.step(np.array([0, 0]))
    assert envs.restarts == 1 and all(gone(pid) for pid in born)
    with pytest.raises(UserError, match='closed'):
        envs.step(np.array([0, 0]))


def test_an_environment_that_never_wakes_up_is_named():
    with pytest.raises(UserError, match=r'failed 1 times.*no answer within 1 s'):
        HostVector(
            functools.partial(toys.Faulty, 'hang', 0), 1, timeout_s=1.0, max_restarts=0
        ).reset()


def test_an_episode_that_ends_well_forgives_earlier_faults(tmp_path):
    scars = [str(tmp_path / name) for name in 'ab']
    broken = functools.partial(toys.Faulty, 'raise', 2, scars[0], 3)
    with HostVector(broken, 1, max_restarts=1) as envs:
        envs.reset()
        ends = [envs.step(np.array([0])).is_terminal[0] for _ in range(6)]  # lost, first, 1, 2, 3
        assert any(ends)
        pathlib.Path(scars[0]).unlink()
        for _ in range(6):
            envs.step(np.array([0]))
        assert envs.restarts == 2


def test_numbers_that_are_not_finite_count_as_a_fault():
    with (
        pytest.raises(UserError, match='not finite'),
        HostVector(toys.Sick, 1, max_restarts=0) as envs,
    ):
        envs.reset()
        envs.step(np.array([0]))


def test_closing_leaves_no_process_even_of_a_hanging_environment():
    envs = HostVector([toys.Clock, functools.partial(toys.Faulty, 'hang', 1)], timeout_s=100.0)
    envs.reset()
    envs.send(np.array([0, 0]))
    ours, began = pids(envs), time.monotonic()
    envs.close()
    envs.close()
    assert time.monotonic() - began < 60.0 and all(gone(pid) for pid in ours)
    forgotten = HostVector(toys.Clock, 1)
    ours = pids(forgotten)
    del forgotten
    assert all(gone(pid) for pid in ours)


def test_a_killed_parent_leaves_no_process():
    script = (
        'import functools, numpy, sys, time; from reverie.envs.host import HostVector; from tests.envs import toys;'
        'envs = HostVector([toys.Clock, functools.partial(toys.Faulty, "hang", 1)], timeout_s=100.0);'
        'envs.reset(); envs.send(numpy.array([0, 0]));'
        'print(*(p.process.pid for p in envs._processes), flush=True); time.sleep(100)'
    )
    root = pathlib.Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, '-c', script], stdout=subprocess.PIPE, text=True, cwd=root
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert len(workers) == 2
    deadline = time.monotonic() + 60.0
    while not all(ended(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if not ended(pid)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


def ended(pid: int) -> bool:
    """True if gone, or dead and not reaped: a container without init reaps no orphans."""
    stat = pathlib.Path(f'/proc/{pid}/stat')
    try:
        return stat.read_text().rpartition(')')[2].split()[0] == 'Z'
    except FileNotFoundError:
        return True


def test_copies_move_while_the_caller_does_something_else(tmp_path):
    gate = tmp_path / 'gate'
    with HostVector(functools.partial(toys.Clock, gate=str(gate)), 2) as envs:
        envs.reset()
        envs.send(np.array([0, 1]))  # returns although no copy can have moved
        with pytest.raises(UserError, match='send was called twice'):
            envs.send(np.array([0, 1]))
        gate.touch()
        assert envs.receive().obs[:, 2].tolist() == [1, 1]
        with pytest.raises(UserError, match='before send'):
            envs.receive()


def test_an_interrupted_wait_can_be_taken_up_again(tmp_path):
    gate = tmp_path / 'gate'

    def interrupt(*_):
        raise KeyboardInterrupt

    with HostVector([functools.partial(toys.Clock, gate=str(gate)), toys.Clock]) as envs:
        envs.reset()
        envs.send(np.array([0, 1]))
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            envs.receive()
        signal.signal(signal.SIGALRM, before)
        gate.touch()
        assert envs.receive().obs[:, 2].tolist() == [1, 1] and not envs.restarts


def test_workers_never_import_jax():
    with HostVector(toys.Witness, 1) as envs:
        assert not envs.reset().obs.any()


@pytest.mark.parametrize(('env', 'options', 'says'), [
    ('gym/NoSuchThing-v0', {}, 'NoSuchThing'), ('chess/e4', {}, "'chess/e4' is unknown; expected .*atari/"),
    (toys.unbuildable, {}, 'unbuildable cannot be built: OSError: no such cartridge'),
    (toys.Mute, {}, 'expected Discrete, or a Box'), (toys.Clock, dict(obs='image'), "expected 'rgb_array'"),
    ([toys.Clock, toys.Screen], {}, 'copy 1 is built as'), ([toys.Clock], dict(n=2), 'n=2'), ([], {}, r'\[\] given'),
    (toys.Clock, dict(n=0), 'n=0'), (toys.Clock, dict(action_repeat=0), 'action_repeat=0'),
    (toys.Clock, dict(obs='pixels'), "'pixels' given"), (toys.Clock, dict(size=(64,)), r'size=\(64,\)'),
    (toys.Clock, dict(timeout_s=0), 'timeout_s=0'), (toys.Clock, dict(max_restarts=-1), 'max_restarts=-1'),
])  # fmt: skip
def test_what_cannot_be_built_is_named(env, options, says):
    with pytest.raises(UserError, match=says):
        HostVector(env, **options)


def test_wrong_actions_are_named_and_do_no_harm():
    with HostVector(toys.Clock, 2) as envs:
        envs.reset()
        for action, says in [
            ([0], r'actions \(1,\)'),
            ([0.5, 1.0], 'float64'),
            ([0, 3], 'expected 0 to 2'),
        ]:
            with pytest.raises(UserError, match=says):
                envs.step(np.array(action))
        assert envs.step(np.array([0, 1])).obs[:, 2].tolist() == [1, 1]
    with HostVector('gym/Pendulum-v1', 1) as envs:
        envs.reset()
        with pytest.raises(UserError, match='expected finite numbers'):
            envs.step(np.array([[np.nan]]))


@pytest.mark.parametrize(
    ('name', 'package'),
    [
        ('atari/pong', 'ale_py'),
        ('dmc/walker_walk', 'dm_control'),
        ('crafter/reward', 'crafter'),
        ('gym/A', 'gymnasium'),
    ],
)
def test_a_missing_package_is_named_with_its_extra(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    extra = {'gym': 'gymnasium'}.get(name.split('/')[0], name.split('/')[0])
    with pytest.raises(
        EnvRefusedError, match=rf"needs the package {package}.*pip install 'reverie\[{extra}\]'"
    ):
        suites.build(name)


@pytest.mark.external('ale_py', 'atari')
def test_atari_shows_the_brighter_of_the_last_two_frames():
    import ale_py as ale

    play = ale.AtariEnv(
        'space_invaders', frameskip=1, repeat_action_probability=0.25, full_action_space=True
    )
    play.reset(seed=3)
    player = worker.EnvWorker(setup('atari/space_invaders', size=None))
    player.reset()
    for _ in range(30):
        frames, rewards = zip(*[play.step(1)[:2] for _ in range(4)], strict=True)
        obs, reward, *_ = player.step(np.int32(1))
        np.testing.assert_array_equal(obs, np.maximum(frames[2], frames[3]))
        assert reward == sum(rewards)
    with HostVector('atari/breakout', 1) as envs:
        assert envs.spec.obs_shape == (64, 64, 3) and envs.spec.actions.meanings[:2] == (
            'noop',
            'fire',
        )
        assert envs.action_repeat == 4 and envs.reset().obs.max() > 0
    with pytest.raises(UserError, match='near it are breakout'):
        HostVector('atari/breakuot', 1)


@pytest.mark.external('dm_control', 'dmc')
def test_dmc_state_is_what_dm_control_shows_in_sorted_order():
    from dm_control import suite

    play = suite.load('walker', 'walk', task_kwargs=dict(random=np.random.RandomState(3)))
    player = worker.EnvWorker(setup('dmc/walker_walk'))

    def seen(arrived) -> np.ndarray:
        assert list(arrived.observation) == ['orientations', 'height', 'velocity']
        parts = arrived.observation
        return np.concatenate([[parts['height']], parts['orientations'], parts['velocity']])

    np.testing.assert_allclose(player.reset(), seen(play.reset()), rtol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        one, two = play.step(action), play.step(action)
        obs, reward, last, terminal = player.step(action)
        np.testing.assert_allclose(obs, seen(two), rtol=1e-5, atol=1e-6)
        assert abs(reward - one.reward - two.reward) < 1e-6 and not last and not terminal
    for _ in range(480):
        *_, last, terminal = player.step(action)
    assert last and not terminal  # 1,000 control steps


@pytest.mark.external('dm_control', 'dmc')
def test_dmc_draws_pictures_where_there_is_a_renderer():
    try:
        envs = HostVector('dmc/cartpole_swingup', 1, obs='image', size=(48, 64), max_restarts=0)
        with envs:
            obs = envs.reset().obs
    except UserError as error:
        if 'GL' in str(error):
            pytest.skip(f'no renderer: {error}')
        raise
    assert obs.shape == (1, 48, 64, 3) and obs.dtype == np.uint8 and obs.std() > 5


@pytest.mark.external('crafter', 'crafter')
def test_crafter_plays_the_same_game_in_every_process():
    with HostVector(toys.crafter, 2) as envs:  # each process has its own memory addresses
        rng = np.random.default_rng(0)
        seen = [envs.reset()] + [envs.step(np.full(2, rng.integers(17))) for _ in range(300)]
    for step in seen:
        np.testing.assert_array_equal(step.obs[0], step.obs[1])


@pytest.mark.external('crafter', 'crafter')
def test_crafter_ends_by_death_or_by_its_clock():
    import crafter

    player = worker.EnvWorker(setup('crafter/reward'))
    play = crafter.Env(seed=3)
    np.testing.assert_array_equal(player.reset(), play.reset())
    obs, _, *ends = player.step(np.int32(0))
    assert obs.shape == (64, 64, 3) and ends == [False, False]
    player.env.game._step = 9_999
    assert player.step(np.int32(0))[2:] == (True, False)
    player.env.game._player.health = 0
    assert player.step(np.int32(0))[2:] == (True, True)
