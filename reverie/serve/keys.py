"""Keys of a keyboard for an environment's actions, from its own names for them."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from reverie.types import ActionSpace, Component

ARROWS = {
    'left': ('ArrowLeft', 'a'),
    'right': ('ArrowRight', 'd'),
    'up': ('ArrowUp', 'w'),
    'down': ('ArrowDown', 's'),
}
NOOP = ('noop', 'no-op', 'none', 'nothing', 'idle')
# what the page itself does not use, and wasd
FREE = 'xcvefqzyuiophjklnt1234567890'
PAGE = frozenset('mrbg[].,-=+ ') | {'Tab', 'Escape', 'Control', 'Alt', 'Meta'}
WORDS = {'fire': ('x', 'Enter'), 'do': ('x', 'Enter'), 'jump': ('x', 'Enter')}
AXES = (
    ('ArrowLeft', 'ArrowRight'),
    ('ArrowDown', 'ArrowUp'),
    ('a', 'd'),
    ('s', 'w'),
    ('j', 'l'),
    ('k', 'i'),
)
# Of the parts of a composite action. The camera has the arrows first, so that the letters are left
# for those who walk.
WALK = {
    'left': ('a', 'ArrowLeft'),
    'right': ('d', 'ArrowRight'),
    'forward': ('w', 'ArrowUp'),
    'up': ('w', 'ArrowUp'),
    'back': ('s', 'ArrowDown'),
    'backward': ('s', 'ArrowDown'),
    'down': ('s', 'ArrowDown'),
    'attack': ('x', 'Enter'),
    'shoot': ('x', 'Enter'),
    **WORDS,
}
LOOK = {'x': ('ArrowLeft', 'ArrowRight'), 'y': ('ArrowUp', 'ArrowDown')}

# The number of a choice, the vector of a continuous action, or one value per part of a composite one:
# the number of its choice, or a number in [low, high].
Given = int | tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Binding:
    """Keys that stand for one action, or for one value of a part."""

    label: str
    chords: tuple[tuple[str, ...], ...]  # each a set of keys held together
    action: Given | float  # its number, its vector for continuous spaces, or the part's value
    part: int | None = None  # of a composite action

    def plain(self) -> dict[str, Any]:
        found = {'label': self.label, 'chords': self.chords, 'action': self.action}
        return found if self.part is None else {**found, 'part': self.part}


def known_words(meaning: str) -> tuple[str, ...]:
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

    Continuous dimensions get a pair of keys, parts of composite actions keys of their own.
    """
    if space.kind == 'composite':
        return _composite(space.parts)
    if space.kind == 'continuous':
        return _axes(space)
    free = iter(FREE)
    taken: set[frozenset[str]] = set()
    found = []
    for i in range(space.size):
        label = space.meanings[i] if i < len(space.meanings) else str(i)
        words = known_words(label)
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


# A value of a part: action, label, default keys, and whether it needs one, whichever is free.
_Option = tuple[float, str, tuple[str, ...], bool]


@dataclasses.dataclass
class _Value:
    """One value of a part that keys may stand for."""

    part: int
    action: float
    label: str
    declared: tuple[str, ...]
    wished: tuple[str, ...]  # default keys, the best first
    needs: bool  # a key, whichever is free
    keys: list[str] = dataclasses.field(default_factory=list)


def _composite(parts: Sequence[Component]) -> tuple[Binding, ...]:
    """Keys for the values of every part, a key for one value of one part only.

    Declared keys come first, then the default ones of parts that declare none: one for each value,
    those of the camera before others, and what is left of them at the end.
    """
    values = [value for i, part in enumerate(parts) for value in _values(i, part)]
    taken = set(PAGE)

    def give(value: _Value, keys: Sequence[str], most: int) -> None:
        for key in keys:
            if len(value.keys) < most and key not in taken:
                taken.add(key)
                value.keys.append(key)

    for value in values:
        give(value, value.declared, len(value.declared))
    plain = [value for value in values if not value.keys]
    for value in sorted(plain, key=lambda value: not parts[value.part].camera):
        give(value, value.wished, 1)
    for value in plain:
        if value.needs:
            give(value, FREE, 1)
    for value in plain:
        give(value, value.wished, len(value.wished))
    return tuple(
        Binding(value.label, tuple((key,) for key in value.keys), value.action, value.part)
        for value in values
    )


def _values(i: int, part: Component) -> Iterator[_Value]:
    """Values of a part but the one at rest, unless that has keys, too.

    Default keys are for parts that declare none, and for values whose declared keys are all taken.
    """
    declared = [tuple(k.lower() if len(k) == 1 else k for k in keys) for keys in part.keys]
    options = _choices(part) if part.choices else _ends(i, part)
    for at, (action, label, wished, needs) in enumerate(options):
        keys = declared[at] if at < len(declared) else ()
        if action == _rest(part) and not keys:
            continue
        if any(declared) and not keys:
            wished, needs = (), False
        yield _Value(i, action, label, keys, wished, needs)


def _choices(part: Component) -> Iterator[_Option]:
    last, rest = len(part.choices) - 1, _rest(part)
    turns: dict[float, str] = {}
    if part.camera:  # the turns of middle size; the mouse has the others
        low, high = LOOK[part.camera]
        turns = {rest - math.ceil(rest / 2): low, rest + math.ceil((last - rest) / 2): high}
    for i, choice in enumerate(part.choices):
        label = choice
        if choice.isdigit():
            label = part.name if last == 1 else f'{part.name} {choice}'
        wished: tuple[str, ...] = WALK.get(label.lower(), ())
        if part.camera:
            wished = (turns[i],) if i in turns else ()
        yield float(i), label, wished, not part.camera


def _ends(i: int, part: Component) -> Iterator[_Option]:
    low, high = LOOK[part.camera] if part.camera else AXES[i % len(AXES)]
    yield part.low, f'{part.name} −', (low,), True
    yield part.high, f'{part.name} +', (high,), True


def _rest(part: Component) -> float:
    if not part.choices:
        return min(max(part.rest, part.low), part.high)
    return float(min(max(int(part.rest), 0), len(part.choices) - 1))


def rest(space: ActionSpace) -> Given | None:
    """The no-op action if there is one, else None (the last action repeats)."""
    if space.kind == 'composite':
        return tuple(_rest(part) for part in space.parts)
    if space.kind == 'continuous':
        return (0.0,) * space.size
    return next((i for i, meaning in enumerate(space.meanings) if meaning.lower() in NOOP), None)


def vector(space: ActionSpace, action: Given | None) -> tuple[float, ...]:
    """An action as the numbers [A] that models take; None is the first of a discrete space."""
    if not isinstance(action, tuple):
        return tuple(float(i == (action or 0)) for i in range(space.size))
    if space.kind != 'composite':
        return action
    numbers: list[float] = []
    for part, value in zip(space.parts, action, strict=True):
        stored = part.stored(value)
        assert stored is not None  # orders are checked as they come
        numbers += [float(j == stored) for j in range(part.size)] if part.choices else [stored]
    return tuple(numbers) or (0.0,) * space.size


def plain_parts(space: ActionSpace) -> list[dict[str, Any]]:
    """Parts as a page knows them; `at`: where a part begins in the action vector."""
    starts = itertools.accumulate((part.size for part in space.parts), initial=0)
    return [
        {
            'name': part.name,
            'choices': len(part.choices),
            'low': part.low,
            'high': part.high,
            'rest': _rest(part),
            'camera': part.camera,
            'at': at,
        }
        for part, at in zip(space.parts, starts, strict=False)
    ]
