"""Recordings of the original MinAtar: states in our layout, the dice it rolled, and what came of
every step.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from reverie.envs.minatar import asterix, breakout, freeway, seaquest, space_invaders
from reverie.envs.minatar.board import DOWN, FIRE, LEFT, NOOP, RIGHT, UP

STEPS = 24_000


class Dice:
    """NumPy generator that records the numbers it rolled."""

    def __init__(self, seed: int):
        self.random, self.rolled = np.random.RandomState(seed), []

    def rand(self, *shape):
        return self._keep(self.random.rand(*shape))

    def randint(self, *args, **kwargs):
        return self._keep(self.random.randint(*args, **kwargs))

    def _keep(self, value):
        self.rolled.append(np.copy(value))
        return value


@dataclasses.dataclass
class Recording:
    """Leading dimension: steps. `before` and `after` are states of our game."""

    before: Any
    action: np.ndarray
    chance: Any
    after: Any
    obs: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    fresh: np.ndarray  # the original was reset, or set by hand, before this step


def integers(*values):
    return [np.int32(v) for v in values]


def breakout_state(env):
    dx, dy = [(-1, -1), (1, -1), (1, 1), (-1, 1)][env.ball_dir]
    numbers = integers(env.pos, env.ball_y, env.ball_x, dy, dx, env.last_y, env.last_x)
    return breakout.State(*numbers, bricks=env.brick_map > 0, struck=np.bool_(env.strike))


def asterix_state(env):
    slots = [e if e is not None else (0, 0, False, False) for e in env.entities]
    travellers = asterix.Travellers(
        present=np.array([e is not None for e in env.entities]),
        x=np.array([e[0] for e in slots], np.int32),
        right=np.array([e[2] for e in slots], bool),
        gold=np.array([e[3] for e in slots], bool),
    )
    y, x = integers(env.player_y, env.player_x)
    timers = (
        env.spawn_speed,
        env.spawn_timer,
        env.move_speed,
        env.move_timer,
        env.ramp_timer,
        env.ramp_index,
    )
    return asterix.State(y, x, travellers, *integers(*timers))


def freeway_state(env):
    x, _, timer, speed = np.array(env.cars, np.int32).T
    chicken, rest, clock = integers(env.pos, env.move_timer, env.terminate_timer)
    return freeway.State(chicken, rest, x, timer, speed, clock)


def space_invaders_state(env):
    timers = (
        env.shot_timer,
        env.enemy_move_interval,
        env.alien_move_timer,
        env.alien_shot_timer,
        env.ramp_index,
    )
    return space_invaders.State(
        np.int32(env.pos),
        env.alien_map > 0,
        np.int32(env.alien_dir),
        env.f_bullet_map > 0,
        env.e_bullet_map > 0,
        *integers(*timers),
    )


def queue(kind, size, rows):
    """Entities at the end of a queue, oldest first; `rows` are the fields after `present`."""
    assert len(rows) <= size, f'{len(rows)} entities do not fit {size} slots'
    fields = [
        np.zeros(size, bool if name in ('present', 'right', 'submarine') else np.int32)
        for name in kind._fields
    ]
    for slot, row in enumerate(rows, start=size - len(rows)):
        for field, value in zip(fields, (True, *row), strict=True):
            field[slot] = value
    return kind(*fields)


def seaquest_state(env):
    fish = [(y, x, right, False, timer, 0) for x, y, right, timer in env.e_fish]
    submarines = [(y, x, right, True, timer, shot) for x, y, right, timer, shot in env.e_subs]
    torpedoes = np.zeros((2, 10, 10), bool)
    for x, y, right in env.e_bullets:
        torpedoes[int(right), y, x] = True
    return seaquest.State(
        *integers(env.sub_y, env.sub_x),
        np.bool_(env.sub_or),
        *integers(env.shot_timer, env.oxygen, env.diver_count),
        np.bool_(env.surface),
        enemies=queue(seaquest.Enemies, seaquest.ENEMIES, fish + submarines),
        divers=queue(
            seaquest.Divers, seaquest.DIVERS, [(y, x, right, t) for x, y, right, t in env.divers]
        ),
        bullets=queue(
            seaquest.Bullets, seaquest.BULLETS, [(y, x, right) for x, y, right in env.f_bullets]
        ),
        torpedoes=torpedoes,
        enemy_every=np.int32(env.e_spawn_speed),
        enemy_timer=np.int32(env.e_spawn_timer),
        enemy_move=np.int32(env.move_speed),
        diver_timer=np.int32(env.d_spawn_timer),
        ramps=np.int32(env.ramp_index),
    )


def breakout_chance(rolled, before):
    return breakout.Chance(np.bool_(False))


def asterix_chance(rolled, before):
    if len(rolled) < 3:  # none due, or no row free
        return asterix.Chance(np.bool_(False), np.bool_(False), np.float32(0))
    right, gold, choice = rolled
    free = (~before.travellers.present).sum()
    return asterix.Chance(
        np.bool_(right < 1 / 2), np.bool_(gold < 1 / 3), np.float32((choice + 0.5) / free)
    )


def freeway_chance(rolled, before):
    if not rolled:
        return freeway.Chance(np.ones(8, np.int32))
    speed, side = rolled
    return freeway.Chance((speed * np.sign(side - 0.5)).astype(np.int32))


def space_invaders_chance(rolled, before):
    return space_invaders.Chance()


def seaquest_chance(rolled, before):
    rolled = list(rolled)
    right, submarine, row = (
        [rolled.pop(0) for _ in range(3)] if before.enemy_timer == 0 else (0, 0, 1)
    )
    diver_right, diver_row = rolled or (0, 1)
    return seaquest.Chance(
        np.bool_(right < 1 / 2),
        np.bool_(submarine < 1 / 3),
        np.int32(row),
        np.bool_(diver_right < 1 / 2),
        np.int32(diver_row),
    )


def follow_the_ball(env, rng, t):
    """Move under the ball or one column ahead of it, which sends it back: together they reach every
    brick.
    """
    if rng.rand() < 0.02:
        return rng.randint(6)
    ahead = 1 if env.ball_dir in (1, 2) else -1
    target = env.ball_x + ahead * (t // 20 % 2)
    return LEFT if target < env.pos else RIGHT if target > env.pos else NOOP


def mostly_up(env, rng, t):
    return UP if rng.rand() < 0.8 else rng.choice([NOOP, UP, DOWN, LEFT])


def wander(env, rng, t):
    return rng.randint(6)


def shoot_and_wander(env, rng, t):
    return FIRE if rng.rand() < 0.3 else rng.choice([LEFT, RIGHT, NOOP, FIRE])


def dive_and_surface(env, rng, t):
    vertical = UP if t % 60 < 15 else DOWN
    return vertical if rng.rand() < 0.3 else rng.randint(6)


def lend_divers(env, rng):
    """Divers come aboard by our hand, so that enough are landed for difficulty to ramp to its end."""
    env.diver_count = rng.randint(1, 7)


PLAY = dict(
    breakout=(breakout_state, breakout_chance, follow_the_ball),
    asterix=(asterix_state, asterix_chance, wander),
    freeway=(freeway_state, freeway_chance, mostly_up),
    space_invaders=(space_invaders_state, space_invaders_chance, shoot_and_wander),
    seaquest=(seaquest_state, seaquest_chance, dive_and_surface),
)
IMMORTAL = (
    'asterix',
    'space_invaders',
    'seaquest',
)  # games that go on sensibly when death is ignored


def record(game: str, seed: int = 0) -> Recording:
    """Plays the original: the first third of the steps by its rules; then, where possible, ignoring
    death for long.
    """
    from minatar import Environment

    env = Environment(game, sticky_action_prob=0.0).env
    state_of, chance_of, act = PLAY[game]
    dice, rng = Dice(seed), np.random.RandomState(seed + 1)
    env.random = dice
    env.reset()
    rows, fresh = [], True
    for t in range(STEPS):
        if game == 'seaquest' and t % 150 == 0:
            lend_divers(env, rng)
            fresh = True
        action = act(env, rng, t)
        before = state_of(env)
        dice.rolled.clear()
        reward, terminal = env.act(action)
        after, obs = state_of(env), env.state()
        rows.append(
            (
                before,
                np.int32(action),
                chance_of(dice.rolled, before),
                after,
                obs,
                reward,
                terminal,
                fresh,
            )
        )
        fresh = False
        immortal = game in IMMORTAL and t > STEPS // 3
        if terminal and immortal:
            env.terminal = False
        if (terminal and not immortal) or (immortal and t % 8000 == 0):
            env.reset()
            fresh = True
    columns = [jax.tree.map(lambda *x: np.stack(x), *column) for column in zip(*rows, strict=True)]
    return Recording(*columns)
