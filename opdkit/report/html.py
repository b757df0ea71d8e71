"""Write report.html: gather the parts of a run folder and fill the template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdkit.base.files import write_whole
from opdkit.report import results as res
from opdkit.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from opdkit.report.curves import chart_sections, time_shares
from opdkit.report.numbers import duration, number
from opdkit.report.plots import WAITED
from opdkit.report.read import RunData, read_run
from opdkit.report.rollouts import sample_steps
from opdkit.report.timeline import timeline

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent
GEOMETRY = {
    "width": WIDTH,
    "height": HEIGHT,
    "left": LEFT,
    "right": WIDTH - RIGHT,
    "top": TOP,
    "bottom": HEIGHT - BOTTOM,
}


def write_report(run_folder: Path) -> Path:
    """Make report.html in a run folder from what is there so far; returns its path.

    The file is complete in itself: it asks no server for anything.
    """
    run = read_run(Path(run_folder))
    path = run.folder / "report.html"
    write_whole(path, render(run))
    return path


def templates() -> jinja2.Environment:
    """The report's templates; what they print is escaped."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(run: RunData) -> str:
    """The page as text."""
    environment = templates()
    standings = res.standings(run.evals)
    sections, waited = dict(chart_sections(run)), timeline(run)
    return environment.get_template("report.html.j2").render(
        title=str(run.summary.get("title") or run.folder.resolve().name),
        finished=bool(run.summary),
        last_step=run.steps[-1] if run.steps else None,
        total_steps=run.config.get("steps"),
        facts=run_facts(run),
        figures=key_figures(run, standings),
        plots=res.interval_plots(standings),
        table=res.result_table(standings) if standings else None,
        eval_curve=res.eval_curve(run.evals, standings),
        timeline=waited,
        lags=sections.pop(WAITED, []) if waited else [],
        sections=list(sections.items()),
        shares=[(name, share, f"{100 * share:.0f}%") for name, share in time_shares(run)],
        samples=sample_steps(run),
        yaml=run.yaml,
        summary=[(str(k), _fact(v)) for k, v in run.summary.items()],
        geometry=GEOMETRY,
    )


def run_facts(run: RunData) -> list[tuple[str, str]]:
    """Who taught whom how, as far as the resolved run says so."""
    found = [
        (key, run.config.get(key))
        for key in ("method", "curriculum", "student", "teacher", "data", "reward")
    ]
    return [(key.capitalize(), _fact(value)) for key, value in found if value]


def _fact(value: Any) -> str:
    """A setting in a few words: `iw_opd(gamma=0.5)`, the source of data, models by route."""
    if isinstance(value, dict):
        head = str(value.get("name") or value.get("source") or "")
        named = value.get("arguments") or {} if head else value
        rest = ", ".join(f"{k}={_fact(v)}" for k, v in named.items())
        times = [_fact(v) for v in value.get("times") or []]
        return " * ".join([f"{head}({rest})" if head and rest else head or rest, *times])
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    return number(value) if isinstance(value, float) else str(value)


def key_figures(run: RunData, standings: dict[str, Any]) -> list[dict[str, str]]:
    """The numbers at the top: a value, what it is, and what it was or what to hold it against."""
    figures = [*_results(standings), *_learnt(run, res.STUDENT in standings)]
    if run.steps:
        trained = _total(run, "tokens/trained")
        note = f"{number(trained)} tokens trained" if trained else ""
        figures.append(_figure("Steps", f"{len(run.steps):,}", note))
    seconds = _total(run, "seconds/step")
    if seconds:
        speed = _median(run, "tokens_per_second/step")
        note = f"{number(speed)} tokens/s" if speed else ""
        figures.append(_figure("Time", duration(seconds), note))
    peak = max((v for v in run.metrics.get("memory/peak_gib", []) if v is not None), default=None)
    if peak:
        figures.append(_figure("Peak memory", f"{number(peak)} GiB"))
    return figures


def _figure(label: str, value: str, note: str = "", tone: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "tone": tone}


def _results(standings: dict[str, Any]) -> list[dict[str, str]]:
    """How good the student became, and how near to the teacher."""
    figures = []
    after, before = standings.get(res.STUDENT), standings.get(res.BEFORE)
    if after:
        gain = res.change(before, after) if before else None
        tone = note = ""
        if gain:
            note = res.points(gain)
            tone = "good" if gain.interval.low > 0 else "bad" if gain.interval.high < 0 else ""
        elif before:
            note = f"{number(before.avg_at_k.value, '%')} before"
        label = f"Student, Avg@{after.samples_per_problem}"
        figures.append(_figure(label, number(after.avg_at_k.value, "%"), note, tone))
    closed = res.gap_closed(standings)
    if closed is not None:
        note = f"teacher {number(standings[res.TEACHER].avg_at_k.value, '%')}"
        figures.append(_figure("Teacher gap closed", f"{100 * closed:.0f}%", note))
    return figures


def _learnt(run: RunData, evaluated: bool) -> list[dict[str, str]]:
    """What training itself says: its rewards where no evaluation says more."""
    ends = [("KL to the teacher", "teacher_kl/sampled", "nats per token", "")]
    if not evaluated:
        ends += [
            ("Training reward", "reward/mean", "", ""),
            ("Correct in training", "correct/mean", "", "%"),
        ]
    figures = []
    for label, key, unit, kind in ends:
        known = [v for v in run.metrics.get(key, []) if v is not None]
        if known:
            first, last = _ends(known)
            note = f"{unit + ', ' if unit else ''}was {number(first, kind)}"
            figures.append(_figure(label, number(last, kind), note))
    return figures


def _ends(values: list[float]) -> tuple[float, float]:
    """Means of the first and last twentieth of a curve: single steps are noise."""
    n = max(1, len(values) // 20)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def _total(run: RunData, name: str) -> float:
    return sum(v for v in run.metrics.get(name, []) if v is not None)


def _median(run: RunData, name: str) -> float | None:
    known = sorted(v for v in run.metrics.get(name, []) if v is not None)
    return known[len(known) // 2] if known else None
