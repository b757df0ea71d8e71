"""Who waited for whom: what each part of a run did when, as a drawing of the last steps, a table of
the whole run, and a sentence that says what limits it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.report.charts import Scale
from opdkit.report.intervals import Intervals, both, measure, union, without
from opdkit.report.numbers import number, ticks
from opdkit.report.read import RunData, Span

WAIT = "wait"  # the phase in which a part stands still
TRAINERS = ("trainer", "rank")
PARTS = (*TRAINERS, "sampler", "teacher")  # in their order from the top
# of work, in the colours that they have in all charts
PHASES = ("sample", "score", "learn", "reward")
WRITING = ("sample", "reward")  # those of the sampler, where the trainer is the sampler too
SHOWN = 5  # steps drawn, the last ones
TOUCH = 0.02  # of the time: what two parts do at once, where they do not just hand over
MUCH = 0.1  # of the time: from here on it is worth a sentence
BUSY = 0.85  # a part that works for so much of the time limits the run
WIDTH, LEFT, TOP, ROW, BAR = 1160, 118, 26, 34, 20  # pixels of the drawing
LABEL = 64  # that the name of a step takes


@dataclass(frozen=True)
class Window:
    """A step with the time in which it alone happened: what lies between two windows (evaluations,
    checkpoints, an interruption) is in neither.
    """

    step: int
    start: float
    end: float


def timeline(run: RunData) -> dict[str, Any] | None:
    """What the template draws; None where the run has not told when it did what."""
    steps = _placed(run)
    windows = _windows(steps)
    if not windows:
        return None
    spans = [span for _, spans in steps for span in spans]
    names = sorted({span.part for span in spans}, key=_order)
    phases = list(dict.fromkeys(span.phase for span in sorted(spans, key=lambda s: s.start)))
    colors = _colors(phases)
    counted = windows[1:] or windows  # in the first step engines compile and caches fill
    shares = {name: _Shares.of(name, names, spans, counted) for name in names}
    return {
        "says": _says(shares, run.config),
        "of": _of(windows, counted),
        "table": _table(shares, colors),
        "legend": [(phase, colors[phase]) for phase in sorted(colors, key=_phase_order)],
        "waits": any(span.phase == WAIT for span in spans),
        "gantt": _gantt(names, spans, _last(counted), colors),
    }


def _placed(run: RunData) -> list[tuple[int, list[Span]]]:
    """The spans of each step. Where samplers are elsewhere, a trainer that samples only waits for
    them: one that tells nothing of itself works as long, those that do have rows of their own,
    beside which only rewards are left of what they do together.
    """
    parts = {span.part for _, spans in run.timeline for span in spans}
    each = any(_kind(part) == "sampler" and part != "sampler" for part in parts)
    sampler = run.config.get("sampler")
    kind = sampler.get("kind") if isinstance(sampler, dict) else str(sampler).partition(":")[0]
    if not each and "sampler" not in parts and kind != "server":
        return run.timeline

    def placed(span: Span) -> list[Span]:
        if span.part == "sampler" and each:
            return [] if span.phase == "sample" else [replace(span, part="rewards")]
        if span.phase != "sample":
            return [span]
        if _kind(span.part) not in TRAINERS:
            return [span]
        waits = replace(span, phase=WAIT)
        return [waits] if each or "sampler" in parts else [waits, replace(span, part="sampler")]

    return [(step, [one for s in spans for one in placed(s)]) for step, spans in run.timeline]


def _windows(steps: Sequence[tuple[int, Sequence[Span]]]) -> list[Window]:
    """Of each step, the time from where the trainer takes it up: its rollouts may be older."""
    out: list[Window] = []
    for step, spans in steps:
        trainer = [s for s in spans if _kind(s.part) in TRAINERS] or list(spans)
        if trainer:
            start, end = min(s.start for s in trainer), max(s.end for s in trainer)
            out.append(Window(step, max([start, *(w.end for w in out[-1:])]), end))
    return [window for window in out if window.end > window.start]


def _last(windows: Sequence[Window]) -> list[Window]:
    """The last few steps, as far back as nothing longer than a step lies between two."""
    kept = [windows[-1]]
    for window in reversed(windows[-SHOWN:-1]):
        longest = max(window.end - window.start, kept[0].end - kept[0].start)
        if kept[0].start - window.end > longest:
            break
        kept.insert(0, window)
    return kept


@dataclass(frozen=True)
class _Shares:
    """Of a part, shares of the time of the steps: at work, in each phase, and while another part
    worked, standing still or working too.
    """

    busy: float
    phases: dict[str, float]
    still: dict[str, float]  # by the part that worked meanwhile
    beside: dict[str, float]  # so too

    @classmethod
    def of(
        cls, name: str, names: Sequence[str], spans: Sequence[Span], windows: Sequence[Window]
    ) -> _Shares:
        time = union((w.start, w.end) for w in windows)
        whole = measure(time)
        work = {part: both(_work(spans, part), time) for part in names}
        idle = without(time, work[name])
        phases = dict.fromkeys(s.phase for s in spans if s.part == name and s.phase != WAIT)
        mine = {p: _work([s for s in spans if s.phase in (p, WAIT)], name) for p in phases}
        others = [part for part in names if part != name]
        return cls(
            busy=measure(work[name]) / whole,
            phases={phase: measure(both(done, time)) / whole for phase, done in mine.items()},
            still={part: measure(both(idle, work[part])) / whole for part in others},
            beside={part: measure(both(work[name], work[part])) / whole for part in others},
        )


def _work(spans: Iterable[Span], part: str) -> Intervals:
    """When a part worked: a wait may be within a phase, in which others worked for it."""
    mine = [s for s in spans if s.part == part]
    waits = union((s.start, s.end) for s in mine if s.phase == WAIT)
    return without(union((s.start, s.end) for s in mine if s.phase != WAIT), waits)


def _table(shares: Mapping[str, _Shares], colors: Mapping[str, int]) -> list[dict[str, Any]]:
    """A row per part."""
    return [
        {
            "part": name,
            "busy": number(share.busy, "%"),
            "idle": number(1 - share.busy, "%"),
            "phases": [
                (phase, number(part, "%"), colors[phase])
                for phase, part in sorted(share.phases.items(), key=lambda p: _phase_order(p[0]))
            ],
            "still": ", ".join(
                f"{other} {number(part, '%')}" for other, part in share.still.items() if part > 5e-4
            ),
        }
        for name, share in shares.items()
    ]


def _of(windows: Sequence[Window], counted: Sequence[Window]) -> str:
    """Which steps the shares are of."""
    first, last = counted[0].step, counted[-1].step
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"{steps}, without the first" if len(counted) < len(windows) else steps


# ---------------------------------------------------------------------------------- what limits it


def _says(shares: Mapping[str, _Shares], config: Mapping[str, Any]) -> str:
    """What limits the run, and what would help."""
    trainers = {name: share for name, share in shares.items() if _kind(name) in TRAINERS}
    others = {name: share for name, share in shares.items() if name not in trainers}
    if not trainers:
        return ""
    slowest = max(trainers.values(), key=lambda share: share.busy)
    # nobody can be waited for longer than the time in which a part stood still
    waited = {
        kind: max((slowest.still[n] for n in others if _kind(n) == kind), default=0.0)
        for kind in ("sampler", "teacher")
    }
    writes = sum(slowest.phases.get(phase, 0.0) for phase in WRITING)
    if waited["sampler"] >= MUCH and waited["sampler"] >= waited["teacher"]:
        overlap = max(slowest.beside[n] for n in others if _kind(n) == "sampler") > TOUCH
        return _waited(waited["sampler"], "rollouts", _more_samplers(config, overlap))
    if waited["teacher"] >= MUCH:
        remedy = "more of their servers or devices, or a method that asks for fewer numbers a token"
        return _waited(waited["teacher"], "teachers", f"{remedy} (docs/teachers.md)")
    if writes >= MUCH:
        ahead = config.get("ahead") or 0
        turns = f", and also with ahead={ahead} it writes and learns in turn" if ahead else ""
        return (
            f"Rollouts and their rewards took {_percent(writes)} of the trainer's time{turns}. A "
            f"sampler on devices of its own{'' if ahead else ' with ahead=1'} writes while it "
            "learns (docs/cluster.md)."
        )
    if slowest.busy < BUSY:
        return (
            f"The trainer stood still for {_percent(1 - slowest.busy)} of the time, and no other "
            "part worked meanwhile: weights are sent, processes start or answer late, or the "
            "device is shared with another program."
        )
    return (
        f"The trainer worked for {_percent(slowest.busy)} of the time: it limits the run. More "
        "processes for it, or fewer trained tokens per step, would make the run faster."
        f"{_spare(others)}"
    )


def _waited(share: float, what: str, remedy: str) -> str:
    return f"The trainer waited {_percent(share)} of the time for {what}: {remedy}."


def _more_samplers(config: Mapping[str, Any], overlap: bool) -> str:
    ahead = config.get("ahead") or 0
    if not ahead:
        return "with ahead=1 they are written while the trainer learns (docs/cluster.md)"
    if not overlap:
        return (
            f"with ahead={ahead} the two still take turns, since one device does both. Put the "
            "sampler on devices of its own (docs/cluster.md)"
        )
    return (
        "more samplers, or shorter responses. A larger ahead evens out long and short steps, and "
        "is no faster in the mean"
    )


def _spare(others: Mapping[str, _Shares]) -> str:
    """What the other parts could do besides."""
    said = ""
    for kind in ("sampler", "teacher"):
        mine = [share for n, share in others.items() if _kind(n) == kind and share.phases]
        still = sorted(1 - share.busy for share in mine)
        if still and still[0] >= MUCH:
            one, few, many = len(still) == 1, _percent(still[0]), _percent(still[-1])
            which = f"The {kind}" if one else f"The {len(still)} {kind}s"
            said += f" {which} stood still for {few if few == many else f'{few} to {many}'}."
    return said


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


# ------------------------------------------------------------------------------------- the drawing


def _gantt(
    names: Sequence[str],
    spans: Sequence[Span],
    windows: Sequence[Window],
    colors: Mapping[str, int],
) -> dict[str, Any]:
    """A row per part, a bar per span, seconds from the first step drawn."""
    zero = windows[0].start
    x = Scale(0.0, windows[-1].end - zero, LEFT, WIDTH - 8)
    rows = [
        {
            "name": name,
            "y": TOP + ROW * i,
            "bars": _bars([s for s in spans if s.part == name], zero, x, colors),
        }
        for i, name in enumerate(names)
    ]
    bottom = TOP + ROW * len(names) + 2
    return {
        "width": WIDTH,
        "height": bottom + 26,
        "left": LEFT,
        "right": WIDTH - 8,
        "bottom": bottom,
        "bar": BAR,
        "rows": rows,
        "steps": _labels([(x(w.start - zero), f"step {w.step}") for w in windows]),
        "ticks": [(x(t), f"{number(t)} s" if t else "0") for t in ticks(0.0, x.high, 8)],
        "about": _spoken(names, spans, windows),
    }


def _labels(steps: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Where each step begins; its name where there is room for it."""
    out: list[tuple[float, str]] = []
    last = -math.inf
    for at, name in steps:
        room = at - last >= LABEL
        out.append((at, name if room else ""))
        last = at if room else last
    return out


