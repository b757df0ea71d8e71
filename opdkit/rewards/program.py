"""Where in a response its program stands.

By its look: a model's text is not parsed in this process. So there may be several readings, and the
first that is Python is run.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from opdkit.rewards.extract import outside_thoughts

PYTHON = ("", "python", "py", "python3", "python2", "ipython", "pycon")
# ``` or ~~~, also in a list or a quotation, and after "<answer>" or "Answer:"
_FENCE = re.compile(
    r"^(?:(?P<lead>[ \t>]*(?:[-*+]|\d+[.)])?[ \t]*)|[ \t]*(?:<\w+>|[\w*' ]+:\**)[ \t]*)"
    r"(?P<mark>`{3,}|~{3,})[ \t]*\{?\.?(?P<name>\w*)[^\n`]*$",
    flags=re.MULTILINE,
)
_MARKS = (
    ("[PYTHON]", "[/PYTHON]"),
    ("[BEGIN]", "[DONE]"),
    ("[CODE]", "[/CODE]"),
    ("<code>", "</code>"),
    ("<python>", "</python>"),
    ("<answer>", "</answer>"),
    ("\\begin{lstlisting}", "\\end{lstlisting}"),
    ("\\begin{python}", "\\end{python}"),
)
# a line of a program that is not indented; prose around a program looks otherwise
_CODE = re.compile(
    r"[ "
    r"\t]|$|#|@\w|[)\]}]|\"\"\"|'''|(?:from\s+[\w.]+\s+import|import\s+\w|def\s+\w+\s*\(|class\s+\w+"
    r"|async\s+def|if\s.*:|elif\s.*:|else\s*:|for\s.*\sin\s.*:|while\s.*:|try\s*:|except\b.*:|finally\s*:"
    r"|with\s.*:|assert\s|print\(|raise\b)|[A-Za-z_][\w.\[\]'\", ]*(?::[^=\n]*)?[-+*/|&^%]?=(?!=)"
    r"|[A-Za-z_][\w.]*\(.*\)\s*$"
)
_BEGINS = re.compile(r"(?:from\s|import\s|def\s|class\s|async\s|@)")


def answer(text: str) -> str:
    """What follows a model's thinking, its indentation kept."""
    return outside_thoughts(text)


def programs(text: str, wanted: Sequence[str]) -> list[str]:
    """The program, and other ways to read it.

    It is the last block that defines a wanted name, else the last block of Python, else the text
    as it stands, or its lines that look like a program. wanted: what tests call.
    """
    found = blocks(text, wanted)
    best = next((code for code in reversed(found) if defines(code, wanted)), (found or [text])[-1])
    ways = (best, _typed(best), *(() if found else _lines(text, wanted)))
    return [adapted(code, wanted) for code in dict.fromkeys(ways)]


def _typed(code: str) -> str:
    """A program that is shown as typed to an interpreter."""
    return re.sub(r"^(?:>>>|\.\.\.) ?", "", code, flags=re.MULTILINE)


def blocks(text: str, wanted: Sequence[str]) -> list[str]:
    """The blocks of Python, in order; of marks such as [PYTHON] only where nothing is fenced."""
    found = _fenced(text, wanted)
    for start, end in _MARKS:
        if found:
            break
        parts = text.split(end)
        inside = [part.rpartition(start)[2] for part in parts[:-1]]
        if not inside and start in text:
            inside = [text.partition(start)[2]]  # cut
        found = [code.strip("\n") for code in inside if start in text or defines(code, wanted)]
        # an end without a beginning: that stands in the prompt. After that, and after a [DONE], a
        # base model goes on with the next question.
        if end == "[DONE]" or (inside and start not in parts[0]):
            found = found[:1]
    return [textwrap.dedent(code) for code in found if code.strip()]


def _fenced(text: str, wanted: Sequence[str]) -> list[str]:
    found, at, opened = [], 0, None
    for fence in _FENCE.finditer(text):
        if opened is None:
            before = text[at : fence.start()]
            if not at and not fence["name"] and defines(before, wanted):
                found.append(before)  # the prompt had opened it
                at = fence.end()
                continue
            opened, at = fence, fence.end()
        elif fence["mark"].startswith(opened["mark"]) and not fence["name"]:
            found += _python(opened, text[at : fence.start()])
            opened, at = None, fence.end()
    return found + (_python(opened, text[at:]) if opened else [])


def _python(fence: re.Match[str], code: str) -> list[str]:
    if fence["name"].lower() not in PYTHON or not code.strip():
        return []
    if ">" in (fence["lead"] or ""):
        code = re.sub(r"^[ \t]*> ?", "", code, flags=re.MULTILINE)
    return [textwrap.dedent(code).lstrip("\n")]


def _lines(text: str, wanted: Sequence[str]) -> list[str]:
    """Of prose with a program in it: the last run of lines that look like one and define a wanted
    name.
    """
    runs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not _CODE.match(line) or (not runs[-1] and not _BEGINS.match(line)):
            runs.append([])
        else:
            runs[-1].append(line)
    codes = ["\n".join(run) for run in runs if run]
    found = [code for code in codes if defines(code, wanted)]
    return [found[-1], "\n".join(codes)] if found else []


def defines(code: str, names: Sequence[str]) -> bool:
    """Whether one of the names is defined at the start of a line, or as a method."""
    found = re.findall(
        r"^(?:(?:async[ \t]+)?def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)",
        code,
        flags=re.MULTILINE,
    )
    return any(a in names or b in names for a, b in found) or bool(_methods(code, names))


def _methods(code: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """The wanted names that are methods, with what they are called on."""
    out = []
    for name in names:
        found = re.search(
            rf"^class[ \t]+(\w+)[^\n]*:(?:\n(?:[ \t][^\n]*)?)*?\n[ \t]+(?:async[ \t]+)?def[ \t]+"
            rf"{re.escape(name)}[ \t]*\(\s*(\w*)",
            code,
            flags=re.MULTILINE,
        )
        if found:
            own = found[2] in ("self", "cls")
            out.append((name, f"{found[1]}()" if own else found[1]))
    return out


def adapted(code: str, wanted: Sequence[str]) -> str:
    """A program whose wanted function is wrapped in a class, and the function besides."""
    for name, of in _methods(code, wanted):
        if not re.search(rf"^(?:def|class)[ \t]+{re.escape(name)}\b", code, flags=re.MULTILINE):
            code += f"\ntry:\n    {name} = {of}.{name}\nexcept Exception:\n    pass\n"
    return code


def continued(text: str) -> list[str]:
    """A response as the body of a function that a prompt began, in the ways in which decoding and
    stripping change its first line.
    """
    first = next((line for line in text.splitlines() if line.strip()), "")
    depth = len(first) - len(first.lstrip())
    start = text.find(first) if first else 0
    rest = text[start:]
    lost = " " * (-depth % 4)  # of four spaces one was left out, or all
    whole = text[:start] + (lost or "    ") + rest if not depth else text[:start] + lost + rest
    ways = [text, whole]
    if first and not depth and not _BEGINS.match(first):
        ways = [whole, textwrap.indent(text, "    "), text]
    return [*dict.fromkeys(ways), *dict.fromkeys(map(body, ways))]


def body(code: str) -> str:
    """The body that a completion begins with, without what a model went on to write after it."""
    after = re.search(r"^\S", code[1:], flags=re.MULTILINE)
    return code[: after.start() + 1] if after else code
