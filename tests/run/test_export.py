"""What `opdkit export` refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from opdkit.cli import main


def test_what_is_no_checkpoint_is_refused_with_those_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    for name, said in (
        ("checkpoint-3", "there is no folder"),
        (".", "is no checkpoint of a run"),
    ):
        assert main(["export", str(tmp_path / name), str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert said in told and f"There are {tmp_path}/checkpoint-4" in told
    assert not (tmp_path / "out").exists()
