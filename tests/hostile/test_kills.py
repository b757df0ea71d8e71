"""SIGKILL at any moment, again and again: continued, it is the run that was never killed, to the
byte, and nothing of the interruptions is left.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from opdkit.base.files import read_lines
from tests.end_to_end.conftest import Shop
from tests.end_to_end.crash import left_by
from tests.hostile.runs import Child, contents, passing, report

pytestmark = pytest.mark.hostile

KINDS: dict[str, tuple[str, ...]] = {  # of runs, with what they add to a plain one
    "plain": (),
    "adapters": ("lora.r=2",),
    "replay": ("--method=distillm(threshold=0.7)",),
    "several updates": ("passes=2", "minibatches=2", "schedule=cosine"),
}
KILLS = {"train": 96, "overwrite": 12, "cache-teacher": 10, "compare": 10}
IN_A_ROW = 6  # kills of one run of a kind


class Kills:
    """Commands that are killed after a random time until so many kills have hit, then ended."""

    def __init__(self, work: Path, seed: int):
        self.work, self.rng = work, random.Random(seed)
        self.hit = self.number = 0
        self.faults: dict[str, list[str]] = {}
        self.trials = 0

    def log(self) -> Path:
        self.number += 1
        return self.work / f"{self.number}.log"

    def timed(self, arguments: Sequence[str]) -> float:
        """Seconds that a command takes, unbroken."""
        import time

        begin = time.monotonic()
        said = Child(arguments, self.log()).wait()
        assert said.code == 0, said.text
        return time.monotonic() - begin

    def until_done(
        self, name: str, first: Sequence[str], again: Sequence[str], seconds: float, kills: int
    ) -> None:
        """`first`, then `again` after each kill, and to the end."""
        self.trials += 1
        command = first
        for _ in range(kills):
            self.hit += Child(command, self.log()).kill(self.rng.uniform(0.02, 0.9 * seconds))
            command = again
        said = Child(command, self.log()).wait()
        if said.code or said.crashed:
            self.faults[f"{name} {self.trials}"] = [f"ended with {said.code}: {said.text[-600:]}"]

    def same(self, name: str, left: object, whole: object, folder: Path) -> None:
        faults = [] if left == whole else ["not the run that was never killed"]
        faults += [f"left behind: {path}" for path in passing(folder)]
        if faults:
            self.faults.setdefault(f"{name} {self.trials}", []).extend(faults)


def train(shop: Shop, out: Path, *more: str) -> list[str]:
    flags = [f"--student={shop.student}", f"--teacher={shop.teacher}", f"--data={shop.data}"]
    flags += [f"--output={out}", f"--reward={shop.reward}", *(m for m in more if m[0] == "-")]
    quick = ["prompts_per_step=2", "num_generations=2", "max_completion_length=8", "steps=8"]
    quick += ["device=cpu", "checkpoint.every=2", "sample_every=3", "learning_rate=1e-3"]
    quick += [f"evaluate.data={shop.data}", "evaluate.every=3"]
    return ["train", *flags, *quick, *(m for m in more if m[0] != "-")]


def test_kills(shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    kills = Kills(tmp_path, seed)
    killed_training(kills, shop)
    killed_overwriting(kills, shop)
    killed_caching(kills, shop)
    killed_comparing(kills, shop)
    with capsys.disabled():
        print(f"\n{kills.hit} kills of {sum(KILLS.values())} hit a process at work; seed {seed}")
        report("killed and continued", kills.faults, kills.trials)
    assert kills.hit >= 100


def killed_training(kills: Kills, shop: Shop) -> None:
    for kind, more in KINDS.items():
        whole = kills.work / f"whole {kind}"
        seconds = kills.timed(train(shop, whole, *more))
        for number in range(KILLS["train"] // len(KINDS) // IN_A_ROW):
            out = kills.work / f"{kind} {number}"
            command = train(shop, out, *more, "--resume")
            kills.until_done(kind, command, command, seconds, IN_A_ROW)
            kills.same(kind, left_by(out), left_by(whole), out)


def killed_overwriting(kills: Kills, shop: Shop) -> None:
    """Until it has taken its first step, the earlier run is there; then the new one goes on."""
    old, new = kills.work / "old", kills.work / "new"
    kills.timed(train(shop, old))
    seconds = kills.timed(train(shop, new, "seed=1"))
    for number in range(KILLS["overwrite"]):
        out = kills.work / f"over {number}"
        shutil.copytree(old, out)
        command = train(shop, out, "seed=1", "--overwrite")
        kills.until_done("overwrite", command, command, seconds / 2, 1)
        kills.same("overwrite", left_by(out), left_by(new), out)


def killed_caching(kills: Kills, shop: Shop) -> None:
    def command(out: Path) -> list[str]:
        flags = [f"--student={shop.student}", f"--teacher={shop.teacher}", f"--data={shop.data}"]
        quick = ["--prompts-per-shard=1", "max_completion_length=32", "device=cpu"]
        return ["cache-teacher", *flags, f"--out={out}", *quick]

    whole, out = kills.work / "cache", kills.work / "broken cache"
    seconds = kills.timed(command(whole))
    kills.until_done("cache", command(out), command(out), seconds, KILLS["cache-teacher"])
    kills.same("cache", contents(out), contents(whole), out)


def killed_comparing(kills: Kills, shop: Shop) -> None:
    def command(out: Path) -> list[str]:
        flags = [f"--recipe={base}", "--seeds=1", f"--out={out}"]
        return ["compare", "opd", "gkd", *flags]

    base = kills.work / "base.yaml"
    run = shop.run(
        "unused",
        reward=shop.reward,
        steps=4,
        evaluate={"data": shop.data},
        checkpoint={"every": 1},
    )
    base.write_text(run.yaml())
    whole, out = kills.work / "comparison", kills.work / "broken comparison"
    seconds = kills.timed(command(whole))
    kills.until_done("compare", command(out), command(out), seconds, KILLS["compare"])
    kills.same("compare", results(out), results(whole), out)


def results(folder: Path) -> dict[str, object]:
    """What the runs of a comparison left, and the numbers of their evaluations."""
    runs = sorted(folder.glob("runs/*/*"))
    found: dict[str, object] = {
        str(run.relative_to(folder)): sorted(p.name for p in run.iterdir()) for run in runs
    }
    for run in runs:
        lines = read_lines(run / "evals.jsonl")
        found[f"{run.relative_to(folder)} scores"] = [line["per_problem"] for line in lines]
        found[f"{run.relative_to(folder)} model"] = contents(run / "model")
    return found
