"""Two processes on one folder: one of them has it, the other is refused, and what is there in the
end is what the one alone would have left.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Shop
from tests.end_to_end.crash import left_by
from tests.hostile.runs import Child, Said, passing, refusal_faults, report, until

pytestmark = pytest.mark.hostile

WAITING = """
import time
from pathlib import Path

def even(rollout):
    while Path({armed!r}).exists():
        time.sleep(0.01)
    return float(sum(rollout.tokens) % 2 == 0)
"""


class Pairs:
    """Pairs of commands, judged."""

    def __init__(self, shop: Shop, work: Path):
        self.shop, self.work = shop, work
        self.armed = work / "armed"
        (work / "reward.py").write_text(WAITING.format(armed=str(self.armed)))
        self.faults: dict[str, list[str]] = {}
        self.count = 0
        self.whole = left_by(self.alone("whole"))

    def train(self, out: Path | str, *more: str) -> list[str]:
        shop = self.shop
        flags = [f"--student={shop.student}", f"--teacher={shop.teacher}", f"--data={shop.data}"]
        quick = ["prompts_per_step=2", "num_generations=2", "max_completion_length=8", "steps=2"]
        reward = f"--reward={self.work / 'reward.py'}:even"
        flags += [reward, f"--output={out}", *(m for m in more if m.startswith("-"))]
        return ["train", *flags, *quick, "device=cpu", *(m for m in more if not m.startswith("-"))]

    def alone(self, name: str, *more: str) -> Path:
        assert Child(self.train(self.work / name, *more), self.log(name)).wait().code == 0
        return self.work / name

    def log(self, name: str) -> Path:
        return self.work / f"{name.replace(' ', '_').replace('/', '_')}.log"

    def meet(
        self,
        name: str,
        first: list[str],
        second: list[str],
        folder: Path,
        *,
        at_once: bool = False,
        environment: dict[str, str] | None = None,
    ) -> tuple[Said, Said]:
        """Both in the folder: the second while the first is in its first step, or both at once."""
        self.count += 1
        self.armed.touch()
        one = Child(first, self.log(f"{name} 1"))
        if not at_once:
            until(lambda: (folder / ".lock").exists() and (folder / ".lock").stat().st_size > 0)
        two = Child(second, self.log(f"{name} 2"), environment)
        if at_once:
            until(lambda: not (one.process.is_alive() and two.process.is_alive()))
        else:
            two.process.join()
        self.armed.unlink()
        return one.wait(), two.wait()

    def judge(
        self, name: str, said: tuple[Said, Said], folder: Path, *words: str, same: bool = True
    ) -> None:
        won, lost = sorted(said, key=lambda s: s.code)
        faults = [] if won.code == 0 and not won.crashed else [f"neither went through: {won.text}"]
        faults += refusal_faults(lost, *(words or (str(folder), "another process (process ")))
        faults += [f"left behind: {p}" for p in passing(folder)]
        if same and left_by(folder) != self.whole:
            faults.append("another result than alone")
        if faults:
            self.faults[name] = faults


def test_pairs_of_processes_on_one_folder(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = Pairs(shop, tmp_path)
    for number in range(5):
        folder = tmp_path / f"new{number}"
        command = pairs.train(folder)
        pairs.judge(
            f"twice at once, {number}",
            pairs.meet(f"once{number}", command, command, folder, at_once=True),
            folder,
        )
    for more in ("--resume", "--overwrite", "seed=4"):
        folder = tmp_path / more.strip("-")
        said = pairs.meet(more, pairs.train(folder), pairs.train(folder, more), folder)
        pairs.judge(f"a second with {more}", said, folder)
    for more in ("--resume", "--overwrite"):  # of a run that is there
        folder = pairs.alone(f"old{more}", "steps=1")
        first = pairs.train(folder, more)
        said = pairs.meet(f"both{more}", first, first, folder)
        pairs.judge(f"both with {more}", said, folder)
    folder, link = tmp_path / "real", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    said = pairs.meet("link", pairs.train(folder), pairs.train(link), folder)
    pairs.judge("by another name", said, folder, "another process (process ")
    folder = tmp_path / "rank"
    command, ranks = pairs.train(folder), {"WORLD_SIZE": "2", "RANK": "1"}
    said = pairs.meet("rank", command, command, folder, environment=ranks)
    pairs.judge("as torchrun starts them", said, folder, "WORLD_SIZE=2, RANK=1")
    after_a_kill(pairs, tmp_path / "killed")
    other_commands(pairs, tmp_path)
    with capsys.disabled():
        report("pairs of processes on one folder", pairs.faults, pairs.count)


def after_a_kill(pairs: Pairs, folder: Path) -> None:
    """The first is killed: the second then has the folder."""
    pairs.count += 1
    pairs.armed.touch()
    one = Child(pairs.train(folder), pairs.log("killed 1"))
    until(lambda: (folder / "run.yaml").exists())
    assert one.kill(0.2)
    pairs.armed.unlink()
    two = Child(pairs.train(folder), pairs.log("killed 2")).wait()
    if two.code or left_by(folder) != pairs.whole or passing(folder):
        pairs.faults["after a kill"] = [two.text, *passing(folder)]


def other_commands(pairs: Pairs, tmp_path: Path) -> None:
    """`compare` and `cache-teacher` have one writer too."""
    shop, folder = pairs.shop, tmp_path / "cache"
    models = [f"--student={shop.student}", f"--teacher={shop.teacher}", f"--data={shop.data}"]
    cache = ["cache-teacher", *models, f"--out={folder}", "--prompts-per-shard=1", "device=cpu"]
    cache.append("max_completion_length=64")
    said = pairs.meet("cache", cache, cache, folder, at_once=True)
    pairs.judge("cache-teacher twice", said, folder, same=False)
    folder = tmp_path / "comparison"
    plain = tmp_path / "base.yaml"
    values = shop.run("unused", reward=f"{tmp_path / 'reward.py'}:even", steps=1)
    plain.write_text(values.yaml())
    compare = ["compare", "opd", "gkd", f"--recipe={plain}", "--seeds=1", f"--out={folder}"]
    compare.append(f"evaluate.data={shop.data}")
    said = pairs.meet("compare", compare, compare, folder)
    pairs.judge("compare twice", said, folder, same=False)


def test_many_at_once_are_one(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight, as a job that is started by mistake once for each device."""
    pairs = Pairs(shop, tmp_path)
    pairs.armed.touch()
    folder = tmp_path / "run"
    children = [Child(pairs.train(folder), pairs.log(f"many {n}")) for n in range(8)]
    until(lambda: sum(c.process.is_alive() for c in children) == 1)
    time.sleep(0.1)
    pairs.armed.unlink()
    said = sorted((c.wait() for c in children), key=lambda s: s.code)
    faults = {f"number {n}": f for n, s in enumerate(said[1:]) if (f := refusal_faults(s))}
    if said[0].code or left_by(folder) != pairs.whole or passing(folder):
        faults["the one"] = [said[0].text]
    assert os.path.exists(folder / "model")
    with capsys.disabled():
        report("eight processes on one folder", faults, 8)
