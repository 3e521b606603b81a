"""Environments that need memory: hidden orders, and a cue to be remembered."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie.envs.options import typed
from reverie.types import ActionSpace, EnvSpec, Step, UserError

SIZE = 8
STEPS = 100
PER_BALL = 3.0
MOVES = np.array([(0, 0), (0, -1), (-1, 0), (0, 1), (1, 0)], np.int32)  # rows and columns
COLOURS = np.array(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167)],
    np.uint8,
)
CELL = 64 // SIZE  # pixels


class OrderState(NamedTuple):
    place: Int[Array, ' 2']  # the player's row and column
    balls: Int[Array, 'n 2']
    order: Int[Array, ' n']  # order[k]: the ball to be taken k-th
    progress: Int[Array, '']  # balls taken in order
    solved: Bool[Array, '']  # the whole order was found once


@dataclasses.dataclass(frozen=True)
class HiddenOrder:
    """Hidden Order Discovery in 2D; TransDreamer (arXiv 2202.09481) section 4.1.

    Coloured balls lie on an 8x8 grid, in an order that is drawn for each episode of 100 steps and
    never shown. Walking onto the right ball earns 3 and the ball disappears; onto a wrong one earns
    nothing, all balls return and progress is lost. After the last one all return, and the same
    order pays again.

    Not from the paper: the player starts in a random free cell and has five actions (stay and four
    moves, walls stop it); a ball is taken on arrival only, so one that returns under the player
    must be left and come back to; balls return to their places; the episode ends by its length
    alone, without a terminal step.
    """

    balls: int = 4
    """Number of balls."""
    obs: Literal['grid', 'image'] = 'grid'
    """Booleans [8, 8, 1 + balls] (player, then each ball), or uint8 [64, 64, 3]."""
    pays: Literal['balls', 'success'] = 'balls'
    """Reward for each ball, or 1 when the whole order is first found, to measure how often."""

    @property
    def spec(self) -> EnvSpec:
        actions = ActionSpace('discrete', len(MOVES), ('noop', 'left', 'up', 'right', 'down'))
        channels = ('player', *(f'ball {i + 1}' for i in range(self.balls)))
        name = f'hidden_order/{self.balls}'
        if self.obs == 'image':
            return EnvSpec(name, (64, 64, 3), actions)
        return EnvSpec(name, (SIZE, SIZE, 1 + self.balls), actions, channels=channels)

    def reset(self, key: PRNGKeyArray) -> tuple[OrderState, Step]:
        key_place, key_order = jax.random.split(key)
        cells = jax.random.choice(key_place, SIZE * SIZE, (self.balls + 1,), replace=False)
        places = jnp.stack([cells // SIZE, cells % SIZE], -1).astype(jnp.int32)
        order = jax.random.permutation(key_order, self.balls).astype(jnp.int32)
        none, no = jnp.zeros((), jnp.int32), jnp.asarray(False)
        state = OrderState(places[0], places[1:], order, none, no)
        return state, self._step(state, jnp.zeros(len(MOVES)), jnp.zeros(()), True)

    def step(
        self, state: OrderState, action: Int[Array, ''], key: PRNGKeyArray
    ) -> tuple[OrderState, Step]:
        """Move the player; nothing is random after the reset, so `key` is not read."""
        place = jnp.clip(state.place + jnp.asarray(MOVES)[action], 0, SIZE - 1)
        moved = (place != state.place).any()
        met = moved & (state.balls == place).all(-1) & self.lying(state)
        right = met[state.order[state.progress]]
        progress = jnp.where(right, state.progress + 1, jnp.where(met.any(), 0, state.progress))
        complete = progress == self.balls
        found = complete & ~state.solved
        after = state._replace(
            place=place, progress=progress % self.balls, solved=state.solved | complete
        )
        reward = found.astype(jnp.float32) if self.pays == 'success' else PER_BALL * right
        return after, self._step(after, jax.nn.one_hot(action, len(MOVES)), reward, False)

    def lying(self, state: OrderState) -> Bool[Array, ' n']:
        """Mask of the balls that have not been taken."""
        rank = jnp.argsort(state.order)  # place of each ball in the order
        return rank >= state.progress

    def _step(self, state: OrderState, prev_action: Array, reward: Array, first: bool) -> Step:
        never = jnp.asarray(False)
        return Step(self._see(state), prev_action, reward, jnp.asarray(first), never, never)

    def _see(self, state: OrderState) -> Array:
        rows = jnp.arange(SIZE)

        def cell(place: Array) -> Array:
            return (rows == place[0])[:, None] & (rows == place[1])[None]

        balls = jax.vmap(cell)(state.balls) & self.lying(state)[:, None, None]
        player = cell(state.place)
        if self.obs == 'grid':
            return jnp.moveaxis(jnp.concatenate([player[None], balls]), 0, -1)
        colours = jnp.asarray(COLOURS)[: self.balls, None, None]
        colour = (balls[..., None] * colours).sum(0).astype(jnp.uint8)
        picture = colour.repeat(CELL, 0).repeat(CELL, 1)
        inner = slice(CELL // 4, -CELL // 4)
        middle = jnp.zeros((CELL, CELL), bool).at[inner, inner].set(True)
        covered = player.repeat(CELL, 0).repeat(CELL, 1) & jnp.tile(middle, (SIZE, SIZE))
        return jnp.where(covered[..., None], jnp.uint8(255), picture)


class CueState(NamedTuple):
    cue: Int[Array, '']
    time: Int[Array, '']


@dataclasses.dataclass(frozen=True)
class Cue:
    """Probe of memory: a cue is shown at step 0 alone, and must be chosen `delay` steps later.

    Step 0 lights the left or the right half of a 4x4 grid. The second channel is lit at step
    `delay` and, as a warning, at the one before; other steps are dark. The action taken at step
    `delay` earns 1 if it is the cue's, and ends the episode, whose last step shows the cue's half
    again, whatever was chosen. A policy without memory earns one half on average.

    The last step is there because a world model learns from things that it can predict: while the
    policy is undecided, neither the cue nor the action alone predicts the reward. The warning is
    there because a transformer's state holds the step before: attention learnt for the answer then
    serves the choice as well.
    """

    delay: int = 32
    """Steps between the cue and the choice."""

    @property
    def spec(self) -> EnvSpec:
        actions = ActionSpace('discrete', 2, ('left', 'right'))
        return EnvSpec(f'memory/{self.delay}', (4, 4, 2), actions, 1.0, ('cue', 'choose'))

    def reset(self, key: PRNGKeyArray) -> tuple[CueState, Step]:
        state = CueState(jax.random.randint(key, (), 0, 2), jnp.zeros((), jnp.int32))
        return state, self._step(state, jnp.zeros(2), jnp.zeros(()), False)

    def step(
        self, state: CueState, action: Int[Array, ''], key: PRNGKeyArray
    ) -> tuple[CueState, Step]:
        over = state.time == self.delay
        reward = (over & (action == state.cue)).astype(jnp.float32)
        after = state._replace(time=state.time + 1)
        return after, self._step(after, jax.nn.one_hot(action, 2), reward, over)

    def _step(
        self,
        state: CueState,
        prev_action: Array,
        reward: Float[Array, ''],
        over: Bool[Array, ''] | bool,
    ) -> Step:
        over = jnp.asarray(over)
        half = (jnp.arange(4) // 2 == state.cue) & ((state.time == 0) | over)
        go = jnp.broadcast_to((state.time == self.delay - 1) | (state.time == self.delay), (4, 4))
        seen = jnp.stack([jnp.broadcast_to(half, (4, 4)), go], -1)
        return Step(seen, prev_action, reward, state.time == 0, over, over)


BALLS = (4, 5, 6)


def build(family: str, game: str, **options: Any) -> tuple[HiddenOrder | Cue, int | None]:
    """Build hidden_order/4, /5 or /6 (options obs and pays) or memory/<delay>; return it with its
    time limit.

    Raises UserError for anything else.
    """
    cls: type[HiddenOrder | Cue] = HiddenOrder if family == 'hidden_order' else Cue
    declared = dict(obs=Literal['grid', 'image'], pays=Literal['balls', 'success'])
    options = typed(f'{family}/{game}', options, declared if cls is HiddenOrder else {})
    if cls is HiddenOrder:
        if game not in map(str, BALLS):
            raise UserError(f'hidden_order/{game}: expected {", ".join(map(str, BALLS))} balls')
        return HiddenOrder(int(game), **options), STEPS
    if not game.isdecimal() or int(game) < 1:
        raise UserError(f'memory/{game}: expected a delay of at least 1 step, e.g. memory/32')
    return Cue(int(game)), None
