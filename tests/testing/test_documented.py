"""What docs/writing_methods.md says there is to build with is there, and what it builds passes."""

from __future__ import annotations

import re
from pathlib import Path

import opdkit.objective
from opdkit.methods.method import load
from opdkit.objective.grammar import DENOMINATORS
from opdkit.testing import check

PAGE = (Path(__file__).parents[2] / "docs" / "writing_methods.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## What there is\n")[2].partition("\n## ")[0]


def test_the_parts_in_the_table_are_there() -> None:
    named = set(re.findall(r"`([A-Z]\w+)", SECTION.partition("```")[0]))
    assert len(named) > 30
    assert named - set(opdkit.objective.__all__) == set()


def test_every_denominator_is_named() -> None:
    said = PAGE.partition("## Denominators\n")[2].partition("\n## ")[0]
    assert set(re.findall(r'`"(\w+)"`', said)) == set(DENOMINATORS)


def test_the_method_of_the_page_passes_every_check(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", SECTION, re.S)
    assert code is not None
    (tmp_path / "mine.py").write_text(code[1], encoding="utf-8")
    name = f"{tmp_path / 'mine.py'}:gentle"
    for arguments in ({}, {"divergence_mask": 0.15}):
        report = check(load(name, **arguments))
        assert report.passed, str(report)
    assert "DivergenceMask" in str(load(name, divergence_mask=0.15))
    assert load(f"{name} + 0.1 * opd").needs.models >= {"reference", "teacher"}
