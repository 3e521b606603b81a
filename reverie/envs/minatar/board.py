"""Board of 10 x 10 cells that all games share: action numbers and masks of cells.

Positions are int32 scalars (row `y` down, column `x` right). Observations are built by comparing
positions with these constant index arrays; scatters would be several times slower on a CPU.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SIZE = 10
LAST = SIZE - 1
NOOP, LEFT, UP, RIGHT, DOWN, FIRE = range(6)
MEANINGS = ('noop', 'left', 'up', 'right', 'down', 'fire')


def line(i: Int[Array, '']) -> Bool[Array, '10']:
    """Row or column of cells with cell `i` set; empty where `i` is off the board."""
    return jnp.arange(SIZE) == i


def cell(y: Int[Array, ''], x: Int[Array, '']) -> Bool[Array, '10 10']:
    """Board with cell (y, x) set; empty where the position is off the board."""
    return line(y)[:, None] & line(x)[None, :]


def columns(x: Int[Array, ' n'], present: Bool[Array, ' n']) -> Bool[Array, 'n 10']:
    """Row of cells for each of n objects, with the cell at column `x` set where the object is
    present and on the board.
    """
    return present[:, None] & (x[:, None] == jnp.arange(SIZE))


def occupied(
    y: Int[Array, ' n'], x: Int[Array, ' n'], present: Bool[Array, ' n']
) -> Bool[Array, '10 10']:
    """Board with the cells of n objects set; a row is built as the bits of one integer."""
    on_board = present & (x >= 0) & (x < SIZE)
    bit = jnp.where(on_board, 1 << jnp.clip(x, 0, LAST), 0)
    rows = jnp.bitwise_or.reduce(jnp.where(y == jnp.arange(SIZE)[:, None], bit, 0), axis=1)
    return ((rows[:, None] >> jnp.arange(SIZE)) & 1).astype(bool)


def walk(
    position: Int[Array, ''],
    action: Int[Array, ''],
    back: int,
    ahead: int,
    low: int = 0,
    high: int = LAST,
) -> Int[Array, '']:
    """Move one step along an axis, within [low, high]; `back` and `ahead` are the two actions that
    move.
    """
    step = (action == ahead).astype(jnp.int32) - (action == back)
    return jnp.clip(position + step, low, high)


def integer(value: int) -> Int[Array, '']:
    return jnp.asarray(value, jnp.int32)
