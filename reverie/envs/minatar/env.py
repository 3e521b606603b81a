"""MinAtar games as environments: sticky actions, action sets and the two protocols of the
literature.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from reverie.envs.minatar.asterix import Asterix
from reverie.envs.minatar.board import MEANINGS, NOOP, SIZE
from reverie.envs.minatar.breakout import Breakout
from reverie.envs.minatar.freeway import Freeway
from reverie.envs.minatar.seaquest import Seaquest
from reverie.envs.minatar.space_invaders import SpaceInvaders
from reverie.envs.options import typed
from reverie.types import ActionSpace, EnvSpec, Step, UserError


@runtime_checkable
class Game(Protocol):
    """Rules of one game; all chance enters through `draw`, so that tests can replay the original's
    random numbers.
    """

    name: ClassVar[str]
    channels: ClassVar[tuple[str, ...]]
    minimal: ClassVar[tuple[int, ...]]  # the actions that do something in this game

    def draw(self, key: PRNGKeyArray) -> PyTree: ...

    def reset(self, chance: PyTree) -> PyTree: ...

    def transition(
        self, state: PyTree, action: Int[Array, ''], chance: PyTree
    ) -> tuple[PyTree, Float[Array, ''], Bool[Array, '']]:
        """Apply an action of the full set of six; return (state, reward, terminal)."""
        ...

    def observe(self, state: PyTree) -> Bool[Array, '10 10 c']: ...


class StickyState(NamedTuple):
    game: PyTree
    executed: Int[Array, '']  # the action the game saw last, in the full set


@dataclasses.dataclass(frozen=True)
class MinAtar:
    """Environment around one game; `envs.device.Vector` runs many."""

    game: Game
    sticky: float = 0.1
    """Probability that the game repeats the action it executed last instead of the one given."""
    minimal_actions: bool = False
    """Offer only the actions that do something; otherwise all six, 'noop' to 'fire'."""

    @property
    def actions(self) -> tuple[int, ...]:
        return self.game.minimal if self.minimal_actions else tuple(range(len(MEANINGS)))

    @property
    def spec(self) -> EnvSpec:
        meanings = tuple(MEANINGS[a] for a in self.actions)
        return EnvSpec(
            name=f'minatar/{self.game.name}',
            obs_shape=(SIZE, SIZE, len(self.game.channels)),
            actions=ActionSpace('discrete', len(meanings), meanings),
            channels=self.game.channels,
        )

    def reset(self, key: PRNGKeyArray) -> tuple[StickyState, Step]:
        game = self.game.reset(self.game.draw(key))
        step = Step(
            obs=self.game.observe(game),
            prev_action=jnp.zeros(len(self.actions)),
            reward=jnp.zeros(()),
            is_first=jnp.asarray(True),
            is_last=jnp.asarray(False),
            is_terminal=jnp.asarray(False),
        )
        return StickyState(game, jnp.asarray(NOOP, jnp.int32)), step

    def step(
        self, state: StickyState, action: Int[Array, ''], key: PRNGKeyArray
    ) -> tuple[StickyState, Step]:
        """Take an action; `prev_action` of the result is the one given, which the game may not have
        executed.
        """
        chance_key, sticky_key = jax.random.split(key)
        wanted = action.astype(jnp.int32)
        if self.minimal_actions:
            wanted = jnp.asarray(self.actions, jnp.int32)[action]
        executed = jnp.where(jax.random.uniform(sticky_key) < self.sticky, state.executed, wanted)
        chance = self.game.draw(chance_key)
        game, reward, terminal = self.game.transition(state.game, executed, chance)
        step = Step(
            obs=self.game.observe(game),
            prev_action=jax.nn.one_hot(action, len(self.actions)),
            reward=reward,
            is_first=jnp.asarray(False),
            is_last=terminal,
            is_terminal=terminal,
        )
        return StickyState(game, executed), step


GAMES = {game.name: game for game in (Asterix, Breakout, Freeway, Seaquest, SpaceInvaders)}

# The defaults of the original and those of the gymnax ports, both called MinAtar in the literature.
# Freeway's clock runs 2,500 steps in both; gymnax truncates there, one step before the game itself
# would end.
PROTOCOLS: dict[str, dict[str, Any]] = {
    'minatar': dict(sticky=0.1, ramping=True, minimal_actions=False, time_limit=None),
    'gymnax': dict(sticky=0.0, ramping=True, minimal_actions=True, time_limit=1000),
}


OPTIONS = dict(
    protocol=Literal['minatar', 'gymnax'],
    sticky=float,
    ramping=bool,
    minimal_actions=bool,
    time_limit=int | None,
)


def build(name: str, **options: Any) -> tuple[MinAtar, int | None]:
    """Build the game called `name`; return it with its time limit in steps or None. `protocol` is
    one of PROTOCOLS, 'minatar' if not given; other options overrule its settings.

    Raises UserError for an unknown option, or a value out of range.
    """
    given = typed(f'minatar/{name}', options, OPTIONS)
    protocol = given.pop('protocol', 'minatar')
    settings = dict(PROTOCOLS[protocol])
    if protocol == 'gymnax' and name == 'freeway':
        settings['time_limit'] = 2500
    settings |= given
    if not 0.0 <= settings['sticky'] <= 1.0:
        raise UserError(
            f'sticky={settings["sticky"]} is not a probability; expected a number from 0 to 1'
        )
    game = GAMES[name](ramping=settings['ramping'])
    return MinAtar(game, settings['sticky'], settings['minimal_actions']), settings['time_limit']
