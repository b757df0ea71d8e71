"""Checkpoints: complete or not there.

Weights, optimiser and counters, with a manifest of digests. One process writes Hugging Face
weights; several write each its parts (`shards`), when and how `saver` says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from opdkit.base import exact
from opdkit.base.errors import UserError
from opdkit.base.files import remove_folder, tidy, write_folder, write_json, write_whole
from opdkit.models.adapters import has_adapters
from opdkit.objective.companion import Companions
from opdkit.train.mesh import ALONE, Mesh
from opdkit.train.restored import load_optimiser, read_queue, read_state, read_tensors
from opdkit.train.shards import SHARDS, is_sharded, load_student, together
from opdkit.train.student import Student

MANIFEST, STATE, OPTIMISER = "manifest.json", "trainer_state.json", "optimizer.pt"
COMPANIONS = "companions.pt"
QUEUE = "queue.json"
RECORD = "run.json"  # what the run was that wrote it: see `run.resume`
# what is not of the model: all else goes with it
TRAINERS = (MANIFEST, STATE, QUEUE, OPTIMISER, COMPANIONS, RECORD, SHARDS)


@dataclass
class State:
    """Where a run stands, besides weights and optimiser."""

    step: int = 0  # steps done
    updates: int = 0  # optimiser steps done
    stream: dict[str, Any] = field(default_factory=dict)  # position in the data
    memory: dict[str, Any] = field(default_factory=dict)  # what the curriculum remembers
    best: float | None = None  # best evaluation so far
    best_step: int | None = None
    evaluated: int = -1  # step of the last evaluation, -1 before the first
    tokens: int = 0  # that the student has written so far
    # what run this is, in a file of its own
    record: dict[str, Any] = field(default_factory=dict)
    # rollouts asked for ahead and not yet learnt from (see `collect.ahead`), in a file of their own
    queue: list[dict[str, Any]] = field(default_factory=list)


def save(
    folder: Path,
    state: State,
    student: Student,
    tokenizer: Any,
    companions: Companions | None = None,
) -> Path:
    """Write `checkpoint-N` of a model that is whole in this process."""
    beside = companions.state_dict() if companions else {}

    def write(partial: Path) -> None:
        write_model(partial, student.model, tokenizer)
        write_state(partial, state, student, beside)
        torch.save(student.optimiser.state_dict(), partial / OPTIMISER)
        _finish(partial)

    final = place_of(folder, state)
    put(final, write)
    return final


def place_of(folder: Path, state: State) -> Path:
    """The folder of a checkpoint."""
    return folder / f"checkpoint-{state.step}"


def write_state(folder: Path, state: State, student: Student, beside: Mapping[str, Any]) -> None:
    """All but weights and optimiser: counters, what run it is, what stands beside the student."""
    state.updates = student.updates
    values = asdict(state)
    write_whole(folder / RECORD, exact.dumps(values.pop("record"), indent=1) + "\n")
    if queue := values.pop("queue"):
        write_whole(folder / QUEUE, exact.dumps(queue) + "\n")
    write_whole(folder / STATE, exact.dumps(values, indent=1) + "\n")
    if beside:
        torch.save(dict(beside), folder / COMPANIONS)


def put(final: Path, write: Callable[[Path], None]) -> None:
    """Write a folder of a run, whole or not at all: see `write_folder`."""
    try:
        write_folder(final, write)
    # a full disk is an OSError, a SafetensorError or a RuntimeError, as the writer likes
    except Exception as error:
        raise unwritten(final, f"{type(error).__name__}: {error}") from error


def unwritten(final: Path, why: str) -> UserError:
    """The error for a folder that could not be written."""
    return UserError(
        f"{final} could not be written ({why}). Earlier checkpoints are untouched; free some space "
        "or choose another output folder, then continue with --resume"
    )


def write_model(
    folder: Path, model: Any, tokenizer: Any, weights: Mapping[str, Any] | None = None
) -> None:
    """Weights as safetensors (adapters alone, with LoRA), configuration and tokenizer: loads with
    plain from_pretrained. `weights`: those of a model that is not whole here.
    """
    given = {} if weights is None else {"state_dict": weights}
    model.save_pretrained(folder, safe_serialization=True, **given)
    tokenizer.save_pretrained(folder)


def write_description(folder: Path, model: Any, tokenizer: Any) -> None:
    """All that `write_model` writes but the weights."""
    base = model.get_base_model() if has_adapters(model) else model
    base.config.save_pretrained(folder)
    if getattr(base, "generation_config", None) is not None and base.can_generate():
        base.generation_config.save_pretrained(folder)
    if has_adapters(model):
        for name, config in model.peft_config.items():
            told = copy(config)
            told.inference_mode = True
            told.base_model_name_or_path = config.base_model_name_or_path or base.name_or_path
            told.save_pretrained(folder if name == "default" else folder / name)
    tokenizer.save_pretrained(folder)


def _finish(folder: Path) -> None:
    """The manifest, last: what every file must be."""
    files = (p for p in folder.rglob("*") if p.is_file())
    write_manifest(folder, digests(folder, files))


def digests(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What files in a folder are, by their names in it."""
    found = {}
    for path in sorted(files):
        with path.open("rb") as handle:
            found[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(handle, "sha256").hexdigest(),
            }
    return found


