"""Chat rows as real data sets hold them: what reaches the template, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opdkit.base.errors import UserError
from opdkit.data import Prompts, load_rows
from tests.common.tiny import TEMPLATE, tiny_tokenizer

ASKED = "<|im_start|>user\nsum 2 2<|im_end|>\n<|im_start|>assistant\n"
USER = {"role": "user", "content": "sum 2 2"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}
ADD = {"type": "function", "function": {"name": "add", "description": None}}
# as Llama 3.1's and Qwen's, which look for the key
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools|tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if 'tool_calls' in m %}"
    "{{ m.tool_calls|length }} call of {{ m.tool_calls[0].function.name }} with "
    "{{ m.tool_calls[0].function.arguments|tojson }}{% endif %}{% if m.content %}{{ m.content }}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def asked(row: dict[str, Any], template: str = TEMPLATE) -> str:
    """The prompt that a row becomes."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return str(tokenizer.decode(Prompts(load_rows([row]), tokenizer)[0].tokens))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "sum "}, {"text": "2 2"}]}],
        # as a table fills them
        [{"role": "user", "content": [{"type": "text", "text": "sum 2 2", "image": None}]}],
        [USER | {"tool_calls": None, "name": None}],
        json.dumps([USER]),
        str([USER]),
        (USER,),
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, TOOLS])
def test_every_writing_of_a_message_reaches_the_template(messages: Any, template: str) -> None:
    assert asked({"messages": messages}, template) == ASKED


def test_a_template_that_reads_parts_gets_them() -> None:
    each = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": t} for t in ("a", "b")]
    assert asked({"messages": [{"role": "user", "content": parts}]}, each) == "<a><b>"
    assert asked({"prompt": "plain"}, each) == "<plain>"


def test_tools_and_calls_reach_a_template_that_knows_them() -> None:
    answered = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    row = {"messages": [*answered, {"role": "tool", "content": "4"}], "tools": [ADD]}
    tools = (
        '<|im_start|>system\nTools: [{"type": "function", "function": {"name": "add"}}]<|im_end|>\n'
    )
    call = '<|im_start|>assistant\n1 call of add with {"a": 2}<|im_end|>\n'
    result = "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"
    expected = tools + ASKED.removesuffix("<|im_start|>assistant\n") + call + result
    assert asked(row, TOOLS) == expected
    assert asked(row | {"tools": json.dumps([ADD])}, TOOLS) == expected
    row["messages"][1].pop("content")
    assert asked(row, TOOLS) == expected


def test_null_content_is_no_word() -> None:
    """A template that writes what it is given would write None; one that adds it to text fails."""
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, USER]
    names = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    for content in ("{{ m.content }}", "{{ 'x' + m.content }}"):
        written = asked(
            {"messages": turns}, "{% for m in messages %}" + content + names + ";{% endfor %}"
        )
        assert written.replace("x", "") == "sum 2 2;add;sum 2 2;"
    known = (
        "{% for m in messages %}{% if m.content is none %}null{% endif %}" + names + "{% endfor %}"
    )
    assert asked({"messages": turns}, known) == "nulladd"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
                ]
            },
            "message 0 of row 0 has a part of type 'image', and only text can be read",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 of row 0 has no content"),
        ({"messages": [{"role": None, "content": "x"}]}, "has the role None"),
        ({"messages": [{"role": "user", "content": 5}]}, "is int .'5'., neither text nor parts"),
        (
            {"messages": [USER], "tools": [ADD]},
            "the function 'add', and the chat template does not",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER]},
            "the function 'add', and the chat template does not write it",
        ),
        ({"messages": [USER], "tools": ["hammer"]}, "tools of row '0' is no list of functions"),
    ],
)
def test_what_would_be_lost_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        asked(row)


def test_a_column_tools_of_plain_questions_is_a_column() -> None:
    assert asked({"prompt": "sum 2 2", "tools": "hammer"}) == ASKED


def test_whatever_a_template_raises_is_told_with_its_row() -> None:
    with pytest.raises(UserError, match="the chat template refuses row '0': integer division"):
        asked({"prompt": "x"}, "{{ 1 // 0 }}")


def test_a_start_of_sequence_is_written_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    rows = load_rows([{"prompt": "<|im_start|>What"}, {"prompt": "What"}])
    own, added = (p.tokens for p in Prompts(rows, tokenizer))
    assert own == added and own.count(1) == 1
    templated = Prompts(rows[1:], tokenizer, template="<|im_start|>{prompt}")
    assert templated[0].tokens == added
    twice = load_rows([{"prompt": "<|im_start|><|im_start|>What"}])  # somebody wrote it so
    assert Prompts(twice, tokenizer)[0].tokens == [1, *added]


def test_a_reference_response_is_closed_as_the_template_closes_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"  # Gemma: <eos> and <end_of_turn>
    rows = load_rows([{"prompt": "p", "response": "It is 42."}])
    body = tokenizer("It is 42.")["input_ids"]
    assert Prompts(rows, tokenizer).response_tokens(0) == [*body, 2]
    assert Prompts(rows, tokenizer, chat=False).response_tokens(0) == [*body, 0]


def test_enable_thinking_that_nothing_reads_is_said() -> None:
    rows = load_rows([{"prompt": "p"}])
    (note,) = Prompts(rows, tiny_tokenizer(), enable_thinking=False).notes
    assert "enable_thinking=False changes nothing" in note
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if enable_thinking is false %}!{% endif %}"
    assert Prompts(rows, tokenizer, enable_thinking=False).notes == []


def test_a_token_that_a_model_of_the_run_lacks_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    known = len(tokenizer)
    tokenizer.add_tokens(["<picture>"])
    rows = load_rows([{"prompt": "p", "response": "a <picture>"}, {"prompt": "q"}])
    prompts = Prompts(rows, tokenizer)
    prompts.refuse_unknown(known)
    with pytest.raises(UserError, match=r"response of row '0' holds the token '<picture>' .id 320"):
        prompts.response_tokens(0)
    with pytest.raises(UserError, match="prompt of row '0' holds the token '<picture>'"):
        Prompts(load_rows([{"prompt": "<picture>"}]), tokenizer).refuse_unknown(known)
