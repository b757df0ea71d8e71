"""Checkpoints: complete or not there. Hugging Face weights, optimiser, counters and random state, with a manifest of digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from opdkit.errors import UserError
from opdkit.train.student import Student

MANIFEST, STATE, OPTIMISER = "manifest.json", "trainer_state.json", "optimizer.pt"


@dataclass
class State:
    """Where a run stands, besides weights and optimiser."""

    step: int = 0  # steps done
    updates: int = 0  # optimiser steps done
    stream: dict[str, Any] = field(default_factory=dict)  # position in the data
    memory: dict[str, Any] = field(default_factory=dict)  # what the curriculum remembers
    best: float | None = None  # best evaluation so far
    best_step: int | None = None
    tokens: int = 0  # tokens sampled so far


def save(folder: Path, state: State, student: Student, tokenizer: Any) -> Path:
    """Write `checkpoint-N` beside its final place, then rename: a reader never sees half of one."""
    final = folder / f"checkpoint-{state.step}"
    partial = folder / f".partial-{state.step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_model(partial, student.model, tokenizer)
        state.updates = student.updates
        (partial / STATE).write_text(json.dumps(asdict(state), indent=1))
        torch.save({"optimiser": student.optimiser.state_dict(), "rng": torch.get_rng_state()}, partial / OPTIMISER)
        _finish(partial)
        if final.exists():  # the same step again, after an interruption between saving and the next step
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be written: {error}. Earlier checkpoints are untouched; free some space or choose another "
            "output folder, then continue with --resume"
        ) from error
    return final


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Weights as safetensors (adapters alone, with LoRA), configuration and tokenizer: loads with plain from_pretrained."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def _finish(folder: Path) -> None:
    """Flush every file and write the manifest last."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    digests = {}
    for path in files:
        with path.open("rb") as handle:
            digests[str(path.relative_to(folder))] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(handle, "sha256").hexdigest(),
            }
            os.fsync(handle.fileno())
    manifest = folder / MANIFEST
    with manifest.open("w") as handle:
        json.dump(digests, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. What an interrupted save left behind has another name."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def verify(checkpoint: Path) -> None:
    """Every file as it was written, or an error that names the one that is not."""

    def damaged(what: str) -> UserError:
        return UserError(
            f"checkpoint {checkpoint} is damaged: {what}. Delete that folder to continue from the checkpoint before it "
            "(or start again with --overwrite)"
        )

    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise damaged(f"its manifest cannot be read ({error})") from error
    for name, entry in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            raise damaged(f"{name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise damaged(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != entry["sha256"]:
                raise damaged(f"{name} is not what was written (its digest differs)")


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, verified; None where there is none."""
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)
    found = checkpoints(folder)
    if not found:
        return None
    verify(found[-1])
    return found[-1]


def restore(checkpoint: Path, student: Student) -> State:
    """Optimiser, counters and random state; the weights were loaded with the model."""
    saved = torch.load(checkpoint / OPTIMISER, map_location="cpu", weights_only=True)
    student.optimiser.load_state_dict(saved["optimiser"])
    torch.set_rng_state(saved["rng"])
    state = State(**json.loads((checkpoint / STATE).read_text()))
    student.updates = state.updates
    return state


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best."""
    found = checkpoints(folder)
    for path in found[: max(len(found) - max(keep, 1), 0)]:
        if path.name != f"checkpoint-{best_step}":
            shutil.rmtree(path)
