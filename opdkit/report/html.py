"""Write report.html: gather the parts of a run folder and fill the template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdkit.base.files import write_whole
from opdkit.report import results as res
from opdkit.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from opdkit.report.curves import chart_sections, time_shares
from opdkit.report.numbers import duration, number
from opdkit.report.read import RunData, read_run
from opdkit.report.rollouts import sample_steps

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
        sections=chart_sections(run),
        shares=[(name, share, f"{100 * share:.0f}%") for name, share in time_shares(run)],
        samples=sample_steps(run),
        yaml=run.yaml,
        summary=[(str(k), _fact(v)) for k, v in run.summary.items()],
        geometry=GEOMETRY,
    )


def run_facts(run: RunData) -> list[tuple[str, str]]:
    """Who taught whom how, as far as the resolved run says so."""
    found = [
        (key, run.config.get(key)) for key in ("method", "student", "teacher", "data", "reward")
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
    figures = []

    def add(label: str, value: str, note: str = "", tone: str = "") -> None:
        figures.append({"label": label, "value": value, "note": note, "tone": tone})

    after, before = standings.get(res.STUDENT), standings.get(res.BEFORE)
    if after:
        label = f"Student, Avg@{after.samples_per_problem}"
        gain = res.change(before, after) if before else None
        tone = (
            ""
            if not gain
            else "good"
            if gain.interval.low > 0
            else "bad"
            if gain.interval.high < 0
            else ""
        )
        note = (
            res.points(gain)
            if gain
            else f"{number(before.avg_at_k.value, '%')} before"
            if before
            else ""
        )
        add(label, number(after.avg_at_k.value, "%"), note, tone)
    closed = res.gap_closed(standings)
    if closed is not None:
        add(
            "Teacher gap closed",
            f"{100 * closed:.0f}%",
            f"teacher {number(standings[res.TEACHER].avg_at_k.value, '%')}",
        )
    ends = [
        ("KL to the teacher", "teacher_kl/sampled", "nats per token", ""),
        *(
            []
            if after
            else [
                ("Training reward", "reward/mean", "", ""),
                ("Correct in training", "correct/mean", "", "%"),
            ]
        ),
    ]
    for label, key, unit, kind in ends:
        known = [v for v in run.metrics.get(key, []) if v is not None]
        if known:
            first, last = _ends(known)
            add(
                label, number(last, kind), f"{unit + ', ' if unit else ''}was {number(first, kind)}"
            )
    if run.steps:
        trained = _total(run, "tokens/trained")
        add("Steps", f"{len(run.steps):,}", f"{number(trained)} tokens trained" if trained else "")
    seconds = _total(run, "seconds/step")
    if seconds:
        speed = _median(run, "tokens_per_second/step")
        add("Time", duration(seconds), f"{number(speed)} tokens/s" if speed else "")
    peak = max((v for v in run.metrics.get("memory/peak_gib", []) if v is not None), default=None)
    if peak:
        add("Peak memory", f"{number(peak)} GiB")
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
