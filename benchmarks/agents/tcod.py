"""TCOD (f2b and b2f) beside plain OPD on TextWorld games: success and KL by turn, over seeds.

A teacher learns the games' own walkthroughs, a student the same for fewer steps; then each method
trains that student from that teacher, on whole episodes of the games. What is measured is lived in
whole episodes too, nothing replayed, with the teacher and the games of the training: this asks how
training goes, not what carries over to other games. A comparison that is stopped goes on where it
was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from measure import Measured, measure
from page import write_page
from world import Size, batch_of, learn, model_of, save, texts_of, tokenizer_of

from opdkit.base.files import write_json
from opdkit.environments import Dialogue
from opdkit.environments.textworld import TextWorldSettings
from opdkit.models.load import load_model, load_tokenizer
from opdkit.run.launch import execute
from opdkit.run.settings import make_run
from opdkit.train.checkpoint import checkpoints
from opdkit.types import DataRow, Sampling

TEACHER = Size(64, 2, steps=110, rate=6e-3)
ROOM = 480  # tokens of an episode after its opening
ETA = 3  # steps of each depth


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where it lies."""

    out: Path
    games: int
    weak: int
    steps: int
    every: int
    episodes: int
    rate: float
    seeds: tuple[int, ...]
    samples: int

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        return {
            "opd": {"name": "opd"},
            "tcod f2b": {"name": "tcod", "direction": "f2b", "eta": ETA},
            "tcod b2f": {"name": "tcod", "direction": "b2f", "eta": ETA},
        }

    @property
    def world(self) -> TextWorldSettings:
        return TextWorldSettings(
            games=self.games,
            rooms=2,
            objects=4,
            quest_length=5,
            folder=str(self.out / "games"),
            max_turns=8,
            turn_tokens=16,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--out", type=Path, default=Path("runs/tcod-textworld"))
    args.add_argument("--games", type=int, default=4)
    args.add_argument("--weak", type=int, default=50, help="supervised steps of the student")
    args.add_argument("--steps", type=int, default=30)
    args.add_argument("--every", type=int, default=10, help="steps between measurements")
    args.add_argument("--episodes", type=int, default=8, help="of each game, in a training step")
    args.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    args.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args.add_argument("--samples", type=int, default=8, help="episodes of each game that measure")
    args.add_argument("--threads", type=int, default=1)
    given = vars(args.parse_args(arguments))
    torch.set_num_threads(given.pop("threads"))
    compare(Comparison(**given | {"seeds": tuple(given["seeds"])}))


def compare(comparison: Comparison) -> Path:
    """Trains and measures what is not there yet; returns the page."""
    began, rows = time.perf_counter(), comparison.world.rows()
    start = models(comparison, rows)
    for seed in comparison.seeds:
        for name, method in comparison.methods.items():
            path = comparison.out / f"{name.replace(' ', '-')}-{seed}.json"
            if not path.exists():
                curve = trained(comparison, rows, method, seed, path.with_suffix(""))
                write_json(path, {"method": name, "seed": seed, "curve": {0: start, **curve}})
            last = max(json.loads(path.read_text())["curve"].items(), key=lambda at: int(at[0]))
            say(began, f"{name}, seed {seed}: success {last[1]['success']:.0%} at step {last[0]}")
    page = write_page(comparison.out, list(comparison.methods), comparison.samples)
    say(began, f"page {page}")
    return page


def say(began: float, text: str) -> None:
    print(f"{time.perf_counter() - began:6.0f} s  {text}", flush=True)


def models(comparison: Comparison, rows: Sequence[DataRow]) -> dict[str, Any]:
    """Makes teacher and student, and measures both; what the student does before distillation."""
    out, began = comparison.out, time.perf_counter()
    if not (out / "start.json").exists():
        dialogues = texts_of(comparison.world, rows)
        tokenizer = tokenizer_of(dialogues)
        ids, labels = batch_of(dialogues, Dialogue(tokenizer))
        student = Size(TEACHER.hidden, TEACHER.layers, comparison.weak, 5e-3)
        for name, size, seed in (("teacher", TEACHER, 1), ("student", student, 2)):
            model = model_of(size, tokenizer, seed)
            learn(model, ids, labels, size, lambda step, loss: None)
            save(out / name, model, tokenizer)
            say(began, f"{name}: {size}")
        both = {name: measured(comparison, rows, out / name, 0) for name in ("teacher", "student")}
        write_json(out / "start.json", {name: found.plain() for name, found in both.items()})
    found = json.loads((out / "start.json").read_text())
    say(began, ", ".join(f"{name}: success {x['success']:.0%}" for name, x in found.items()))
    return found["student"]


def trained(
    comparison: Comparison,
    rows: Sequence[DataRow],
    method: dict[str, Any],
    seed: int,
    folder: Path,
) -> dict[int, dict[str, Any]]:
    """Trains a run, and measures its checkpoints: by step."""
    world = comparison.world
    environment = {
        "kind": world.kind,
        "games": world.games,
        "rooms": world.rooms,
        "objects": world.objects,
        "quest_length": world.quest_length,
        "folder": world.folder,
        "max_turns": world.max_turns,
        "turn_tokens": world.turn_tokens,
    }
    run = make_run(
        {
            "student": str(comparison.out / "student"),
            "teacher": str(comparison.out / "teacher"),
            "environment": environment,
            "method": method,
            "output": str(folder),
            "steps": comparison.steps,
            "prompts_per_step": comparison.games,
            "sampling": {"max_completion_length": ROOM, "num_generations": comparison.episodes},
            "optim": {"learning_rate": comparison.rate, "warmup_steps": 3, "betas": [0.9, 0.95]},
            "checkpoint": {"every": comparison.every, "keep": comparison.steps},
            "sample_every": comparison.every,
            "seed": seed,
        }
    )
    execute(run, overwrite=True)
    return {
        int(path.name.rpartition("-")[2]): measured(comparison, rows, path, seed).plain()
        for path in checkpoints(folder)
    }


def measured(comparison: Comparison, rows: Sequence[DataRow], folder: Path, seed: int) -> Measured:
    """What the model in a folder does, against the teacher."""
    student, teacher = (load_model(str(f)).eval() for f in (folder, comparison.out / "teacher"))
    return measure(
        student,
        teacher,
        load_tokenizer(str(folder)),
        comparison.world,
        rows,
        Sampling(max_completion_length=ROOM, num_generations=comparison.samples),
        seed,
    )


if __name__ == "__main__":
    main()
