"""Keys of a keyboard for an environment's actions, from its own names for them."""

import dataclasses
import itertools
from typing import Any

from reverie.types import ActionSpace

ARROWS = {
    'left': ('ArrowLeft', 'a'),
    'right': ('ArrowRight', 'd'),
    'up': ('ArrowUp', 'w'),
    'down': ('ArrowDown', 's'),
}
NOOP = ('noop', 'no-op', 'none', 'nothing', 'idle')
# what the page itself does not use: Tab Space . m r b g [ ] - =, and wasd
FREE = 'xcvefqzyuiophjklnt1234567890'
WORDS = {'fire': ('x', 'Enter'), 'do': ('x', 'Enter'), 'jump': ('x', 'Enter')}
AXES = (
    ('ArrowLeft', 'ArrowRight'),
    ('ArrowDown', 'ArrowUp'),
    ('a', 'd'),
    ('s', 'w'),
    ('j', 'l'),
    ('k', 'i'),
)


@dataclasses.dataclass(frozen=True)
class Binding:
    """Keys that stand for one action."""

    label: str
    chords: tuple[tuple[str, ...], ...]  # each a set of keys held together
    action: int | tuple[float, ...]  # its number, or its vector for continuous spaces

    def plain(self) -> dict[str, Any]:
        return {'label': self.label, 'chords': self.chords, 'action': self.action}


def parts(meaning: str) -> tuple[str, ...]:
    """'upleftfire' or 'move_left' -> the known words in it, if they are all there is to it."""
    found = []
    rest = meaning.lower().replace('_', ' ').replace('move', ' ').strip()
    while rest:
        word = next((w for w in (*ARROWS, *WORDS) if rest.startswith(w)), None)
        if word is None:
            return ()
        found.append(word)
        rest = rest[len(word) :].strip()
    return tuple(found)


def bindings(space: ActionSpace) -> tuple[Binding, ...]:
    """Keys for every action; each chord stands for one action only.

    Continuous dimensions get a pair of keys.
    """
    if space.kind == 'continuous':
        return _axes(space)
    free = iter(FREE)
    taken: set[frozenset[str]] = set()
    found = []
    for i in range(space.size):
        label = space.meanings[i] if i < len(space.meanings) else str(i)
        words = parts(label)
        keys = [ARROWS.get(w) or WORDS[w] for w in words]
        held = itertools.product(*keys) if keys else ()
        chords = tuple(c for c in held if frozenset(c) not in taken)
        if label.lower() in NOOP:
            chords = ()
        elif not chords:
            key = next((k for k in free if frozenset(k) not in taken), None)
            chords = ((key,),) if key else ()
        taken |= {frozenset(c) for c in chords}
        found.append(Binding(label, chords, i))
    return tuple(found)


def _axes(space: ActionSpace) -> tuple[Binding, ...]:
    found = []
    for i in range(space.size):
        label = space.meanings[i] if i < len(space.meanings) else f'axis {i}'
        for sign, name in ((-1.0, '−'), (1.0, '+')):
            vector = tuple(sign if j == i else 0.0 for j in range(space.size))
            chords = ((AXES[i][sign > 0],),) if i < len(AXES) else ()
            found.append(Binding(f'{label} {name}', chords, vector))
    return tuple(found)


def rest(space: ActionSpace) -> int | tuple[float, ...] | None:
    """The no-op action if there is one, else None (the last action repeats)."""
    if space.kind == 'continuous':
        return (0.0,) * space.size
    return next((i for i, meaning in enumerate(space.meanings) if meaning.lower() in NOOP), None)


def vector(space: ActionSpace, action: int | tuple[float, ...]) -> tuple[float, ...]:
    """An action as the numbers [A] that models take."""
    if isinstance(action, tuple):
        return action
    return tuple(float(i == action) for i in range(space.size))
