"""What a data set's columns mean: every layout that this field uses, as one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from opdkit.base.errors import UserError, nearest, shown
from opdkit.data.messages import Message, as_messages, is_messages, stringified, text
from opdkit.data.pairs import EMPTY, PAIR, with_prompt
from opdkit.rewards.extract import boxed
from opdkit.types import DataRow

CANONICAL = ("prompt", "answer", "response", "teacher", "id")
# the first one that a row has
PROMPTS = ("prompt", "messages", "question", "problem", "query", "instruction")
# then a short "solution"
ANSWERS = ("answer", "ground_truth", "final_answer", "reward_model.ground_truth")
# then a worked "solution", then a worked "answer"
RESPONSES = ("response", "completion", "output", "canonical_solution")
TEACHERS = (
    "teacher_id",
    "opd_teacher",
    "teacher",
    "teacher_tag",
    "tag",
    "domain",
    "data_source",
    "dataset",
)
NESTED_TEACHERS = tuple(
    f"{outer}.{name}" for outer in ("metadata", "extra_info") for name in TEACHERS[:4]
)
IDS = ("id", "task_id", "question_id", "uuid", "uid")

WORKED_WORDS = 20  # a "solution" of more words is a derivation, not an answer


def normalise(rows: Iterable[DataRow], columns: Mapping[str, str] | None = None) -> list[DataRow]:
    """Rows with their own columns and `prompt`, `answer`, `response`, `teacher` and `id` besides.

    prompt: text, or messages without the assistant's last turn. answer: the ground truth as text.
    response: a reference response. teacher: the key that routes the row to a teacher. These three
    are None where a row has none. id: unique. A row may also have a pair of responses, `chosen` and
    `rejected` (see `pairs`). `columns` names the column that each is read from, such as {"prompt":
    "task.text"}.
    """
    columns = dict(columns or {})
    for key in columns:
        if key not in (*CANONICAL, *PAIR):
            raise UserError(
                f"columns={{{key!r}: ...}} is not something a row "
                f"has{nearest(key, [*CANONICAL, *PAIR])}"
            )
    seen: set[str] = set()
    return [_normalise(row, index, columns, seen) for index, row in enumerate(rows)]


def _normalise(row: DataRow, index: int, columns: dict[str, str], seen: set[str]) -> DataRow:
    named = {key: _named(row, key, column, index) for key, column in columns.items()}
    row = _paired(row, named, index)
    prompt, last = _prompt(row, named, index)
    said = None if last is None else _said([last])
    refuse_surrogates(prompt, f"the prompt of row {index}")
    answer, worked = _answer(row, named)
    response = named["response"] if "response" in named else _first(row, RESPONSES)
    if response is None and row.get("test_list"):
        response = row.get("code")  # MBPP
    teacher = named["teacher"] if "teacher" in named else _first(row, TEACHERS + NESTED_TEACHERS)
    id = named["id"] if "id" in named else _first(row, IDS)
    for name, value in {"answer": answer, "response": response}.items():
        refuse_surrogates(value, f"the {name} of row {index}")
    return {
        **row,
        # a turn that only calls a tool is no text, and still a turn
        **({"messages": [*prompt, last]} if last is not None and said is None else {}),
        "prompt": prompt,
        "answer": answer,
        "response": next((text for text in (_said(response), said, worked) if text), None),
        "teacher": None if teacher in (None, "") else str(teacher),
        "id": unique(str(index if id is None else id), seen),
    }


def _paired(row: DataRow, named: DataRow, index: int) -> DataRow:
    """The row with `chosen` and `rejected` where it has such columns, and with the prompt that
    these hold.
    """
    found = {c: stringified(named.get(c, row.get(c, row.get(f"{c}_response")))) for c in PAIR}
    found = {column: value for column, value in found.items() if value not in EMPTY}
    for column, value in found.items():
        refuse_surrogates(value, f"{column} of row {index}")
    row = {**row, **found}
    if len(found) < len(PAIR):
        return row
    own = named.get("prompt", _first(row, PROMPTS))
    made = with_prompt(row, None if own in EMPTY else stringified(own), f"row {index}")
    if "prompt" in named and made.get("prompt") is not row.get("prompt"):
        named["prompt"] = made["prompt"]
    return made


def refuse_surrogates(value: Any, where: str) -> None:
    """Half of a surrogate pair, as in a text cut between two escapes, is no character."""
    texts = [str(m.get("content")) for m in value] if is_messages(value) else [value]
    for written in texts:
        if isinstance(written, str) and (found := re.search("[\ud800-\udfff]", written)):
            raise UserError(
                f"{where} holds {found[0]!r}, half of a surrogate pair, which is no character: no "
                "tokenizer can read it. Take it out, or write the text again from its source"
            )


def unique(id: str, seen: set[str]) -> str:
    """The id itself the first time, then with #2, #3 ..."""
    name, n = id, 1
    while name in seen:
        n += 1
        name = f"{id}#{n}"
    seen.add(name)
    return name


