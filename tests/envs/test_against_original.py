"""Every game equals the original MinAtar step by step, given the same state, action and dice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('minatar', reason='the original MinAtar is not installed: pip install minatar')

import original

from reverie.envs.minatar.env import GAMES


def compact(queue):
    """The living entities of each queue in their order, at the end; the rest zeroed."""
    order = np.argsort(queue.present, axis=1, kind='stable')
    sort = lambda x: np.where(
        np.sort(queue.present, axis=1), np.take_along_axis(x, order, axis=1), 0
    )
    return type(queue)(*[sort(np.asarray(field)) for field in queue])


def canonical(game, state):
    """Part of a state that the rules can observe."""
    if game == 'asterix':
        present = state.travellers.present
        return state._replace(
            travellers=type(state.travellers)(*[np.where(present, f, 0) for f in state.travellers])
        )
    if game == 'seaquest':
        enemies = state.enemies
        shot = np.where(enemies.submarine, enemies.shot_timer, 0)
        kinds = [
            enemies._replace(present=enemies.present & k, shot_timer=shot)
            for k in (enemies.submarine, ~enemies.submarine)
        ]
        return state._replace(
            enemies=tuple(compact(k) for k in kinds),
            divers=compact(state.divers),
            bullets=compact(state.bullets),
        )
    return state


def replay(game, recording, inject):
    """Our game through the recorded steps; the recorded state replaces ours where `inject`."""

    def step(state, row):
        before, action, chance, inject = row
        state = jax.tree.map(lambda a, b: jnp.where(inject, a, b), before, state)
        state, reward, terminal = game.transition(state, action, chance)
        return state, (state, game.observe(state), reward, terminal)

    first = jax.tree.map(lambda x: jnp.asarray(x[0]), recording.before)
    rows = (recording.before, recording.action, recording.chance, inject)
    return jax.tree.map(np.asarray, jax.jit(lambda s, r: jax.lax.scan(step, s, r)[1])(first, rows))


def seen(game, recording):
    """The rare events that the recording must contain to be worth comparing."""
    before, after = recording.before, recording.after
    if game == 'breakout':
        return dict(
            cleared=(after.bricks.sum((1, 2)) > before.bricks.sum((1, 2))).any(),
            passed=before.struck.any(),
        )
    if game == 'asterix':
        full = before.travellers.present.all(axis=1) & (before.spawn_timer == 0)
        return dict(
            full=full.any(),
            fastest=(after.spawn_every == 1).any() and (after.move_every == 1).any(),
        )
    if game == 'freeway':
        return dict(crossed=(recording.reward > 0).sum() > 100, clock=recording.terminal.sum() > 5)
    if game == 'space_invaders':
        return dict(fastest=(after.move_every == 6).any(), landed=after.aliens[:, 9].any())
    crowd = after.enemies.present.sum(axis=1)
    return dict(
        crowd=crowd.max() > 15,
        fastest=((after.enemy_every == 1) & (after.enemy_move == 2)).any(),
        in_debt=(after.aboard < 0).any(),
        paid=recording.reward.max() > 3,
    )


@pytest.mark.parametrize('name', GAMES)
def test_game_equals_the_original_in_state_observation_reward_and_terminal(name):
    recording = original.record(name)
    # First half: every step starts from the original's state. Second half: ours runs free from
    # reset to reset.
    inject = recording.fresh | (np.arange(original.STEPS) < original.STEPS // 2)
    state, obs, reward, terminal = replay(GAMES[name](), recording, inject)

    np.testing.assert_array_equal(reward, recording.reward)
    np.testing.assert_array_equal(terminal, recording.terminal)
    np.testing.assert_array_equal(obs, recording.obs)
    jax.tree.map(
        np.testing.assert_array_equal, canonical(name, state), canonical(name, recording.after)
    )
    events = seen(name, recording)
    assert all(events.values()), events
