"""Numbers as a reader wants them."""

import math

MISSING = "\u2013"
"""Stands where nothing was measured."""


def decimal(value: float | None, digits: int = 3) -> str:
    """Write a number with a fixed number of decimals.

    Args:
        value: NaN for one that was not finite, None for none.
        digits: decimals.
    """
    if value is None:
        return MISSING
    return "not finite" if math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Write a fraction as a percentage with two decimals.

    Args:
        value: 0.25 for a quarter; NaN for one that was not finite, None for none.
    """
    return decimal(None if value is None else 100 * value, 2) + ("" if value is None or math.isnan(value) else " %")


def short_count(value: float | None) -> str:
    """Write a count with three digits and the letter of its thousands: 1.23 k, 4.56 M, 7.89 G.

    Args:
        value: not negative; NaN for one that was not finite, None for none.
    """
    if value is None or math.isnan(value):
        return decimal(value)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {letter}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Write a duration with its two largest units.

    Args:
        seconds: not negative; NaN for one that was not finite, None for none.
    """
    if seconds is None or math.isnan(seconds):
        return decimal(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"
