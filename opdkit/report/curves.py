"""Which metrics share a chart, in which section, and what a chart means; metrics nobody foresaw get
a chart of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opdkit.report.charts import Line, line_chart
from opdkit.report.read import RunData, Values


@dataclass(frozen=True)
class Plot:
    """A chart of the metrics in `keys`; `prefix/*` takes all that begin so."""

    section: str
    title: str
    keys: tuple[str, ...]
    unit: str = ""
    about: str = ""
    smooth: bool = True


PLOTS = (
    Plot(
        "Learning",
        "KL to the teacher",
        ("teacher_kl/*",),
        "nats per token",
        "Sampled estimate of KL(student ‖ teacher). At 0 the student writes exactly as the teacher "
        "would.",
    ),
    Plot("Learning", "Loss", ("loss",), "", "What is minimised: the sum of the objective's terms."),
    Plot(
        "Learning",
        "Entropy",
        ("entropy/*",),
        "nats per token",
        "How open the model's choices are. A collapse towards 0 means that it stops exploring.",
    ),
    Plot(
        "Learning",
        "Reward",
        ("reward/mean", "reward/std"),
        "",
        "Mean over the step's rollouts, and one standard deviation around it.",
    ),
    Plot(
        "Learning",
        "Correct answers",
        ("correct/*",),
        "%",
        "Share of the training rollouts with a right answer.",
    ),
    Plot("Learning", "Gradient norm", ("grad_norm",), "", "Before clipping."),
    Plot("Learning", "Learning rate", ("learning_rate",), smooth=False),
    Plot(
        "Tokens",
        "log(teacher / student)",
        ("log_ratio/*",),
        "nats",
        "At the sampled tokens: what OPD credits them with. A long negative tail are tokens that "
        "the teacher would hardly write.",
    ),
    Plot(
        "Tokens",
        "Trusted tokens",
        ("trust/*",),
        "%",
        "Mean of min(teacher / student, 1): how many of the student's tokens speculative sampling "
        "would accept from it.",
    ),
    Plot(
        "Tokens",
        "Sure or not, agreed or not",
        ("quadrants/*",),
        "%",
        "Tokens by student entropy (from 0.5 nats: unsure) and KL to the teacher (from 0.1 nats: "
        "apart). Sure and apart: confident mistakes.",
    ),
    Plot(
        "Tokens",
        "Mass on the top k",
        ("mass/*",),
        "%",
        "Probability that a model gives to its own top k or to the other's.",
    ),
    Plot(
        "Tokens",
        "Overlap of the top k",
        ("overlap/*",),
        "%",
        "Share of the student's top k that is in the teacher's.",
    ),
    Plot("Terms", "Loss per term", ("loss/*",)),
    Plot(
        "Terms",
        "Mean weight per term",
        ("weight/*",),
        "",
        "Mean over the tokens that the term selects.",
    ),
    Plot(
        "Terms",
        "Tokens per term",
        ("share/*",),
        "%",
        "Share of the trained tokens that the term selects.",
    ),
    Plot(
        "Terms",
        "Effective tokens per term",
        ("effective_tokens/*",),
        "tokens",
        "(sum of weights)² / sum of squares: as many equally weighted tokens would average as "
        "well.",
    ),
    Plot(
        "Terms",
        "Gradient per term",
        ("term_gradient/*",),
        "",
        "Norm of each term's gradient in the student's logits, over the step.",
    ),
    Plot(
        "Completions",
        "Length",
        ("completions/mean_length", "completions/min_length", "completions/max_length"),
        "tokens",
        "Mean, and the shortest and longest of the step.",
    ),
    Plot(
        "Completions",
        "Cut at the limit",
        ("completions/truncated_fraction",),
        "%",
        "Share of rollouts that reached max_completion_length. Runaway lengths show here first.",
    ),
    Plot("Completions", "Tokens trained", ("tokens/trained",), "tokens per step"),
    Plot(
        "Speed and memory",
        "Throughput",
        ("tokens_per_second/*",),
        "tokens/s",
        "Of each phase, and of the whole step.",
    ),
    Plot(
        "Speed and memory",
        "Utilisation",
        ("mfu/*",),
        "share",
        "Model FLOPs over the device's peak; of a CPU the peak is a rule of thumb.",
    ),
    Plot("Speed and memory", "Time", ("seconds/*",), "s", "Of each phase, and of the whole step."),
    Plot("Speed and memory", "Peak memory", ("memory/peak_gib",), "GiB", smooth=False),
)
OTHER = "More metrics"
WEIGHTS, DRIFT = (
    "weights/",
    "drift/tenth_",
)  # quantiles of a term's weights; mean size of the log-ratio in a tenth of the response
BANDS = (("median", "p50", ""), ("5 to 95%", "p05", "p95"), ("1 to 99%", "p01", "p99"))
# of a profile; each the mean over a fifth of the steps
PERIODS = {"start of the run": 0.0, "middle": 0.5, "end": 1.0}
WORDS = ("quadrants/", "mass/", "overlap/")  # metrics whose names read as words
# of a step; they have the same colour in every chart
PHASES = ("sample", "score", "learn", "reward")


def chart_sections(run: RunData) -> list[tuple[str, list[dict[str, Any]]]]:
    """(section, charts) for everything in metrics.jsonl, each metric exactly once; weights that
    never differ are left out.
    """
    if not run.steps:
        return []
    # in their order
    sections: dict[str, list[dict[str, Any]]] = {plot.section: [] for plot in PLOTS}
    left = dict(run.metrics)
    for plot in PLOTS:
        found = {
            name: left.pop(name)
            for name in list(left)
            if any(_matches(name, key) for key in plot.keys)
        }
        if found:
            chart = line_chart(
                plot.title,
                run.steps,
                _lines(found),
                unit=plot.unit,
                about=plot.about,
                smooth=plot.smooth,
            )
            sections[plot.section].append(chart | {"warning": _warning(run, list(found))})
    for term in dict.fromkeys(
        name.removeprefix(WEIGHTS).rpartition("/")[0] for name in left if name.startswith(WEIGHTS)
    ):
        found = {
            name: left.pop(name) for name in list(left) if name.startswith(f"{WEIGHTS}{term}/")
        }
        # weights all the same need no chart
        if len({v for line in found.values() for v in line if v is not None}) > 1:
            chart = line_chart(
                f"Weights of {term}",
                run.steps,
                _lines(found),
                about="Of the tokens that the term selects.",
            )
            sections["Terms"].append(chart | {"warning": _warning(run, list(found))})
    drift = {name: left.pop(name) for name in sorted(left) if name.startswith(DRIFT)}
    if drift:
        sections["Tokens"].append(_profile(drift) | {"warning": _warning(run, list(drift))})
    for name, values in sorted(left.items()):
        sections.setdefault(OTHER, []).append(
            line_chart(name, run.steps, [Line(name, values)]) | {"warning": _warning(run, [name])}
        )
    return [(name, charts) for name, charts in sections.items() if charts]


def _profile(drift: dict[str, Values]) -> dict[str, Any]:
    """The mean size of the log-ratio by position in the response, early, midway and late in the
    run.
    """
    several = len(next(iter(drift.values()))) >= len(PERIODS)
    periods = PERIODS if several else {"mean": 0.0}
    lines = [
        Line(period, [_mean_near(values, at) for values in drift.values()])
        for period, at in periods.items()
    ]
    steps = [int(name.removeprefix(DRIFT)) for name in drift]
    about = (
        "Mean |log(teacher / student)| in each tenth of the responses. Rising: the student drifts "
        "away in their course."
    )
    return line_chart(
        "Distance by position", steps, lines, unit="nats", about=about, smooth=False, along="tenth"
    )


def _mean_near(values: Values, at: float) -> float | None:
    """Mean over the fifth of the steps that lies at a share of the run."""
    width = max(1, len(values) // 5)
    start = round(at * (len(values) - width))
    known = [v for v in values[start : start + width] if v is not None]
    return sum(known) / len(known) if known else None


def _warning(run: RunData, names: list[str]) -> str:
    """What a gap in a curve means."""
    bad = {name: run.nonfinite[name] for name in names if name in run.nonfinite}
    return (
        "Not a finite number: "
        + ", ".join(f"{name} at {n} of {len(run.steps)} steps" for name, n in bad.items())
        if bad
        else ""
    )


def _matches(name: str, key: str) -> bool:
    return name.startswith(key[:-1]) if key.endswith("/*") else name == key


def _lines(found: dict[str, Values]) -> list[Line]:
    """Lines of a chart: mean with std, and mean with min and max, become a line in a band."""
    mean, std = found.get("reward/mean"), found.get("reward/std")
    if mean and std:
        low, high = _plus(mean, std, -1), _plus(mean, std, 1)
        return [Line("mean", mean), Line("± std", low, high)]
    ends = [found.get(f"completions/{end}_length") for end in ("min", "max")]
    if "completions/mean_length" in found and ends[0] and ends[1]:
        return [Line("mean", found["completions/mean_length"]), Line("range", ends[0], ends[1])]
    by_end = {name.rpartition("/")[2]: values for name, values in found.items()}
    if {end for _, *ends in BANDS for end in ends if end} <= set(by_end):
        return [Line(name, by_end[low], by_end.get(high, [])) for name, low, high in BANDS]
    lines = [Line(_short(name), values) for name, values in found.items()]
    return sorted(lines, key=lambda line: _order(line.name))


def _short(name: str) -> str:
    """What tells a metric from the others of its chart."""
    short = name.split("/", 1)[-1].removesuffix("_length")
    return short.replace("_", " ") if name.startswith(WORDS) else short


def _order(name: str) -> tuple[int, str]:
    """Phases first, the whole step last, others by name in between."""
    return (PHASES.index(name) if name in PHASES else len(PHASES) + (name == "step"), name)


def _plus(a: Values, b: Values, sign: int) -> Values:
    return [None if x is None or y is None else x + sign * y for x, y in zip(a, b)]


def time_shares(run: RunData) -> list[tuple[str, float]]:
    """(phase, share of the time of all steps); what no phase accounts for is "other"."""
    totals = {
        name.removeprefix("seconds/"): _total(values)
        for name, values in run.metrics.items()
        if name.startswith("seconds/")
    }
    whole = totals.pop("step", 0.0) or sum(totals.values())
    if not totals or not whole:
        return []
    shares = [(name, totals[name] / whole) for name in sorted(totals, key=_order)]
    other = 1 - sum(share for _, share in shares)
    return shares + ([("other", other)] if other > 0.005 else [])


def _total(values: Sequence[float | None]) -> float:
    return sum(v for v in values if v is not None)
