"""Checkpoints: complete or not there.

Hugging Face weights, optimiser and counters, with a manifest of digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from opdkit.base import exact
from opdkit.base.errors import UserError
from opdkit.base.files import remove_folder, tidy, write_folder, write_json, write_whole
from opdkit.models.adapters import has_adapters
from opdkit.models.sharding import is_spread
from opdkit.objective.companion import Companions
from opdkit.objective.parts import whole
from opdkit.train.restored import load_optimiser, read_queue, read_state, read_tensors
from opdkit.train.student import Student

MANIFEST, STATE, OPTIMISER = "manifest.json", "trainer_state.json", "optimizer.pt"
COMPANIONS = "companions.pt"
QUEUE = "queue.json"
RECORD = "run.json"  # what the run was that wrote it: see `run.resume`


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
    rank: int = 0,
) -> Path:
    """Write `checkpoint-N`. Where a model is spread over several processes, all of them put it
    together, and the one of rank 0 writes.
    """
    weights = whole_weights(student.model) if is_spread(student.model) else None
    optimiser = whole_optimiser(student)
    beside = companions.state_dict() if companions else {}

    def write(partial: Path) -> None:
        write_model(partial, student.model, tokenizer, weights)
        state.updates = student.updates
        values = asdict(state)
        write_whole(partial / RECORD, exact.dumps(values.pop("record"), indent=1) + "\n")
        if queue := values.pop("queue"):
            write_whole(partial / QUEUE, exact.dumps(queue) + "\n")
        write_whole(partial / STATE, exact.dumps(values, indent=1) + "\n")
        torch.save(optimiser, partial / OPTIMISER)
        if beside:
            torch.save(beside, partial / COMPANIONS)
        _finish(partial)

    final = folder / f"checkpoint-{state.step}"
    if rank == 0:
        put(final, write)
    return final


def whole_weights(model: Any) -> dict[str, Any]:
    """The weights of a model that is spread over processes, put together on all of them."""
    # not `state_dict`, for which a model takes its parts up again where it is whole meanwhile
    named = dict(model.named_parameters())  # tied ones once
    for path, module in model.named_modules():
        kept = set(module._buffers) - module._non_persistent_buffers_set
        named |= {f"{path}.{name}".lstrip("."): module._buffers[name] for name in sorted(kept)}
    if has_adapters(model):  # what learns is all that is saved
        named = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    return {name: whole(x.detach()).cpu() for name, x in named.items() if x is not None}


def whole_optimiser(student: Student) -> dict[str, Any]:
    """The state of the optimiser, as one process has it."""
    held = student.optimiser.state_dict()
    if not is_spread(student.model):
        return held
    state = {
        number: {name: whole(value) for name, value in moments.items()}
        for number, moments in held["state"].items()
    }
    return {**held, "state": state}


def put(final: Path, write: Callable[[Path], None]) -> None:
    """Write a folder of a run, whole or not at all: see `write_folder`."""
    try:
        write_folder(final, write)
    # a full disk is an OSError, a SafetensorError or a RuntimeError, as the writer likes
    except Exception as error:
        raise UserError(
            f"{final} could not be written ({type(error).__name__}: {error}). Earlier checkpoints "
            "are untouched; free some space or choose another output folder, then continue with "
            "--resume"
        ) from error


def write_model(
    folder: Path, model: Any, tokenizer: Any, weights: Mapping[str, Any] | None = None
) -> None:
    """Weights as safetensors (adapters alone, with LoRA), configuration and tokenizer: loads with
    plain from_pretrained. `weights`: those of a model that is not whole here.
    """
    given = {} if weights is None else {"state_dict": weights}
    model.save_pretrained(folder, safe_serialization=True, **given)
    tokenizer.save_pretrained(folder)


def _finish(folder: Path) -> None:
    """The manifest, last: what every file must be."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    digests = {}
    for path in files:
        with path.open("rb") as handle:
            digests[str(path.relative_to(folder))] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(handle, "sha256").hexdigest(),
            }
    write_json(folder / MANIFEST, digests)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. What an interrupted save left behind has another name."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def verify(checkpoint: Path) -> None:
    """Every file as it was written, or an error that names the one that is not."""

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
    for name, (size, digest) in entries.items():
        path = checkpoint / name
        if not path.is_file():
            raise damaged(f"{name} is missing")
        if path.stat().st_size != size:
            raise damaged(f"{name} has {path.stat().st_size} bytes instead of {size}")
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                raise damaged(f"{name} is not what was written (its digest differs)")


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, verified; None where there is none."""
    tidy(folder)
    found = checkpoints(folder)
    if not found:
        return None
    verify(found[-1])
    return found[-1]


def recorded(checkpoint: Path) -> dict[str, Any]:
    """What run wrote it; empty for one written before that was recorded."""
    path = checkpoint / RECORD
    return exact.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def restore(checkpoint: Path, student: Student, companions: Companions | None = None) -> State:
    """Optimiser, counters and what stands beside the student; the weights were loaded with the
    model.

    The optimiser's settings stay the run's: they are the stored ones, unless a change was meant.
    """
    groups = student.optimiser.param_groups
    chosen = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in groups]
    load_optimiser(checkpoint / OPTIMISER, student.optimiser)
    for group, settings in zip(student.optimiser.param_groups, chosen, strict=True):
        group.update(settings)
    state: State = read_state(checkpoint / STATE, State)
    state.record = recorded(checkpoint)
    state.queue = read_queue(checkpoint / QUEUE)
    student.updates = state.updates
    path = checkpoint / COMPANIONS
    try:
        (companions or Companions()).load_state_dict(read_tensors(path) if path.exists() else {})
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
