"""Limits of the numbers in a configuration, by the names of its fields.

Numbers that make no agent are refused in one line, before anything is built of them; those that
make a poor one are the user's choice.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from reverie.errors import UserError

# Whole numbers of at least 0; all others are at least 1.
MAY_BE_ZERO = (
    'steps', 'warmup_steps', 'bootstrap_warmup', 'prefill', 'multi_token', 'registers',
    'head_layers', 'context', 'long_length',
)  # fmt: skip
# Whole numbers that count updates or frames; all others are sizes.
COUNTS = ('steps', 'warmup_steps', 'bootstrap_warmup', 'prefill', 'capacity', 'every')
LARGEST_COUNT = 2**31 - 1
LARGEST_SIZE = 10**6
LARGEST_DEPTH = 10**4  # of what is repeated one by one
REPEATED = ('layers', 'head_layers', 'prior_layers', 'post_layers', 'iterations', 'multi_token')
# Real numbers from 0 to 1; all others are at least 0.
SHARES = (
    'discount', 'cont_discount', 'lam', 'decay', 'ema_decay', 'rms_decay', 'balance', 'unimix',
    'bootstrap_fraction', 'context_frame_rate', 'context_noise', 'max_mask_rate', 'relevant',
    'single_image_rate', 'epsilon', 'rho', 'pixel_mean', 'long_share', 'long_end',
)  # fmt: skip
POSITIVE = ('pixel_std', 'mlp_ratio', 'eps', 'ratio')


def check(config: Any, path: str = 'config', *, named: bool = True) -> None:
    """Raise UserError naming the first number that is out of its limits.

    named: whether fields mean what they are called here; else numbers need only be finite.
    """
    for field in dataclasses.fields(config):
        _check(getattr(config, field.name), field.name, f'{path}.{field.name}', named)


def _check(value: Any, name: str, path: str, named: bool) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        check(value, path, named=named)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check(inner, str(key), f'{path}.{key}', named)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check(inner, name, f'{path}[{i}]', named)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'--{path} {value}: expected a finite number')
    elif named and isinstance(value, int | float) and not isinstance(value, bool):
        low, high = limits(name, isinstance(value, int))
        if not low <= value <= high:
            top = '' if high == math.inf else f' to {high:,.0f}'
            given = f'{value:,}' if isinstance(value, int) else f'{value:g}'
            raise UserError(f'--{path} {given}: expected {low:g}{top or " or more"}')


def limits(name: str, whole: bool) -> tuple[float, float]:
    """Least and greatest value of the fields of a name."""
    if whole:
        top = LARGEST_DEPTH if name in REPEATED else LARGEST_SIZE
        return float(name not in MAY_BE_ZERO), float(LARGEST_COUNT if name in COUNTS else top)
    if name in POSITIVE:
        return 1e-12, math.inf
    return 0.0, 1.0 if name in SHARES else math.inf
