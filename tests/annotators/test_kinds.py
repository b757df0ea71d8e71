"""Which annotators a run has: its words over those of its method."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from opdkit import UserError
from opdkit.annotators import AnnotateContext, AnnotatorSettings, annotators_of, kinds
from opdkit.annotators.debate import DebateSettings
from opdkit.annotators.skills import SkillSettings
from opdkit.annotators.spans import SpanSettings
from opdkit.run.settings import Run, make_run
from opdkit.types import Rollout

USUAL = {"spans": {"kind": "spans", "by": "rules", "coverage": 0.1}}


@pytest.mark.parametrize(
    ("mine", "made"),
    [
        ({}, {"spans": SpanSettings("rules", coverage=0.1)}),
        ({"spans": None}, {}),
        ({"spans": {"by": "model"}}, {"spans": SpanSettings("model", coverage=0.1)}),
        ({"spans": "column:steps"}, {"spans": SpanSettings("column:steps")}),
        ({"spans": {"kind": "spans", "by": "model"}}, {"spans": SpanSettings("model")}),
        ({"spans": "skills:rules"}, {"spans": SkillSettings("rules")}),
        (
            {"more": "skills:rules"},
            {"spans": SpanSettings("rules", coverage=0.1), "more": SkillSettings("rules")},
        ),
    ],
)
def test_what_a_run_says_wins_name_by_name(mine: dict[str, Any], made: dict[str, Any]) -> None:
    assert annotators_of(mine, USUAL) == made


def test_overrides_change_text_and_groups() -> None:
    values = {"student": "s", "teacher": "t", "data": "d"}

    def of(*overrides: str) -> dict[str, AnnotatorSettings]:
        return annotators_of(make_run(values, overrides).annotate)

    assert of("annotate.spans=rules") == {"spans": SpanSettings("rules")}
    assert of("annotate.spans.by=model") == {"spans": SpanSettings("model")}
    assert of("annotate.spans=rules", "annotate.spans.coverage=0.1") == {
        "spans": SpanSettings("rules", coverage=0.1)
    }
    assert of("annotate.debate.of=[a, b]", "annotate.skills=rules") == {
        "debate": DebateSettings(("a", "b")),
        "skills": SkillSettings("rules"),
    }


@pytest.mark.parametrize(
    ("annotate", "told"),
    [
        ({"x": "spanz"}, "annotate.x: 'spanz' is no kind of annotator; did you mean 'spans'?"),
        ({"x": 3}, "must be a kind of annotator"),
        ({"spans": "ruls"}, "did you mean 'rules'?"),
        ({"debate": {"kind": "debate", "of": ["a", "a"]}}, "names one teacher twice"),
        ({"debate": "debate:a"}, "nothing may follow"),
        ({"spans": {"kind": "spans", "coverage": 2}}, "above 0 and at most 1"),
        ({"s": {"kind": "skills", "kep": 2}}, "unknown key 'annotate.s.kep'; did you mean 'keep'"),
    ],
)
def test_wrong_settings_are_errors_before_anything_else(annotate: Any, told: str) -> None:
    with pytest.raises(UserError) as error:
        make_run({"student": "s", "teacher": "t", "data": "d", "annotate": annotate})
    assert told in str(error.value)


def test_settings_without_a_kind_are_those_of_the_methods_own() -> None:
    """A run cannot know them yet; with the method they are checked."""
    run = Run("s", "t", "d", annotate={"key": {"coverage": 0.2}})
    usual = {"key": {"kind": "spans"}}
    assert annotators_of(run.annotate, usual) == {"key": SpanSettings(coverage=0.2)}
    with pytest.raises(UserError, match="'key' is no kind of annotator"):
        annotators_of(run.annotate)


def test_the_example_of_a_kind_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in `AnnotatorSettings`: it marks what the student found improbable."""
    lines = (AnnotatorSettings.__doc__ or "").splitlines()
    example = dedent("\n".join(x for x in lines if x.startswith(" " * 8) or not x))
    head = (
        "from __future__ import annotations\nimport math\nfrom dataclasses import dataclass, "
        "replace\nfrom opdkit.annotators import Annotator, AnnotatorContext, AnnotatorSettings\n"
    )
    path = tmp_path / "rare_annotator.py"
    path.write_text(head + example)
    spec = importlib.util.spec_from_file_location("rare_annotator", path)
    assert spec is not None and spec.loader is not None
    own = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rare_annotator", own)
    spec.loader.exec_module(own)
    monkeypatch.setitem(kinds.KINDS, "rare", own.RareSettings)
    [settings] = annotators_of({"x": {"kind": "rare", "below": 0.1}}).values()
    made = Rollout("0", [1], [5, 6], [True] * 2, [-0.1, -3.0], [-0.1, -3.0], "g")
    context: Any = None
    [noted], memory = settings.open(context).annotate([made], AnnotateContext(0, 0))
    assert noted.marks == {"rare": [False, True]} and memory == {}
