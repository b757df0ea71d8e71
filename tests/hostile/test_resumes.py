"""Resumes with something changed: what decides what is learnt is named and refused, and the folder
stays as it was; with the flag it is told in run.yaml; the rest goes on without a word.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opdkit.cli import main
from tests.common.tiny import save_tiny
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows
from tests.hostile.runs import Said, contents, copied, refusal_faults, report

pytestmark = pytest.mark.hostile

OWN = """
from opdkit import load

def even(rollout):
    return float(sum(rollout.tokens) % 2 == {parity})

def method(scale={scale}):
    return load("gopd", scale=scale)
"""
# setting=value: the setting is named
REFUSED = (
    *("learning_rate=0.01", "schedule=cosine", "warmup_steps=2", "weight_decay=0.1"),
    *("betas=[0.5,0.9]", "eps=1e-6", "max_grad_norm=0.5", "passes=2", "minibatches=2"),
    *("seed=7", "temperature=0.7", "top_p=0.9", "top_k=5", "num_generations=4"),
    *("max_completion_length=6", "prompts_per_step=3", "method=gkd", "method.scale=1.5"),
    *("dtype=bfloat16", "teacher_dtype=bfloat16", "reward=exact", "dynamic_sampling=true"),
    *("overlong_margin=2", "correct_sampling=true", "recompute_student=true"),
    "curriculum=frontier",
    *("evaluate.num_generations=3", "evaluate.ks=[1,2]", "evaluate=null"),
    *("data.template='{prompt} Think.'", "data.system=Be kind.", "data.chat=false"),
    *("data.max_prompt_length=400", "reference=llama", "student=llama", "teacher=llama"),
    *(
        "lora.r=4",
        "evaluate.data=other.jsonl",
        "data=other.jsonl",
        "data.limit=5",
        "sampling.stop=[x]",
    ),
)
ALLOWED = (
    *("steps=4", "checkpoint.every=1", "checkpoint.keep=2", "evaluate.every=1", "device=cpu"),
    *("micro_batch_tokens=100", "sample_every=1", "keep_samples=1", "gradient_checkpointing=true"),
    *("term_gradients_every=1", "trackers=[tensorboard]", "max_tokens=100000"),
    "evaluate.teacher=true",
)
FIXED = ("student", "lora")  # no flag changes what the weights are made of


def own(folder: Path, parity: int = 0, scale: float = 1.25) -> None:
    (folder / "own.py").write_text(OWN.format(parity=parity, scale=scale))


def rows() -> list[dict[str, Any]]:
    return [{**row, "id": f"row {i}"} for i, row in enumerate(gsm8k_rows(6))]


def swap_teacher(folder: Path) -> None:
    shutil.rmtree(folder / "teacher")
    save_tiny(folder / "teacher", "qwen3", seed=9)


def template(folder: Path) -> None:
    path = folder / "student" / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "model"))


def move_all(folder: Path) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(folder / name, folder / f"moved_{name}")
    shutil.copy(folder / "data.jsonl", folder / "moved.jsonl")


# what is changed behind the names that a run has; what is named
EDITED: dict[str, tuple[Callable[[Path], object], str]] = {
    "rows shuffled": (lambda f: write_rows(f / "data.jsonl", rows()[::-1]), "data.rows"),
    "one answer mended": (
        lambda f: write_rows(f / "data.jsonl", [*rows()[:5], {**rows()[5], "answer": "#### 5"}]),
        "data.rows",
    ),
    "as many other rows": (
        lambda f: write_rows(f / "data.jsonl", [{**r, "question": "Why?"} for r in rows()]),
        "data.rows",
    ),
    "the test set": (lambda f: write_rows(f / "test.jsonl", rows()[::-1]), "evaluate.data.rows"),
    "another teacher under the same name": (swap_teacher, "teacher"),
    "the file of the reward": (lambda f: own(f, parity=1), "reward"),
    "the file of the method": (lambda f: own(f, scale=2.0), "method"),
    "the chat template": (template, "tokenizer"),
}


@pytest.fixture(scope="module")
def world(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a run reads, and a run of two steps."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "student", "qwen3", seed=1)
    save_tiny(folder / "llama", "llama", seed=2)
    save_tiny(folder / "teacher", "qwen3", seed=3)
    write_rows(folder / "data.jsonl", rows())
    write_rows(folder / "test.jsonl", rows()[:3])
    write_rows(folder / "other.jsonl", [{"question": f"Say {i}", "answer": "1"} for i in range(6)])
    own(folder)
    return folder


def begin(world: Path, method: str) -> Path:
    """A run's folder in a world, two steps long; kept in `world/METHOD`."""
    code = command(
        world,
        "train",
        *("--student=student", "--teacher=teacher", "--data=data.jsonl", f"--method={method}"),
        *(
            "--reward=own.py:even",
            "evaluate.data=test.jsonl",
            "evaluate.num_generations=2",
            "--output=run",
            "steps=2",
        ),
        *("prompts_per_step=2", "num_generations=2", "max_completion_length=8", "device=cpu"),
        "learning_rate=1e-3",
    )
    assert code == 0
    return world / "run"


