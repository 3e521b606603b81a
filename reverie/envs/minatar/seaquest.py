"""Seaquest: shoot fish and submarines, pick up divers and surface before the oxygen runs out.

+1 for a fish or submarine shot; surfacing with six divers pays up to +10 for the oxygen left. Over
on touching an enemy or its torpedo, without oxygen, or on surfacing without a diver.
"""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie.envs.minatar.board import (
    DOWN,
    FIRE,
    LAST,
    LEFT,
    RIGHT,
    SIZE,
    UP,
    cell,
    integer,
    occupied,
    walk,
)

RELOAD = 5  # steps between two shots of the player
OXYGEN, FULL = 200, 6  # steps under water; divers of a full load
ENEMY_EVERY, ENEMY_SHOT = 20, 10
ENEMY_MOVE, FASTEST_MOVE = 5, 2
DIVER_EVERY, DIVER_MOVE = 30, 5

# Entities are kept in queues: a newcomer enters at the end and pushes the others towards slot 0.
# They leave in the order they came or earlier, so a queue this long never pushes out a present one:
# an enemy crosses in 30 steps and one comes a step at most; a diver crosses in 60 and comes every
# 30; a bullet flies 9 and the next follows after 5.
ENEMIES = 32
DIVERS, BULLETS = 2, 2


class Enemies(NamedTuple):
    present: Bool[Array, '32']
    y: Int[Array, '32']
    x: Int[Array, '32']
    right: Bool[Array, '32']  # swims right, otherwise left
    submarine: Bool[Array, '32']  # otherwise a fish
    move_timer: Int[Array, '32']
    shot_timer: Int[Array, '32']  # read for submarines only


class Divers(NamedTuple):
    present: Bool[Array, '2']
    y: Int[Array, '2']
    x: Int[Array, '2']
    right: Bool[Array, '2']
    move_timer: Int[Array, '2']


class Bullets(NamedTuple):
    """Bullets of the player."""

    present: Bool[Array, '2']
    y: Int[Array, '2']
    x: Int[Array, '2']
    right: Bool[Array, '2']


class State(NamedTuple):
    y: Int[Array, '']  # the player's submarine
    x: Int[Array, '']
    right: Bool[Array, '']  # points right, otherwise left
    reload: Int[Array, '']
    oxygen: Int[Array, '']
    aboard: Int[Array, '']  # divers picked up
    surfaced: Bool[Array, '']  # already paid for being at the surface
    enemies: Enemies
    divers: Divers
    bullets: Bullets
    torpedoes: Bool[Array, '2 10 10']  # the enemies', flying left and right
    enemy_every: Int[Array, '']  # steps between two enemies; shrinks as difficulty ramps
    enemy_timer: Int[Array, '']
    enemy_move: Int[Array, '']  # steps between two moves of an enemy; shrinks too
    diver_timer: Int[Array, '']
    ramps: Int[Array, '']  # number of times that difficulty was raised


class Chance(NamedTuple):
    enemy_right: Bool[Array, '']
    enemy_submarine: Bool[Array, '']
    enemy_row: Int[Array, '']
    diver_right: Bool[Array, '']
    diver_row: Int[Array, '']


Entities = TypeVar('Entities', Enemies, Divers, Bullets)


def at(entities: Enemies | Divers | Bullets, y: Array, x: Array) -> Bool[Array, ' n']:
    """Mask of the entities in cell (y, x)."""
    return entities.present & (entities.y == y) & (entities.x == x)


def push(queue: Entities, newcomer: Entities, due: Bool[Array, '']) -> Entities:
    """Add a newcomer at the end of the queue where it is due."""

    def leaf(old: Array, new: Array) -> Array:
        return jnp.where(due, jnp.append(old[1:], new), old)

    pushed: Entities = jax.tree.map(leaf, queue, newcomer)
    return pushed


