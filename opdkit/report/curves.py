"""The charts of a run, by section; metrics nobody foresaw get a chart of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkit.report.charts import Line, line_chart
from opdkit.report.plots import PLOTS, PROFILES, Profile
from opdkit.report.read import RunData, Values

OTHER = "More metrics"
WEIGHTS = "weights/"  # quantiles of a term's weights
BANDS = (("median", "p50", ""), ("5 to 95%", "p05", "p95"), ("1 to 99%", "p01", "p99"))
# of a profile; each the mean over a fifth of the steps
PERIODS = {"start of the run": 0.0, "middle": 0.5, "end": 1.0}
WORDS = ("quadrants/", "mass/", "overlap/", "curriculum/")  # metrics whose names read as words
# of a step; they have the same colour in every chart
PHASES = ("sample", "score", "learn", "reward")

ASIDE = ("sample", "reward", "load")  # of these, what the sampler does while the trainer learns


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
    for profile in PROFILES:
        found = {name: left.pop(name) for name in list(left) if name.startswith(profile.prefix)}
        if found:
            warning = {"warning": _warning(run, list(found))}
            sections[profile.section].append(_profile(profile, found) | warning)
    for name, values in sorted(left.items()):
        sections.setdefault(OTHER, []).append(
            line_chart(name, run.steps, [Line(name, values)]) | {"warning": _warning(run, [name])}
        )
    return [(name, charts) for name, charts in sections.items() if charts]


def _profile(profile: Profile, found: dict[str, Values]) -> dict[str, Any]:
    at = {int(name.removeprefix(profile.prefix)): values for name, values in found.items()}
    places = sorted(at)
    several = len(at[places[0]]) >= len(PERIODS)
    periods = PERIODS if several else {"mean": 0.0}
    lines = [
        Line(period, [_mean_near(at[place], when) for place in places])
        for period, when in periods.items()
    ]
    return line_chart(
        profile.title,
        places,
        lines,
        unit=profile.unit,
        about=profile.about,
        smooth=False,
        along=profile.along,
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
    return name.startswith(key[:-1]) if key.endswith("*") else name == key


def _lines(found: dict[str, Values]) -> list[Line]:
    """Lines of a chart: mean with std, and mean with min and max, become a line in a band."""
    mean, std = found.get("reward/mean"), found.get("reward/std")
    if mean and std:
        low, high = _plus(mean, std, -1), _plus(mean, std, 1)
        return [Line("mean", mean), Line("± std", low, high)]
    for name in ("completions/{}_length", "turns/{}"):
        ends = [found[key] for end in ("mean", "min", "max") if (key := name.format(end)) in found]
        if len(ends) == 3:
            return [Line("mean", ends[0]), Line("range", ends[1], ends[2])]
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
    if "wait" in totals:  # rollouts come about beside the step
        totals = {name: value for name, value in totals.items() if name not in ASIDE}
    if not totals or not whole:
        return []
    shares = [(name, totals[name] / whole) for name in sorted(totals, key=_order)]
    other = 1 - sum(share for _, share in shares)
    return shares + ([("other", other)] if other > 0.005 else [])


def _total(values: Sequence[float | None]) -> float:
    return sum(v for v in values if v is not None)
