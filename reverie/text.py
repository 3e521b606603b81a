"""Numbers and durations as people read them."""

import math

Number = float | int


def number(x: Number | None, digits: int = 3, strip: bool = False) -> str:
    """`digits` significant digits, thousands as k and M, a true minus sign; '–' without a number.

    strip: leave trailing zeros out.
    """
    if x is None or not math.isfinite(x):
        return '–'
    size = abs(x)
    for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if size >= unit:
            return number(x / (1e3 if name == 'k' else unit), digits, strip) + name
    if size and size < 1e-3:
        mantissa, exponent = f'{size:.{max(digits - 2, 0)}e}'.split('e')
        text = f'{mantissa.rstrip("0").rstrip(".")}e{int(exponent)}'
    else:
        decimals = max(0, digits - 1 - (math.floor(math.log10(size)) if size else 0))
        text = f'{size:.{min(decimals, 4)}f}'
        text = text.rstrip('0').rstrip('.') if strip and '.' in text else text
    return ('−' if x < 0 else '') + text


def percent(share: Number | None) -> str:
    """0.24 -> '24%'; '–' without a number."""
    return '–' if share is None else f'{100 * share:.0f}%'


def duration(seconds: Number | None) -> str:
    """Seconds as '45 s', '12 min' or '3 h 20 min'; '–' without a finite number."""
    if seconds is None or not math.isfinite(seconds):
        return '–'
    if seconds < 90:
        return f'{seconds:.0f} s'
    minutes = round(seconds / 60)
    return f'{minutes} min' if minutes < 60 else f'{minutes // 60} h {minutes % 60} min'
