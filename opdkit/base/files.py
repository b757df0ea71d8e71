"""Files that appear whole or not at all, and lines of JSON of which a crash may have cut
the last.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from opdkit.base.errors import UserError


def write_whole(path: Path, page: str) -> None:
    """A page that appears whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(partial, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file, none if it is absent; a last line that is still being
    written is left out.
    """
    return [row for _, row in _parse(path)]


def truncate_metrics(path: Path, last_step: float = math.inf) -> None:
    """Drop the lines after `last_step` and a half-written last line, so that a resumed run ends
    with the file of an unbroken one.

    Works on any JSONL file whose lines have a "step". The file is replaced in one move.
    """
    if not path.exists():
        return
    kept = "".join(text + "\n" for text, row in _parse(path) if row["step"] <= last_step)
    if kept.encode() == path.read_bytes():
        return
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(kept, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def _parse(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line as text and as a dict.

    Only the last line may be broken: that is what a crash or a running writer leaves.
    """
    if not path.exists():
        return []
    # Split at "\n" alone: str.splitlines also cuts at separators that JSON allows inside strings.
    lines = [
        line
        for line in path.read_bytes().decode("utf-8", errors="replace").split("\n")
        if line.strip()
    ]
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append((line, json.loads(line)))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(
                    f"Line {number} of {path} is not JSON ({error.msg}). The file was changed or "
                    "damaged after it was written: mend or delete that line, then try again."
                ) from error
    return parsed


def write_json(path: Path, value: Any) -> None:
    """A JSON file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
