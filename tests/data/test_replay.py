"""The replay rings against plain Python lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie.data import Episodes, replay
from reverie.data.replay import HostRing, Layout
from reverie.data.sources import Resident
from reverie.types import ActionSpace, EnvSpec, Step, UserError

N, L, T, B = 3, 10, 4, 5
DISCRETE, CONTINUOUS = ActionSpace('discrete', 3), ActionSpace('continuous', 2)


def play(time: int, actions=DISCRETE, envs=N) -> Step:
    """A vector step, NumPy: observations tell environment and time; environment i has episodes of i
    + 3 steps.
    """
    env = np.arange(envs)
    at = time % (env + 3)
    first = at == 0
    number = 50 * env + time
    obs = (number[:, None] >> np.arange(12)) % 2 == 1
    if actions.kind == 'discrete':
        action = np.eye(actions.size, dtype=np.float32)[(time + env) % actions.size]
    else:
        action = np.stack([np.sin(number), np.cos(number)], -1).astype(np.float32)
    action = np.where(first[:, None], 0, action)
    reward = np.where(first, 0, number).astype(np.float32)
    last = at == env + 2
    return Step(obs.reshape(envs, 2, 3, 2), action, reward, first, last, last & (env == 0))


def memory(time: int, envs=N):
    return {
        'h': (100 * np.arange(envs) + time).astype(np.float32)[:, None],
        'n': np.full(envs, time, np.int16),
    }


def stored(time: int, actions=DISCRETE):
    return replay.to_stored(play(time, actions), memory(time), actions, np)


@jax.jit
def _written(ring, steps):
    return jax.lax.scan(lambda r, x: (replay.write(r, x), None), ring, steps)[0]


def device_ring(steps: int, batch=B):
    ring = replay.empty(stored(0), L, batch)
    return (
        _written(ring, jax.tree.map(lambda *x: jnp.stack(x), *map(stored, range(steps))))
        if steps
        else ring
    )


def host_ring(steps: int) -> HostRing:
    ring = HostRing(stored(0), L)
    for time in range(steps):
        ring.write(stored(time))
    return ring


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def expected(env, start, steps, context):
    """(Step [B, T], memories of the steps before [B, context], zeros where not held) from the play
    itself.
    """
    one = lambda e, t: jax.tree.map(lambda x: x[e], play(t))
    rows = [[one(e, t) for t in range(s, s + T)] for e, s in zip(env, start, strict=True)]
    earlier = lambda e, t: jax.tree.map(
        lambda x: 0 * x[e] if t < max(steps - L, 0) else x[e], memory(t)
    )
    before = [
        [earlier(e, t) for t in range(s - context, s)] for e, s in zip(env, start, strict=True)
    ]
    stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)
    return stack([stack(row) for row in rows]), stack([stack(row) for row in before])


@pytest.mark.parametrize('actions', [DISCRETE, CONTINUOUS], ids=lambda a: a.kind)
@pytest.mark.parametrize('xp', [np, jnp], ids=['host', 'device'])
def test_stored_form_gives_the_step_back(actions, xp):
    steps = play(4, actions)
    layout = Layout.of(steps, actions)
    form = replay.to_stored(jax.tree.map(xp.asarray, steps), (), actions, xp)
    assert same(replay.to_step(form, layout, xp), steps)
    assert form.obs.shape == (N, 2) and form.obs.dtype == np.uint8  # 12 bits


def test_observations_may_be_trees_and_keep_their_dtype():
    obs = {
        'image': np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1),
        'speed': np.ones((3, 2), np.float32),
    }
    steps = play(1)._replace(obs=obs)
    form = replay.to_stored(steps, (), DISCRETE, np)
    assert form.obs['image'].dtype == np.uint8 and same(
        replay.to_step(form, Layout.of(steps, DISCRETE), np), steps
    )
    assert replay.bytes_per_step(form) == 4 + 8 + 1 + 4 + 1


@pytest.mark.parametrize('steps, context', [(5, 1), (10, 1), (11, 1), (37, 1), (6, 3), (37, 3)])
def test_windows_of_both_rings_are_what_was_played(steps, context):
    layout = Layout.of(play(0), DISCRETE)
    ring, host = device_ring(steps), host_ring(steps)
    assert same(ring.data, host.data)
    for draw in range(20):
        ring = replay.choose(ring, jax.random.key(draw), T, online=False)
        rows, found = replay.windows(ring, T, context)
        steps_bt, before = expected(np.asarray(ring.env), np.asarray(ring.start), steps, context)
        assert same(replay.to_step(rows, layout), steps_bt) and same(found, before)
        drawn = host.choose(np.random.default_rng(draw), B, T, online=False)
        rows, found = host.windows(drawn, T, context)
        steps_bt, before = expected(drawn.env, drawn.start, steps, context)
        assert same(replay.to_step(rows, layout, np), steps_bt) and same(found, before)


@pytest.mark.parametrize(
    'steps, starts', [(4, {0}), (6, {0, 1, 2}), (10, set(range(1, 7))), (13, set(range(4, 10)))]
)
def test_every_window_that_is_held_is_drawn_equally_often(steps, starts):
    ring, host = device_ring(steps, batch=4000), host_ring(steps)
    ring = jax.jit(lambda r: replay.choose(r, jax.random.key(0), T, online=False))(ring)
    for rows in (ring, host.choose(np.random.default_rng(0), 4000, T, online=False)):
        pairs, counts = np.unique(np.stack([rows.env, rows.start]), axis=1, return_counts=True)
        assert set(map(tuple, pairs.T)) == {(e, s) for e in range(N) for s in starts}
        assert counts.min() > 0.7 * 4000 / len(counts)


def test_the_online_queue_hands_out_each_window_once_and_in_order():
    ring, host, handed = replay.empty(stored(0), L, 2), HostRing(stored(0), L), []
    choose = jax.jit(lambda r, k: replay.choose(r, k, T))
    write = jax.jit(replay.write)
    for time in range(25):
        ring = write(ring, stored(time))
        host.write(stored(time))
        if time >= T - 1:
            before = int(ring.seen)
            ring, rows = (
                choose(ring, jax.random.key(time)),
                host.choose(np.random.default_rng(time), 2, T),
            )
            taken = int(ring.seen) - before
            assert host.seen == ring.seen
            handed += [
                (int(e), int(s)) for e, s in zip(ring.env[:taken], ring.start[:taken], strict=True)
            ]
            np.testing.assert_array_equal(rows.env[:taken], ring.env[:taken])
            np.testing.assert_array_equal(rows.start[:taken], ring.start[:taken])
    assert handed == [(env, start) for start in range(0, 24 - T + 1, T) for env in range(N)]


def test_windows_lost_to_the_write_head_leave_the_queue():
    ring = replay.choose(device_ring(23), jax.random.key(0), T)
    assert (
        ring.start[0] == 16 and ring.env[0] == 0
    )  # 14 is the first that may be drawn; 8 and 12 begin before it
    assert int(ring.seen) == 4 * N + 3 and np.asarray(ring.start)[:3].tolist() == [16] * 3


@pytest.mark.parametrize('ok', [True, False])
def test_absorbed_memories_replace_those_of_the_rows_and_the_last_row_wins(ok):
    env, start = np.array([0, 2, 0, 0, 1]), np.array([5, 6, 7, 8, 9])
    new = {
        'h': np.arange(B * T, dtype=np.float32).reshape(B, T, 1),
        'n': -np.arange(B * T).reshape(B, T),
    }
    ring = device_ring(13)._replace(env=jnp.asarray(env), start=jnp.asarray(start))
    wanted = jax.tree.map(np.array, ring.data.memory)
    if ok:
        for row in range(B):
            for t in range(T):
                slot = (start[row] + t) % L
                wanted['h'][env[row], slot] = new['h'][row, t]
                wanted['n'][env[row], slot] = new['n'][row, t]
    ring = jax.jit(replay.write_memory)(ring, new, jnp.asarray(ok))
    assert same(ring.data.memory, wanted) and ring.data.memory['n'].dtype == jnp.int16
    if ok:
        host = host_ring(13)
        host.write_memory(replay.DrawnRows(env, start), new)
        assert same(host.data.memory, wanted)


def test_the_host_does_not_absorb_what_was_overwritten_since():
    host = host_ring(13)
    rows = replay.DrawnRows(np.array([1]), np.array([4]))
    for time in (13, 14):
        host.write(stored(time))
    before = host.data.memory['n'].copy()
    host.write_memory(rows, {'h': np.full((1, T, 1), -1.0), 'n': np.full((1, T), -1)})
    changed = np.argwhere(host.data.memory['n'] != before).tolist()
    assert changed == [[1, 5], [1, 6], [1, 7]]  # time 4 was in slot 4, which holds time 14 now


def test_rings_of_several_seeds_under_vmap_equal_each_alone():
    keys = jax.random.split(jax.random.key(3), 2)

    def one(key):
        ring = replay.choose(_written(replay.empty(stored(0), L, B), steps), key, T)
        rows, context = replay.windows(ring, T)
        return (
            replay.write_memory(
                ring, jax.tree.map(lambda x: x + 1, rows.memory), jnp.asarray(True)
            ),
            rows,
            context,
        )

    steps = jax.tree.map(lambda *x: jnp.stack(x), *map(stored, range(13)))
    both = jax.jit(jax.vmap(one))(keys)
    for i in range(2):
        assert same(jax.tree.map(lambda x, i=i: x[i], both), one(keys[i]))


def test_a_cut_stream_ends_its_open_episodes_without_termination():
    host = host_ring(5)
    host.cut()
    newest = replay.to_step(
        jax.tree.map(lambda x: x[:, 4], host.data), Layout.of(play(0), DISCRETE), np
    )
    assert newest.is_last.all() and not newest.is_terminal.any()


def test_a_saved_ring_is_restored():
    host, other = host_ring(13), host_ring(0)
    host.choose(np.random.default_rng(0), B, T)
    other.set_arrays(jax.tree.map(np.copy, host.arrays()))
    assert same(other.arrays(), host.arrays()) and other.seen == host.seen > 0


def test_a_ring_leaves_a_dataset_that_sources_read(tmp_path):
    layout, spec = Layout.of(play(0), DISCRETE), EnvSpec('probe', (2, 3, 2), DISCRETE)
    ring = device_ring(14)
    replay.export(tmp_path / 'set', [(ring.data, 14), (host_ring(7).data, 7)], layout, spec)
    episodes = Episodes(tmp_path / 'set')
    records = list(episodes.records())
    for record in (r for r in records if r.kind == 'seed0' and r.complete):
        assert len(record) in (3, 4, 5)
    # times 4 to 13: environments of episodes of 3, 4 and 5 steps, from the first beginning on
    assert [len(r) for r in records if r.kind == 'seed0'] == [3, 3, 2, 4, 4, 2, 5, 4]
    assert [len(r) for r in records if r.kind == 'seed1'] == [3, 3, 1, 4, 3, 5, 2]
    source = Resident(episodes)
    batch = source.draw(source.data, None, jax.random.key(0), B, T)
    assert (
        batch.step.obs.dtype == bool
        and bool(batch.has_action.all())
        and batch.step.obs.shape == (B, T, 2, 3, 2)
    )
    record = records[0]
    assert record.flags[-1] == 6 and record.reward.tolist() == [0, 7, 8]


@pytest.mark.parametrize('what', ['file', 'folder', 'link to nowhere'])
def test_a_target_that_is_no_dataset_is_refused_and_left_as_it_is(tmp_path, what):
    layout, spec = Layout.of(play(0), DISCRETE), EnvSpec('probe', (2, 3, 2), DISCRETE)
    target = tmp_path / 'set'
    if what == 'file':
        target.write_text('mine')
    elif what == 'folder':
        (target / 'mine').mkdir(parents=True)
    else:
        target.symlink_to(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='is not a dataset'):
        replay.check_export(target, layout, spec)
    assert [p.name for p in tmp_path.iterdir()] == ['set']


def test_a_dataset_holds_no_trees_of_observations(tmp_path):
    layout = Layout(
        {'a': jax.ShapeDtypeStruct((), bool), 'b': jax.ShapeDtypeStruct((), bool)}, DISCRETE
    )
    with pytest.raises(UserError, match='one array per observation'):
        replay.export(tmp_path / 'set', [], layout, EnvSpec('probe', (2,), DISCRETE))
