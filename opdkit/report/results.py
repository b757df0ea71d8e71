"""Evaluations before, during and after training: the table, the interval plot and the curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkit.eval.evaluate import EvalResult
from opdkit.eval.stats import Estimate, paired_difference
from opdkit.report.charts import WIDTH, Line, Scale, line_chart
from opdkit.report.numbers import duration, number, ticks

BEFORE, STUDENT, TEACHER = "student_before", "student", "teacher"
LABELS = {BEFORE: "Student before", STUDENT: "Student after", TEACHER: "Teacher"}
ROW = 54  # pixels of a row in the interval plot


def standings(evals: Sequence[EvalResult]) -> dict[str, EvalResult]:
    """The results to compare, by name: before, after, teacher, then any other; the latest of each
    name.

    Where nothing is called student_before, an evaluation of the student at an earlier step takes
    its place.
    """
    latest = {e.name: e for e in sorted(evals, key=lambda e: e.step)}
    earlier = [e for e in evals if e.name == STUDENT and e.step < latest[STUDENT].step]
    if BEFORE not in latest and earlier:
        latest[BEFORE] = min(earlier, key=lambda e: e.step)
    order = {name: i for i, name in enumerate(LABELS)}
    return dict(sorted(latest.items(), key=lambda item: order.get(item[0], len(order))))


def label(name: str, results: dict[str, EvalResult]) -> str:
    """A result's name in words; the student alone is neither before nor after."""
    return "Student" if name == STUDENT and BEFORE not in results else LABELS.get(name, name)


def change(before: EvalResult, after: EvalResult) -> Estimate | None:
    """after - before in Avg@k, paired by problem; None where they are not of the same problems."""
    if not before.per_problem or set(before.per_problem) != set(after.per_problem):
        return None
    ids = sorted(before.per_problem)
    return paired_difference(
        [before.per_problem[i] for i in ids],
        [after.per_problem[i] for i in ids],
        samples=min(before.samples_per_problem, after.samples_per_problem),
    )


def gap_closed(results: dict[str, EvalResult]) -> float | None:
    """The share of the way from the student before to the teacher; None where the teacher is not
    ahead.
    """
    if not {BEFORE, STUDENT, TEACHER} <= set(results):
        return None
    before, after, teacher = (results[name].avg_at_k.value for name in (BEFORE, STUDENT, TEACHER))
    return (after - before) / (teacher - before) if teacher > before else None


def measures(result: EvalResult) -> dict[str, Estimate]:
    """Avg@k and the Pass@k that say more than it: Pass@1 is Avg@k by another name."""
    named = {f"Avg@{result.samples_per_problem}": result.avg_at_k}
    return named | {
        f"Pass@{k}": estimate for k, estimate in sorted(result.pass_at_k.items()) if k > 1
    }


def interval_plots(results: dict[str, EvalResult]) -> list[dict[str, Any]]:
    """One plot per measure: a row per model with its mean and interval on a common axis."""
    names = dict.fromkeys(measure for result in results.values() for measure in measures(result))
    return [_interval_plot(name, results) for name in names]


def _interval_plot(measure: str, results: dict[str, EvalResult]) -> dict[str, Any]:
    rows = {name: m[measure] for name, r in results.items() if measure in (m := measures(r))}
    ends = [end for e in rows.values() for end in (e.interval.low, e.interval.high)]
    air = max(0.08 * (max(ends) - min(ends)), 0.01)
    axis = Scale(max(0.0, min(ends) - air), min(1.0, max(ends) + air), 12, WIDTH - 12)
    return {
        "measure": measure,
        "height": ROW * len(rows) + 30,
        "bottom": ROW * len(rows) + 4,
        "ticks": [(axis(t), f"{100 * t:.4g}%") for t in ticks(axis.low, axis.high, 5)],
        "rows": [
            {
                "label": label(name, results),
                "kind": name if name in LABELS else "other",
                "y": ROW * i + 36,
                "low": axis(e.interval.low),
                "at": axis(e.value),
                "high": axis(e.interval.high),
                "text": number(e.value, "%"),
                "range": span(e),
            }
            for i, (name, e) in enumerate(rows.items())
        ],
    }


def span(estimate: Estimate, unit: str = "%") -> str:
    return f"{number(estimate.interval.low, unit)} – {number(estimate.interval.high, unit)}"


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points, with its interval."""
    low, high = estimate.interval.low, estimate.interval.high
    return f"{100 * estimate.value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def result_table(results: dict[str, EvalResult]) -> dict[str, Any]:
    """Head and cells of the table under the plot."""
    names = list(
        dict.fromkeys(measure for result in results.values() for measure in measures(result))
    )
    head = [
        "Model",
        "Step",
        *names,
        "Reward",
        "Mean tokens",
        "Cut at limit",
        "Problems × samples",
        "Time",
    ]
    body = []
    for name, r in results.items():
        cells = [
            (number(m[n].value, "%"), span(m[n])) if n in (m := measures(r)) else ("–", "")
            for n in names
        ]
        body.append(
            [
                (label(name, results), ""),
                (str(r.step), ""),
                *cells,
                (number(r.reward_mean), ""),
                (number(r.mean_length), ""),
                (number(r.truncated_share, "%"), ""),
                (f"{r.n_problems:,} × {r.samples_per_problem}", ""),
                (duration(r.seconds), ""),
            ]
        )
    return {"head": head, "body": body}


def eval_curve(
    evals: Sequence[EvalResult], results: dict[str, EvalResult]
) -> dict[str, Any] | None:
    """Avg@k of the student over training, where it was evaluated more than once; the teacher as a
    level.
    """
    points_in_time = {e.step: e for e in evals if e.name in (BEFORE, STUDENT)}
    if len(points_in_time) < 2:
        return None
    steps = sorted(points_in_time)
    avg = [points_in_time[step].avg_at_k for step in steps]
    levels = [("teacher", results[TEACHER].avg_at_k.value)] if TEACHER in results else []
    lines = [
        Line("student", [e.value for e in avg]),
        Line("95% interval", [e.interval.low for e in avg], [e.interval.high for e in avg]),
    ]
    title = f"Avg@{points_in_time[steps[-1]].samples_per_problem} over training"
    return line_chart(
        title,
        steps,
        lines,
        unit="%",
        about="On the evaluation problems.",
        levels=levels,
        smooth=False,
    )
