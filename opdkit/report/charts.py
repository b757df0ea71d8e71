"""Line charts as geometry: paths and ticks in pixels, which the template draws as SVG, and the
values for hovering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opdkit.report.numbers import log_ticks, number, tick_labels, ticks
from opdkit.report.read import Values, evenly

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26  # margins of the plot inside the drawing
POINTS = 400  # kept per line: more than its pixels, few enough for a small file
READABLE = 1500  # steps of a chart that can be read by pointing at it
SMOOTH_FROM = 25  # steps; shorter curves are drawn as they are
LOG_FROM = 50  # times between small and large values
COLORS = 12  # of curves; the second half of them is dashed as well
FEW = 12  # points that get a dot each


@dataclass(frozen=True)
class Line:
    """A named curve, with the band `around` it; or with `upto` a band of its own between `values`
    and `upto`, in the first curve's colour.
    """

    name: str
    values: Values
    upto: Values = field(default_factory=list)
    # low and high, at the steps of the values
    around: tuple[Sequence[float | None], Sequence[float | None]] = ((), ())


@dataclass(frozen=True)
class Scale:
    """Values to pixels along one axis."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return round(self.start + (self.end - self.start) * (at - low) / (high - low), 1)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def line_chart(
    title: str,
    steps: Sequence[int],
    lines: Sequence[Line],
    *,
    unit: str = "",
    about: str = "",
    levels: Sequence[tuple[str, float]] = (),
    smooth: bool = True,
    along: str = "step",
) -> dict[str, Any]:
    """A chart for the template.

    `levels` are named horizontal lines, in the unit of the values; `steps` count what `along` says.
    """
    x = Scale(steps[0], max(steps[-1], steps[0] + 1), LEFT, WIDTH - RIGHT)
    curves = [_curve(line, steps, smooth) for line in lines]
    y = _vertical(curves, [level for _, level in levels], unit)
    marks = y.ticks()
    return {
        "title": title,
        "along": along,
        "unit": "log scale"
        if y.log and not unit
        else f"{unit}, log scale"
        if y.log
        else unit.replace("%", ""),
        "about": about,
        "warning": "",
        "curves": [_draw(curve, x, y, unit, index) for index, curve in enumerate(curves)],
        "levels": [{"name": name, "y": y(level)} for name, level in levels],
        "xticks": [
            (x(t), f"{t:,.0f}" if along == "step" else number(t)) for t in x.ticks() if t == int(t)
        ],
        "yticks": list(zip(map(y, marks), tick_labels(marks, unit, y.log))),
        "last": steps[-1],
        "data": {
            "unit": unit,
            "along": along,
            "x": [x.low, x.high, x.start, x.end],
            "y": [y.low, y.high, y.start, y.end, int(y.log)],
            **_hover(lines, steps),
        },
    }


@dataclass(frozen=True)
class _Curve:
    """The points of a line that are drawn: finite and thinned. `upper` is empty but for a band."""

    name: str
    steps: list[int]
    raw: list[float]
    smooth: list[float]
    upper: list[float]
    smooth_upper: list[float]
    low: list[float]
    high: list[float]


def _curve(line: Line, steps: Sequence[int], smooth: bool) -> _Curve:
    pairs = list(zip(steps, line.values, line.upto or line.values))
    whole = [
        (step, value, upto) for step, value, upto in pairs if value is not None and upto is not None
    ]
    raw, upper = (
        [value for _, value, _ in whole],
        [upto for _, _, upto in whole] if line.upto else [],
    )
    smooth_raw, smooth_upper = (smoothed(raw), smoothed(upper)) if smooth else (raw, upper)
    kept = thinned(raw)
    around = [
        [v for v, value in zip(ends, line.values) if value is not None and v is not None]
        for ends in line.around
    ]
    around = [smoothed(ends) for ends in around] if smooth else around
    values = (
        [values[i] for i in kept] if values else []
        for values in (raw, smooth_raw, upper, smooth_upper, *around)
    )
    return _Curve(line.name, [whole[i][0] for i in kept], *values)


