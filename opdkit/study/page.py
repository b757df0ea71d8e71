"""Write comparison.html: methods side by side, in one file that asks no server for anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opdkit.base.config import to_yaml
from opdkit.base.files import write_whole
from opdkit.eval.stats import Estimate
from opdkit.report.charts import COLORS, WIDTH, Line, Scale, line_chart
from opdkit.report.html import GEOMETRY, templates
from opdkit.report.numbers import duration, number, ticks
from opdkit.report.read import evenly
from opdkit.report.results import ROW, span
from opdkit.study.standings import (
    KL,
    REWARD,
    Curve,
    Entrant,
    Entries,
    Standing,
    accuracy_curve,
    final,
    metric_curve,
    standings,
    teacher_accuracy,
)

NAME = 30  # characters of a method's name beside its interval
POINTS = 300  # token counts at which a chart can be read
SEEDS_LISTED = 5  # more are given by their range
PLOTS = (  # title, metric, unit, what it means
    (
        "KL to the teacher",
        KL,
        "nats per token",
        "Sampled estimate of KL(student ‖ teacher) on the training rollouts.",
    ),
    ("Reward", REWARD, "", "Mean over the training rollouts."),
    ("Entropy", "entropy/student", "nats per token", "How open the student's choices are."),
    ("Length", "completions/mean_length", "tokens", "Mean over the training rollouts."),
)


def write_page(entries: Entries) -> Path:
    """Make comparison.html from the runs that are finished; returns its path."""
    path = entries.folder / "comparison.html"
    write_whole(path, render(entries))
    return path


def render(entries: Entries) -> str:
    """The page as text."""
    environment = templates()
    names = without_folders([entrant.label for entrant in entries.entrants])
    entrants = [replace(entrant, label=name) for entrant, name in zip(entries.entrants, names)]
    plan = entries.plan
    ranked = standings(entrants)
    colors = {entrant.label: i for i, entrant in enumerate(entrants)}
    done, wanted = (
        sum(len(entrant.runs) for entrant in entrants),
        len(entrants) * len(entries.seeds),
    )
    return environment.get_template("compare.html.j2").render(
        title=entries.folder.resolve().name,
        first=entrants[0].label,
        finished=done == wanted,
        state=f"{done} of {wanted} runs finished",
        facts=[
            (name, str(plan[key])) for name, key in (("Recipe", "recipe"), ("Budget", "budget"))
        ],
        figures=key_figures(entrants, ranked),
        plots=[accuracy_plot(ranked, colors), *difference_plot(ranked, colors)] if ranked else [],
        table=table(ranked, colors),
        failed=[(e.label, seed, text) for e in entrants for seed, text in e.failed.items()],
        charts=charts(entrants) if ranked else [],
        methods=[(e.label, e.summary, e.formula, colors[e.label] % COLORS) for e in entrants],
        yaml=to_yaml(plan["run"]),
        geometry=GEOMETRY,
    )


def without_folders(labels: Sequence[str]) -> list[str]:
    """`own.py:mine` for `some/where/own.py:mine`, unless two methods would then have one name."""
    short = [re.sub(r"[^\s*+(),]*/(?=[^/\s]+\.py:)", "", label) for label in labels]
    return short if len(set(short)) == len(short) else list(labels)


def key_figures(entrants: Sequence[Entrant], ranked: Sequence[Standing]) -> list[dict[str, str]]:
    """The numbers at the top."""
    if not ranked:
        return []
    best = max(ranked, key=lambda s: s.accuracy.value)
    results = [final(run) for entrant in entrants for run in entrant.runs.values()]
    evaluated = results[0]
    found = [
        ("Highest accuracy", number(best.accuracy.value, "%"), best.label),
        (
            "Methods × seeds",
            f"{len(ranked)} × {max(len(s.seeds) for s in ranked)}",
            "the same prompts for all methods of a seed",
        ),
        (
            "Student tokens of a run",
            number(sum(s.tokens for s in ranked) / len(ranked)),
            f"{number(_steps(ranked))} steps on average",
        ),
        (
            "Problems",
            f"{evaluated.n_problems:,}",
            f"held out, {evaluated.samples_per_problem} answer(s) each",
        ),
        (
            "Time",
            duration(sum(s.seconds * len(s.seeds) for s in ranked)),
            "of all steps and evaluations",
        ),
    ]
    return [
        {"label": label, "value": value, "note": note, "tone": ""} for label, value, note in found
    ]


def _steps(ranked: Sequence[Standing]) -> float:
    return sum(s.steps for s in ranked) / len(ranked)


# ---------------------------------------------------------------------------------- table and plots


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:+.1f}"


def interval(difference: Estimate) -> str:
    return f"{points(difference.interval.low)} to {points(difference.interval.high)}"


def per_seed(standing: Standing) -> str:
    """The differences of the seeds, or their range where they are many."""
    values = list(standing.by_seed.values())
    if len(values) > SEEDS_LISTED:
        return f"{points(min(values))} to {points(max(values))}"
    return ", ".join(map(points, values))


def tone(difference: Estimate | None) -> str:
    """Whether the interval leaves zero out, and on which side."""
    if difference is None:
        return ""
    return "good" if difference.interval.low > 0 else "bad" if difference.interval.high < 0 else ""


def table(ranked: Sequence[Standing], colors: dict[str, int]) -> dict[str, Any]:
    """Head and rows of the table; a cell is a value, a note under it and its tone."""
    head = [
        "Method",
        "Accuracy",
        "Difference, points",
        "By seed",
        "KL to teacher",
        "Reward",
        "Length",
        "Student tokens",
        "Steps",
        "Time",
    ]
    body = []
    for s in ranked:
        d = s.difference
        cells = [
            (number(s.accuracy.value, "%"), span(s.accuracy), ""),
            (points(d.value), interval(d), tone(d)) if d else ("–", "", ""),
            (per_seed(s) or "–", "", ""),
            (number(s.kl), "", ""),
            (number(s.reward), "", ""),
            (number(s.length), "", ""),
            (number(s.tokens), "", ""),
            (number(s.steps), "", ""),
            (duration(s.seconds), "", ""),
        ]
        body.append({"label": s.label, "color": colors[s.label] % COLORS, "cells": cells})
    return {"head": head, "body": body}


# label, what is drawn, as text, its range as text, a mark per seed
_Row = tuple[str, Estimate, str, str, list[float]]


def accuracy_plot(ranked: Sequence[Standing], colors: dict[str, int]) -> dict[str, Any]:
    """Accuracy and its interval, a row per method."""
    rows: list[_Row] = [
        (s.label, s.accuracy, number(s.accuracy.value, "%"), span(s.accuracy), []) for s in ranked
    ]
    return _plot("Accuracy", rows, colors, lambda t: f"{100 * t:.4g}%", (0.0, 1.0))


def difference_plot(ranked: Sequence[Standing], colors: dict[str, int]) -> list[dict[str, Any]]:
    """The paired difference to the first method and its interval, with a mark per seed."""
    rows: list[_Row] = [
        (
            s.label,
            s.difference,
            points(s.difference.value),
            interval(s.difference),
            list(s.by_seed.values()),
        )
        for s in ranked
        if s.difference is not None
    ]
    if not rows:
        return []
    return [
        _plot(
            f"Difference to {ranked[0].label}, percentage points",
            rows,
            colors,
            lambda t: f"{100 * t:+.4g}" if t else "0",
            (-1.0, 1.0),
            zero=True,
        )
    ]


def _plot(
    measure: str,
    rows: Sequence[_Row],
    colors: dict[str, int],
    tick: Callable[[float], str],
    limits: tuple[float, float],
    zero: bool = False,
) -> dict[str, Any]:
    """Rows of intervals on a common axis (see `results._interval_plot`); `zero` marks no
    difference.
    """
    ends = [
        end for _, e, _, _, seeds in rows for end in (e.interval.low, e.interval.high, *seeds)
    ] + [0.0] * zero
    air = max(0.08 * (max(ends) - min(ends)), 0.005)
    axis = Scale(max(limits[0], min(ends) - air), min(limits[1], max(ends) + air), 12, WIDTH - 12)
    return {
        "measure": measure,
        "height": ROW * len(rows) + 30,
        "bottom": ROW * len(rows) + 4,
        "ticks": [(axis(t), tick(t)) for t in ticks(axis.low, axis.high, 5)],
        "zero": axis(0.0) if zero else None,
        "rows": [
            {
                "label": label if len(label) <= NAME else f"{label[: NAME - 1]}…",
                "kind": f"c{colors[label] % COLORS}",
                "y": ROW * i + 36,
                "low": axis(e.interval.low),
                "at": axis(e.value),
                "high": axis(e.interval.high),
                "text": text,
                "range": range_,
                "seeds": [axis(value) for value in seeds],
            }
            for i, (label, e, text, range_, seeds) in enumerate(rows)
        ],
    }


# ------------------------------------------------------------------------------------------- charts


def charts(entrants: Sequence[Entrant]) -> list[dict[str, Any]]:
    """Accuracy, KL and the rest against the tokens that the student wrote."""
    shown = [entrant for entrant in entrants if entrant.runs]
    levels = list(teacher_accuracy(shown).items())
    accuracy = {entrant.label: accuracy_curve(entrant) for entrant in shown}
    found = [_chart("Accuracy", accuracy, "%", "On the evaluation problems.", levels)]
    for title, name, unit, about in PLOTS:
        curves = {entrant.label: metric_curve(entrant, name) for entrant in shown}
        if any(curve.tokens for curve in curves.values()):
            found.append(_chart(title, curves, unit, about))
    return found


def _chart(
    title: str,
    curves: dict[str, Curve],
    unit: str,
    about: str,
    levels: Sequence[tuple[str, float]] = (),
) -> dict[str, Any]:
    """A line per method, in the band of its seeds; all are read at the same token counts."""
    every = sorted({tokens for curve in curves.values() for tokens in curve.tokens})
    grid = [every[i] for i in evenly(len(every), POINTS)]
    lines = []
    for label, curve in curves.items():
        mean, low, high = curve.at(grid)
        lines.append(Line(label, mean, around=(low, high)))
    chart = line_chart(
        title,
        [round(x) for x in grid],
        lines,
        unit=unit,
        about=about,
        levels=levels,
        smooth=False,
        along="tokens",
    )
    for drawn in chart["curves"]:
        drawn["dots"] = []  # of the common grid, not of what was measured
    return chart
