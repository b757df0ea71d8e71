"""A run folder as the report sees it: whatever is there so far, also while the run goes on."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkit.base.errors import UserError
from opdkit.base.files import read_lines, step_of
from opdkit.eval.evaluate import EvalResult

STEPS_SHOWN = 6  # sample files shown, spread evenly over the run
ROLLOUTS_SHOWN = 3  # of each

Values = list[float | None]  # one per step; None where the step did not log it or it was not finite


@dataclass(frozen=True)
class Span:
    """What a part of a run did from when to when, in seconds; `wait` is to stand still."""

    part: str
    phase: str
    start: float
    end: float


@dataclass(frozen=True)
class RunData:
    """What a run folder holds."""

    folder: Path
    config: dict[str, Any]
    yaml: str
    steps: list[int]
    metrics: dict[str, Values]  # by name, each as long as `steps`
    nonfinite: dict[str, int]  # by name, the number of steps at which it was infinite or no number
    evals: list[EvalResult]
    samples: list[tuple[int, list[dict[str, Any]]]]  # (step, rollouts)
    summary: dict[str, Any]
    timeline: list[tuple[int, list[Span]]]  # by step; empty where it was not kept


def read_run(folder: Path) -> RunData:
    """Read a run folder; parts that are not there yet are empty."""
    parts = ("run.yaml", "metrics.jsonl", "evals.jsonl", "samples", "summary.json")
    if not any((folder / part).exists() for part in parts):
        raise UserError(
            f"{folder} is not a run folder: it has none of {', '.join(parts)}. Give the folder "
            "that `opdkit train` wrote."
        )
    yaml_text = _text(folder / "run.yaml")
    steps, metrics, nonfinite = _metrics(folder / "metrics.jsonl")
    return RunData(
        folder=folder,
        config=_config(yaml_text, folder),
        yaml=yaml_text,
        steps=steps,
        metrics=metrics,
        nonfinite=nonfinite,
        evals=_evals(folder / "evals.jsonl"),
        samples=_samples(folder / "samples"),
        summary=_summary(folder / "summary.json"),
        timeline=_timeline(folder / "timeline.jsonl"),
    )


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Reads a file of a run, which may have been changed since."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not what was written ({type(error).__name__}: {str(error)[:200]}). Restore "
            "it, or remove it to get a report without it"
        ) from error


def _evals(path: Path) -> list[EvalResult]:
    with _as_written(path):
        return [EvalResult.from_dict(line) for line in read_lines(path)]


def _summary(path: Path) -> dict[str, Any]:
    with _as_written(path):
        return dict(json.loads(_text(path) or "{}").items())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _config(text: str, folder: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(
            f"{folder / 'run.yaml'} is not YAML: {error}. Restore it, or remove it to get a report "
            "without it."
        ) from error
    return config if isinstance(config, dict) else {}


def _metrics(path: Path) -> tuple[list[int], dict[str, Values], dict[str, int]]:
    """Columns from lines. The last line of a step counts."""
    rows = {step_of(line, path): line for line in read_lines(path)}
    steps = sorted(rows)
    names = dict.fromkeys(
        name for step in steps for name in rows[step] if name not in ("step", "nonfinite")
    )
    columns = {name: [_finite(rows[step].get(name)) for step in steps] for name in names}
    with _as_written(path):
        nonfinite = Counter(name for row in rows.values() for name in row.get("nonfinite", ()))
    return steps, columns, dict(nonfinite)


def _timeline(path: Path) -> list[tuple[int, list[Span]]]:
    """The spans of each step; the last line of a step counts."""
    rows = {step_of(line, path): line for line in read_lines(path)}
    with _as_written(path):
        return [
            (
                step,
                [
                    Span(str(part), str(phase), float(start), float(end))
                    for part, phase, start, end in rows[step]["spans"]
                    if math.isfinite(start) and start <= end < math.inf
                ],
            )
            for step in sorted(rows)
        ]


def _finite(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer of a thousand digits
        return None


def _samples(folder: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """A few rollouts of a few steps, first and last among them."""
    files = sorted(p for p in folder.glob("step_*.jsonl") if p.stem[5:].isdigit())
    chosen = [files[i] for i in evenly(len(files), STEPS_SHOWN)]
    read = [(int(path.stem[5:]), _rollouts(path)) for path in chosen]
    return [(step, rollouts) for step, rollouts in read if rollouts]


def _rollouts(path: Path) -> list[dict[str, Any]]:
    """The first rollouts of a file, as the report reads them."""
    rows = read_lines(path)[:ROLLOUTS_SHOWN]
    with _as_written(path):
        for row in rows:
            row["pieces"] = [str(piece) for piece in row.get("pieces") or ()]
            told = row.get("parts") or ()
            row["parts"] = [(int(turn), str(author), int(n)) for turn, author, n in told]
            for name in ("credit", "weight", "logp", "teacher_logp"):
                row[name] = [_finite(value) for value in row.get(name) or ()]
    return rows


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of 0..n-1, evenly spread, with both ends."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def need_folder(path: str | Path) -> Path:
    """A run folder that is there."""
    folder = Path(path)
    if not (folder / "metrics.jsonl").exists() and not (folder / "run.yaml").exists():
        raise UserError(f"{folder} is not a run folder: it has neither run.yaml nor metrics.jsonl")
    return folder
