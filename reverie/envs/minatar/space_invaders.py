"""Space Invaders: shoot the aliens from a cannon; +1 an alien, over when a bullet or an alien
reaches the cannon.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie.envs.minatar.board import FIRE, LAST, LEFT, NOOP, RIGHT, SIZE, cell, integer, walk

RELOAD = 5  # steps between two shots of the cannon
ALIEN_SHOT_EVERY = 10
MOVE_EVERY, FASTEST_MOVE_EVERY = 12, 6


class State(NamedTuple):
    cannon: Int[Array, '']  # column, in the bottom row
    aliens: Bool[Array, '10 10']
    direction: Int[Array, '']  # the aliens': -1 left, 1 right
    bullets: Bool[Array, '10 10']  # the player's, flying up
    bombs: Bool[Array, '10 10']  # the aliens', falling
    reload: Int[Array, '']
    move_every: Int[Array, '']  # steps between two moves of a full fleet; shrinks with every fleet
    move_timer: Int[Array, '']
    shot_timer: Int[Array, '']  # steps until the aliens shoot
    ramps: Int[Array, '']  # number of times that difficulty was raised


class Chance(NamedTuple):
    """Nothing: no part of this game is random."""


def fleet() -> Bool[Array, '10 10']:
    y, x = jnp.arange(SIZE)[:, None], jnp.arange(SIZE)
    return (y < 4) & (x >= 2) & (x < 8)


def march(
    state: State, due: Bool[Array, '']
) -> tuple[Bool[Array, '10 10'], Int[Array, ''], Bool[Array, '']]:
    """Move the aliens sideways, or down and about at the edge of the board; return (aliens,
    direction, landed).
    """
    aliens, left = state.aliens, state.direction < 0
    turn = due & jnp.where(left, aliens[:, 0].any(), aliens[:, LAST].any())
    landed = turn & aliens[LAST].any()
    sideways = jnp.where(left, jnp.roll(aliens, -1, axis=1), jnp.roll(aliens, 1, axis=1))
    moved = jnp.where(turn, jnp.roll(aliens, 1, axis=0), sideways)
    direction = jnp.where(turn, -state.direction, state.direction)
    return jnp.where(due, moved, aliens), direction, landed


def gunner(aliens: Bool[Array, '10 10'], cannon: Int[Array, '']) -> Bool[Array, '10 10']:
    """Lowest alien of the occupied column nearest to the cannon; of two as near, the left one."""
    x, y = jnp.arange(SIZE), jnp.arange(SIZE)[:, None]
    distance = 2 * jnp.abs(x - cannon) + (x > cannon)
    column = jnp.where(aliens.any(axis=0), distance, 2 * SIZE)
    lowest = jnp.where(aliens, y, -1).max(axis=0)
    return aliens & (y == lowest) & (column == column.min())


@dataclasses.dataclass(frozen=True)
class SpaceInvaders:
    """Rules of Space Invaders."""

    ramping: bool = True
    """Every new fleet marches faster, down to half the first one's interval."""
    name: ClassVar[str] = 'space_invaders'
    channels: ClassVar[tuple[str, ...]] = (
        'cannon', 'alien', 'alien_left', 'alien_right', 'friendly_bullet', 'enemy_bullet',
    )  # fmt: skip
    minimal: ClassVar[tuple[int, ...]] = (NOOP, LEFT, RIGHT, FIRE)

    def draw(self, key: PRNGKeyArray) -> Chance:
        return Chance()

    def reset(self, chance: Chance) -> State:
        empty = jnp.zeros((SIZE, SIZE), bool)
        return State(
            cannon=integer(5),
            aliens=fleet(),
            direction=integer(-1),
            bullets=empty,
            bombs=empty,
            reload=integer(0),
            move_every=integer(MOVE_EVERY),
            move_timer=integer(MOVE_EVERY),
            shot_timer=integer(ALIEN_SHOT_EVERY),
            ramps=integer(0),
        )

    def transition(
        self, state: State, action: Int[Array, ''], chance: Chance
    ) -> tuple[State, Float[Array, ''], Bool[Array, '']]:
        """Play one step; return (state, reward, terminal)."""
        cannon = walk(state.cannon, action, LEFT, RIGHT)
        here = cell(integer(LAST), cannon)
        fire = (action == FIRE) & (state.reload == 0)
        no_row = jnp.zeros((1, SIZE), bool)
        # A bullet leaves the cannon's row in the step it is fired.
        bullets = jnp.concatenate([(state.bullets | (here & fire))[1:], no_row])
        bombs = jnp.concatenate([no_row, state.bombs[:-1]])
        dead = ((bombs | state.aliens) & here).any()

        move = state.move_timer == 0
        aliens, direction, landed = march(state, move)
        dead |= landed | (move & (aliens & here).any())
        count = state.aliens.sum()
        move_timer = jnp.where(move, jnp.minimum(count, state.move_every), state.move_timer)

        shoot = state.shot_timer == 0
        bombs |= shoot & gunner(aliens, cannon)

        killed = aliens & bullets
        aliens, bullets = aliens & ~killed, bullets & ~killed
        cleared = ~aliens.any()
        faster = cleared & (state.move_every > FASTEST_MOVE_EVERY) & self.ramping
        after = State(
            cannon=cannon,
            aliens=jnp.where(cleared, fleet(), aliens),
            direction=direction,
            bullets=bullets,
            bombs=bombs,
            reload=jnp.maximum(jnp.where(fire, RELOAD, state.reload) - 1, 0),
            move_every=state.move_every - faster,
            move_timer=move_timer - 1,
            shot_timer=jnp.where(shoot, ALIEN_SHOT_EVERY, state.shot_timer) - 1,
            ramps=state.ramps + faster,
        )
        return after, killed.sum().astype(jnp.float32), dead

    def observe(self, state: State) -> Bool[Array, '10 10 6']:
        left = state.direction < 0
        return jnp.stack(
            [
                cell(integer(LAST), state.cannon),
                state.aliens,
                state.aliens & left,
                state.aliens & ~left,
                state.bullets,
                state.bombs,
            ],
            axis=-1,
        )
