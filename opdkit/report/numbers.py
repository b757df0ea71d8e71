"""Numbers as people read them, and where an axis puts its ticks."""

from __future__ import annotations

import math


def number(value: float | None, unit: str = "") -> str:
    """A number with three to four digits: 0.0412, 12.3k, 61.2% (unit "%": value is a share)."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "%":
        return f"{100 * value:.1f}%"
    size = abs(value)
    for limit, scale, suffix in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{_digits(value / scale, 3)}{suffix}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return _digits(value, 4 if size >= 1000 else 3)


def _digits(value: float, digits: int) -> str:
    """Rounded to some digits, and never as a power of ten: 999.6 is 1000, not 1e+03."""
    return f"{float(f'{value:.{digits}g}'):.10g}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values between low and high: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high, with 2 and 5 times them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    values = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
    return values[:: math.ceil(len(values) / 6)] if values else [low]


def tick_labels(values: list[float], unit: str = "", log: bool = False) -> list[str]:
    """Labels that differ wherever the ticks do, however near each other they are."""
    if unit == "%":
        return [f"{100 * value:.4g}%" for value in values]
    labels = [number(value) for value in values]
    digits = 4
    while not log and len(set(labels)) < len(values) and digits < 12:
        labels, digits = [f"{value:.{digits}g}" for value in values], digits + 1
    return labels


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
