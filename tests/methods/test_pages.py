"""The pages of methods say what the code does: writing them again changes nothing, and each has
words of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.methods.method import load, methods
from opdkit.methods.pages import NOTES, TABLE, arxiv, between, escape, main, pages, prose, render

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "methods"


def test_writing_the_pages_again_changes_nothing():
    stale = [
        file.name
        for file, text in pages(ROOT).items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"run python -m opdkit.methods.pages: {stale}"


def test_there_is_a_page_for_every_method_and_no_other():
    assert {page.stem for page in DOCS.glob("*")} == set(methods())


@pytest.mark.parametrize("name", methods())
def test_each_page_says_when_what_it_costs_and_what_it_is_sensitive_to(name):
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    notes = text.partition(NOTES[0])[2].partition(NOTES[1])[0]
    assert [
        word for word in ("**When.**", "**Cost.**", "**Sensitive to**") if word not in notes
    ] == []
    assert 60 <= len(notes.split()) <= 220


def test_links_lead_somewhere():
    for page in [*DOCS.glob("*.md"), ROOT / "docs" / "methods.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_a_page_holds():
    text = render(load("iw_opd"), "**When.** Sometimes.")
    assert text.startswith("# iw_opd\n\nIW-OPD: early tokens")
    for part in (
        "```text\ncredit r_t = log(pi_t/pi_s),  weight 1 + gamma",
        "- **Source:** arXiv 2606.22600.",
        f"{NOTES[0]}\n\n**When.** Sometimes.\n\n{NOTES[1]}",
        "| `gamma` | `0.5` |",
        "`method: {name: iw_opd, gamma: 0.5}`",
        "PolicyGradient(log(teacher/student)) * (1 + 0.5 * (1 - "
        "SpentBefore(log(teacher/student))))",
        "- teacher log-prob of the sampled token",
        "1. teacher, without gradient\n2. student, with gradient",
        "`opd * iw_opd` multiplies every term of the left method by\n\n```text\n1 + 0.5",
    ):
        assert part in text
    assert "Curriculum: `PassRates(window=8)`." in render(load("paced"), "")
    assert "\n\nNone: its loss is not multiplied by any signal.\n" in render(load("gkd"), "")


def test_the_guide_leads_to_every_method():
    guide = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition(TABLE[0])[0]
    assert [name for name in methods() if not re.search(rf"\b{name}\b", guide)] == []


def test_sources_and_departures_are_set_apart():
    lines = prose(load("gkd")).splitlines()
    assert [line.split(":**")[0] for line in lines if line.startswith("- **")] == [
        "- **Source",
        "- **Departures",
    ]


def test_signs_of_formulas_stay_signs():
    assert escape("a * b < c, p~") == r"a \* b \< c, p\~"
    assert (
        escape("`a * b`, see `gopd(scale=2)` and `floor`")
        == "`a * b`, see [`gopd(scale=2)`](gopd.md) and `floor`"
    )
    assert (
        arxiv("arXiv:2606.22600") == "[arXiv 2606.22600](https://arxiv.org/abs/2606.22600)"
        and arxiv("") == ""
    )


def test_notes_survive_and_missing_ones_are_named(tmp_path, capsys):
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    for file in ("README.md", "docs/methods.md"):
        (tmp_path / file).write_text(f"before\n{TABLE[0]}\nstale words\n{TABLE[1]}\nafter\n")
    (tmp_path / "docs" / "methods" / "tip.md").write_text(
        f"old {NOTES[0]} My words. {NOTES[1]} old"
    )
    (tmp_path / "docs" / "methods" / "gone.md").write_text("")
    assert main(tmp_path) == 1
    said = capsys.readouterr().out
    assert (
        "gone.md: no such method" in said
        and "no notes yet on when to use opd, gkd" in said
        and "tip," not in said
    )
    assert (
        f"{NOTES[0]}\n\nMy words.\n\n{NOTES[1]}"
        in (tmp_path / "docs" / "methods" / "tip.md").read_text()
    )
    readme = (tmp_path / "README.md").read_text()
    assert (
        readme.startswith("before\n") and readme.endswith("after\n") and "stale words" not in readme
    )
    assert "| [tip](docs/methods/tip.md) | reverse KL on" in readme


def test_a_file_without_marks_and_a_folder_without_docs_are_refused(tmp_path):
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(UserError, match="lacks the marks"):
        between(tmp_path / "README.md", TABLE, "")
    with pytest.raises(UserError, match="no checkout"):
        main(tmp_path)
