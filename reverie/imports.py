"""Presets and environments of the reader's own modules, named `module:name`."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from reverie.errors import UserError

OWN = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*')


def is_own(name: str) -> bool:
    """Whether a preset or environment is named `module:name`."""
    return OWN.fullmatch(name) is not None


def find(name: str) -> Callable[..., Any]:
    """The function or class called `module:name`; modules are also looked for in the current folder.

    config.json names such a preset too, and opening the run imports it; so nothing of Python itself
    can be meant, and nothing that the module has only imported. Raises UserError if there is no
    such function.
    """
    module_name, _, attribute = name.partition(':')
    package = module_name.partition('.')[0]
    if package in sys.stdlib_module_names:
        raise UserError(f'{name}: {package} is a module of Python; expected one of your own')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f'{module_name}.'.startswith(f'{error.name}.'):
            where = 'installed, or in the current folder'
            raise UserError(f'{name}: no module {error.name}; expected it {where}') from error
        raise UserError(f'{name}: {module_name} cannot be imported: {error}') from error
    except Exception as error:
        said = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise UserError(f'{name}: {module_name} cannot be imported: {said}') from error
    if not hasattr(module, attribute):
        known = ', '.join(x for x, y in vars(module).items() if _belongs(y, package)) or 'none'
        raise UserError(f'{name}: {module_name} has no {attribute}; its functions are {known}')
    found: Callable[..., Any] = getattr(module, attribute)
    if not _belongs(found, package):
        raise UserError(f'{name}: expected a function or class of {package}, got {found!r:.80}')
    return found


def _belongs(thing: Any, package: str) -> bool:
    return callable(thing) and str(getattr(thing, '__module__', '')).partition('.')[0] == package


def call(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`function(*args, **options)`; raises UserError if it does not take them."""
    try:
        inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        raise UserError(f'{name}: {error}') from error
    return function(*args, **options)
