"""Pairs of responses in every layout, and what is refused of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opdkit.base.errors import UserError
from opdkit.data import Prompts
from opdkit.data.columns import normalise
from opdkit.data.pairs import pair_of
from tests.common.tiny import tiny_tokenizer

USER, SKY = {"role": "user", "content": "What colour is the sky?"}, "What colour is the sky?"
SYSTEM = {"role": "system", "content": "Be brief."}
BLUE, GREEN = ({"role": "assistant", "content": f"It is {c}."} for c in ("blue", "green"))
ANSWERS = ("It is blue.", "It is green.")
HH = "\n\nHuman: {}\n\nAssistant:"


def read(row: dict[str, Any], **options: Any) -> tuple[Any, tuple[str, str]]:
    """The prompt and the pair of a row."""
    [made] = normalise([row], **options)
    return made["prompt"], pair_of(made)


@pytest.mark.parametrize(
    ("row", "prompt", "pair"),
    [
        ({"prompt": SKY, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}, SKY, ANSWERS),
        ({"question": SKY, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}, SKY, ANSWERS),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, [USER], ANSWERS),
        ({"prompt": SKY, "chosen": [BLUE], "rejected": ANSWERS[1]}, SKY, ANSWERS),
        # the prompt is what both conversations begin with
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER], ANSWERS),
        (
            {
                "chosen": [SYSTEM, USER, GREEN, USER, BLUE],
                "rejected": [SYSTEM, USER, GREEN, USER, GREEN],
            },
            [SYSTEM, USER, GREEN, USER],
            ANSWERS,
        ),
        # and where a row says it again, all that comes before the answer
        (
            {"prompt": SKY, "chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]},
            [SYSTEM, USER],
            ANSWERS,
        ),
        ({"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER], ANSWERS),
        (
            {"messages": [USER, BLUE], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            [USER],
            ANSWERS,
        ),
        ({"prompt": [USER], "chosen": [USER, BLUE], "rejected": [GREEN]}, [USER], ANSWERS),
        (
            {"prompt": SKY, "chosen": [SYSTEM, USER, BLUE], "rejected": ANSWERS[1]},
            [SYSTEM, USER],
            ANSWERS,
        ),
        (
            {"prompt": SKY, "chosen": [BLUE], "rejected": [SYSTEM, USER, GREEN]},
            [SYSTEM, USER],
            ANSWERS,
        ),
        # texts that begin alike, to the last space before they part
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            "The sky is",
            (" blue.", " black."),
        ),
        ({"chosen": "Q: 1+1?\n2", "rejected": "Q: 1+1?\n3"}, "Q: 1+1?\n", ("2", "3")),
        (
            {
                "chosen": HH.format("Hi") + " Hello you.",
                "rejected": HH.format("Hi") + " Hello there.",
            },
            HH.format("Hi"),
            (" Hello you.", " Hello there."),
        ),
        ({"prompt": SKY, "chosen_response": "a", "rejected_response": "b"}, SKY, ("a", "b")),
        # messages may stand in a text, and have keys that a table filled with null
        (
            {"chosen": json.dumps([USER, BLUE]), "rejected": str([{**USER, "name": None}, GREEN])},
            [USER],
            ANSWERS,
        ),
        # a space at the start of an answer is its own
        ({"prompt": "Q:", "chosen": " a", "rejected": " b"}, "Q:", (" a", " b")),
    ],
)
def test_layouts(row: dict[str, Any], prompt: Any, pair: tuple[str, str]) -> None:
    assert read(row) == (prompt, pair)


def test_named_columns() -> None:
    row = {"prompt": "p", "chosen": 1, "better": "yes", "worse": "no"}
    assert read(row, columns={"chosen": "better", "rejected": "worse"}) == ("p", ("yes", "no"))
    whole = {"ask": SKY, "chosen": [USER, BLUE], "rejected": [USER, GREEN]}
    assert read(whole, columns={"prompt": "ask"}) == ([USER], ANSWERS)
    with pytest.raises(UserError, match="did you mean 'chosen'"):
        read(row, columns={"choosen": "better"})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": SKY}, r"row '0' has no pair: its column 'chosen' is not there"),
        ({"prompt": SKY, "chosen": "a", "rejected": None}, "its column 'rejected' is empty"),
        ({"prompt": SKY, "chosen": "a", "rejected": []}, "its column 'rejected' is empty"),
        ({"prompt": SKY, "chosen": "a", "rejected": "a"}, "are the same text .*Take the row out"),
        ({"chosen": "The sky is blue", "rejected": "The sky is blue"}, "are the same text"),
        ({"chosen": [USER, BLUE], "rejected": [USER, BLUE]}, "are the same text"),
        ({"prompt": SKY, "chosen": 3, "rejected": "b"}, "chosen of row '0' is neither text nor"),
        (
            {"chosen": [USER, BLUE], "rejected": [SYSTEM, USER, GREEN]},
            "the prompts of row 0 differ",
        ),
        ({"chosen": [USER, BLUE], "rejected": [BLUE, GREEN]}, "the prompts of row 0 differ"),
        (
            {"prompt": "Other?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            "the prompts of row '0' differ: chosen holds 1 messages before its answer",
        ),
        (
            {"prompt": SKY, "chosen": [SYSTEM, USER, BLUE], "rejected": [USER, GREEN]},
            r"the prompts of row '0' differ: .* \(2 and 1 messages\)",
        ),
        (
            {"prompt": SKY, "chosen": [BLUE], "rejected": [SYSTEM, GREEN]},
            "row '0' differ: rejected",
        ),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "nothing says what they answer"),
        ({"chosen": "blue", "rejected": "green"}, "do not begin with the same words"),
        ({"chosen": [USER, BLUE]}, "row 0 has no prompt.*what chosen and rejected begin with"),
        ({"prompt": SKY, "chosen": [USER], "rejected": [GREEN]}, "ends with a message of the user"),
        (
            {
                "prompt": SKY,
                "chosen": [{"role": "assistant", "tool_calls": []}],
                "rejected": [GREEN],
            },
            "ends with no text",
        ),
        (
            {"prompt": SKY, "chosen": "a\ud83d", "rejected": "b"},
            "chosen of row 0 holds .*surrogate",
        ),
    ],
)
def test_what_is_no_pair_is_refused_with_its_row(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(row)


def test_rows_without_a_pair_are_rows_for_other_methods() -> None:
    """Only who reads pairs minds what is wrong with them."""
    [row] = normalise([{"prompt": SKY, "chosen": "a", "rejected": "a"}])
    assert row["prompt"] == SKY and row["response"] is None


def test_both_answers_are_written_as_the_student_would() -> None:
    """Behind the same prompt, in the tokens of a response, with what ends it."""
    tokenizer = tiny_tokenizer()
    rows = normalise([{"prompt": "Q:", "chosen": " a b", "rejected": " a"}])
    prompts = Prompts(rows, tokenizer, chat=False)
    (chosen, a), (rejected, b) = prompts.pair(0)
    assert (a, b) == (" a b", " a")
    for ids, said in ((chosen, a), (rejected, b)):
        assert ids == [*tokenizer(said, add_special_tokens=False)["input_ids"], prompts.end]
    assert prompts[0].tokens == prompts.tokens(rows[0])
