"""Views: what a teacher's question becomes, from which pieces, and what is said where there are
none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from opdkit import UserError
from opdkit.data import Prompts
from opdkit.data.views import TEMPLATES, View, of_row, seen, view_of
from opdkit.types import Rollout
from tests.common.tiny import tiny_tokenizer

ROW = {"id": "a", "prompt": "2+2?", "answer": "4", "response": None, "teacher": None}


def rollout(id: str = "0/a/0", **fields: Any) -> Rollout:
    return replace(of_row(fields.pop("row", ROW)), id=id, group=fields.pop("group", "a"), **fields)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"solution": "2 and 2 is 4", "response": "so 4"}, "2 and 2 is 4"),
        ({"response": "so 4"}, "so 4"),
        ({}, "4"),  # an answer is the shortest of solutions
    ],
)
def test_a_solution_is_the_column_else_the_response_else_the_answer(row: Any, shown: str) -> None:
    asked = View("solution").row(rollout(row={**ROW, **row}))
    assert asked is not None and asked["prompt"].startswith("2+2?\n") and shown in asked["prompt"]
    assert asked["answer"] == "4"  # all else of the row stays


def test_a_template_of_ones_own_reads_columns_and_what_is_inside_them() -> None:
    row = {**ROW, "meta": {"hint": ["add", "both"]}}
    view = view_of("{prompt} Hint: {meta.hint}. {{literally}}")
    assert view.row(rollout(row=row)) == {**row, "prompt": "2+2? Hint: add, both. {literally}"}


def test_what_a_row_holds_is_never_read_as_a_template() -> None:
    row = {**ROW, "prompt": "{answer}", "solution": "{prompt} {0} {missing}"}
    asked = view_of("{prompt}|{solution}").row(rollout(row=row))
    assert asked is not None and asked["prompt"] == "{answer}|{prompt} {0} {missing}"


def test_what_ends_a_plain_question_ends_it_with_what_is_shown_too() -> None:
    row = {**ROW, "prompt": "2+2?\n"}
    asked = view_of("{prompt} = {answer}").row(rollout(row=row))
    assert asked is not None and asked["prompt"] == "2+2? = 4\n"


def test_of_messages_the_users_last_one_is_written_anew() -> None:
    before = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "2+2?"},
    ]
    row = {**ROW, "prompt": before}
    asked = view_of("{prompt} = {answer}").row(rollout(row=row))
    assert asked is not None
    assert asked["prompt"] == [*before[:3], {"role": "user", "content": "2+2? = 4"}]
    assert before[3]["content"] == "2+2?"  # the student's own is left alone


def test_a_peer_is_another_right_answer_of_the_group_without_its_thoughts() -> None:
    right = rollout("0/a/1", text="<think>hm, 5?</think>It is 4.", correct=True)
    wrong = rollout("0/a/2", text="5", correct=False)
    elsewhere = rollout("0/b/0", text="7", correct=True, group="b")
    among = [elsewhere, wrong, right]
    view = View("peer")
    found = view.row(wrong, among)
    assert found is not None and "It is 4." in found["prompt"] and "hm" not in found["prompt"]
    # its own success is never shown to a rollout
    assert view.row(right, among) is None
    assert view.row(elsewhere, among) is None


def test_of_peer_and_feedback_the_second_is_read_where_there_is_no_first() -> None:
    alone = rollout(text="5", correct=False, feedback="expected 4")
    peer = rollout("0/a/1", text="4", correct=True)
    view = View("peer_or_feedback")
    first, second = view.row(alone, [alone, peer]), view.row(alone, [alone])
    assert first is not None and "This attempt was right:\n4" in first["prompt"]
    assert "expected 4" not in first["prompt"]
    assert second is not None and "expected 4" in second["prompt"]
    assert view.row(replace(alone, feedback=""), [alone]) is None


def test_every_known_view_has_the_question_in_it() -> None:
    for name in TEMPLATES:
        assert all("{prompt}" in template for template in View(name).templates)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("solutoin", "did you mean 'solution'"),
        ("Look: {solution}", r"has no \{prompt\}"),
        ("{prompt} {", "cannot be read"),
        ({"nam": "solution"}, "must be the name of a view"),
        (7, "must be the name of a view"),
    ],
)
def test_what_is_no_view_is_refused(value: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        view_of(value)


def test_rows_without_anything_to_show_are_told_and_refused_where_no_row_has() -> None:
    rows = [{**ROW, "id": "a", "hint": "x"}, {**ROW, "id": "b"}]
    view = view_of("hint")
    note = view.check(rows)
    assert note is not None and note.startswith("1 of 2 rows") and "'b'" in note
    assert view.check(rows[:1]) is None
    with pytest.raises(UserError, match="no row of the data has that: add a column 'hint'"):
        view.check(rows[1:])
    assert View("peer").check(rows) is None  # known only once there are rollouts


def test_a_prompt_through_a_view_is_another_of_the_same_question() -> None:
    tokenizer = tiny_tokenizer()
    prompts = Prompts([{**ROW, "hint": "add"}, {**ROW, "id": "b"}], tokenizer, template="{prompt}!")
    other = seen(prompts, prompts[0], "hint")
    assert (other.id, other.question, other.group) == ("a:hint", "a", "a")
    # the run's own template comes around what the view writes
    assert tokenizer.decode(other.tokens).count("You are also told this:\nadd!<|im_end|>") == 1
    with pytest.raises(UserError, match="row 'b' has nothing for the view hint"):
        seen(prompts, prompts[1], "hint")
