"""The methods' pages in docs/methods, from their docstrings: `python -m opdkit.methods.pages`
writes them and the tables that list them.

Each page has one part written by hand, between its `notes` marks; it is kept as it stands.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from opdkit.base.errors import UserError
from opdkit.curricula import Plain
from opdkit.methods import FAMILIES
from opdkit.methods.arguments import described
from opdkit.methods.explain import SHARED, Shown, arguments_of, brought, passes, table
from opdkit.methods.method import Method, function_of, load, methods
from opdkit.objective import algebra
from opdkit.objective.grammar import RolloutLoss

NOTES = (
    "<!-- notes: written by hand, kept by `python -m opdkit.methods.pages` -->",
    "<!-- /notes -->",
)
TABLE = ("<!-- methods -->", "<!-- /methods -->")
LABELS = re.compile(
    r"(?:^|(?<=\. )|(?<=\) )|(?<=\n))(Source|Departures?|Ours|Not offered|Where sources disagree): "
)


def pages(root: Path) -> dict[Path, str]:
    """Every generated file of a repository with its text: a page per method, and the files with a
    table of all.
    """
    out = {
        page: render(load(name), _notes(page))
        for name in methods()
        for page in [root / "docs" / "methods" / f"{name}.md"]
    }
    for file, folder in (
        (root / "README.md", "docs/methods/"),
        (root / "docs" / "methods.md", "methods/"),
    ):
        out[file] = between(file, TABLE, listing(folder, full=file.name != "README.md"))
    return out


def _notes(page: Path) -> str:
    if not page.exists():
        return ""
    text = page.read_text(encoding="utf-8")
    return text.partition(NOTES[0])[2].partition(NOTES[1])[0].strip()


def between(file: Path, marks: tuple[str, str], text: str) -> str:
    """A file's text with what stands between two marks replaced."""
    before, start, rest = file.read_text(encoding="utf-8").partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not start or not end:
        raise UserError(
            f"{file} lacks the marks {marks[0]} and {marks[1]}: the table of methods goes between "
            "them"
        )
    return f"{before}{start}\n{text}\n{end}{after}"


def listing(folder: str, full: bool) -> str:
    """The tables of all methods, a family each, linked to their pages; `full` adds what they need.
    In the README they are folded.
    """
    rows = {row["method"]: row for row in table()}
    parts = []
    for name, family in FAMILIES.items():
        shown = _rows([rows[m] for m in family.methods], folder, full)
        if full:
            parts.append(
                f"### {family.title[0].upper()}{family.title[1:]}\n\n{family.about}\n\n{shown}"
            )
        else:
            listed = ", ".join(family.methods)
            title = f"<b>{family.title}</b> ({name}): {listed}"
            parts.append(
                f"<details><summary>{title}</summary>\n\n{family.about}\n\n{shown}\n\n</details>"
            )
    return "\n\n".join(parts)


def _rows(rows: Sequence[Mapping[str, str]], folder: str, full: bool) -> str:
    """A table of methods."""
    columns = ("method", "idea", *(("needs", "passes") if full else ()), "source")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = {
            **row,
            "method": f"[{row['method']}]({folder}{row['method']}.md)",
            "source": arxiv(row["source"]),
            "idea": escape(row["idea"]),
        }
        lines.append("| " + " | ".join(cells[c].replace("|", "\\|") for c in columns) + " |")
    return "\n".join(lines)


def arxiv(source: str) -> str:
    number = source.removeprefix("arXiv:")
    return f"[arXiv {number}](https://arxiv.org/abs/{number})" if number else ""


