"""Arguments of host environments, checked before a process is started."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from reverie.envs.observations import Wishes
from reverie.envs.worker import Setup
from reverie.types import ActionSpace, UserError

Factory = Callable[[], Any]  # makes a gymnasium.Env


def wishes_of(obs: str | None, keys: str | None, size: tuple[int, ...] | None) -> Wishes:
    """Choices about observations. Raises UserError for an `obs` that is none."""
    kept = tuple(filter(None, (keys or '').split(',')))
    codes = re.fullmatch(r'codes:(\d{1,3})', obs or '')
    if codes and int(codes[1]) > 1:
        return Wishes(None, kept, int(codes[1]), size)
    if obs not in (None, 'image', 'state'):
        raise UserError(
            f"obs={obs!r} given for host environments; expected 'image', 'state' or codes:<n>"
        )
    return Wishes('image' if obs == 'image' else 'state' if obs else None, kept, None, size)


def check_numbers(
    size: tuple[int, ...] | None, timeout_s: float | int, max_restarts: int, **counts: int | None
) -> None:
    for what, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f'{what}={value} given for host environments; expected at least 1')
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f'size={size} given for host environments; expected (height, width)')
    if timeout_s <= 0:
        raise UserError(f'timeout_s={timeout_s} given for host environments; expected more than 0')
    if max_restarts < 0:
        raise UserError(
            f'max_restarts={max_restarts} given for host environments; expected at least 0'
        )


def check_actions(action: np.ndarray, space: ActionSpace, n: int, name: str) -> None:
    """Raise UserError unless these are n actions of the space."""
    discrete = space.kind == 'discrete'
    shape = (n,) if discrete else (n, space.size)
    if action.shape != shape:
        raise UserError(f'{name}: actions {action.shape} given; expected {shape}')
    if discrete and not np.issubdtype(action.dtype, np.integer):
        raise UserError(f'{name}: actions of type {action.dtype} given; expected integers')
    if discrete and not ((action >= 0) & (action < space.size)).all():
        given, last = action.tolist(), space.size - 1
        raise UserError(f'{name}: actions {given} given; expected 0 to {last}')
    if not np.isfinite(action).all():
        raise UserError(f'{name}: actions {action.tolist()} given; expected finite numbers')


def factories_of(env: str | Factory | Sequence[Factory], n: int | None) -> list[Any]:
    if isinstance(env, str):
        return [None] * (n or 1)
    if callable(env):
        return [env] * (n or 1)
    if (
        not isinstance(env, Iterable)
        or not (many := list(env))
        or not all(callable(make) for make in many)
    ):
        raise UserError(
            f'{env!r} given as host environments; expected a name, or functions that make environments'
        )
    if n not in (None, len(many)):
        raise UserError(f'{len(many)} functions given for n={n} environments; expected as many')
    return many


def name_of(factory: Factory) -> str:
    made_by = getattr(factory, 'func', factory)  # of a functools.partial
    return getattr(made_by, '__qualname__', type(made_by).__name__)


def dumps(setup: Setup, name: str) -> bytes:
    """Pickle a setup. Raises UserError if that cannot be done."""
    try:
        # comes with gymnasium; takes functions of the main module and closures, too
        import cloudpickle
    except ImportError as error:
        hint = "pip install 'reverie[gymnasium]'"
        raise UserError(
            f'{name} needs the package gymnasium, which is missing; install it with: {hint}'
        ) from error
    try:
        pickled: bytes = cloudpickle.dumps(tuple(setup))
    except Exception as error:
        raise UserError(
            f'{name} cannot be sent to a worker process: {error}; expected a function to pickle'
        ) from error
    return pickled
