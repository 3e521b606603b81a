"""Seaquest: shoot fish and submarines, pick up divers and surface before the oxygen runs out.

+1 for a fish or submarine shot; surfacing with six divers pays up to +10 for the oxygen left. Over
on touching an enemy or its torpedo, without oxygen, or on surfacing without a diver.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

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
OXYGEN, FULL = 200, 6  # steps under water; divers that make a full load
ENEMY_EVERY, ENEMY_MOVE, FASTEST_MOVE, ENEMY_SHOT = 20, 5, 2, 10
DIVER_EVERY, DIVER_MOVE = 30, 5

# Entities live in queues: a newcomer enters at the end and pushes the others towards slot 0.
# Entities leave in the order they came or earlier, so a queue this long never pushes out a living
# one: an enemy crosses in 30 steps and one comes a step at most; a diver crosses in 60 and comes
# every 30; a bullet flies 9 and the next follows after 5.
ENEMIES, DIVERS, BULLETS = 32, 2, 2


class Enemies(NamedTuple):
    present: Bool[Array, '32']
    y: Int[Array, '32']
    x: Int[Array, '32']
    right: Bool[Array, '32']  # its direction
    submarine: Bool[Array, '32']  # otherwise a fish
    move_timer: Int[Array, '32']
    shot_timer: Int[Array, '32']  # of submarines


class Divers(NamedTuple):
    present: Bool[Array, '2']
    y: Int[Array, '2']
    x: Int[Array, '2']
    right: Bool[Array, '2']
    move_timer: Int[Array, '2']


class Bullets(NamedTuple):
    """The player's."""

    present: Bool[Array, '2']
    y: Int[Array, '2']
    x: Int[Array, '2']
    right: Bool[Array, '2']


class State(NamedTuple):
    y: Int[Array, '']  # the player's submarine
    x: Int[Array, '']
    right: Bool[Array, '']  # where it points
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
    ramps: Int[Array, '']  # how often difficulty was raised


class Chance(NamedTuple):
    enemy_right: Bool[Array, '']
    enemy_submarine: Bool[Array, '']
    enemy_row: Int[Array, '']
    diver_right: Bool[Array, '']
    diver_row: Int[Array, '']


def push(queue: PyTree, newcomer: PyTree, due: Bool[Array, '']) -> PyTree:
    """The newcomer enters at the end of the queue where it is due."""
    return jax.tree.map(
        lambda old, new: jnp.where(due, jnp.append(old[1:], new), old), queue, newcomer
    )


def advance(entities, due: Bool[Array, ' n']):
    """Those due move one column on, and are gone where that takes them off the board."""
    x = entities.x + jnp.where(due, jnp.where(entities.right, 1, -1), 0)
    return entities._replace(x=x, present=entities.present & (x >= 0) & (x <= LAST))


def shoot_down(
    enemies: Enemies, bullets: Bullets, target: Bool[Array, '32'], rank: Int[Array, '32'], order
):
    """Each bullet, in the given order of slots, takes the target of lowest rank in its cell, and
    both are gone.

    -> (enemies, bullets, kills). Several may share a cell, so who goes first decides who stays.
    """
    left = bullets.present
    for i in order:
        met = (
            target
            & enemies.present
            & left[i]
            & (enemies.y == bullets.y[i])
            & (enemies.x == bullets.x[i])
        )
        victim = met & (rank == jnp.where(met, rank, 2 * ENEMIES).min())
        enemies = enemies._replace(present=enemies.present & ~victim)
        left &= ~(met.any() & (jnp.arange(BULLETS) == i))
    return enemies, bullets._replace(present=left), bullets.present.sum() - left.sum()


def spawn(state: State, chance: Chance) -> State:
    """Enemies and divers arrive at the edges.

    No enemy enters a row where another one comes towards it.
    """
    enemies, due = state.enemies, state.enemy_timer == 0
    head_on = (
        enemies.present & (enemies.y == chance.enemy_row) & (enemies.right != chance.enemy_right)
    )
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
    """The player's bullets move, the newest first, and take the oldest fish, then submarines: ->
    (state, kills).
    """
    bullets = advance(state.bullets, state.bullets.present)
    rank = jnp.arange(ENEMIES) + jnp.where(state.enemies.submarine, ENEMIES, 0)
    anyone = jnp.ones(ENEMIES, bool)
    enemies, bullets, kills = shoot_down(
        state.enemies, bullets, anyone, rank, reversed(range(BULLETS))
    )
    return state._replace(enemies=enemies, bullets=bullets), kills


def move_divers(state: State) -> State:
    """A diver is picked up where it swims or where it swims to, while there is room; the newest
    first.
    """
    divers = state.divers
    due = divers.present & (divers.move_timer == 0)
    moved = advance(divers, due)
    here = lambda d: d.present & (d.y == state.y) & (d.x == state.x)
    reachable = here(divers) | here(moved)
    room = FULL - state.aboard
    newer = jnp.cumsum(reachable[::-1])[::-1]  # of those in reach, this one included
    picked = reachable & (newer <= room)
    # Where it could not be picked up it swims on.
    present = moved.present & ~picked
    timer = jnp.where(due, DIVER_MOVE, divers.move_timer - 1)
    return state._replace(
        divers=moved._replace(present=present, move_timer=timer), aboard=state.aboard + picked.sum()
    )


