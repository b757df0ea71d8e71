"""docs/architecture.md shows the rooms as they are.

`OPDKIT_WRITE=1 pytest tests/test_architecture.py` draws them anew.
"""

import os
import re
from functools import reduce
from pathlib import Path

from tests.test_imports import LAYERS, ROOT, edges

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
DRAWING = re.compile(r"(<!-- rooms -->\n```mermaid\n)(.*?)(```\n<!-- /rooms -->)", flags=re.DOTALL)
ARROW = re.compile(r"^ +(\w+) --> (\w+)$", flags=re.MULTILINE)


def arrows() -> set[tuple[str, str]]:
    """Room to imported room, but for those that follow from others: a -> c from a -> b -> c."""
    every = {(a, b) for a, b in edges() if a != b}
    below: dict[str, set[str]] = {}
    for room in LAYERS:  # each after all that it imports
        imported = [b for a, b in every if a == room]
        below[room] = reduce(set.union, (below[b] for b in imported), set(imported))
    return {(a, b) for a, b in every if not any((a, c) in every and b in below[c] for c in LAYERS)}


def drawn() -> str:
    """The drawing: from those that stand on all others down to those that stand on none."""
    order = {room: n for n, room in enumerate(reversed(LAYERS))}
    lines = sorted(arrows(), key=lambda arrow: (order[arrow[0]], order[arrow[1]]))
    return "flowchart TD\n" + "".join(f"    {a} --> {b}\n" for a, b in lines)


def test_the_drawing_is_that_of_the_imports() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if os.environ.get("OPDKIT_WRITE"):
        page = DRAWING.sub(lambda found: found[1] + drawn() + found[3], page)
        PAGE.write_text(page, encoding="utf-8")
    [(_, drawing, _)] = DRAWING.findall(page)
    assert set(ARROW.findall(drawing)) == arrows()


def test_files_that_the_page_names_are_there() -> None:
    named = re.findall(r"`([\w/]+/[\w/]*(?:\.py)?)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20 and [name for name in named if not (ROOT / name).exists()] == []


def test_every_room_is_described() -> None:
    rooms = {room for room in LAYERS if not room.startswith("__")}
    page = PAGE.read_text(encoding="utf-8")
    assert {room for room in rooms if f"| `{room}" not in page} == set()
