"""The door of folders: reports of odd numbers, checkpoints and caches that are damaged or of
another run, and the flags of the other commands.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from opdkit.cli import main
from tests.hostile.conftest import QUICK, Ground
from tests.hostile.judge import EITHER, REFUSED, WORKS, Attack

pytestmark = pytest.mark.hostile

METRICS = {
    "nothing": ("", EITHER),
    "a line that is cut": ('{"step": 1, "loss": 1}\n{"step": 2, "lo', WORKS),
    "a hole in the middle": ('{"step": 1}\n\0\0\0\0\n{"step": 3}\n', REFUSED),
    "a list": ("[1]\n", REFUSED),
    "a number": ("3\n", REFUSED),
    "null": ("null\n", REFUSED),
    "no step": ('{"loss": 1}\n', REFUSED),
    "a step of text": ('{"step": "one", "loss": 1}\n', REFUSED),
    "a step below zero": ('{"step": -1, "loss": 1}\n', EITHER),
    "a step of half": ('{"step": 0.5, "loss": 1}\n', EITHER),
    "infinite": ('{"step": 1, "loss": Infinity}\n', EITHER),
    "10^400": ('{"step": 1, "loss": 1' + "0" * 400 + "}\n", EITHER),
    "5,000 digits": ('{"step": 1, "loss": 1' + "0" * 5000 + "}\n", EITHER),
    "a text": ('{"step": 1, "loss": "low"}\n', EITHER),
    "a mapping": ('{"step": 1, "loss": {"a": 1}}\n', EITHER),
    "nonfinite as a number": ('{"step": 1, "loss": 1, "nonfinite": 3}\n', EITHER),
    "a name of HTML": ('{"step": 1, "<script>alert(1)</script>": 1}\n', WORKS),
    "half a smile": ('{"step": 1, "\\ud83d": 1}\n', EITHER),
    "steps of 10^15": ('{"step": 1, "loss": 1}\n{"step": 1000000000000000, "loss": 1}\n', EITHER),
    "deep": ('{"step": 1, "loss": ' + "[" * 3000 + "]" * 3000 + "}\n", REFUSED),
    "Latin-1": ("caf\u00e9", EITHER),
}
OTHERS = {
    "run.yaml": ["a: [", "- 1", "\t", "3", "!!python/object:x y", "a: 1\na: 2"],
    "evals.jsonl": ["{}\n", "[]\n", '{"name": 3}\n', "null\n", '{"avg_at_k": {"value": 1}}\n'],
    "summary.json": ["{", "[]", "null", "3", '{"steps": {}}'],
    "samples/step_000001.jsonl": [
        "{}\n",
        "[]\n",
        '{"pieces": 3}\n',
        '{"pieces": ["a"], "credit": "x"}\n',
        '{"pieces": [1]}\n',
        '{"pieces": ["a"], "credit": [1e400]}\n',
    ],
    "samples/step_x.jsonl": ['{"pieces": ["a"]}\n'],
}


@pytest.fixture(scope="module")
def trained(ground: Ground) -> Path:
    """A run of two steps."""
    folder = ground.folder / "trained"
    flags = [f"--student={ground.student}", f"--teacher={ground.teacher}", f"--data={ground.data}"]
    assert main(["train", *flags, f"--output={folder}", *QUICK, "steps=2"]) == 0
    return folder


class Runs:
    """The run, once more for each change."""

    def __init__(self, trained: Path):
        self.trained, self.count = trained, 0

    def __call__(self, change: Callable[[Path], object]) -> Path:
        self.count += 1
        folder = self.trained.parent / "runs_of" / str(self.count)
        shutil.copytree(self.trained, folder)
        change(folder)
        return folder


@pytest.fixture(scope="module")
def runs(trained: Path) -> Runs:
    return Runs(trained)


def test_reports(ground: Ground, runs: Runs, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for what, (text, end) in METRICS.items():
            raw = text.encode("latin-1") if what == "Latin-1" else text.encode()
            folder = runs(lambda f, r=raw: (f / "metrics.jsonl").write_bytes(r))
            yield Attack(f"metrics.jsonl: {what}", ("report", str(folder)), end)
        for name, texts in OTHERS.items():
            for text in texts:
                folder = runs(lambda f, n=name, t=text: (f / n).write_text(t))
                yield Attack(f"{name}: {text!r}", ("report", str(folder)), EITHER)
        for what in (
            "nothing there",
            str(ground.data),
            str(ground.folder / "student"),
            "/dev/null",
        ):
            yield Attack(f"report of {what[-20:]}", ("report", what))

    judged("folders: reports", attacks())


def _signed(checkpoint: Path) -> None:
    """The manifest of what the checkpoint holds now."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"]
    entries = {
        str(p.relative_to(checkpoint)): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in files
    }
    (checkpoint / "manifest.json").write_text(json.dumps(entries))