def move_enemies(state: State) -> tuple[State, Int[Array, ''], Bool[Array, '']]:
    """Enemies move, and shoot if submarines: -> (state, kills, dead). Swimming into a bullet kills
    like being hit.
    """
    before = state.enemies
    here = lambda e: e.present & (e.y == state.y) & (e.x == state.x)
    due = before.present & (before.move_timer == 0)
    enemies = advance(before, due)
    met = here(before) | here(enemies)

    shoots = before.present & before.submarine & (before.shot_timer == 0)
    flying = [shoots & ~before.right, shoots & before.right]
    torpedoes = state.torpedoes | jnp.stack([occupied(enemies.y, enemies.x, f) for f in flying])

    rank = jnp.arange(ENEMIES)[::-1] + jnp.where(enemies.submarine, 0, ENEMIES)
    enemies, bullets, kills = shoot_down(
        enemies, state.bullets, due & ~here(enemies), rank, range(BULLETS)
    )
    enemies = enemies._replace(
        move_timer=jnp.where(due, state.enemy_move, before.move_timer - 1),
        shot_timer=jnp.where(shoots, ENEMY_SHOT, before.shot_timer - 1),
    )
    return state._replace(enemies=enemies, bullets=bullets, torpedoes=torpedoes), kills, met.any()


def fly_torpedoes(state: State) -> tuple[State, Bool[Array, '']]:
    """-> (state, dead): torpedoes hit where they are and where they fly to."""
    left, right = state.torpedoes
    edge = jnp.zeros((SIZE, 1), bool)
    left = jnp.concatenate([left[:, 1:], edge], axis=1)
    right = jnp.concatenate([edge, right[:, :-1]], axis=1)
    torpedoes = jnp.stack([left, right])
    player = cell(state.y, state.x)
    return state._replace(torpedoes=torpedoes), ((state.torpedoes | torpedoes) & player).any()


def breathe(state: State, ramping: bool) -> tuple[State, Int[Array, ''], Bool[Array, '']]:
    """Oxygen falls under water; surfacing lands divers and refills it: -> (state, reward, dead).

    As in the original, landing a full load leaves -1 divers aboard, and nobody dies of surfacing
    with less than none.
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
    """ramping: enemies arrive and move faster every time divers are landed."""

    ramping: bool = True
    name: ClassVar[str] = 'seaquest'
    channels: ClassVar[tuple[str, ...]] = (
        'sub_front',
        'sub_back',
        'friendly_bullet',
        'trail',
        'enemy_bullet',
        'enemy_fish',
        'enemy_sub',
        'oxygen_gauge',
        'diver_gauge',
        'diver',
    )
    minimal: ClassVar[tuple[int, ...]] = tuple(range(6))

    def draw(self, key: PRNGKeyArray) -> Chance:
        u = jax.random.uniform(key, (5,))
        row = lambda v: 1 + (v * (SIZE - 2)).astype(jnp.int32)
        return Chance(u[0] < 1 / 2, u[1] < 1 / 3, row(u[2]), u[3] < 1 / 2, row(u[4]))

    def reset(self, chance: Chance) -> State:
        no, zero = lambda n: jnp.zeros(n, bool), lambda n: jnp.zeros(n, jnp.int32)
        n = ENEMIES
        return State(
            y=integer(0),
            x=integer(5),
            right=jnp.asarray(False),
            reload=integer(0),
            oxygen=integer(OXYGEN),
            aboard=integer(0),
            surfaced=jnp.asarray(True),
            enemies=Enemies(no(n), zero(n), zero(n), no(n), no(n), zero(n), zero(n)),
            divers=Divers(no(DIVERS), zero(DIVERS), zero(DIVERS), no(DIVERS), zero(DIVERS)),
            bullets=Bullets(no(BULLETS), zero(BULLETS), zero(BULLETS), no(BULLETS)),
            torpedoes=no((2, SIZE, SIZE)),
            enemy_every=integer(ENEMY_EVERY),
            enemy_timer=integer(ENEMY_EVERY),
            enemy_move=integer(ENEMY_MOVE),
            diver_timer=integer(DIVER_EVERY),
            ramps=integer(0),
        )

    def transition(
        self, state: State, action: Int[Array, ''], chance: Chance
    ) -> tuple[State, Float[Array, ''], Bool[Array, '']]:
        """-> (state, reward, terminal)."""
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
        enemies, divers, bullets = state.enemies, state.divers, state.bullets
        behind = lambda e: occupied(e.y, e.x + jnp.where(e.right, -1, 1), e.present)
        x, bottom = jnp.arange(SIZE), jnp.arange(SIZE)[:, None] == LAST
        oxygen = x < jnp.maximum(state.oxygen, 0) * SIZE // OXYGEN
        aboard = (x >= LAST - state.aboard) & (x < LAST)
        return jnp.stack(
            [
                cell(state.y, state.x),
                cell(state.y, state.x + jnp.where(state.right, -1, 1)),
                occupied(bullets.y, bullets.x, bullets.present),
                behind(enemies) | behind(divers),
                state.torpedoes.any(axis=0),
                occupied(enemies.y, enemies.x, enemies.present & ~enemies.submarine),
                occupied(enemies.y, enemies.x, enemies.present & enemies.submarine),
                bottom & oxygen,
                bottom & aboard,
                occupied(divers.y, divers.x, divers.present),
            ],
            axis=-1,
        )