def render(method: Method, notes: str) -> str:
    """A method's page."""
    needed = [f"- {x}" for x in str(method.needs).split(", ")]
    cost = [f"{i}. {x}" for i, x in enumerate(passes(method), 1)]
    if any(isinstance(term.loss, RolloutLoss) for term in method.objective.terms):
        cost.append(
            "\nThe head is projected twice: a loss over whole rollouts needs all their log-probs "
            "first."
        )
    if method.curriculum != Plain():
        cost.append(f"\nCurriculum: `{method.curriculum}`.")
    cost += [f"\nUnless the run says otherwise, `{model}`." for model in brought(method)]
    parts = [
        f"# {method.name}",
        prose(method),
        "## In practice",
        "\n\n".join([NOTES[0], *([notes] if notes else []), NOTES[1]]),
        "## Arguments",
        arguments(method),
        "## As it prints",
        fence(str(method)),
        "## What it reads",
        "\n".join(needed),
        "## Forward passes of a step, besides sampling",
        "\n".join(cost),
        "## As a weight",
        weight(method),
        "---\n[All methods](../methods.md). This page is made by `python -m opdkit.methods.pages` "
        f"from `{_file(method.name)}`; `opdkit explain {method.name}` prints the same in a "
        "terminal.",
    ]
    return "\n\n".join(parts) + "\n"


def _file(name: str) -> str:
    return str(function_of(name).__module__).replace(".", "/") + ".py"


def fence(text: str) -> str:
    return f"```text\n{text}\n```"


def prose(method: Method) -> str:
    """The docstring: idea, formula, explanation; source, departures and what is not offered as a
    list.
    """
    out = []
    for block in described(method.doc)[0].split("\n\n"):
        if all(line.startswith("    ") for line in block.splitlines()):
            out.append(fence(inspect.cleandoc(block)))
            continue
        text = " ".join(block.split())
        pieces = LABELS.split(text)
        if pieces[0]:
            out.append(escape(pieces[0].strip()))
        if len(pieces) > 1:
            labelled = zip(pieces[1::2], pieces[2::2])
            out.append(
                "\n".join(f"- **{label}:** {escape(words.strip())}" for label, words in labelled)
            )
    return "\n\n".join(out)


def escape(text: str) -> str:
    """Text of a docstring as Markdown: signs of formulas stay signs, names of methods
    become links.
    """
    pieces = text.split("`")  # every second one is code
    pieces[::2] = [re.sub(r"([*<~])", r"\\\1", p) for p in pieces[::2]]
    for i, code in enumerate(pieces):
        if i % 2:
            pieces[i] = (
                f"[`{code}`]({name}.md)"
                if (name := code.partition("(")[0]) in methods()
                else f"`{code}`"
            )
    return "".join(pieces)


def arguments(method: Method) -> str:
    """Tables of the method's own arguments and of the ratio layer's, and how they are given."""
    if not method.arguments:
        return "None."
    own, layer = arguments_of(method)
    parts = [argument_table(own)]
    if layer:
        parts += [f"The {SHARED}:", argument_table(layer)]
    name, default = method.arguments[0]
    # as YAML writes several values
    default = list(default) if isinstance(default, tuple) else default
    parts.append(
        f"On the command line `method.{name}={default}`, in a run's file `method: {{name: "
        f"{method.name}, {name}: {default}}}`."
    )
    return "\n\n".join(parts)


def argument_table(shown: list[Shown]) -> str:
    """Arguments with default, meaning, and where the default comes from."""
    lines = ["| argument | default | meaning | default from |", "|---|---|---|---|"]
    for name, value, said in shown:
        cells = (f"`{name}`", f"`{value!r}`", escape(said.meaning), escape(said.source))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def weight(method: Method) -> str:
    """What `other * method` multiplies by."""
    try:
        found = algebra.weight(method.objective, method.name)
    except UserError as reason:
        return f"None: {escape(str(reason).partition(': ')[2].partition('. ')[0])}."
    return (
        f"`opd * {method.name}` multiplies every term of the left method by\n\n{fence(str(found))}"
    )


def main(root: Path) -> int:
    """Write every page; 1 where one has no words of its own yet."""
    if not (root / "docs" / "methods.md").exists():
        raise UserError(f"{root} is no checkout of opdkit: it has no docs/methods.md")
    (root / "docs" / "methods").mkdir(exist_ok=True)
    known = pages(root)
    for page in (root / "docs" / "methods").glob("*.md"):
        if page not in known:
            print(f"{page}: no such method; delete it if it was renamed")
    bare = []
    for file, text in known.items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {file}")
        if file.parent.name == "methods" and not _notes(file):
            bare.append(file.stem)
    if bare:
        print(
            f"no notes yet on when to use {', '.join(bare)}: write them between the notes marks of "
            "their pages"
        )
    return bool(bare)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2])))
