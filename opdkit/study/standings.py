"""What the runs of a comparison say, method by method: standings with paired differences, curves
over seeds, and one Parquet file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.base.config import read_yaml
from opdkit.base.errors import UserError
from opdkit.base.files import whole
from opdkit.eval.evaluate import EvalResult
from opdkit.eval.stats import Estimate, estimate, paired_difference
from opdkit.report.charts import smoothed
from opdkit.report.read import RunData, Values, read_run
from opdkit.report.results import STUDENT, TEACHER

PLAN = "comparison.yaml"
TOKENS, KL, REWARD = "tokens/sampled_so_far", "teacher_kl/sampled", "reward/mean"


@dataclass(frozen=True)
class Entrant:
    """A method with its finished runs."""

    label: str
    formula: str
    summary: str
    runs: dict[int, RunData]  # by seed
    failed: dict[int, str]  # by seed, what went wrong


@dataclass(frozen=True)
class Entries:
    """A comparison as its folder holds it."""

    folder: Path
    plan: dict[str, Any]
    entrants: list[Entrant]

    @property
    def seeds(self) -> list[int]:
        return self.plan["seeds"]


def finished(run: Path) -> bool:
    """Whether a run has ended: what it says of itself is written last, after its model."""
    return (run / "model").exists() and (run / "summary.json").exists()


def read_comparison(folder: Path) -> Entries:
    """Every finished run of the methods and seeds last asked for."""
    if not (folder / PLAN).exists():
        raise UserError(
            f"{folder} holds no comparison: it has no {PLAN}. Give the folder that `opdkit "
            "compare` wrote"
        )
    plan = read_yaml(folder / PLAN)
    entrants = []
    for method in plan["methods"]:
        places = {
            seed: folder / "runs" / method["folder"] / f"seed-{seed}" for seed in plan["seeds"]
        }
        runs = {seed: read_run(place) for seed, place in places.items() if finished(place)}
        failed = {
            seed: text
            for seed, text in method["failed"].items()
            if seed in places and seed not in runs
        }
        entrants.append(
            Entrant(method["label"], method["formula"], method["summary"], runs, failed)
        )
    return Entries(folder, plan, entrants)


# ---------------------------------------------------------------------------------------- standings


@dataclass(frozen=True)
class Standing:
    """How a method did.

    Means over its finished seeds; `kl` and `reward` over the last tenth of the steps.
    """

    label: str
    seeds: tuple[int, ...]
    accuracy: Estimate  # Avg@k after the last step; the interval is over problems
    # in accuracy to the first method, paired by problem and seed; None for the first itself
    difference: Estimate | None
    by_seed: dict[int, float]  # that difference, seed by seed
    kl: float | None  # nats per token
    reward: float | None
    length: float | None  # tokens of a response
    tokens: float  # that the student wrote
    steps: float
    seconds: float  # of steps and evaluations


def standings(entrants: Sequence[Entrant]) -> list[Standing]:
    """One per method that has a finished run, in the order given; differences are to the first of
    `entrants`.
    """
    return [_standing(entrant, entrants[0]) for entrant in entrants if entrant.runs]


def _standing(entrant: Entrant, first: Entrant) -> Standing:
    runs = list(entrant.runs.values())
    seeds = [] if entrant is first else [seed for seed in entrant.runs if seed in first.runs]
    pairs = {seed: _paired(first.runs[seed], entrant.runs[seed]) for seed in seeds}
    answers = final(runs[0]).samples_per_problem
    return Standing(
        label=entrant.label,
        seeds=tuple(entrant.runs),
        accuracy=estimate(
            list(_by_problem([final(run).per_problem for run in runs]).values()),
            samples=len(runs) * answers,
        ),
        difference=_difference(pairs, len(pairs) * answers) if pairs else None,
        by_seed={
            seed: sum(b - a for a, b in pair.values()) / len(pair) for seed, pair in pairs.items()
        },
        kl=_late(runs, KL),
        reward=_late(runs, REWARD),
        length=_late(runs, "completions/mean_length"),
        tokens=_mean([tokens_at(run, run.steps[-1]) for run in runs]),
        steps=_mean([run.steps[-1] for run in runs]),
        seconds=_mean([_seconds(run) for run in runs]),
    )


def final(run: RunData) -> EvalResult:
    """The evaluation after the last step."""
    return max((e for e in run.evals if e.name == STUDENT), key=lambda e: e.step)


def _paired(a: RunData, b: RunData) -> dict[str, tuple[float, float]]:
    """Problem id -> share correct of the one and of the other."""
    one, other = final(a).per_problem, final(b).per_problem
    if set(one) != set(other):
        raise UserError(
            f"{a.folder} and {b.folder} were evaluated on different problems, so they cannot be "
            "compared: was the evaluation set changed between them? Start a new comparison in "
            "another folder"
        )
    return {problem: (one[problem], other[problem]) for problem in sorted(one)}


def _difference(pairs: Mapping[int, Mapping[str, tuple[float, float]]], samples: int) -> Estimate:
    """Paired by problem and seed; `samples` answers to each problem, over all seeds.

    A problem's seeds are averaged first: they are not independent, problems are the unit of chance.
    """
    one = _by_problem([{problem: a for problem, (a, _) in pair.items()} for pair in pairs.values()])
    other = _by_problem(
        [{problem: b for problem, (_, b) in pair.items()} for pair in pairs.values()]
    )
    return paired_difference(list(one.values()), list(other.values()), samples=samples)


def _by_problem(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over seeds of each problem's score, problems in one order."""
    found: dict[str, list[float]] = {}
    for one in scores:
        for problem, score in one.items():
            found.setdefault(problem, []).append(score)
    return {problem: _mean(found[problem]) for problem in sorted(found)}


