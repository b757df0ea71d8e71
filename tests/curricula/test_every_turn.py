"""Trajectories as questions, one for each assistant turn: what each is asked with, and what is
learnt of it.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from opdkit import UserError, distill
from opdkit.curricula import EveryTurn, Plain, writer_of
from opdkit.data import Prompts, load_rows
from opdkit.methods.method import Method, load
from opdkit.types import Prompt, Sampling
from tests.common.tiny import END, save_tiny, tiny_tokenizer
from tests.curricula.context import context
from tests.end_to_end.conftest import QUICK


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


TRAJECTORY = [
    message("system", "Be short."),
    message("user", "Tom has 3 apples"),
    message("assistant", "Let us think"),
    message("tool", "12"),
    message("assistant", "The answer is 42."),
    message("user", "How many?"),
    message("assistant", "7"),
]
SINGLE = [message("user", "What is 12 plus 30?"), message("assistant", "42.")]


def prompts_of(*conversations: list[dict[str, Any]], column: str = "messages") -> Prompts:
    rows = [{"id": f"t{i}", column: deepcopy(c)} for i, c in enumerate(conversations)]
    return Prompts(load_rows(rows), tiny_tokenizer())


def written(prompts: Prompts, index: int = 0) -> list[str]:
    """What each turn is asked with, as text."""
    decode = prompts.tokenizer.decode
    return [decode(turn.tokens) for turn in prompts.turns(index)]


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_each_turn_is_asked_with_all_messages_before_it(column: str) -> None:
    prompts = prompts_of(TRAJECTORY, column=column)
    turns = prompts.turns(0)
    assert [len(turn.row["prompt"]) for turn in turns] == [2, 4, 6]
    for turn, text, count in zip(turns, written(prompts), (2, 4, 6)):
        asked = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in TRAJECTORY[:count]
        )
        assert text == f"{asked}<|im_start|>assistant\n"
        assert turn.question == "t0" and turn.group == turn.id == turn.row["id"]
    assert [turn.id for turn in turns] == ["t0:turn1", "t0:turn2", "t0:turn3"]
    assert [turn.row["response"] for turn in turns] == ["Let us think", "The answer is 42.", "7"]
    assert turns[-1].tokens == prompts[0].tokens  # the last one is the plain question


def test_the_row_of_a_turn_says_what_it_is_asked_with() -> None:
    """Whoever writes the question anew, as a teacher's view does, writes that of the turn."""
    for turn in prompts_of(TRAJECTORY).turns(0):
        assert Prompts([turn.row], tiny_tokenizer())[0].tokens == turn.tokens


def test_one_turn_is_asked_as_it_is() -> None:
    prompts = prompts_of(SINGLE)
    assert prompts.turns(0) == [prompts[0]]
    text = Prompts(load_rows([{"prompt": "12 plus"}]), tiny_tokenizer())
    assert text.turns(0) == [text[0]]


def test_messages_of_an_assistant_in_a_row_are_a_turn_each() -> None:
    both = [*SINGLE, message("assistant", "Yes.")]
    assert [len(turn.row["prompt"]) for turn in prompts_of(both).turns(0)] == [1, 2]


def test_a_turn_that_only_calls_a_tool_is_one() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    for column in ("messages", "prompt"):
        row = load_rows([{"id": "a", column: [SINGLE[0], deepcopy(call)]}])
        prompts = Prompts(row, tiny_tokenizer())
        assert prompts.turns(0) == [prompts[0]] and prompts.drop_unanswered() == ""


def test_what_follows_the_last_turn_is_not_answered() -> None:
    prompts = prompts_of([*TRAJECTORY[:3], message("user", "So?")], SINGLE)
    assert [len(turn.row["prompt"]) for turn in prompts.turns(0)] == [2]
    assert prompts.turns(0)[0].id == "t0"


def test_conversations_without_a_turn_are_left_out_with_a_note() -> None:
    prompts = prompts_of(SINGLE[:1], TRAJECTORY, TRAJECTORY[:2])
    assert prompts.turns(0) == []
    assert prompts.drop_unanswered() == (
        "2 of 3 conversations have no assistant's message and are left out: t0, t2"
    )
    assert len(prompts) == 1 and prompts[0].id == "t1" and prompts.drop_unanswered() == ""
    with pytest.raises(UserError, match="none of the 1 conversations"):
        prompts_of(SINGLE[:1]).drop_unanswered()


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_the_text_of_a_turn_is_history_of_later_ones_only(turn: int) -> None:
    changed = deepcopy(TRAJECTORY)
    changed[(2, 4, 6)[turn]]["content"] = "Nothing."
    before, after = written(prompts_of(TRAJECTORY)), written(prompts_of(changed))
    assert [a == b for a, b in zip(before, after)] == [n <= turn for n in range(3)]


def test_a_step_has_the_turns_of_its_trajectories_side_by_side() -> None:
    prompts = prompts_of(TRAJECTORY, SINGLE)

    def turns(prompt: Prompt) -> list[Prompt]:
        return prompts.turns(int(prompt.id[1:]))

    asked = context([prompts[1], prompts[0]], turns=turns, sampling=Sampling(num_generations=2))
    rollouts = writer_of(EveryTurn()).write(asked)
    ids = [r.group for r in rollouts]
    assert ids == [id for id in ("t1", "t0:turn1", "t0:turn2", "t0:turn3") for _ in range(2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return save_tiny(folder / "student", seed=0), save_tiny(folder / "teacher", seed=1)


def trained(folder: Path, models: tuple[str, str], rows: list[Any], curriculum: Any) -> Any:
    method = Method(load("gkd").objective, curriculum=curriculum)
    output = str(folder / type(curriculum).__name__)
    return distill(*models, rows, method=method, output=output, **QUICK)


def test_single_turns_train_bit_for_bit_as_plain_distillation(
    tmp_path: Path, models: tuple[str, str]
) -> None:
    rows = [
        {"messages": [message("user", f"{i} plus {i}"), message("assistant", f"{2 * i}")]}
        for i in range(4)
    ]
    every, plain = (trained(tmp_path, models, rows, c) for c in (EveryTurn(), Plain()))
    assert [x["loss"] for x in every.metrics] == [x["loss"] for x in plain.metrics]
    assert every.metrics[0]["loss"] > 0


def test_trajectories_train_the_turns_that_the_student_wrote(
    tmp_path: Path, models: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two trajectories a step, of three turns each with two responses: twelve rollouts, of which
    every token drawn is one that is learnt from, and no other.
    """
    rows = [{"id": f"t{i}", "messages": deepcopy(TRAJECTORY)} for i in range(3)]
    rows.append({"id": "nobody", "messages": TRAJECTORY[:2]})
    result = trained(tmp_path, models, rows, EveryTurn())
    assert "1 of 4 conversations have no assistant's message and are left out: nobody" in (
        capsys.readouterr().err
    )
    line = result.metrics[0]
    assert line["tokens/trained"] == line["tokens/sampled_so_far"]
    assert line["completions/mean_length"] * 12 == pytest.approx(line["tokens/trained"])
    assert line["effective_tokens/jsd"] == line["tokens/trained"]
