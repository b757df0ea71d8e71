"""docs/recipes.md: its commands are commands, and its tables are what the dry run says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from opdkit.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
    if line
]
ROWS = [
    (recipe, *(cell.strip() for cell in row.strip("|").split("|")))
    for recipe, section in re.findall(r"\n## (\w+)\n(.*?)(?=\n## |\Z)", TEXT, flags=re.DOTALL)
    for row in re.findall(r"^\|.*\|$", section, flags=re.MULTILINE)[2:]
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> Any:
    """A dry run's numbers."""
    assert main([*arguments, "--dry-run", "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def clock(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{minutes} min"
        if not hours
        else f"{hours} h {minutes:02} min"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_a_run(capsys: pytest.CaptureFixture[str], command: str) -> None:
    program, name, *arguments = shlex.split(command, comments=True)
    assert (program, name) == ("opdkit", "train")
    device = [] if any(a.startswith("--device") for a in arguments) else ["--device=h100"]
    assert (
        told(
            capsys, ["train", *(a for a in arguments if a not in ("--dry-run", "--json")), *device]
        )["run"]["steps"]
        >= 50
    )


@pytest.mark.parametrize(("recipe", "settings", "device", "memory", "step", "whole"), ROWS)
def test_every_estimate_is_that_of_the_dry_run(
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    settings: str,
    device: str,
    memory: str,
    step: str,
    whole: str,
) -> None:
    flags = shlex.split(settings.strip("`")) if settings.startswith("`") else []
    plan = told(capsys, ["train", f"--recipe={recipe}", *flags, f"--device={device}"])
    said = (
        f"{plan['memory']['peak'] / 2**30:.0f} GiB",
        clock(plan["time"]["step"]),
        clock(plan["time"]["run"]),
    )
    assert plan["memory"]["fits"] and (memory, step, whole) == said


def test_there_are_tables_of_all_recipes_for_real_models() -> None:
    assert {row[0] for row in ROWS} == {"qwen3_math", "qwen3_code", "gsm8k"} and len(COMMANDS) > 10