def write_manifest(folder: Path, found: Mapping[str, Any]) -> None:
    """What every file of a folder must be, in a file of it."""
    write_json(folder / MANIFEST, dict(sorted(found.items())))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. What an interrupted save left behind has another name."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def verify(checkpoint: Path, mesh: Mesh = ALONE) -> None:
    """Every file as it was written, or an error that names the one that is not. Several processes
    share the work, and all of them have the error.
    """

    def damaged(what: str) -> UserError:
        return UserError(
            f"checkpoint {checkpoint} is damaged: {what}. Delete that folder to continue from the "
            "checkpoint before it (or start again with --overwrite)"
        )

    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        entries = {n: (int(e["bytes"]), str(e["sha256"])) for n, e in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(f"its manifest cannot be read ({type(error).__name__}: {error})") from error
    checked = mesh.divided(
        list(entries.items()), lambda some: [_damage(checkpoint / n, n, *e) for n, e in some]
    )
    if wrong := next(filter(None, checked), None):
        raise damaged(wrong)


def _damage(path: Path, name: str, size: int, digest: str) -> str | None:
    """What is wrong with a file, if anything."""
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                return f"{name} is not what was written (its digest differs)"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def newest(folder: Path, mesh: Mesh = ALONE) -> Path | None:
    """The newest complete checkpoint, verified; None where there is none. Several processes ask for
    it at once, and the first says which it is.
    """

    def last() -> Path | None:
        tidy(folder)
        found = checkpoints(folder)
        return found[-1] if found else None

    checkpoint: Path | None = mesh.first(last)
    if checkpoint is not None:
        verify(checkpoint, mesh)
    return checkpoint


def recorded(checkpoint: Path) -> dict[str, Any]:
    """What run wrote it; empty for one written before that was recorded."""
    path = checkpoint / RECORD
    return exact.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def restore(checkpoint: Path, student: Student, companions: Companions | None = None) -> State:
    """Optimiser, counters and what stands beside the student, and of a checkpoint of several
    processes the weights too; those of another were loaded with the model.

    The optimiser's settings stay the run's: they are the stored ones, unless a change was meant.
    """
    if is_sharded(checkpoint):
        load_student(checkpoint, student)
    else:
        load_optimiser(checkpoint / OPTIMISER, student.optimiser)
    state: State = read_state(checkpoint / STATE, State)
    state.record = recorded(checkpoint)
    state.queue = read_queue(checkpoint / QUEUE)
    student.updates = state.updates
    path, mine = checkpoint / COMPANIONS, companions or Companions()
    saved = read_tensors(path) if path.exists() else {}
    if is_sharded(checkpoint):
        saved = together(checkpoint, saved, mine.state_dict())
    try:
        mine.load_state_dict(saved)
    except UserError as error:
        raise UserError(
            f"{checkpoint} cannot be continued: {error}. It is of a run with another method, or "
            "with other arguments: resume with those, or start again with --overwrite"
        ) from error
    return state


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best."""
    found = checkpoints(folder)
    for path in found[: max(len(found) - keep, 0)]:
        if path.name != f"checkpoint-{best_step}":
            remove_folder(path)