def smoothed(values: list[float]) -> list[float]:
    """Moving average over about a thirtieth of the curve; looks both ways, so that it does not lag
    behind.
    """
    if len(values) < SMOOTH_FROM:
        return values
    keep = 1 - 2 / (len(values) / 30 + 2)
    forward, backward = _trailing(values, keep), _trailing(values[::-1], keep)[::-1]
    return [(a + b) / 2 for a, b in zip(forward, backward)]


def _trailing(values: list[float], keep: float) -> list[float]:
    """Exponential moving average without start-up bias."""
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def thinned(values: list[float], most: int = POINTS) -> list[int]:
    """Indices to draw: the lowest and highest of each bucket, so that a spike is never thinned
    away; both ends stay.
    """
    n = len(values)
    if n <= most:
        return list(range(n))
    buckets = most // 2 - 1
    kept = {0, n - 1}
    for b in range(buckets):
        span = range(b * n // buckets, (b + 1) * n // buckets)
        kept |= {min(span, key=values.__getitem__), max(span, key=values.__getitem__)}
    return sorted(kept)


def _vertical(curves: Sequence[_Curve], levels: Sequence[float], unit: str) -> Scale:
    """The y axis: everything visible with a little air, zero included where it is near, logarithmic
    where sizes differ much.
    """
    values = [v for c in curves for part in (c.raw, c.upper, c.low, c.high) for v in part] + list(
        levels
    )
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    start, end = HEIGHT - BOTTOM, TOP
    # a warm-up or a spike does not decide
    common = sorted(values)[len(values) // 20 : -len(values) // 20]
    if unit != "%" and low > 0 and common and common[-1] / common[0] > LOG_FROM:
        return Scale(low / 1.2, high * 1.2, start, end, log=True)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    air = 0.06 * (high - low)
    near_zero = 0 <= low < 0.35 * high
    return Scale(0.0 if near_zero else low - air, high + air, start, end)


def _draw(curve: _Curve, x: Scale, y: Scale, unit: str, index: int) -> dict[str, Any]:
    """What the template draws of one curve."""
    raw, smooth, upper = (
        [(x(step), y(value)) for step, value in zip(curve.steps, values)]
        for values in (curve.raw, curve.smooth, curve.smooth_upper)
    )
    drawn: dict[str, Any] = {
        "name": curve.name,
        "color": index % COLORS,
        "dash": index >= COLORS // 2,
        "band": "",
        "raw": "",
        "smooth": "",
        "dots": [],
    }
    low, high = (
        [(x(step), y(v)) for step, v in zip(curve.steps, ends)] for ends in (curve.low, curve.high)
    )
    drawn["around"] = _path(low + high[::-1]) + "Z" if low else ""
    last = [number(values[-1], unit) for values in (curve.raw, curve.upper) if values]
    if upper:
        return drawn | {
            "color": 0,
            "band": _path(smooth + upper[::-1]) + "Z",
            "value": " – ".join(last),
        }
    return drawn | {
        "raw": "" if raw == smooth else _path(raw),
        "smooth": _path(smooth),
        "dots": smooth if len(smooth) <= FEW else [],
        "value": "".join(last) or "–",
    }


def _hover(lines: Sequence[Line], steps: Sequence[int]) -> dict[str, Any]:
    """The steps at which something was logged, thinned evenly so that all lines are read at the
    same step, and the values there.
    """
    logged = [i for i in range(len(steps)) if any(line.values[i] is not None for line in lines)]
    kept = [logged[i] for i in evenly(len(logged), READABLE)]

    def short(values: Values) -> list[float | None]:
        return [None if values[i] is None else float(f"{values[i]:.4g}") for i in kept]

    ends = [
        {"y": short(line.values)} | ({"z": short(line.upto)} if line.upto else {}) for line in lines
    ]
    return {"steps": [steps[i] for i in kept], "lines": ends}


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:g},{b:g}" for a, b in points) if points else ""
