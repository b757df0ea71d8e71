"""What stands between two turns: to the letter what the template puts there, and what the student
wrote stays as it was sampled (PITFALLS M6).
"""

from __future__ import annotations

from typing import Any

import pytest

from opdkit.base.errors import UserError
from opdkit.environments import Dialogue
from opdkit.environments.tools import tool
from tests.common.tiny import TEMPLATE, tiny_tokenizer
from tests.environments.templates import ALL, QWEN3, chatting

END = 2
ADD = tool("add", "Adds.", a="number: one", b="number: the other")


def read(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("name", [*ALL, "plain chatml"])
def test_a_conversation_is_what_its_template_renders(name: str) -> None:
    """Where the template neither strips nor moves anything, both agree to the letter."""
    tokenizer = chatting(ALL.get(name, TEMPLATE))
    dialogue = Dialogue(tokenizer)
    asked, said, answered = "What is 12?", "42 apples", "no, try again"
    ids = dialogue.opening(dialogue.asked([{"role": "user", "content": asked}], ()), "x")
    for turn in (said, "7"):
        own = tokenizer(turn)["input_ids"]
        ids += [*own, END]
        ids += dialogue.reply([{"role": "user", "content": answered}], (), [*own, END], "x")
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": said},
        {"role": "user", "content": answered},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": answered},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # Mistral's puts a space before what an assistant said, which the student writes itself
    assert read(tokenizer, ids).replace("[/INST]", "[/INST] ") == whole.replace(
        "[/INST] ", "[/INST]"
    ).replace("[/INST]", "[/INST] ")


def test_thoughts_that_a_template_would_strip_stay_as_they_were_sampled() -> None:
    tokenizer = chatting(QWEN3)
    dialogue = Dialogue(tokenizer)
    turn = [*tokenizer("<think>\n3 + 4\n</think>\n\n7")["input_ids"], END]
    ids = [*dialogue.opening(dialogue.asked([{"role": "user", "content": "a"}], ()), "x"), *turn]
    ids += dialogue.reply([{"role": "user", "content": "b"}], (), turn, "x")
    rendered = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>\n3 + 4\n</think>\n\n7"},
            {"role": "user", "content": "b"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert "3 + 4" not in rendered and "3 + 4" in read(tokenizer, ids)
    # but for the thought, the same: what the environment wrote is the template's text
    assert read(tokenizer, ids).replace("<think>\n3 + 4\n</think>\n\n", "") == rendered


def test_token_ids_that_a_tokenizer_would_not_choose_stay() -> None:
    tokenizer = chatting(TEMPLATE)
    pieces = [tokenizer(sign)["input_ids"][0] for sign in "The answer"]
    assert pieces != tokenizer("The answer")["input_ids"]  # it would merge them
    reply = Dialogue(tokenizer).reply([{"role": "user", "content": "b"}], (), pieces, "x")
    # the turn was cut: the environment ends it
    assert reply[0] == END
    ended = Dialogue(tokenizer).reply([{"role": "user", "content": "b"}], (), [*pieces, END], "x")
    assert reply[1:] == ended and END not in ended[:3]


TOOLS = {
    "qwen3": "<|im_start|>user\n<tool_response>\n6\n</tool_response>\n<tool_response>\n8\n"
    "</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "llama3": '<|im_start|>ipython<|im_start|>\n\n"6"<|im_end|><|im_start|>ipython<|im_start|>\n\n'
    '"8"<|im_end|><|im_start|>assistant<|im_start|>\n\n',
    "mistral": '[RESULTS] {"content": 6, "id": "opdkit000"}[/RESULTS]'
    '[RESULTS] {"content": 8, "id": "opdkit001"}[/RESULTS]',
}


@pytest.mark.parametrize("name", TOOLS)
def test_answers_of_functions_stand_as_the_template_writes_them(name: str) -> None:
    tokenizer = chatting(ALL[name])
    turn = [*tokenizer("call")["input_ids"], END]
    answers = [{"role": "tool", "content": "6"}, {"role": "tool", "content": "8"}]
    said = read(tokenizer, Dialogue(tokenizer).reply(answers, (ADD,), turn, "x"))
    assert said.removeprefix("\n") == TOOLS[name]


def test_a_template_without_functions_is_told_of_them_as_text() -> None:
    tokenizer = chatting(ALL["gemma"])
    dialogue = Dialogue(tokenizer)
    first = read(
        tokenizer, dialogue.opening(dialogue.asked([{"role": "user", "content": "a"}], (ADD,)), "x")
    )
    assert '"name": "add"' in first and "```tool_code" in first and first.count("<|im_start|>") == 2
    said = dialogue.reply([{"role": "tool", "content": "6"}], (ADD,), [9, END], "x")
    wanted = "\n<|im_start|>user\n```tool_output\n6\n```<|im_end|>\n<|im_start|>model\n"
    assert read(tokenizer, said) == wanted


def test_a_role_that_a_template_does_not_write_is_refused() -> None:
    with pytest.raises(UserError, match=r"row 7.*does not write system messages"):
        Dialogue(chatting(ALL["gemma"])).reply(
            [{"role": "system", "content": "b"}], (), [9], "row 7"
        )


def test_plain_text_is_lines() -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    dialogue = Dialogue(tokenizer)
    messages = [{"role": "system", "content": "A."}, {"role": "user", "content": "B?"}]
    assert read(tokenizer, dialogue.opening(dialogue.asked(messages, ()), "x")) == "A.\nB?\n"
    answer = [{"role": "user", "content": "no"}]
    for turn, wanted in (("go", "\nno\n"), ("go\n", "no\n")):
        ids = tokenizer(turn)["input_ids"]
        assert read(tokenizer, dialogue.reply(answer, (), ids, "x")) == wanted
    assert dialogue.action("go")[-1] == END
    assert read(tokenizer, dialogue.action("go", ("\n",))) == "go\n"


def test_what_is_said_is_without_its_end_and_stop_strings() -> None:
    tokenizer = chatting(TEMPLATE)
    dialogue = Dialogue(tokenizer)
    turn = [*tokenizer("go north\nnow")["input_ids"], END]
    assert dialogue.said(turn, [], ()) == "go north\nnow"
    assert dialogue.said(turn, [], ("\n",)) == "go north"
    opened = tokenizer("so <think>\n")["input_ids"]
    assert dialogue.said(turn, opened, ()) == "<think>go north\nnow"


def test_another_writes_turns_as_the_student_would_end_them() -> None:
    tokenizer = chatting(QWEN3)
    assert read(tokenizer, Dialogue(tokenizer).action("go north")) == "go north<|im_end|>"
