"""Breakout: bounce the ball off the paddle to break three rows of bricks; +1 a brick, over when the
ball is missed.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie.envs.minatar.board import LAST, LEFT, NOOP, RIGHT, SIZE, cell, integer, walk

BRICK_ROWS = slice(1, 4)
BALL_ROW = 3  # where the ball is served


class State(NamedTuple):
    paddle: Int[Array, '']  # column of the paddle, which lies in the bottom row
    y: Int[Array, '']  # the ball
    x: Int[Array, '']
    dy: Int[Array, '']  # direction of the ball, +-1 each
    dx: Int[Array, '']
    last_y: Int[Array, '']  # the ball one step ago
    last_x: Int[Array, '']
    bricks: Bool[Array, '10 10']
    struck: Bool[Array, '']  # the last step touched a brick: the ball flies through the next one


class Chance(NamedTuple):
    from_right: Bool[Array, '']  # the corner a new game serves the ball from


def wall() -> Bool[Array, '10 10']:
    return jnp.zeros((SIZE, SIZE), bool).at[BRICK_ROWS].set(True)


@dataclasses.dataclass(frozen=True)
class Breakout:
    """Rules of Breakout."""

    ramping: bool = True
    """Changes nothing in this game, whose difficulty does not rise."""
    name: ClassVar[str] = 'breakout'
    channels: ClassVar[tuple[str, ...]] = ('paddle', 'ball', 'trail', 'brick')
    minimal: ClassVar[tuple[int, ...]] = (NOOP, LEFT, RIGHT)

    def draw(self, key: PRNGKeyArray) -> Chance:
        return Chance(from_right=jax.random.bernoulli(key))

    def reset(self, chance: Chance) -> State:
        y, x = integer(BALL_ROW), jnp.where(chance.from_right, LAST, 0)
        dx = jnp.where(chance.from_right, -1, 1)
        return State(integer(4), y, x, integer(1), dx, y, x, wall(), jnp.asarray(False))

    def transition(
        self, state: State, action: Int[Array, ''], chance: Chance
    ) -> tuple[State, Float[Array, ''], Bool[Array, '']]:
        """Play one step; return (state, reward, terminal). Only the serve is random, so `chance` is
        not read.
        """
        paddle = walk(state.paddle, action, LEFT, RIGHT)
        y, x = state.y + state.dy, state.x + state.dx
        side = (x < 0) | (x > LAST)
        x, dx = jnp.clip(x, 0, LAST), jnp.where(side, -state.dx, state.dx)

        # Exactly one of: ceiling, brick, floor, free flight.
        ceiling = y < 0
        target = cell(y, x)
        touched = ~ceiling & (state.bricks & target).any()
        broken = touched & ~state.struck
        floor = ~ceiling & ~touched & (y == LAST)
        cleared = floor & ~state.bricks.any()
        caught_above = floor & (state.x == paddle)
        # the corner of the paddle sends the ball back
        caught_aside = floor & ~caught_above & (x == paddle)

        bounce = broken | caught_above | caught_aside
        bricks = jnp.where(cleared, wall(), state.bricks & ~(target & broken))
        after = State(
            paddle=paddle,
            y=jnp.where(bounce, state.y, jnp.maximum(y, 0)),
            x=x,
            dy=jnp.where(bounce | ceiling, -state.dy, state.dy),
            dx=jnp.where(caught_aside, -dx, dx),
            last_y=state.y,
            last_x=state.x,
            bricks=bricks,
            struck=touched,
        )
        return after, broken.astype(jnp.float32), floor & ~caught_above & ~caught_aside

    def observe(self, state: State) -> Bool[Array, '10 10 4']:
        paddle = cell(integer(LAST), state.paddle)
        ball, trail = cell(state.y, state.x), cell(state.last_y, state.last_x)
        return jnp.stack([paddle, ball, trail, state.bricks], axis=-1)
