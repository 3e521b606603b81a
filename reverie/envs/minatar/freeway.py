"""Freeway: lead a chicken across eight lanes of cars; +1 a crossing, back to the start when hit,
over by the clock.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie.envs.minatar.board import DOWN, LAST, NOOP, SIZE, UP, cell, columns, integer, walk

LANES = SIZE - 2
COLUMN = 4  # the column of the chicken
REST = 3  # steps between two moves of the chicken
CLOCK = 2500
TOP_SPEED = 5


class State(NamedTuple):
    """State of the game; the car of lane i drives on row i + 1."""

    chicken: Int[Array, '']  # row
    rest: Int[Array, '']  # steps until it may move again
    car_x: Int[Array, '8']
    car_timer: Int[Array, '8']  # steps until the car moves
    speed: Int[Array, '8']  # steps a move takes, 1 to 5; negative: drives left
    clock: Int[Array, '']


class Chance(NamedTuple):
    speed: Int[Array, '8']  # speeds of the cars after the next crossing, or in a new game


@dataclasses.dataclass(frozen=True)
class Freeway:
    """Rules of Freeway."""

    ramping: bool = True
    """Changes nothing in this game, whose difficulty does not rise."""
    name: ClassVar[str] = 'freeway'
    channels: ClassVar[tuple[str, ...]] = (
        'chicken', 'car', 'speed1', 'speed2', 'speed3', 'speed4', 'speed5',
    )  # fmt: skip
    minimal: ClassVar[tuple[int, ...]] = (NOOP, UP, DOWN)

    def draw(self, key: PRNGKeyArray) -> Chance:
        uniform = jax.random.uniform(key, (LANES,))
        pick = (uniform * 2 * TOP_SPEED).astype(jnp.int32) - TOP_SPEED  # -5 .. 4
        return Chance(speed=pick + (pick >= 0))

    def reset(self, chance: Chance) -> State:
        return State(
            chicken=integer(LAST),
            rest=integer(REST),
            car_x=jnp.zeros(LANES, jnp.int32),
            car_timer=jnp.abs(chance.speed),
            speed=chance.speed,
            clock=integer(CLOCK),
        )

    def transition(
        self, state: State, action: Int[Array, ''], chance: Chance
    ) -> tuple[State, Float[Array, ''], Bool[Array, '']]:
        """Play one step; return (state, reward, terminal). The end of the clock is part of the
        rules, hence terminal.
        """
        moves = (state.rest == 0) & ((action == UP) | (action == DOWN))
        chicken = jnp.where(moves, walk(state.chicken, action, UP, DOWN), state.chicken)
        rest = jnp.where(moves, REST, state.rest)

        crossed = chicken == 0
        speed = jnp.where(crossed, chance.speed, state.speed)
        timer = jnp.where(crossed, jnp.abs(chance.speed), state.car_timer)

        # A car hits the chicken in its old cell and in its new one. The rows at both ends are safe.
        drives = timer == 0
        car_x = (state.car_x + jnp.where(drives, jnp.sign(speed), 0)) % SIZE
        hit = ((state.car_x == COLUMN) | (car_x == COLUMN)) & (jnp.arange(1, LANES + 1) == chicken)

        clock = state.clock - 1
        after = State(
            chicken=jnp.where(crossed | hit.any(), LAST, chicken),
            rest=jnp.maximum(rest - 1, 0),
            car_x=car_x,
            car_timer=jnp.where(drives, jnp.abs(speed), timer - 1),
            speed=speed,
            clock=clock,
        )
        return after, crossed.astype(jnp.float32), clock < 0

    def observe(self, state: State) -> Bool[Array, '10 10 7']:
        behind = (state.car_x - jnp.sign(state.speed)) % SIZE
        trails = [columns(behind, jnp.abs(state.speed) == s) for s in range(1, TOP_SPEED + 1)]
        rows = jnp.stack([columns(state.car_x, state.car_x >= 0), *trails], axis=-1)
        chicken = cell(state.chicken, integer(COLUMN))[:, :, None]
        return jnp.concatenate([chicken, jnp.pad(rows, ((1, 1), (0, 0), (0, 0)))], axis=-1)
