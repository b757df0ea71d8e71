"""What hostile inputs are tried on: a tiny student and teacher, rows and a reward, and the figures
of the whole group at its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.common.tiny import save_tiny
from tests.end_to_end.conftest import cache, shop
from tests.hostile.judge import Attack, Figures, run

__all__ = ["cache", "shop"]

os.environ["HF_HUB_OFFLINE"] = "1"  # names that no folder has are not asked for again and again
COUNTED: list[tuple[str, int, int]] = []  # (door, inputs, wrong), also of other files of this group
ROWS = "".join(f'{{"prompt": "What is {i} plus {i}?", "answer": "{2 * i}"}}\n' for i in range(4))
QUICK = (
    "steps=1",
    "prompts_per_step=2",
    "num_generations=1",
    "max_completion_length=4",
    "learning_rate=1e-3",
    "device=cpu",
)


class Ground:
    """Paths of what is right, for inputs in which one thing is wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.student = save_tiny(folder / "student")
        self.teacher = save_tiny(folder / "teacher", seed=1)
        self.data = self.file("rows.jsonl", ROWS)

    def file(self, name: str, content: str | bytes) -> str:
        """A file beside the models; returns its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def train(
        self, name: str, *settings: str, end: str = "is refused", said: str = "", **other: Any
    ) -> Attack:
        """A training run with some arguments; student, teacher, data by keyword."""
        named = {"student": self.student, "teacher": self.teacher, "data": self.data} | other
        flags = [f"--{flag}={value}" for flag, value in named.items() if value is not None]
        return Attack(name, ("train", *flags, "--output={out}", *QUICK, *settings), end, said)


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def judged(tmp_path: Path) -> Any:
    """Tries the inputs of a door, counts them, and fails where one ends wrong."""

    def judge(door: str, attacks: Iterable[Attack], tried: Any = run) -> None:
        figures = Figures(door).judge(attacks, tmp_path, tried)
        COUNTED.append((door, sum(figures.ends.values()), len(figures.wrong)))
        assert not figures.wrong, f"{len(figures.wrong)} of {door} ended wrong: see the figures"

    return judge


@pytest.fixture(scope="session", autouse=True)
def _figures() -> Iterator[None]:
    """The figures of every door, at the end."""
    yield
    for door, inputs, wrong in COUNTED:
        print(f"\n{door:<40} {inputs:>5} inputs {wrong:>4} wrong", end="")
    inputs, wrong = (sum(n[i] for n in COUNTED) for i in (1, 2))
    print(f"\n{'in all':<40} {inputs:>5} inputs {wrong:>4} wrong")
