"""What is wrong with the files of a checkpoint that could not be loaded: pointers instead of files,
web pages, files that are cut off or empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

POINTER = b"version https://git-lfs"
LOOKED_AT = ("*.safetensors", "*.json", "*.jinja", "*.model")
LONGEST_HEADER = 100 << 20  # bytes; safetensors refuses longer ones


def damages(folder: Path) -> Iterator[str]:
    """What can be said of each damaged file, with what to do."""
    for path in sorted(p for pattern in LOOKED_AT for p in folder.glob(pattern)):
        try:
            said = _damage(path)
        except OSError as error:
            said = f"cannot be opened ({error.strerror or error}): check its permissions"
        if said:
            yield f"{path.name} {said}"


def _damage(path: Path) -> str | None:
    size = path.stat().st_size
    if not size:
        return "is empty: download or save it again"
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(POINTER):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file itself: download it again"
    if path.suffix == ".safetensors":
        return _tensors(path, size)
    return _json(path) if path.suffix == ".json" else None


def _json(path: Path) -> str | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({error}): download or save it again"
    return None if isinstance(value, dict | list) else "holds no settings: download it again"


def _tensors(path: Path, size: int) -> str | None:
    """Of a safetensors file, whose header says how long it must be."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            return f"is no whole safetensors file ({size} bytes): download or save it again"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "is no safetensors file: download or save it again"
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        return f"is cut off: {size} of its {whole} bytes are there. Download or save it again"
    return None
