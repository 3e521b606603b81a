"""Asterix: dodge enemies and collect gold on eight rows; +1 for gold, over on touching an enemy."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie.envs.minatar.board import (
    DOWN,
    LAST,
    LEFT,
    NOOP,
    RIGHT,
    SIZE,
    UP,
    cell,
    columns,
    integer,
    walk,
)

ROWS = SIZE - 2  # one traveller at most on each row between the top and the bottom one
SPAWN_EVERY, MOVE_EVERY = 10, 5  # at first
RAMP_EVERY = 100


class Travellers(NamedTuple):
    """Objects that cross the board, slot i on row i + 1."""

    present: Bool[Array, '8']
    x: Int[Array, '8']
    right: Bool[Array, '8']  # travels right, otherwise left
    gold: Bool[Array, '8']  # otherwise an enemy


class State(NamedTuple):
    y: Int[Array, '']  # the player
    x: Int[Array, '']
    travellers: Travellers
    spawn_every: Int[Array, '']  # steps between two arrivals; shrinks as difficulty ramps
    spawn_timer: Int[Array, '']
    move_every: Int[Array, '']  # steps between two moves of the travellers; shrinks too
    move_timer: Int[Array, '']
    ramp_timer: Int[Array, '']
    ramps: Int[Array, '']  # number of times that difficulty was raised


class Chance(NamedTuple):
    right: Bool[Array, '']  # the next traveller goes right
    gold: Bool[Array, '']  # and is gold, one in three
    row: Float[Array, '']  # and takes this quantile of the free rows


def arrive(travellers: Travellers, chance: Chance, due: Bool[Array, '']) -> Travellers:
    """Add a traveller on one of the free rows, if there are any."""
    free = ~travellers.present
    count = free.sum()
    # Rounding may lift the product to `count` itself.
    wanted = jnp.minimum((chance.row * count).astype(jnp.int32), count - 1)
    above = jnp.arange(ROWS) < jnp.arange(ROWS)[:, None]
    earlier = (free & above).sum(axis=1)
    slot = due & free & (earlier == wanted)
    return Travellers(
        present=travellers.present | slot,
        x=jnp.where(slot, jnp.where(chance.right, 0, LAST), travellers.x),
        right=jnp.where(slot, chance.right, travellers.right),
        gold=jnp.where(slot, chance.gold, travellers.gold),
    )


def meet(
    travellers: Travellers, y: Int[Array, ''], x: Int[Array, '']
) -> tuple[Travellers, Bool[Array, ''], Bool[Array, '']]:
    """Let the player at (y, x) take the gold there or die of the enemy; return (travellers, gold
    taken, dead).
    """
    touched = travellers.present & (jnp.arange(1, ROWS + 1) == y) & (travellers.x == x)
    taken, dead = touched & travellers.gold, touched & ~travellers.gold
    left = travellers._replace(present=travellers.present & ~taken)
    return left, taken.any(), dead.any()


@dataclasses.dataclass(frozen=True)
class Asterix:
    """Rules of Asterix."""

    ramping: bool = True
    """Travellers arrive and move faster every 100 steps."""
    name: ClassVar[str] = 'asterix'
    channels: ClassVar[tuple[str, ...]] = ('player', 'enemy', 'trail', 'gold')
    minimal: ClassVar[tuple[int, ...]] = (NOOP, LEFT, UP, RIGHT, DOWN)

    def draw(self, key: PRNGKeyArray) -> Chance:
        u = jax.random.uniform(key, (3,))
        return Chance(right=u[0] < 1 / 2, gold=u[1] < 1 / 3, row=u[2])

    def reset(self, chance: Chance) -> State:
        no = jnp.zeros(ROWS, bool)
        return State(
            y=integer(5),
            x=integer(5),
            travellers=Travellers(no, jnp.zeros(ROWS, jnp.int32), no, no),
            spawn_every=integer(SPAWN_EVERY),
            spawn_timer=integer(SPAWN_EVERY),
            move_every=integer(MOVE_EVERY),
            move_timer=integer(MOVE_EVERY),
            ramp_timer=integer(RAMP_EVERY),
            ramps=integer(0),
        )

    def transition(
        self, state: State, action: Int[Array, ''], chance: Chance
    ) -> tuple[State, Float[Array, ''], Bool[Array, '']]:
        """Play one step; return (state, reward, terminal)."""
        spawn = state.spawn_timer == 0
        travellers = arrive(state.travellers, chance, spawn)
        y = walk(state.y, action, UP, DOWN, 1, ROWS)
        x = walk(state.x, action, LEFT, RIGHT)
        travellers, gold, dead = meet(travellers, y, x)

        move = state.move_timer == 0
        ahead = travellers.x + jnp.where(move, jnp.where(travellers.right, 1, -1), 0)
        present = travellers.present & (ahead >= 0) & (ahead <= LAST)
        travellers, more_gold, killed = meet(travellers._replace(x=ahead, present=present), y, x)

        after = State(
            y=y,
            x=x,
            travellers=travellers,
            spawn_every=state.spawn_every,
            spawn_timer=jnp.where(spawn, state.spawn_every, state.spawn_timer) - 1,
            move_every=state.move_every,
            move_timer=jnp.where(move, state.move_every, state.move_timer) - 1,
            ramp_timer=state.ramp_timer,
            ramps=state.ramps,
        )
        reward = gold.astype(jnp.float32) + more_gold
        return ramp(after) if self.ramping else after, reward, dead | killed

    def observe(self, state: State) -> Bool[Array, '10 10 4']:
        t = state.travellers
        behind = t.x + jnp.where(t.right, -1, 1)
        enemies, gold = columns(t.x, t.present & ~t.gold), columns(t.x, t.present & t.gold)
        rows = jnp.stack([enemies, columns(behind, t.present), gold], axis=-1)
        player = cell(state.y, state.x)[:, :, None]
        return jnp.concatenate([player, jnp.pad(rows, ((1, 1), (0, 0), (0, 0)))], axis=-1)


def ramp(state: State) -> State:
    """Raise the difficulty every 100 steps: faster arrivals, and every second time faster moves
    too, until both happen at every step.
    """
    active = (state.spawn_every > 1) | (state.move_every > 1)
    due = active & (state.ramp_timer < 0)
    faster = due & (state.move_every > 1) & (state.ramps % 2 == 1)
    return state._replace(
        spawn_every=state.spawn_every - (due & (state.spawn_every > 1)),
        move_every=state.move_every - faster,
        ramp_timer=jnp.where(due, RAMP_EVERY, state.ramp_timer - active),
        ramps=state.ramps + due,
    )
