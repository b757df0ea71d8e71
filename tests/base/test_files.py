"""A file or a folder is there whole or not at all, whenever the power fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opdkit.base.files import (
    PARTIAL,
    REPLACED,
    tidy,
    truncate_metrics,
    whole,
    write_folder,
    write_json,
    write_whole,
)


def folder(path: Path, text: str) -> None:
    def fill(place: Path) -> None:
        (place / "inner").mkdir()
        (place / "inner" / "words").write_text(text)

    write_folder(path, fill)


def lines(path: Path, text: str) -> None:
    """`truncate_metrics` drops the line that is only half there."""
    path.write_text('{"step": 1}\n{"ste')
    truncate_metrics(path)


WRITERS: dict[str, Callable[[Path, str], None]] = {
    "text": write_whole,
    "json": write_json,
    "folder": folder,
    "lines": lines,
}


def content(path: Path) -> str:
    return (path / "inner" / "words" if path.is_dir() else path).read_text()


def killed_before_the_move(writer: str, path: Path) -> None:
    os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    WRITERS[writer](path, "new")


@pytest.mark.parametrize("writer", ["text", "json", "folder"])
def test_killed_between_writing_and_moving_the_old_content_stays(
    writer: str, tmp_path: Path
) -> None:
    path = tmp_path / "it"
    WRITERS[writer](path, "old")
    before = content(path)
    child = multiprocessing.get_context("spawn").Process(
        target=killed_before_the_move, args=(writer, path)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    # the new one stood complete beside the old one
    tidy(tmp_path)
    assert content(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_moved_is_on_the_disk_and_so_is_its_new_name(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flushed before it is moved: else a power cut leaves the new name with empty content. Its
    folder flushed after: else the old name is back.
    """
    path, events = tmp_path / "it", []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def moved(a: Any, b: Any) -> None:
        events.append(("move", Path(a).name))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", moved)
    WRITERS[writer](path, "new")
    partial = PARTIAL + "it"
    at = events.index(("move", partial))
    assert ("flush", partial) in events[:at]
    assert events[at + 1 :] == [("flush", tmp_path.name)]
    if writer == "folder":
        assert {("flush", "inner"), ("flush", "words")} <= set(events[:at])


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_writing_leaves_the_old_content_and_nothing_beside_it(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "it"
    path.write_text("old")
    with pytest.raises(type(error)), whole(path) as file:
        file.write(b"half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["it"] and path.read_text() == "old"


def test_what_had_been_replaced_half_way_returns(tmp_path: Path) -> None:
    """Killed between the two moves of a folder: the former stands aside, the new one is whole but
    was never named. What was being written goes, files too.
    """
    (tmp_path / f"{REPLACED}it").mkdir()
    (tmp_path / f"{PARTIAL}it").mkdir()
    (tmp_path / f"{PARTIAL}it.json").write_text("{")
    tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_text_without_utf8_is_written_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "it"
    write_whole(path, "a\ud800b")
    assert path.read_bytes() == b"a?b"
    write_whole(path, "a\ud800b", errors="backslashreplace")
    assert path.read_bytes() == b"a\\ud800b"
