"""Spaces of Gymnasium: observations as arrays by the table of `observations`, actions by the
convention of `ActionSpace`. Never imports JAX.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from reverie.envs.observations import LONGEST_STATE, EnvRefusedError, Form, Wishes, form_of

UNBOUNDED = 1e6  # a bound beyond this is no scale for an action in [-1, 1]


class View(NamedTuple):
    """Conversion of an observation into arrays; the only one is called ''."""

    forms: dict[str, Form]
    see: Callable[[Any], dict[str, Any]]


def view(space: Any, wishes: Wishes, who: str) -> View | None:
    """Conversion of the observations of a Gymnasium space; None if pictures are asked for and there
    are none.

    The conversion raises EnvRefusedError for an observation that is not as declared. Raises
    EnvRefusedError for a space that has no array form.
    """
    from gymnasium import spaces

    leaves = _leaves(space)
    if wishes.keys:
        leaves = _chosen(leaves, wishes.keys, who)
    if wishes.obs != 'image':
        for name, leaf in leaves.items():
            _check_flat(leaf.space, name, list(leaves), who)
    boxes = {name: leaf for name, leaf in leaves.items() if isinstance(leaf.space, spaces.Box)}
    forms = {name: _box_form(leaf.space, wishes, who) for name, leaf in boxes.items()}
    pictures = {name: form for name, form in forms.items() if form.kind != 'vector'}
    if wishes.obs == 'image':
        forms = {name: form for name, form in forms.items() if form.kind == 'image'}
        if not forms:
            return None
        return _parts({name: leaves[name] for name in forms}, forms, who)
    if not pictures:
        return _one_vector(leaves, who)
    for name, leaf in leaves.items():
        if name not in forms:
            forms[name] = _choice_form(leaf.space)
    return _parts(leaves, {name: forms[name] for name in leaves}, who)


class _Leaf(NamedTuple):
    space: Any
    path: tuple[Any, ...]

    def of(self, obs: Any) -> Any:
        for key in self.path:
            obs = obs[key]
        return obs


def _leaves(space: Any, path: tuple[Any, ...] = ()) -> dict[str, _Leaf]:
    """The parts of a space by name, in its own order; nested names have dots between them."""
    from gymnasium import spaces

    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return {'.'.join(map(str, path)): _Leaf(space, path)}
    items = space.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
    found: dict[str, _Leaf] = {}
    for key, inner in items:
        found |= _leaves(inner, (*path, key))
    return found


def _chosen(leaves: dict[str, _Leaf], keys: tuple[str, ...], who: str) -> dict[str, _Leaf]:
    if unknown := [key for key in keys if key not in leaves]:
        raise EnvRefusedError(
            f'{who}: keys={",".join(unknown)} given; expected some of {", ".join(leaves)}'
        )
    return {name: leaf for name, leaf in leaves.items() if name in keys}


def _check_flat(space: Any, name: str, names: list[str], who: str) -> None:
    """Raise EnvRefusedError for text, graphs, and whatever changes its length."""
    from gymnasium import spaces

    flat = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    if isinstance(space, flat):
        return
    rest = ','.join(other for other in names if other != name)
    instead = f'; keys={rest} leaves {name} out' if rest else ''
    raise EnvRefusedError(
        f'{who} has observations {space}; expected numbers or choices of a fixed count{instead}'
    )


def _box_form(space: Any, wishes: Wishes, who: str) -> Form:
    return form_of(who, space.shape, space.dtype, space.low, space.high, wishes)


def _choice_form(space: Any) -> Form:
    from gymnasium import spaces

    width = spaces.flatdim(space)
    flat: Callable[[Any], Any] = lambda x: np.asarray(spaces.flatten(space, x), np.float32)
    return Form('vector', (width,), 'float32', f'{space} -> one-hots [{width}]', flat)


def _parts(leaves: Mapping[str, _Leaf], forms: dict[str, Form], who: str) -> View:
    """Each part as an array of its own; a single one without its name."""
    names = list(forms)
    called = dict(zip(names, names if len(names) > 1 else [''], strict=True))

    bounds = {
        name: (leaves[name].space.low.min(), leaves[name].space.high.max())
        for name, form in forms.items()
        if form.kind != 'vector'
    }

    def see(obs: Any) -> dict[str, Any]:
        found = {}
        for name, form in forms.items():
            x = _as_declared(leaves[name].of(obs), leaves[name].space, who)
            if name in bounds:
                _check_within(x, bounds[name], who)
            found[called[name]] = form.convert(x)
        return found

    return View({called[name]: form for name, form in forms.items()}, see)


def _one_vector(leaves: Mapping[str, _Leaf], who: str) -> View:
    """All parts as one vector, in the order of their names."""
    from gymnasium import spaces

    width = sum(spaces.flatdim(leaf.space) for leaf in leaves.values())
    described = ', '.join(str(leaf.space) for leaf in leaves.values())
    if width > LONGEST_STATE:
        raise EnvRefusedError(
            f'{who} has observations {described}, a vector of {width:,}; expected at most '
            f'{LONGEST_STATE:,}'
        )

    def see(obs: Any) -> dict[str, Any]:
        parts = [
            spaces.flatten(leaf.space, _as_declared(leaf.of(obs), leaf.space, who))
            for leaf in leaves.values()
        ]
        return {'': np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in parts])}

    said = f'{described} -> vector [{width}]'
    return View({'': Form('vector', (width,), 'float32', said, lambda x: x)}, see)


def _as_declared(x: Any, space: Any, who: str) -> Any:
    """The observation itself, of a Box as an array. Raises EnvRefusedError unless its shape and sort
    of number are as declared.
    """
    from gymnasium import spaces

    if not isinstance(space, spaces.Box):
        return x
    x = np.asarray(x)
    if x.shape != space.shape:
        raise EnvRefusedError(
            f'{who}: an observation {list(x.shape)} was returned; expected {list(space.shape)}, as '
            'its observation_space declares'
        )
    whole = space.dtype.kind in 'iub'
    if x.dtype.kind not in ('iub' if whole else 'iubf'):
        raise EnvRefusedError(
            f'{who}: an observation of {x.dtype} was returned; expected {space.dtype}, as its '
            'observation_space declares'
        )
    return x


def _check_within(x: np.ndarray, bounds: tuple[Any, Any], who: str) -> None:
    """Raise EnvRefusedError for a picture with numbers beyond its declared bounds."""
    low, high = bounds
    if x.dtype == np.bool_ or (x.dtype == np.uint8 and (low, high) == (0, 255)):
        return
    if x.min() < low or x.max() > high:
        raise EnvRefusedError(
            f'{who}: an observation with numbers from {x.min():g} to {x.max():g} was returned; '
            f'expected {low:g} to {high:g}, as its observation_space declares'
        )


def action_converter(space: Any, who: str) -> tuple[str, int, Callable[[Any], Any]]:
    """Kind and size of an action space, and the function that turns an action in the convention of
    `ActionSpace` into one that lies in the space.

    Numbers of a Box span its bounds; with one bound they reach two units from it; without any they
    are taken as they are. Whole numbers get equal shares of [-1, 1]. Raises EnvRefusedError for
    other spaces.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Discrete):
        return 'discrete', int(space.n), lambda action: int(action) + int(space.start)
    whole = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer)
    if not isinstance(space, spaces.Box) or not (whole or space.dtype.kind == 'f'):
        raise EnvRefusedError(f'{who} has actions {space}; expected Discrete, or a Box of numbers')
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    below, above = np.abs(low) < UNBOUNDED, np.abs(high) < UNBOUNDED
    if whole and not (below & above).all():
        raise EnvRefusedError(f'{who} has actions {space}; expected whole numbers with bounds')
    begin = np.where(below, low, np.where(above, high - 2.0, -1.0))
    end = np.where(above, high, np.where(below, low + 2.0, 1.0))
    free = ~below & ~above

    def convert(action: np.ndarray) -> np.ndarray:
        action = action.astype(np.float64)
        share = (np.clip(action, -1.0, 1.0) + 1.0) / 2.0
        if whole:
            found = begin + np.minimum(np.floor(share * (end - begin + 1.0)), end - begin)
        else:
            found = np.where(free, action, begin + share * (end - begin))
        shaped = found.reshape(space.shape).astype(space.dtype)
        inside: np.ndarray = np.clip(shaped, space.low, space.high)
        return inside

    return 'continuous', low.size, convert
