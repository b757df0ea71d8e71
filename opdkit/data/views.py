"""Views: a rollout's question with something beside it that the student was not shown, such as a
solution, for teachers that score the same response under it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdkit.base.errors import UserError, nearest, shown
from opdkit.data.columns import look, text
from opdkit.data.messages import as_messages, is_messages
from opdkit.data.prompts import Prompts, fill, names_in
from opdkit.rewards.extract import outside_thoughts
from opdkit.types import DataRow, Prompt, Rollout

AGAIN = "Now answer the question in your own words, with your own reasoning."
TEMPLATES: dict[str, tuple[str, ...]] = {
    "question": ("{prompt}",),
    "solution": (
        "{prompt}\n\nHere is a reference solution:\n{solution}\n\nUnderstand it first. " + AGAIN,
    ),
    "demonstration": (
        "{prompt}\n\nThis is an example of a response to the question:\n{demonstration}\n\n"
        "Now answer with a response of your own, including the thinking process.",
    ),
    "hint": ("{prompt}\n\nYou are also told this:\n{hint}",),
    "feedback": (
        "{prompt}\n\nAn earlier attempt was judged as follows:\n{feedback}\n\n"
        "Now solve the original question correctly.",
    ),
    "peer": (
        "{prompt}\n\nThis attempt was right:\n{peer}\n\nNow solve the original question correctly.",
    ),
    "skill": ("{prompt}\n\nWhat was learnt from earlier attempts:\n{skill}",),
    "allowed": ("{prompt}\n\nNote: it is fit to share: {allowed}.",),
    "disallowed": ("{prompt}\n\nNote: it is not fit to share: {disallowed}.",),
    "span_types": ("{prompt}\n\nPay attention to: {span_types}.",),
    "debate": (
        "{prompt}\n\nThe question was discussed before:\n{debate}\n\nNow give your answer.",
    ),
}
# the first whose pieces are there
TEMPLATES["peer_or_feedback"] = TEMPLATES["peer"] + TEMPLATES["feedback"]


def _column(*names: str) -> Callable[[Rollout, Sequence[Rollout]], str]:
    """The first of the row's columns that holds something, as text."""

    def read(rollout: Rollout, among: Sequence[Rollout]) -> str:
        values = (as_text(rollout.row.get(name)) for name in names)
        return next((value for value in values if value), "")

    return read


def peer(rollout: Rollout, among: Sequence[Rollout]) -> str:
    """What another rollout of its group says that is right, without its thoughts; the first one
    that says something.
    """
    others = (r for r in among if r.group == rollout.group and r.id != rollout.id and r.correct)
    return next((said for r in others if (said := outside_thoughts(r.text).strip())), "")


# what a template's braces stand for, where it is no column of the row
PIECES: Mapping[str, Callable[[Rollout, Sequence[Rollout]], str]] = {
    "solution": _column("solution", "response", "answer"),
    "demonstration": _column("demonstration", "response", "solution", "answer"),
    "feedback": lambda rollout, among: rollout.feedback.strip(),
    "peer": peer,
}
# pieces that are there only once there are rollouts
LATE = {"feedback", "peer", "skill", "span_types", "debate"}