def command(folder: Path, *arguments: str) -> int:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return main(list(arguments))
    finally:
        os.chdir(before)


class Trials:
    """Resumes in a world that is put back before each, as a run names its files in full; judged."""

    def __init__(self, world: Path, work: Path, capsys: pytest.CaptureFixture[str]):
        self.world, self.kept, self.capsys = world, copied(world, work / "kept"), capsys
        self.faults: dict[str, list[str]] = {}
        self.count = 0

    def __call__(
        self, name: str, *arguments: str, edit: Callable[[Path], object] | None = None
    ) -> tuple[Said, Path, dict[str, bytes]]:
        """A resume with arguments, or behind an edit of the world; steps=3 unless it says more."""
        self.count += 1
        folder = copied(self.kept, self.world)
        if edit is not None:
            edit(folder)
        before = contents(folder / "run")
        self.capsys.readouterr()
        code = command(folder, "train", "run/run.yaml", "--resume", "steps=3", *arguments)
        return Said(code, self.capsys.readouterr().err), folder / "run", before

    def note(self, name: str, faults: list[str]) -> None:
        if faults:
            self.faults[name] = faults


def named(change: str) -> str:
    """The last name of the setting that a change is named by: rows are compared, not where they are
    from, and a method as a whole.
    """
    setting = change.partition("=")[0]
    known = {"data.limit": "rows", "method.scale": "method"}
    return known.get(setting, setting.rpartition(".")[2])


def told(run: Path) -> str:
    lines = (run / "run.yaml").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_resumes_with_a_change(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(world, "own.py:method")
    (world / "run" / "report.html").unlink()
    trial = Trials(world, tmp_path, capsys)
    for change in REFUSED:
        name = named(change)
        said, run, before = trial(change, change)
        faults = refusal_faults(said, name, "in the checkpoint")
        if contents(run) != before:
            faults.append("the folder has changed")
        trial.note(change, faults)
    for what, (edit, name) in EDITED.items():
        said, run, before = trial(what, edit=edit)
        faults = refusal_faults(said, name, "in the checkpoint")
        if contents(run) != before:
            faults.append("the folder has changed")
        trial.note(what, faults)
    refused = trial.count
    for change in ALLOWED:
        said, run, _ = trial(change, change)
        steps = [json.loads(s)["step"] for s in (run / "metrics.jsonl").read_text().splitlines()]
        faults = [] if said.code == 0 and not said.messages else [f"refused: {said.text}"]
        if steps != list(range(1, (4 if change == "steps=4" else 3) + 1)) or told(run):
            faults.append(f"steps {steps}, told {told(run)!r}")
        trial.note(change, faults)
    moved = ("student=moved_student", "teacher=moved_teacher", "data=moved.jsonl")
    said, run, _ = trial("moved", *moved, edit=move_all)
    trial.note("moved", [] if said.code == 0 else [said.text])
    with capsys.disabled():
        print(f"\n{refused} changes to be refused, {trial.count - refused} to be let through")
        report("resumes with a change", trial.faults, trial.count)


def test_changes_that_are_meant(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (world / "run").exists():
        begin(world, "own.py:method")
    trial = Trials(world, tmp_path, capsys)
    for change in REFUSED:
        name = named(change)
        said, run, before = trial(change, change, "--allow-changes")
        if change.startswith(FIXED):
            faults = refusal_faults(said, "cannot be made otherwise")
            if contents(run) != before:
                faults.append("the folder has changed")
        elif said.code == 2 and contents(run) == before:
            faults = refusal_faults(said)  # refused for what it is, as a new run would be
        else:
            faults = [] if said.code == 0 and not said.crashed else [said.text[-600:]]
            if f"{name}: " not in told(run) and f"{name}." not in told(run):
                faults.append(f"run.yaml tells {told(run)!r}")
        trial.note(change, faults)
    with capsys.disabled():
        report("changes that are meant", trial.faults, trial.count)