def _late(runs: Sequence[RunData], name: str) -> float | None:
    """Mean over seeds of a metric's mean over the last tenth of the steps that logged it."""
    known = [[v for v in run.metrics.get(name, []) if v is not None] for run in runs]
    ends = [_mean(values[-max(1, len(values) // 10) :]) for values in known if values]
    return _mean(ends) if ends else None


def _seconds(run: RunData) -> float:
    return sum(v or 0.0 for v in run.metrics.get("seconds/step", [])) + sum(
        e.seconds for e in run.evals if e.name == STUDENT
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tokens_at(run: RunData, step: int) -> int:
    """Tokens that the student had written after a step."""
    return 0 if step == 0 else int(run.metrics[TOKENS][run.steps.index(step)] or 0)


# ------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """A number against the tokens written: the mean over seeds, and its range."""

    tokens: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    def at(self, grid: Sequence[float]) -> tuple[Values, Values, Values]:
        """Mean, low and high on other token counts, linear in between; None outside."""
        import numpy as np

        inside = [bool(self.tokens) and self.tokens[0] <= x <= self.tokens[-1] for x in grid]
        ends = [
            np.interp(grid, self.tokens, values) if self.tokens else [0.0] * len(grid)
            for values in (self.mean, self.low, self.high)
        ]
        mean, low, high = (
            [float(v) if i else None for v, i in zip(values, inside)] for values in ends
        )
        return mean, low, high


def metric_curve(entrant: Entrant, name: str) -> Curve:
    """A metric, smoothed as in a run's report, over the steps that every seed took."""
    series = []
    for run in entrant.runs.values():
        known = [(s, v) for s, v in zip(run.steps, run.metrics.get(name, [])) if v is not None]
        series.append(dict(zip([s for s, _ in known], smoothed([v for _, v in known]))))
    return _over_seeds(entrant, series)


def accuracy_curve(entrant: Entrant) -> Curve:
    """Avg@k on the evaluation problems.

    The evaluations after the last step belong together, whatever its number.
    """
    series, last = [], []
    for run in entrant.runs.values():
        end = final(run)
        series.append(
            {e.step: e.avg_at_k.value for e in run.evals if e.name == STUDENT and e.step < end.step}
        )
        last.append((tokens_at(run, end.step), end.avg_at_k.value))
    body = _over_seeds(entrant, series)
    if not last:
        return body
    scores = [score for _, score in last]
    ends = (_mean([tokens for tokens, _ in last]), _mean(scores), min(scores), max(scores))
    return Curve(
        *(
            [*values, end]
            for values, end in zip((body.tokens, body.mean, body.low, body.high), ends)
        )
    )


def _over_seeds(entrant: Entrant, series: Sequence[Mapping[int, float]]) -> Curve:
    """One value per step that all seeds have; its place is the mean of their token counts."""
    curve = Curve([], [], [], [])
    steps = sorted(set.intersection(*(set(one) for one in series))) if series else []
    for step in steps:
        values = [one[step] for one in series]
        curve.tokens.append(_mean([tokens_at(run, step) for run in entrant.runs.values()]))
        for column, value in (
            (curve.mean, _mean(values)),
            (curve.low, min(values)),
            (curve.high, max(values)),
        ):
            column.append(value)
    return curve


def teacher_accuracy(entrants: Sequence[Entrant]) -> dict[str, float]:
    """Avg@k of each teacher, by name."""
    evals = [e for entrant in entrants for run in entrant.runs.values() for e in run.evals]
    return {
        e.name: e.avg_at_k.value
        for e in evals
        if e.name == TEACHER or e.name.startswith(f"{TEACHER} ")
    }


# ------------------------------------------------------------------------------------------ Parquet


def rows(entries: Entries) -> Iterator[dict[str, Any]]:
    """A row per method, seed and step, then its evaluations; names as in metrics.jsonl, evaluations
    under eval/.
    """
    for entrant in entries.entrants:
        for seed, run in entrant.runs.items():
            key = {"method": entrant.label, "seed": seed}
            for i, step in enumerate(run.steps):
                found = {name: values[i] for name, values in run.metrics.items()}
                yield {**key, "kind": "step", "step": step, "tokens": tokens_at(run, step), **found}
            for result in run.evals:
                found = {f"eval/{name}": value for name, value in _flat(result).items()}
                yield {
                    **key,
                    "kind": "evaluation",
                    "step": result.step,
                    "tokens": tokens_at(run, result.step),
                    **found,
                }


def _flat(result: EvalResult) -> dict[str, Any]:
    estimates = {"avg": result.avg_at_k} | {
        f"pass@{k}": value for k, value in result.pass_at_k.items()
    }
    numbers = {
        name: getattr(result, name)
        for name in ("mean_length", "truncated_share", "reward_mean", "seconds", "tokens")
    }
    for name, value in estimates.items():
        numbers |= {
            name: value.value,
            f"{name}_low": value.interval.low,
            f"{name}_high": value.interval.high,
        }
    return {
        "model": result.name,
        "samples": result.samples_per_problem,
        **numbers,
        "per_problem": list(result.per_problem.items()),
    }


def write_parquet(entries: Entries) -> Path:
    """comparison.parquet: everything that the page draws, and every problem's score."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = list(rows(entries))
    types = {
        "method": pa.string(),
        "seed": pa.int64(),
        "kind": pa.string(),
        "step": pa.int64(),
        "tokens": pa.int64(),
    }
    types |= {"eval/model": pa.string(), "eval/per_problem": pa.map_(pa.string(), pa.float64())}
    names = [
        *list(types)[:5],
        *sorted({name for row in found for name in row} - set(list(types)[:5])),
    ]
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in names])
    path = entries.folder / "comparison.parquet"
    with whole(path) as file:
        pq.write_table(pa.Table.from_pylist(found, schema=schema), file)
    return path