@dataclass(frozen=True)
class View:
    """How a question is written for a teacher that reads more than the student.

    A template has {prompt} and columns of the data in braces, such as "{prompt}\\n\\nA solution:
    {solution}". {solution} is the row's `solution`, else its reference response, else its answer;
    {demonstration} likewise; {feedback} what was said of the rollout itself; {peer} another right
    answer of its group. What it writes takes the question's place in the user's last message; the
    run's own `data.template` comes around it.

    Arguments:
        name: of one that is known, for its template.
        template: one's own.
    """

    name: str = ""
    template: str | None = None

    def __post_init__(self) -> None:
        if self.template is None and self.name not in TEMPLATES:
            raise ValueError(
                f"there is no view {self.name!r}{nearest(self.name, list(TEMPLATES))}: one of "
                f'{", ".join(TEMPLATES)}, or a template of your own such as "{{prompt}}\\n\\nA '
                'solution: {solution}"'
            )
        if self.template is not None and "prompt" not in names_in(self.template):
            raise ValueError(
                f"the view's template {shown(self.template)} has no {{prompt}}, so that the "
                "teacher would not read the question: put it in"
            )

    def __str__(self) -> str:
        return self.name or shown(self.template)

    @property
    def templates(self) -> tuple[str, ...]:
        """Those that it has, in the order in which they are tried."""
        return TEMPLATES[self.name] if self.template is None else (self.template,)

    def pieces(self, rollout: Rollout, among: Sequence[Rollout] = ()) -> dict[str, str] | None:
        """What the braces of the first template stand for of which none is empty, and "template"
        itself; None where there is none.

        Arguments:
            among: the rollouts of the step, of which one may be shown to another.
        """
        for template in self.templates:
            found = {name: piece(name, rollout, among) for name in names_in(template) - {"prompt"}}
            if all(found.values()):
                return {**found, "template": template}
        return None

    def row(self, rollout: Rollout, among: Sequence[Rollout] = ()) -> DataRow | None:
        """The rollout's row with the question as this view writes it; None where a piece of it is
        missing.
        """
        found = self.pieces(rollout, among)
        if found is None:
            return None
        template = found.pop("template")
        return rewritten(
            rollout.row, lambda prompt: fill(template, {**found, "prompt": prompt}.__getitem__)
        )

    @property
    def late(self) -> bool:
        """Whether what it shows is known only once there are rollouts."""
        return any(names_in(template) & LATE for template in self.templates)

    def check(self, rows: Sequence[DataRow]) -> str | None:
        """What is to be said of rows that lack what it reads; an error where all of them do."""
        if self.late:
            return None
        lacking = [row for row in rows if self.row(of_row(row)) is None]
        if len(lacking) == len(rows) and rows:
            names = sorted(set().union(*map(names_in, self.templates)) - {"prompt"})
            raise UserError(
                f"the view {self} shows the teacher {', '.join(names)}, and no row of the data has "
                f"that: add a column {names[0]!r}, or choose another view (teacher.view=...)"
            )
        if not lacking:
            return None
        return (
            f"{len(lacking)} of {len(rows)} rows have nothing for the view {self} to show (the "
            f"first is {lacking[0]['id']!r}): their responses are scored under the plain question"
        )


def seen(prompts: Prompts, prompt: Prompt, view: str) -> Prompt:
    """One of the prompts as a view of its row writes it: another prompt of the same question and
    group.
    """
    row = view_of(view).row(of_row(prompt.row))
    if row is None:
        raise nothing_to_show(prompt.row, view)
    name = view_of(view).name or "view"
    return replace(prompt, id=f"{prompt.id}:{name}", tokens=prompts.tokens_of(row))


def nothing_to_show(row: DataRow, view: str) -> UserError:
    """The error for a row whose responses cannot be written under a view."""
    return UserError(
        f"row {row['id']!r} has nothing for the view {view} to show, and its responses are to be "
        "written under it: add the column to that row, or take the row out"
    )


def view_of(value: Any, where: str = "view") -> View:
    """A view from what a run says: its name, a template with {prompt}, or a group of these."""
    if isinstance(value, View):
        return value
    if isinstance(value, str):
        value = {"template": value} if "{" in value else {"name": value}
    if not isinstance(value, Mapping) or set(value) - {"name", "template"}:
        raise UserError(
            f"{where} must be the name of a view, a template with {{prompt}} in it, or a group "
            f"with `name` or `template`, not {shown(value)}"
        )
    try:
        return View(value.get("name") or "", value.get("template"))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def piece(name: str, rollout: Rollout, among: Sequence[Rollout]) -> str:
    """What {name} stands for."""
    known = PIECES.get(name)
    return as_text(look(rollout.row, name)) if known is None else known(rollout, among)


def as_text(value: Any) -> str:
    """A column as a template writes it: of a list its entries, one after the other."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(as_text, value)))
    return str(value).strip()


def rewritten(row: DataRow, write: Callable[[str], str]) -> DataRow:
    """A row whose question is written anew: the text, or the user's last message."""
    prompt = row["prompt"]
    if not is_messages(prompt):
        asked = prompt.rstrip()
        # what ends a plain prompt, such as the end of its line, ends the new one
        return {**row, "prompt": write(asked) + prompt[len(asked) :]}
    messages = as_messages(prompt, f"row {row.get('id')!r}")
    asked = next((m for m in reversed(messages) if m["role"] == "user"), None)
    if asked is None:
        raise UserError(
            f"the prompt of row {row.get('id')!r} has no message of a user, whose question a view "
            "could write anew: take that row out, or leave the view out"
        )
    asked["content"] = write(text(asked.get("content")))
    return {**row, "prompt": messages}


def of_row(row: DataRow) -> Rollout:
    """A rollout of which nothing is known but its row."""
    return Rollout("", [], [], [], [], [], "", row=row)