def advance(entities: Entities, due: Bool[Array, ' n']) -> Entities:
    """Move those due one column on, and remove them where that takes them off the board."""
    x = entities.x + jnp.where(due, jnp.where(entities.right, 1, -1), 0)
    return entities._replace(x=x, present=entities.present & (x >= 0) & (x <= LAST))


def shoot_down(
    enemies: Enemies,
    bullets: Bullets,
    target: Bool[Array, '32'],
    rank: Int[Array, '32'],
    order: Iterable[int],
) -> tuple[Enemies, Bullets, Int[Array, '']]:
    """Let each bullet, in the given order of slots, hit the target of lowest rank in its cell, and
    remove both; return (enemies, bullets, kills).

    Several entities may share a cell, so the order decides which of them stay.
    """
    left = bullets.present
    for i in order:
        met = target & left[i] & at(enemies, bullets.y[i], bullets.x[i])
        victim = met & (rank == jnp.where(met, rank, 2 * ENEMIES).min())
        enemies = enemies._replace(present=enemies.present & ~victim)
        left &= ~(met.any() & (jnp.arange(BULLETS) == i))
    return enemies, bullets._replace(present=left), bullets.present.sum() - left.sum()


def spawn(state: State, chance: Chance) -> State:
    """Add enemies and divers at the edges; no enemy enters a row where another one comes towards
    it.
    """
    enemies, due = state.enemies, state.enemy_timer == 0
    in_row = enemies.present & (enemies.y == chance.enemy_row)
    head_on = in_row & (enemies.right != chance.enemy_right)
    enemy = Enemies(
        present=jnp.asarray(True),
        y=chance.enemy_row,
        x=jnp.where(chance.enemy_right, 0, LAST),
        right=chance.enemy_right,
        submarine=chance.enemy_submarine,
        move_timer=state.enemy_move,
        shot_timer=integer(ENEMY_SHOT),
    )
    diver_due = state.diver_timer == 0
    diver = Divers(
        present=jnp.asarray(True),
        y=chance.diver_row,
        x=jnp.where(chance.diver_right, 0, LAST),
        right=chance.diver_right,
        move_timer=integer(DIVER_MOVE),
    )
    return state._replace(
        enemies=push(enemies, enemy, due & ~head_on.any()),
        enemy_timer=jnp.where(due, state.enemy_every, state.enemy_timer),
        divers=push(state.divers, diver, diver_due),
        diver_timer=jnp.where(diver_due, DIVER_EVERY, state.diver_timer),
    )


def steer(state: State, action: Int[Array, '']) -> State:
    """Move the player, or fire."""
    fire = (action == FIRE) & (state.reload == 0)
    bullet = Bullets(jnp.asarray(True), state.y, state.x, state.right)
    return state._replace(
        y=walk(state.y, action, UP, DOWN, 0, LAST - 1),
        x=walk(state.x, action, LEFT, RIGHT),
        right=(state.right | (action == RIGHT)) & (action != LEFT),
        bullets=push(state.bullets, bullet, fire),
        reload=jnp.where(fire, RELOAD, state.reload),
    )


def fly_bullets(state: State) -> tuple[State, Int[Array, '']]:
    """Move the player's bullets, the newest first, which hit the oldest fish, then submarines;
    return (state, kills).
    """
    bullets = advance(state.bullets, state.bullets.present)
    rank = jnp.arange(ENEMIES) + jnp.where(state.enemies.submarine, ENEMIES, 0)
    all_of_them, newest_first = jnp.ones(ENEMIES, bool), reversed(range(BULLETS))
    enemies, bullets, kills = shoot_down(state.enemies, bullets, all_of_them, rank, newest_first)
    return state._replace(enemies=enemies, bullets=bullets), kills


