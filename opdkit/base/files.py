"""Files and folders that appear whole or not at all, and lines of JSON of which a crash may have
cut the last.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from opdkit.base.errors import UserError, shown

PARTIAL = ".partial-"  # begins the name of what is being written
REPLACED = ".replaced-"  # of a folder whose place is being taken


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write in: at the end of the `with` block it is moved to `path`, on the disk.

    It is written beside its place, under a name that begins with `PARTIAL`, and what stood at
    `path` stays until all of it is written. After an error nothing of it is left; after a crash a
    file of that name may be, which the next writing replaces.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_whole(path: Path, text: str, errors: str = "replace") -> None:
    """A text as UTF-8, see `whole`; `errors` says what becomes of what has no UTF-8 (half of a
    surrogate pair), as in `str.encode`.
    """
    with whole(path) as file:
        file.write(text.encode("utf-8", errors=errors))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines, whole or not at all, in a folder that is made where it is not there; the
    file's name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_json(path: Path, value: Any) -> None:
    """A value as JSON, see `whole`."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """A folder that `write` fills: made beside its place and then moved there, on the disk.

    A reader never sees half of it, and a former one stays until then. After an error nothing of it
    is left; after a crash `tidy` cleans up.
    """
    try:
        write(begin_folder(final))
        place_folder(final)
    except Exception:
        tidy(final.parent)
        raise


def begin_folder(final: Path) -> Path:
    """An empty folder beside the place of another, to be filled and then moved there."""
    partial = partial_of(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def partial_of(final: Path) -> Path:
    """Where a folder is filled before it is moved to its place."""
    return final.with_name(PARTIAL + final.name)


def place_folder(final: Path) -> None:
    """Moves what `begin_folder` began to its place, once all of it is on the disk."""
    folder = final.parent
    partial, former = partial_of(final), folder / (REPLACED + final.name)
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(final, former)
    os.replace(partial, final)
    _flush(folder)
    shutil.rmtree(former, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """A folder, gone in one move: what an interruption leaves of it is no longer called so, and
    `tidy` removes it.
    """
    going = partial_of(path)
    shutil.rmtree(going, ignore_errors=True)
    os.replace(path, going)
    shutil.rmtree(going, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what an interruption left half written; what it was about to replace returns to its
    place.
    """
    for partial in folder.glob(PARTIAL + "*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
    for former in folder.glob(REPLACED + "*"):
        final = folder / former.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:
            os.replace(former, final)


def _flush(path: Path) -> None:
    """What a file holds, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False also for a name that none can have."""
    try:
        return path.exists()
    except OSError:
        return False


def read_text(path: Path, what: str) -> str:
    """A file of text that a person named; `what` it should be ("a run's YAML file")."""
    name = shown(str(path))
    try:
        if not path.exists():
            raise UserError(f"there is no file {name}: give the path of {what}")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no file of text"
            raise UserError(f"{name} is {kind}: give the path of {what}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 ({error.reason} at byte {error.start}), so it cannot be read as "
            f"{what}: save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # no permission, a name too long or with a NUL
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read ({why}): give the path of {what}") from None


def path_text(value: Any) -> Any:
    """A path as text, alone or in a dictionary; anything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) is dict:
        return {name: path_text(inner) for name, inner in value.items()}
    return value


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
    kept = "".join(text + "\n" for text, row in _parse(path) if step_of(row, path) <= last_step)
    if kept.encode() == path.read_bytes():
        return
    write_whole(path, kept)


def step_of(row: dict[str, Any], path: Path) -> int:
    """The step of a line of metrics."""
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise UserError(
            f"{path} has a line without the number of its step ({shown(row)}): it was changed "
            "after it was written. Mend or delete that line, then try again"
        )
    return step


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
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"it is a {type(row).__name__}, and each line is an object")
            parsed.append((line, row))
        except (ValueError, TypeError, RecursionError) as error:
            cut = isinstance(error, json.JSONDecodeError) and number == len(lines)
            if not cut:
                raise UserError(
                    f"Line {number} of {path} is not JSON as it was written ({str(error)[:200]}). "
                    "The file was changed or damaged since then: mend or delete that line, then "
                    "try again."
                ) from error
    return parsed