def _bars(
    spans: Sequence[Span], zero: float, x: Scale, colors: Mapping[str, int]
) -> list[dict[str, Any]]:
    """What of the spans falls into the drawing; bars of one phase that touch are one."""
    pixel = (x.high - x.low) / (x.end - x.start)
    out = []
    # a wait last: it may lie within a phase
    for phase in sorted(dict.fromkeys(s.phase for s in spans), key=WAIT.__eq__):
        mine = union((s.start - zero, s.end - zero) for s in spans if s.phase == phase)
        inside = both(mine, [(x.low, x.high)])
        drawn = union((start - pixel / 4, end + pixel / 4) for start, end in inside)
        out += [
            {
                "x": x(start),
                "width": round(max(x(end) - x(start), 0.5), 1),
                "color": colors.get(phase),
                "title": f"{phase}, {number(end - start)} s",
            }
            for start, end in drawn
        ]
    return out


def _spoken(names: Sequence[str], spans: Sequence[Span], windows: Sequence[Window]) -> str:
    """The drawing in words, for those who do not see it."""
    shares = [f"{name} {_percent(_Shares.of(name, names, spans, windows).busy)}" for name in names]
    first, last = windows[0].step, windows[-1].step
    return f"Steps {first} to {last}: share of the time at work: {', '.join(shares)}"


def _colors(phases: Iterable[str]) -> dict[str, int]:
    """A colour's number for each phase of work; standing still has none."""
    more = iter((4, 7, 6, 8, 10, 11, 9, 5))
    work = [phase for phase in phases if phase != WAIT]
    known = {phase: PHASES.index(phase) for phase in work if phase in PHASES}
    return known | {phase: next(more, 5) for phase in work if phase not in PHASES}


def _phase_order(phase: str) -> tuple[int, str]:
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), phase)


def _kind(part: str) -> str:
    """`sampler` of `sampler 2` and of `sampler:http://a`."""
    return re.split(r"[^a-z]", part, maxsplit=1)[0]


def _order(part: str) -> tuple[int, list[tuple[int, str]]]:
    """By kind, then by name, numbers in their order."""
    kind = _kind(part)
    at = PARTS.index(kind) if kind in PARTS else len(PARTS)
    words = re.findall(r"\d+|\D+", part)
    return at, [(int(w), "") if w.isdecimal() and len(w) < 10 else (-1, w) for w in words]
