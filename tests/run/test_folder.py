"""The folder of a run on several machines is one that all of them see."""

from __future__ import annotations

from pathlib import Path

import pytest

from opdkit import UserError
from opdkit.run.folder import refuse_apart
from opdkit.train.mesh import ALONE, Mesh
from tests.train.test_mesh import on_each


def test_a_folder_of_one_machine_alone_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """The third process is on another machine, whose folder of that name is another one."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    refuse_apart(tmp_path / "nowhere", ALONE)
    on_each(3, lambda mesh: refuse_apart(tmp_path / "a", mesh))

    def refused(mesh: Mesh) -> None:
        with pytest.raises(UserError, match="process 2 does not see"):
            refuse_apart(tmp_path / ("b" if mesh.rank == 2 else "a"), mesh)

    on_each(3, refused)
    assert not list((tmp_path / "a").iterdir()), "what was tried is gone again"
