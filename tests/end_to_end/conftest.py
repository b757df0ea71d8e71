"""A workshop for whole runs: tiny students and a teacher with one tokenizer, rows as in GSM8K, a
reward, and the command line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opdkit.cli import main
from opdkit.run.settings import Run, make_run
from tests.common.tiny import save_tiny

REWARD = '''
def even(rollout):
    """About half of all responses are right, whatever the model."""
    return float(sum(rollout.tokens) % 2 == 0)
'''
QUICK = {  # a step of a few hundredths of a second
    "steps": 2,
    "prompts_per_step": 2,
    "sampling": {"num_generations": 2, "max_completion_length": 8},
    "optim": {"learning_rate": 1e-3},
    "device": "cpu",
}


@dataclass(frozen=True)
class Shop:
    """Paths of what a run needs."""

    folder: Path
    student: str  # Qwen3
    llama: str
    teacher: str  # Qwen3
    data: str
    reward: str  # file.py:function

    def values(self, output: Path | str, **settings: Any) -> dict[str, Any]:
        """A quick run as nested values; a group of settings is merged with the quick one."""
        out: dict[str, Any] = {
            "student": self.student,
            "teacher": self.teacher,
            "data": self.data,
            "output": str(output),
            **QUICK,
        }
        for key, value in settings.items():
            out[key] = (
                {**out[key], **value}
                if isinstance(value, dict) and isinstance(out.get(key), dict)
                else value
            )
        return out

    def run(self, output: Path | str, **settings: Any) -> Run:
        return make_run(self.values(output, **settings))

    def train(
        self,
        output: Path | str,
        *arguments: str,
        student: str | None = None,
        teacher: str | None = None,
    ) -> int:
        """`opdkit train` with the settings of a quick run; its exit code."""
        return train(
            f"--student={student or self.student}",
            f"--teacher={teacher or self.teacher}",
            f"--data={self.data}",
            f"--output={output}",
            *arguments,
        )

    def cache(self, out: Path | str, *arguments: str) -> int:
        """`opdkit cache-teacher`: six prompts in three files, two responses each, the teacher's top
        4; its exit code.
        """
        flags = [
            f"--student={self.student}",
            f"--teacher={self.teacher}",
            f"--data={self.data}",
            f"--out={out}",
        ]
        quick = [
            "--top-k=4",
            "--num-generations=2",
            "--prompts-per-shard=2",
            "max_completion_length=8",
            "device=cpu",
        ]
        return main(["cache-teacher", *flags, *quick, *arguments])

    def offline(self, output: Path | str, cache: Path | str, *arguments: str) -> int:
        """`opdkit train` with Lightning OPD on a cache; its exit code."""
        flags = [
            "--method=lightning_opd",
            f"--student={self.student}",
            f"--teacher=cached:{cache}",
            f"--output={output}",
        ]
        return main(
            [
                "train",
                *flags,
                "steps=2",
                "prompts_per_step=3",
                "learning_rate=1e-3",
                "device=cpu",
                *arguments,
            ]
        )


def train(*arguments: str) -> int:
    """`opdkit train`; later arguments win over the quick ones."""
    quick = (
        "steps=2",
        "prompts_per_step=2",
        "num_generations=2",
        "max_completion_length=8",
        "learning_rate=1e-3",
        "device=cpu",
    )
    return main(
        [
            "train",
            *(a for a in arguments if a.startswith("-")),
            *quick,
            *(a for a in arguments if not a.startswith("-")),
        ]
    )


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gsm8k_rows(n: int) -> list[dict[str, Any]]:
    """Rows with GSM8K's columns."""
    return [
        {
            "question": f"Tom has {i} apples and buys {i + 1} more.",
            "answer": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}",
        }
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    (folder / "reward.py").write_text(REWARD)
    return Shop(
        folder,
        save_tiny(folder / "student", "qwen3", seed=1),
        save_tiny(folder / "llama", "llama", seed=2),
        save_tiny(folder / "teacher", "qwen3", seed=3),
        write_rows(folder / "data.jsonl", gsm8k_rows(6)),
        f"{folder / 'reward.py'}:even",
    )


@pytest.fixture(scope="session")
def cache(shop: Shop) -> Path:
    """A cache written in one go; not to be changed."""
    assert shop.cache(shop.folder / "cache") == 0
    return shop.folder / "cache"
