"""Options of environments, checked against the types that are declared for them."""

import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from reverie.errors import UserError

WORDS = {
    'true': True, 'yes': True, 'on': True, '1': True, 'false': False, 'no': False, 'off': False, '0': False,
}  # fmt: skip


def typed(env: str, options: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as values of the declared types, {name: bool, int, float, str, a tuple of them, a
    Literal, or one of these or None}; Any takes everything.

    A word for yes or no is a bool, a whole number is an int in whatever form. Raises UserError for
    an unknown option, and for a value that is none of its type.
    """
    found = {}
    for name, value in options.items():
        if name not in declared:
            expected = ', '.join(declared) or 'none'
            raise UserError(f'{env} has no option {name!r}; expected {expected}')
        try:
            found[name] = convert(value, declared[name])
        except (TypeError, ValueError):
            what = describe(declared[name])
            raise UserError(f'{env}: {name}={value!r}; expected {what}') from None
    return found


def convert(value: Any, kind: Any) -> Any:
    """`value` as one of a declared type; raises ValueError or TypeError if it is none."""
    if kind is Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or str(value).lower() in ('none', 'null'):
            return None
        (kind,) = [x for x in inner if x is not type(None)]
        return convert(value, kind)
    if origin is typing.Literal:
        if value not in inner:
            raise ValueError
        return value
    if origin is tuple:
        items = list(value) if not isinstance(value, str) else value.split(',')
        if len(items) != len(inner):
            raise ValueError
        return tuple(convert(x, k) for x, k in zip(items, inner, strict=True))
    if kind is bool:
        if isinstance(value, bool):
            return value
        return WORDS[str(value).lower()] if str(value).lower() in WORDS else _refuse()
    if kind is str:
        return value if isinstance(value, str) else _refuse()
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError
    return int(number) if kind is int else number


def _refuse() -> Any:
    raise ValueError


def describe(kind: Any) -> str:
    """A declared type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(describe(x) for x in inner)
    if origin is typing.Literal:
        return f'one of {", ".join(map(str, inner))}'
    if origin is tuple:
        return f'{len(inner)} numbers with commas between them'
    words = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a word'}
    return words.get(kind, 'none')
