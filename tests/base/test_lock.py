"""A folder has one writer; the lock ends with its process, a start that fails leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.base.lock import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from opdkit.base.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_the_second_is_refused_with_the_process_of_the_first_and_sigkill_frees_it(
    tmp_path: Path,
) -> None:
    child = holder(tmp_path / "run")
    with (
        pytest.raises(UserError, match=f"another process .process {child.pid} on "),
        locked(tmp_path / "run"),
    ):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (tmp_path / "run" / LOCK).exists()  # left, and nobody's
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / "run" / LOCK).exists()


def test_two_of_one_process_are_two(tmp_path: Path) -> None:
    """Such as two threads of a notebook."""
    with (
        locked(tmp_path),
        pytest.raises(UserError, match=f"process {os.getpid()} on "),
        locked(tmp_path),
    ):
        pass


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    """A worker that outlives its parent holds no folder."""
    waiting, told = os.pipe()
    context = locked(tmp_path)
    context.__enter__()
    child = os.fork()
    if not child:
        os.close(told)
        os.read(waiting, 1)  # until the parent has tried
        os._exit(0)
    context.__exit__(None, None, None)
    with locked(tmp_path):
        pass
    os.close(told)
    os.waitpid(child, 0)
    os.close(waiting)


def test_only_folders_that_it_made_and_that_are_empty_go(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "kept").write_text("")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "kept"]
    with locked(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "kept").exists()


@pytest.mark.parametrize("kind", ["file", "inside a file", "link to nothing"])
def test_what_is_no_folder_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    folder = {"file": "file", "inside a file": "file/run", "link to nothing": "link"}[kind]
    with (
        pytest.raises(UserError, match=r"cannot be written .*choose another"),
        locked(tmp_path / folder),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]