# ------------------------------------------------------------------------------------------ finding


def look(row: DataRow, column: str) -> Any:
    """A column's value, None where absent.

    `a.b` looks inside a dictionary, which may be written as JSON.
    """
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return None
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _first(row: DataRow, columns: Iterable[str]) -> Any:
    """The first of the columns that holds something."""
    return next(
        (value for column in columns if (value := look(row, column)) not in (None, "", [])), None
    )


def _named(row: DataRow, key: str, column: str, index: int) -> Any:
    value = look(row, column)
    if value is None and column not in row:
        raise UserError(
            f"columns={{{key!r}: {column!r}}} names a column that row {index} does not "
            f"have{nearest(column, list(row))}. Its columns: {', '.join(row)}"
        )
    return value


# ------------------------------------------------------------------------------------------ reading


def _prompt(row: DataRow, named: DataRow, index: int) -> tuple[str | list[Message], Message | None]:
    """The prompt, and the assistant's last message where messages end with its turn."""
    # MBPP
    value = (
        named["prompt"]
        if "prompt" in named
        else _first(row, (*PROMPTS, "text") if row.get("test_list") else PROMPTS)
    )
    if value in (None, "", []):
        empty = [column for column in PROMPTS if column in row]
        raise UserError(
            f"row {index} has no prompt: "
            + (
                f"its column {empty[0]!r} is empty"
                if empty
                else f"none of its columns ({', '.join(row)}) is a prompt"
            )
            + f". A prompt is read from {', '.join(PROMPTS)}, or from what chosen and rejected "
            "begin with. "
            + (
                "Remove the row, or fill it."
                if empty
                else "Rename a column, or name it: columns={'prompt': 'my_column'}."
            )
        )
    value = stringified(value)
    if isinstance(value, str):
        by_instruction = "prompt" not in named and value is row.get("instruction")
        return (
            f"{value}\n\n{row['input']}" if by_instruction and row.get("input") else value
        ), None
    if not is_messages(value):
        raise UserError(
            f"the prompt of row {index} is neither text nor messages, but {type(value).__name__}: "
            f"{shown(value)}. Write a text, or messages, which are a list such as "
            '[{"role": "user", "content": "..."}]'
        )
    messages = as_messages(value, f"row {index}")
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise UserError(
            f"row {index} has only an assistant's message and nothing that it answers: remove the "
            "row, or add a user's"
        )
    return messages[:-1], messages[-1]


def _said(value: Any) -> str | None:
    """A response as text: a string, or the assistant's turns of a list of messages (TRL's
    conversational completion).
    """
    value = stringified(value)
    if is_messages(value):
        said = [text(m.get("content")) for m in value if m["role"] == "assistant"]
        return "".join(said) or None
    return None if value is None else str(value)


def _answer(row: DataRow, named: DataRow) -> tuple[str | None, str | None]:
    """The ground truth, and the worked solution that came with it (None where the row has none)."""
    solution = _first(row, ("solution",))
    worked = solution if isinstance(solution, str) and _is_worked(solution) else None
    given = named["answer"] if "answer" in named else _first(row, ANSWERS)
    if given is None:
        final = boxed(solution) if isinstance(solution, str) else None
        given = final or (solution if worked is None else worked if _hashes(worked) else None)
    if isinstance(given, str) and (final := _hashes(given)) is not None:
        return final, given
    return plain(given), worked


def _is_worked(solution: str) -> bool:
    return (
        "\n" in solution.strip()
        or len(solution.split()) > WORKED_WORDS
        or _hashes(solution) is not None
    )


def _hashes(solution: str) -> str | None:
    """What stands after the last line's `#### ` (GSM8K), without thousands separators, or None."""
    found = re.search(r"(?:^|\n)#### ?([^\n#]+)\s*$", solution)
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", found[1].strip()) if found else None


def plain(value: Any) -> str | None:
    """A ground truth as text: 27.0 is "27", structures are JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return (
        json.dumps(value, ensure_ascii=False, default=str)
        if isinstance(value, list | tuple | dict)
        else str(value)
    )
