"""The comparison as one page: success over steps, KL by turn at the start and the end, a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdkit.base.files import write_json, write_whole
from opdkit.eval.stats import Estimate, estimate, paired_difference
from opdkit.report.charts import Line, line_chart
from opdkit.report.html import GEOMETRY, templates

Curve = dict[int, dict[str, Any]]  # what was measured, by step
BODY = """{% from "charts.html.j2" import chart with context %}
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>{% include "style.css.j2" %}</style></head><body><main>
<header><h1>{{ title }}</h1></header>
<p class="lead">{{ lead }}</p>
<div class="charts">{% for c in charts %}{{ chart(c) }}{% endfor %}</div>
<div class="card scroll"><table>
<thead><tr>{% for h in head %}<th>{{ h }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div></main><div id="tip" role="tooltip"></div>
<script>{% include "script.js.j2" %}</script></body></html>
"""
HEAD = (
    "method", "success", "95% interval", "by seed", "against opd, paired", "turns",
    "KL per token, nats", "KL by turn",
)  # fmt: skip


def read(out: Path, methods: Sequence[str]) -> dict[str, list[Curve]]:
    """The curves of each method, one for each seed."""
    found: dict[str, list[Curve]] = {name: [] for name in methods}
    for path in sorted(out.glob("*-*.json")):
        kept = json.loads(path.read_text())
        if kept.get("method") in found:
            curve = {int(step): what for step, what in kept["curve"].items()}
            found[kept["method"]].append(curve)
    return found


def over_seeds(values: Sequence[Sequence[float | None]]) -> tuple[list[Any], list[Any], list[Any]]:
    """Mean, least and most of each column, over the seeds that have it."""
    columns = [[v for v in column if v is not None] for column in zip(*values)]
    return (
        [sum(c) / len(c) if c else None for c in columns],
        [min(c, default=None) for c in columns],
        [max(c, default=None) for c in columns],
    )


def line(name: str, values: Sequence[Sequence[float | None]]) -> Line:
    """A curve in the band from the lowest to the highest seed."""
    mean, low, high = over_seeds(values)
    return Line(name, mean, around=(low, high))


def kl_of(what: Mapping[str, Any], deepest: int) -> list[float | None]:
    """KL by turn, None where no episode has come so far."""
    known = [k if n else None for k, n in zip(what["kl"], what["tokens"])]
    return [*known, *[None] * (deepest - len(known))][:deepest]


def per_token(what: Mapping[str, Any]) -> float:
    """The mean KL over all tokens."""
    return sum(k * n for k, n in zip(what["kl"], what["tokens"])) / sum(what["tokens"])


def charts(found: Mapping[str, list[Curve]], start: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Success and KL over steps, KL by turn halfway and at the end."""
    steps = sorted(next(iter(found.values()))[0])
    deepest = max(
        len(what["kl"]) for curves in found.values() for c in curves for what in c.values()
    )
    turns = list(range(1, deepest + 1))
    teacher = [("teacher", 100 * start["teacher"]["success"])]
    success = [
        line(name, [[100 * c[s]["success"] for s in steps] for c in curves])
        for name, curves in found.items()
    ]
    apart = [
        line(name, [[per_token(c[s]) for s in steps] for c in curves])
        for name, curves in found.items()
    ]
    made = [
        line_chart("Won episodes, in %", steps, success, levels=teacher, smooth=False),
        line_chart("KL(student || teacher) per token, nats", steps, apart, smooth=False),
    ]
    for step in (steps[len(steps) // 2], steps[-1]):
        by_turn = [
            line(name, [kl_of(c[step], deepest) for c in curves]) for name, curves in found.items()
        ]
        before = Line("before", kl_of(start["student"], deepest))
        title = f"KL by turn after step {step}, nats"
        made.append(line_chart(title, turns, [*by_turn, before], smooth=False, along="turn"))
    return made


def at_end(curves: Sequence[Curve], samples: int) -> tuple[dict[str, float], Estimate]:
    """Each game's share of won episodes after the last step, over seeds; and their mean."""
    ends = [c[max(c)]["won"] for c in curves]
    games = {game: sum(e[game] for e in ends) / len(ends) for game in ends[0]}
    return games, estimate(list(games.values()), samples=samples * len(curves))


def span(found: Estimate) -> str:
    return f"{100 * found.interval.low:.0f} to {100 * found.interval.high:.0f} %"


def table(found: Mapping[str, list[Curve]], samples: int) -> list[list[str]]:
    """One row for each method, after the last step."""
    first, rows = None, []
    for name, curves in found.items():
        games, mean = at_end(curves, samples)
        first = first or games
        pairs = [[g[k] for k in games] for g in (first, games)]
        change = paired_difference(*pairs, samples=samples * len(curves))
        ends = [c[max(c)] for c in curves]
        deepest = max(len(e["kl"]) for e in ends)
        by_turn = over_seeds([kl_of(e, deepest) for e in ends])[0]
        rows.append(
            [
                name,
                f"{100 * mean.value:.1f} %",
                span(mean),
                ", ".join(f"{100 * e['success']:.0f}" for e in ends),
                f"{100 * change.value:+.1f} ({span(change)})" if games is not first else "",
                f"{sum(e['turns'] for e in ends) / len(ends):.1f}",
                f"{sum(map(per_token, ends)) / len(ends):.3f}",
                " ".join(f"{k:.2f}" for k in by_turn if k is not None),
            ]
        )
    return rows


def write_page(out: Path, methods: Sequence[str], samples: int) -> Path:
    """The page, and beside it its table as JSON."""
    found = {name: curves for name, curves in read(out, methods).items() if curves}
    start = json.loads((out / "start.json").read_text())
    student, teacher = (start[name]["success"] for name in ("student", "teacher"))
    rows = table(found, samples)
    lead = (
        f"The teacher wins {teacher:.0%} of its episodes, the student {student:.0%} before "
        f"distillation. {len(next(iter(found.values())))} seeds, {samples} episodes of each game: "
        "curves are means over seeds in the band from the lowest to the highest; intervals are "
        "over games. Episodes that measure are whole ones, nothing replayed."
    )
    text = (
        templates()
        .from_string(BODY)
        .render(
            title="TCOD beside OPD on TextWorld",
            lead=lead,
            charts=charts(found, start),
            head=HEAD,
            table=rows,
            geometry=GEOMETRY,
        )
    )
    write_whole(out / "page.html", text)
    write_json(out / "result.json", {"start": start, "table": [dict(zip(HEAD, r)) for r in rows]})
    return out / "page.html"