def move_divers(state: State) -> State:
    """Move the divers, and pick up those whose old or new cell is the player's, while there is
    room; the newest first.
    """
    divers = state.divers
    due = divers.present & (divers.move_timer == 0)
    moved = advance(divers, due)
    reachable = at(divers, state.y, state.x) | at(moved, state.y, state.x)
    room = FULL - state.aboard
    newer = jnp.cumsum(reachable[::-1])[::-1]  # reachable divers as new as this one, it included
    picked = reachable & (newer <= room)
    present = moved.present & ~picked
    timer = jnp.where(due, DIVER_MOVE, divers.move_timer - 1)
    divers = moved._replace(present=present, move_timer=timer)
    return state._replace(divers=divers, aboard=state.aboard + picked.sum())


def move_enemies(state: State) -> tuple[State, Int[Array, ''], Bool[Array, '']]:
    """Move the enemies, of which submarines shoot; return (state, kills, dead). An enemy that swims
    into a bullet is hit by it.
    """
    before = state.enemies
    due = before.present & (before.move_timer == 0)
    enemies = advance(before, due)
    reached = at(enemies, state.y, state.x)
    met = at(before, state.y, state.x) | reached

    shoots = before.present & before.submarine & (before.shot_timer == 0)
    flying = [shoots & ~before.right, shoots & before.right]
    torpedoes = state.torpedoes | jnp.stack([occupied(enemies.y, enemies.x, f) for f in flying])

    rank = jnp.arange(ENEMIES)[::-1] + jnp.where(enemies.submarine, 0, ENEMIES)
    target = due & ~reached
    enemies, bullets, kills = shoot_down(enemies, state.bullets, target, rank, range(BULLETS))
    enemies = enemies._replace(
        move_timer=jnp.where(due, state.enemy_move, before.move_timer - 1),
        shot_timer=jnp.where(shoots, ENEMY_SHOT, before.shot_timer - 1),
    )
    return state._replace(enemies=enemies, bullets=bullets, torpedoes=torpedoes), kills, met.any()


def fly_torpedoes(state: State) -> tuple[State, Bool[Array, '']]:
    """Move the torpedoes, which hit the player in their old and in their new cell; return (state,
    dead).
    """
    left, right = state.torpedoes
    edge = jnp.zeros((SIZE, 1), bool)
    left = jnp.concatenate([left[:, 1:], edge], axis=1)
    right = jnp.concatenate([edge, right[:, :-1]], axis=1)
    torpedoes = jnp.stack([left, right])
    player = cell(state.y, state.x)
    return state._replace(torpedoes=torpedoes), ((state.torpedoes | torpedoes) & player).any()


