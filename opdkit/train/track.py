"""Where the numbers of a run go: metrics.jsonl always, other trackers by name."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opdkit.base.errors import UserError, nearest
from opdkit.base.files import read_lines, truncate_metrics, write_whole

Metrics = Mapping[str, float]


class Tracker(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run.

    `log` once per step with flat names such as `reward/mean`; usable as a context manager.
    """

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the numbers of one optimiser step. Scalars of torch and numpy are welcome."""
        plain = {name: _number(value) for name, value in metrics.items()}
        for tracker in self._trackers:
            tracker.log(step, plain)

    def close(self) -> None:
        while self._trackers:
            self._trackers.pop().close()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_trackers(
    folder: Path, names: Sequence[str] = (), config: Mapping[str, Any] | None = None
) -> Trackers:
    """metrics.jsonl in the run folder, and the trackers in `names`: tensorboard, trackio, wandb.

    `config` is shown by them.

    Continues an existing file: call `truncate_metrics` first when resuming from a checkpoint.
    """
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise UserError(
            f"There is no tracker named {unknown[0]!r}{nearest(unknown[0], list(BACKENDS))}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    trackers = [JsonLines(folder / "metrics.jsonl")]
    return Trackers(
        [*trackers, *(BACKENDS[name](folder, dict(config or {})) for name in dict.fromkeys(names))]
    )


def _number(value: Any) -> int | float:
    return value.item() if hasattr(value, "item") else value


# ------------------------------------------------------------------------------------ metrics.jsonl


class JsonLines:
    """One strict JSON object per line: {"step": 3, "loss": 0.25}; what is not finite is null and
    named under "nonfinite".
    """

    def __init__(self, path: Path):
        truncate_metrics(path)  # a line cut by a crash would swallow the next one
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, metrics: Metrics) -> None:
        bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        line: dict[str, Any] = {"step": step} | {
            name: None if name in bad else value for name, value in metrics.items()
        }
        if bad:
            line["nonfinite"] = bad
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


# ----------------------------------------------------------------------------------- other trackers


def _missing(name: str, install: str) -> UserError:
    return UserError(
        f"The tracker {name!r} needs a package that is not installed. Run `pip install {install}`, "
        "or leave it out."
    )


class TensorBoard:
    """Event files in the run folder's `tensorboard`."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "tensorboard") from error
        lines = read_lines(folder / "metrics.jsonl")
        # Resumed: the curves begin again after the last step that was kept.
        self.writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=lines[-1]["step"] + 1 if lines else None
        )
        self.writer.add_text(
            "config", "```json\n" + json.dumps(config, indent=2, default=str) + "\n```"
        )

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A local trackio dashboard; project from TRACKIO_PROJECT, else `opdkit`."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        try:
            import trackio
        except ImportError as error:
            raise _missing("trackio", "trackio") from error
        self.trackio = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "opdkit"),
            name=_run_name(folder, "trackio"),
            config=config,
            resume="allow",
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self.trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self.trackio.finish()


class Wandb:
    """Weights & Biases; project from WANDB_PROJECT, else `opdkit`.

    A resumed run continues its own curve.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "wandb") from error
        name = _run_name(folder, "wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "opdkit"),
            name=folder.resolve().name,
            id=name,
            resume="allow",
            dir=str(folder),
            config=config,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


def _run_name(folder: Path, tracker: str) -> str:
    """A name no other run has, kept in the run folder so that a resumed run finds its own
    curves.
    """
    path = folder / f"{tracker}_id.txt"
    if not path.exists():
        # wandb refuses "/", ":" and the like in an id
        stem = re.sub(r"[^\w.-]", "-", folder.resolve().name)[:80]
        write_whole(path, f"{stem}-{secrets.token_hex(3)}\n")
    return path.read_text(encoding="utf-8").strip()


BACKENDS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}
