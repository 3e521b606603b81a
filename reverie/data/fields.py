"""Types of the fields of a JSON file, declared once and checked before anything uses them."""

import math
import types
from collections.abc import Mapping
from typing import Any

LONGEST = 200  # characters of a name
MOST = 2**53  # of anything that is counted

Declared = type | types.UnionType | dict[Any, Any] | list[Any]


def misfit(value: Any, kind: Declared, name: str = '') -> str | None:
    """Say which field is not of its declared type; None if all are.

    A dict is declared by its fields (those with a ? may be missing; others are left alone) or as
    {str: type of every value}, a list by [type of every item]. Counts are whole numbers from 0 on,
    floats finite, strings short and printable.
    """
    if isinstance(kind, list):
        if not isinstance(value, list):
            return _said(value, name, 'a list')
        found = (misfit(x, kind[0], f'{name}[{i}]') for i, x in enumerate(value))
        return next(filter(None, found), None)
    if isinstance(kind, dict):
        return _misfit_of_fields(value, kind, name)
    if kind is dict or kind is list:
        words = 'a mapping' if kind is dict else 'a list'
        return None if isinstance(value, kind) else _said(value, name, words)
    if isinstance(kind, types.UnionType):
        return None if value is None else misfit(value, float, name)
    if kind is bool:
        return None if isinstance(value, bool) else _said(value, name, 'true or false')
    if kind is str:
        short = isinstance(value, str) and len(value) <= LONGEST and value.isprintable()
        return None if short else _said(value, name, 'a short text')
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _said(value, name, 'a number')
    if kind is int:
        whole = isinstance(value, int) and 0 <= value <= MOST
        return None if whole else _said(value, name, f'a whole number from 0 to {MOST:,}')
    return None if abs(value) < math.inf else _said(value, name, 'a finite number')


def _misfit_of_fields(value: Any, kind: Mapping[Any, Declared], name: str) -> str | None:
    if not isinstance(value, dict):
        return _said(value, name, 'a mapping')
    of_all = kind.get(str)
    declared = {key: of_all for key in value} if of_all is not None else kind
    for key, inner in declared.items():
        plain = key.removesuffix('?')
        where = f'{name}.{plain}' if name else plain
        if of_all is not None and (wrong := misfit(key, str, f'a name in {name}')):
            return wrong
        if plain not in value:
            if key == plain:
                return f'{where} is missing'
            continue
        if wrong := misfit(value[plain], inner, where):
            return wrong
    return None


def _said(value: Any, name: str, expected: str) -> str:
    given = ascii(value)
    return f'{name} is {given[:40]}{"..." if len(given) > 40 else ""}, expected {expected}'
