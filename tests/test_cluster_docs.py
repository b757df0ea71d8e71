"""docs/cluster.md and its pages: tables are the planner's, drawings are those of the script, what
is written in a drawing fits into it, and commands, settings and messages are the program's.

`OPDKIT_WRITE=1 pytest tests/test_cluster_docs.py` writes tables and drawings anew.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from opdkit.base.config import parse_overrides
from opdkit.recipes.qwen3_math import qwen3_math
from opdkit.run.plan import find_device, plan
from opdkit.run.plan.layouts import markdown_table, table
from opdkit.run.settings import make_run, set_value

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "cluster"
PAGES = [ROOT / "docs" / "cluster.md", *sorted(FOLDER.glob("*.md"))]
MARKED = re.compile(r"(<!-- table (\w+) -->\n)(.*?)(<!-- /table -->)", flags=re.DOTALL)
GIB = 2**30
LARGE = {"student": "Qwen/Qwen3-8B", "teacher": "Qwen/Qwen3-32B"}
WIDE = 7.0  # pixels that a character of 12 or 13 takes at most, in the mean of a line


def run_of(**settings: Any) -> Any:
    return make_run(qwen3_math() | settings)


def one_gpu() -> str:
    away = {"kind": "local", "model": "Qwen/Qwen3-8B", "offload": True}
    few = {"kind": "local", "model": "Qwen/Qwen3-8B", "quantize": "4bit"}
    runs = {
        "as it is: all weights trained": {},
        "`teacher.offload=true`": {"teacher": away},
        "`teacher.quantize=4bit`": {"teacher": few},
        "`--lora 32`": {"lora": {"r": 32}},
        "`--student Qwen/Qwen3-4B`": {"student": "Qwen/Qwen3-4B"},
        "`--student Qwen/Qwen3-4B --lora 32`": {"student": "Qwen/Qwen3-4B", "lora": {"r": 32}},
    }
    rows = [("settings", "sample", "score", "learn", "fits")]
    for name, settings in runs.items():
        memory = plan(run_of(**settings), find_device("h100")).memory
        sizes = [f"{memory.total(phase) / GIB:.1f}" for phase in ("sample", "score", "learn")]
        rows.append((name, *sizes, "yes" if memory.fits else "no"))
    return markdown_table(rows)


def apart(text: str) -> str:
    """Of a table of layouts, those whose parts have devices of their own."""
    head, rule, *rows = text.splitlines()
    return "\n".join([head, rule, *(row for row in rows if "in turn" not in row)])


TABLES: dict[str, Callable[[], str]] = {
    "one_gpu": one_gpu,
    "one_node": lambda: table(run_of(), "8xh100"),
    "one_node_8b": lambda: table(run_of(**LARGE), "8xh100"),
    "slurm": lambda: table(run_of(**LARGE), "2x8xh100"),
    "ray": lambda: apart(table(run_of(), "8xh100")),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_tables_are_the_planners() -> None:
    made = cache(lambda name: TABLES[name]() + "\n")
    seen = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        right = MARKED.sub(lambda found: found[1] + made(found[2]) + found[4], text)
        seen |= {name for _, name, _, _ in MARKED.findall(text)}
        if os.environ.get("OPDKIT_WRITE"):
            page.write_text(right, encoding="utf-8")
        else:
            assert text == right, f"{page.name}: OPDKIT_WRITE=1 pytest {Path(__file__).name}"
    assert seen == set(TABLES)


# ------------------------------------------------------------------------------------- drawings


@pytest.fixture(scope="module")
def drawings() -> Any:
    spec = importlib.util.spec_from_file_location("drawings", FOLDER / "drawings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["drawings"] = module  # dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["drawings"]


def test_drawings_are_those_of_the_script(drawings: Any) -> None:
    for name, draw in drawings.DRAWINGS.items():
        path = FOLDER / f"{name}.svg"
        if os.environ.get("OPDKIT_WRITE"):
            path.write_text(draw(), encoding="utf-8")
        assert path.read_text(encoding="utf-8") == draw()
        page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
        assert f"({name}.svg)" in page


def test_what_is_written_in_a_drawing_fits(drawings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer than its box, none lies below it, and no box leaves the drawing."""
    boxes = []
    original = drawings.svg

    def noted(width: int, height: int, title: str, things: Any) -> str:
        for box in things:
            if isinstance(box, drawings.Box):
                assert box.x >= 0 and box.x + box.w <= width, box
                assert box.y >= 0 and box.y + box.h <= height, box
                boxes.append(box)
        return original(width, height, title, things)

    monkeypatch.setattr(drawings, "svg", noted)
    for draw in drawings.DRAWINGS.values():
        draw()
    assert len(boxes) > 20
    for box in boxes:
        for line in (box.title, *box.lines):
            assert 12 + WIDE * len(line) <= box.w, (box.title, line)
        assert 21 + drawings.LINE * len(box.lines) + 6 <= box.h, box.title


# --------------------------------------------------------------------------------------- commands


def commands() -> list[str]:
    """Commands of opdkit on the pages, with lines that go on joined."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE):
            found += [line.strip() for line in block.splitlines() if "opdkit " in line]
    return found


def test_every_command_is_one() -> None:
    """Each is parsed as it stands, to the settings of a run."""
    from opdkit.cli import COMMANDS

    named = {command.name: command for command in COMMANDS}
    seen = set()
    for line in commands():
        words = shlex.split(line.split("-m opdkit")[-1].split("opdkit ", 1)[-1], comments=True)
        words = [word for word in words if word != "&"]
        assert words[0] in named, line
        seen.add(words[0])
    assert {"train", "export", "serve-teacher"} <= seen


def test_settings_of_commands_are_settings() -> None:
    tried = 0
    for line in commands():
        if "opdkit train" in line:
            words = shlex.split(line.split("opdkit train", 1)[1], comments=True)
            values = qwen3_math()
            for key, value in parse_overrides([w for w in words if re.match(r"[a-z_.]+=", w)]):
                set_value(values, key, value)
                tried += 1
            make_run(values)
    assert tried >= 8


# --------------------------------------------------------------------------------------- messages


def test_messages_are_the_programs() -> None:
    """What the pages quote is in the source, word by word between what varies."""
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "opdkit").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for part in re.findall(r"\| seen \|.*?(?=\n\n|\Z)", text, flags=re.DOTALL):
            for row in part.splitlines()[2:]:
                quoted = re.match(r"\| `([^`]+)`", row)
                if quoted is None:
                    continue
                for piece in pieces(quoted[1]):
                    assert piece in joined, (page.name, piece)


def pieces(message: str) -> list[str]:
    """The parts of a quoted message that do not vary."""
    message = message.removeprefix("opdkit: ").removeprefix("error: ")
    fixed = re.split(
        r"\([^)]*\)|\.\.\.|http://\S+|\b[Nn]?\d+\b|\bN\b|sampler-\d|SIGKILL|joined|: ", message
    )
    return [words.strip(" .:;()") for words in fixed if len(words.split()) > 2]


# ------------------------------------------------------------------------------------------ links


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_links_lead_somewhere() -> None:
    links = [
        (page, link)
        for page in (*PAGES, ROOT / "docs" / "running.md", ROOT / "docs" / "samplers.md")
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if not link.startswith("http")
    ]
    assert len(links) > 20
    for page, link in links:
        name, _, anchor = link.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {link}"