def breathe(state: State, ramping: bool) -> tuple[State, Int[Array, ''], Bool[Array, '']]:
    """Use up oxygen under water, refill it and land divers at the surface; return (state, reward,
    dead).

    As in the original, landing a full load leaves -1 divers aboard, and surfacing with less than
    none is not fatal.
    """
    under = state.y > 0
    arrives = ~under & ~state.surfaced
    lands = arrives & (state.aboard != 0)
    full = lands & (state.aboard == FULL)
    after = state._replace(
        oxygen=jnp.where(lands, OXYGEN, state.oxygen - under),
        aboard=jnp.where(full, 0, state.aboard) - lands,
        surfaced=~under & (state.surfaced | lands),
    )
    if ramping:
        harder = lands & ((state.enemy_every > 1) | (state.enemy_move > FASTEST_MOVE))
        faster = harder & (state.enemy_move > FASTEST_MOVE) & (state.ramps % 2 == 1)
        after = after._replace(
            enemy_every=state.enemy_every - (harder & (state.enemy_every > 1)),
            enemy_move=state.enemy_move - faster,
            ramps=state.ramps + harder,
        )
    dead = (state.oxygen <= 0) | (arrives & ~lands)
    return after, jnp.where(full, state.oxygen * SIZE // OXYGEN, 0), dead


@dataclasses.dataclass(frozen=True)
class Seaquest:
    """Rules of Seaquest."""

    ramping: bool = True
    """Enemies arrive and move faster every time divers are landed."""
    name: ClassVar[str] = 'seaquest'
    channels: ClassVar[tuple[str, ...]] = (
        'sub_front', 'sub_back', 'friendly_bullet', 'trail', 'enemy_bullet', 'enemy_fish',
        'enemy_sub', 'oxygen_gauge', 'diver_gauge', 'diver',
    )  # fmt: skip
    minimal: ClassVar[tuple[int, ...]] = tuple(range(6))

    def draw(self, key: PRNGKeyArray) -> Chance:
        u = jax.random.uniform(key, (5,))
        row = 1 + (u * (SIZE - 2)).astype(jnp.int32)
        return Chance(u[0] < 1 / 2, u[1] < 1 / 3, row[2], u[3] < 1 / 2, row[4])

    def reset(self, chance: Chance) -> State:
        e, d, b = (jnp.zeros(n, bool) for n in (ENEMIES, DIVERS, BULLETS))
        e0, d0, b0 = (jnp.zeros(n, jnp.int32) for n in (ENEMIES, DIVERS, BULLETS))
        return State(
            y=integer(0),
            x=integer(5),
            right=jnp.asarray(False),
            reload=integer(0),
            oxygen=integer(OXYGEN),
            aboard=integer(0),
            surfaced=jnp.asarray(True),
            enemies=Enemies(e, e0, e0, e, e, e0, e0),
            divers=Divers(d, d0, d0, d, d0),
            bullets=Bullets(b, b0, b0, b),
            torpedoes=jnp.zeros((2, SIZE, SIZE), bool),
            enemy_every=integer(ENEMY_EVERY),
            enemy_timer=integer(ENEMY_EVERY),
            enemy_move=integer(ENEMY_MOVE),
            diver_timer=integer(DIVER_EVERY),
            ramps=integer(0),
        )

    def transition(
        self, state: State, action: Int[Array, ''], chance: Chance
    ) -> tuple[State, Float[Array, ''], Bool[Array, '']]:
        """Play one step; return (state, reward, terminal)."""
        state = steer(spawn(state, chance), action)
        state, shot = fly_bullets(state)
        state = move_divers(state)
        state, rammed, dead = move_enemies(state)
        state, torpedoed = fly_torpedoes(state)
        state = state._replace(
            enemy_timer=jnp.maximum(state.enemy_timer - 1, 0),
            diver_timer=jnp.maximum(state.diver_timer - 1, 0),
            reload=jnp.maximum(state.reload - 1, 0),
        )
        state, landed, drowned = breathe(state, self.ramping)
        return state, (shot + rammed + landed).astype(jnp.float32), dead | torpedoed | drowned

    def observe(self, state: State) -> Bool[Array, '10 10 10']:
        enemies, divers = state.enemies, state.divers
        bullets = state.bullets
        trails, trails_of_divers = (
            occupied(e.y, e.x + jnp.where(e.right, -1, 1), e.present) for e in (enemies, divers)
        )
        x, bottom = jnp.arange(SIZE), jnp.arange(SIZE)[:, None] == LAST
        oxygen = x < jnp.maximum(state.oxygen, 0) * SIZE // OXYGEN
        aboard = (x >= LAST - state.aboard) & (x < LAST)
        channels = [
            cell(state.y, state.x),
            cell(state.y, state.x + jnp.where(state.right, -1, 1)),
            occupied(bullets.y, bullets.x, bullets.present),
            trails | trails_of_divers,
            state.torpedoes.any(axis=0),
            occupied(enemies.y, enemies.x, enemies.present & ~enemies.submarine),
            occupied(enemies.y, enemies.x, enemies.present & enemies.submarine),
            bottom & oxygen,
            bottom & aboard,
            occupied(divers.y, divers.x, divers.present),
        ]
        return jnp.stack(channels, axis=-1)