def changes() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What is done to a checkpoint, by name."""
    for text in ("", "{", "[]", "null", "3", '{"a": 3}', '{"a": {}}', '{"../x": {"bytes": 1}}'):
        yield f"manifest {text!r}", lambda f, t=text: (f / "manifest.json").write_text(t)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "config.json"):
        yield f"{name} is gone", lambda f, n=name: (f / n).unlink()
        yield f"{name} is empty", lambda f, n=name: (f / n).write_bytes(b"")
    for state in (
        "",
        "[]",
        "null",
        "{}",
        '{"step": "two"}',
        '{"step": 2, "field_of_a_newer_version": 1}',
        '{"step": -5}',
        '{"step": 2, "stream": 3}',
        '{"step": 2, "memory": []}',
    ):

        def rewrite(f: Path, text: str = state) -> None:
            (f / "trainer_state.json").write_text(text)
            _signed(f)

        yield f"signed state {state!r}", rewrite
    for what, kept in optimisers().items():

        def swap(f: Path, value: object = kept) -> None:
            torch.save(value, f / "optimizer.pt")
            _signed(f)

        yield f"signed optimiser: {what}", swap


def optimisers() -> dict[str, object]:
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    return {
        "nothing": None,
        "a list": [1, 2],
        "empty": {},
        "no groups": {"state": {}, "param_groups": []},
        "of one weight": {"state": {0: moments}, "param_groups": [group | {"params": [0]}]},
        "of other shapes": {
            "state": dict.fromkeys(range(25), moments),
            "param_groups": [group | {"params": list(range(25))}],
        },
        "of text": {"state": "x", "param_groups": "y"},
    }


def test_checkpoints(ground: Ground, runs: Runs, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for what, change in changes():

            def on_newest(folder: Path, change: Callable[[Path], object] = change) -> None:
                newest = sorted(folder.glob("checkpoint-*"))[-1]
                change(newest)

            folder = runs(on_newest)
            yield Attack(
                f"checkpoint: {what}",
                ("train", str(folder / "run.yaml"), "--resume", "steps=3", f"output={folder}"),
                EITHER if what.endswith("{}'") else REFUSED,
            )
        for text in ('{"step": 1}\n\0\0\n{"step": 2}\n', "[]\n{}\n", "x\ny\n"):
            folder = runs(lambda f, t=text: (f / "metrics.jsonl").write_text(t))
            yield Attack(
                f"resumed with metrics {text[:20]!r}",
                ("train", str(folder / "run.yaml"), "--resume", "steps=3", f"output={folder}"),
            )

    judged("folders: checkpoints", attacks())


COMMANDS: list[tuple[str, ...]] = [
    ("eval", "{student}"),
    ("eval", "{student}", "--data={data}", "--k=0"),
    ("eval", "{student}", "--data={data}", "--k=two"),
    ("eval", "{student}", "--data={data}", "--k=4"),
    ("eval", "{student}", "--data={data}", "--k="),
    ("eval", "{student}", "--data={data}", "--samples=0"),
    ("eval", "{student}", "--data={data}", "--samples=-1"),
    ("eval", "{student}", "--data={data}", "--limit=0"),
    ("eval", "{student}", "--data={data}", "--limit=-3"),
    ("eval", "{student}", "--data={data}", "--temperature=-1"),
    ("eval", "{student}", "--data={data}", "--temperature=nan"),
    ("eval", "{student}", "--data={data}", "--temperature=inf"),
    ("eval", "{student}", "--data={data}", "--top-p=0"),
    ("eval", "{student}", "--data={data}", "--max-completion-length=0"),
    ("eval", "{student}", "--data={data}", "--dtype=float7"),
    ("eval", "{student}", "--data={data}", "--seed=-1"),
    ("eval", "{student}", "--data={data}", "--reward="),
    ("eval", "{student}", "--data={data}", "--reward=maths"),
    ("eval", "{student}", "--data={data}", "--template={x}"),
    ("eval", "{student}", "--data={data}", "--max-completion-length=4", "--out=/dev/null/x"),
    ("eval", "no/model", "--data={data}"),
    ("eval", "{data}", "--data={data}"),
    ("sample", "{student}"),
    ("sample", "{student}", ""),
    ("sample", "{student}", "hi", "--samples=0"),
    ("sample", "{student}", "hi", "--samples=x"),
    ("sample", "{student}", "hi", "--top-p=2"),
    ("sample", "{student}", "hi", "--max-completion-length=-1"),
    ("sample", "/no/model", "hi"),
    ("sample", "{student}", "--data=/no/data.jsonl"),
    ("compare", "opd"),
    ("compare", "opd", "--recipe=none"),
    ("compare", "opd", "gkd", "--recipe=/no/run.yaml"),
    ("compare", "opd", "gkd", "--recipe=gsm8k", "--seeds=0"),
    ("compare", "opd", "opd", "--recipe=gsm8k"),
    ("compare", "opd", "nothing", "--recipe=gsm8k"),
    ("cache-teacher", "--student={student}", "--teacher={teacher}", "--data={data}"),
    (
        "cache-teacher",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--out=/dev/null/x",
    ),
    (
        "cache-teacher",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--out={out}",
        "--top-k=-1",
    ),
    (
        "cache-teacher",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--out={out}",
        "--prompts-per-shard=0",
    ),
    (
        "cache-teacher",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--out={out}",
        "--num-generations=0",
    ),
    ("train", "--student={student}", "--teacher=cached:{data}", "--output={out}"),
    (
        "train",
        "--student={student}",
        "--teacher=cached:/no/cache",
        "--method=lightning_opd",
        "--output={out}",
    ),
    (
        "train",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--resume",
        "--output={out}",
        "--overwrite",
    ),
    (
        "train",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--json",
        "--output={out}",
    ),
    (
        "train",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--lora=0",
        "--output={out}",
    ),
    (
        "train",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--dry-run",
        "--mfu=-1",
    ),
    (
        "train",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--dry-run",
        "--mfu=nan",
    ),
    (
        "train",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--dry-run",
        "--device=z9",
    ),
    (
        "train",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--dry-run",
        "--device-memory=much",
    ),
    (
        "train",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--dry-run",
        "--device=h100",
        "--device-tflops=-4",
    ),
    (
        "train",
        "--student={student}",
        "--teacher={teacher}",
        "--data={data}",
        "--dry-run",
        "--response-length=0",
    ),
    ("serve-teacher", "/no/model"),
    ("serve-teacher", "{student}", "--port=99999"),
    ("serve-teacher", "{student}", "--port=-1"),
    ("serve-teacher", "{student}", "--port=x"),
    ("serve-teacher", "{student}", "--host=0.0.0.0"),
    ("serve-teacher", "{student}", "--dtype=float7"),
    ("serve-teacher", "{student}", "--device=meta"),
    ("serve-teacher", "{student}", "--max-batch-tokens=0"),
    ("quickstart", "--out=/dev/null/x"),
    ("quickstart", "--method=nothing", "--out={out}"),
    ("explain", "nothing"),
    ("explain",),
    ("check", "nothing"),
    ("report",),
    ("dance",),
    ("train", "--dance"),
]


def test_commands(ground: Ground, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for words in COMMANDS:
            filled = tuple(
                word.replace("{student}", ground.student)
                .replace("{teacher}", ground.teacher)
                .replace("{data}", ground.data)
                for word in words
            )
            yield Attack(" ".join(words), filled)

    judged("commands: flags", attacks())
