"""Rows as token ids: what the model reads, and what is left out."""

import pytest

from opdkit.base.errors import UserError
from opdkit.data import Prompts, load_rows
from tests.common.tiny import END, tiny_tokenizer

ROWS = load_rows(
    [
        {
            "prompt": "What is 12 plus 30?",
            "answer": "42",
            "response": "It is 42.",
            "unit": "apples",
            "id": "a",
        },
        {
            "prompt": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "And 3 plus 4?"},
            ],
            "unit": "pears",
        },
        {"prompt": "Tom has 3 apples and buys 4 more. " * 5, "unit": "apples", "id": "long"},
    ]
)


@pytest.fixture(scope="module")
def chat():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def plain():
    return tiny_tokenizer(chat_template=False)


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def test_the_chat_template_is_applied(chat):
    prompts = Prompts(ROWS, chat)
    assert [p.id for p in prompts] == ["a", "1", "long"] and prompts[0].row["answer"] == "42"
    assert (
        chat.decode(prompts[0].tokens)
        == turn("user", "What is 12 plus 30?") + "<|im_start|>assistant\n"
    )
    assert prompts[0].tokens[0] == 1  # the mark as one token, not as text
    expected = (
        turn("system", "Be short.") + turn("user", "And 3 plus 4?") + "<|im_start|>assistant\n"
    )
    assert chat.decode(prompts[1].tokens) == expected
    assert prompts[1:] == [prompts[1], prompts[2]] and prompts[-1] is prompts[2]


def test_template_and_system(chat):
    prompts = Prompts(
        ROWS, chat, template="{prompt}\nIn {unit}, inside \\boxed{{}}.", system="Be kind."
    )
    asked = turn("system", "Be kind.") + turn(
        "user", "What is 12 plus 30?\nIn apples, inside \\boxed{}."
    )
    assert chat.decode(prompts[0].tokens) == asked + "<|im_start|>assistant\n"
    own = turn("system", "Be short.") + turn("user", "And 3 plus 4?\nIn pears, inside \\boxed{}.")
    assert chat.decode(prompts[1].tokens) == own + "<|im_start|>assistant\n"
    assert ROWS[1]["prompt"][1]["content"] == "And 3 plus 4?"  # the rows are not changed


def test_enable_thinking_reaches_the_template(chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if enable_thinking is false %} quick{% endif %}"
    )
    ends = [
        tokenizer.decode(Prompts(ROWS[:1], tokenizer, enable_thinking=think)[0].tokens)[-5:]
        for think in (None, True, False)
    ]
    assert ends == ["s 30?", "s 30?", "quick"]


def test_plain_text_keeps_the_tokenizers_start_and_not_its_end(plain):
    from tokenizers.processors import TemplateProcessing

    assert plain.decode(Prompts(ROWS[:1], plain)[0].tokens) == "What is 12 plus 30?"
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"<|im_start|> $A {END}", special_tokens=[("<|im_start|>", 1), (END, 2)]
    )
    bare = plain("What is 12 plus 30?")["input_ids"]
    assert Prompts(ROWS[:1], tokenizer)[0].tokens == [1, *bare]
    # an end that was written stays
    assert Prompts(load_rows([{"prompt": f"x{END}"}]), tokenizer)[0].tokens[-1] == 2
    assert Prompts(ROWS[:1], tokenizer, template="Q: {prompt}\nA:")[0].tokens == [
        1,
        *plain("Q: What is 12 plus 30?\nA:")["input_ids"],
    ]


def test_chat_can_be_turned_off(chat):
    assert chat.decode(Prompts(ROWS[:1], chat, chat=False)[0].tokens) == "What is 12 plus 30?"


def test_long_prompts_are_dropped_never_cut(chat):
    everything = Prompts(ROWS, chat)
    lengths = [len(p.tokens) for p in everything]
    prompts = Prompts(ROWS, chat, max_prompt_length=max(lengths[:2]))
    assert [p.tokens for p in prompts] == [p.tokens for p in everything[:2]]
    assert prompts.dropped == [f"long ({lengths[2]} tokens)"]
    assert (
        prompts.report()
        == f"2 of 3 prompts; 1 dropped, longer than max_prompt_length={max(lengths[:2])}: long "
        f"({lengths[2]} tokens)"
    )
    assert everything.report() == "3 prompts" and everything.dropped == []
    with pytest.raises(
        UserError,
        match=rf"all 3 prompts are longer than max_prompt_length=5.*longest {max(lengths)}",
    ):
        Prompts(ROWS, chat, max_prompt_length=5)


def test_many_dropped_prompts_are_counted(chat):
    rows = load_rows(
        [{"prompt": "short"}, *({"prompt": "quite a lot longer than this " * 3} for _ in range(12))]
    )
    assert Prompts(rows, chat, max_prompt_length=30).report().endswith(" and 2 more")


def test_dropping_keeps_responses_with_their_prompts(chat):
    rows = load_rows(
        [{"prompt": "long " * 50, "response": "no"}, {"prompt": "short", "response": "yes"}]
    )
    prompts = Prompts(rows, chat, max_prompt_length=30)
    assert chat.decode(prompts.response_tokens(0)) == f"yes{END}"


def test_response_tokens_are_what_the_template_would_write(chat):
    prompts = Prompts(ROWS, chat)
    response = prompts.response_tokens(0)
    assert response[-1] == chat.eos_token_id and prompts.response_tokens(1) is None
    whole = [
        {"role": "user", "content": "What is 12 plus 30?"},
        {"role": "assistant", "content": "It is 42."},
    ]
    written = chat.apply_chat_template(whole, return_dict=False)
    assert written[: len(prompts[0].tokens) + len(response)] == prompts[0].tokens + response
    ended = Prompts(load_rows([{"prompt": "p", "response": f"It is 42.{END}"}]), chat)
    assert ended.response_tokens(0) == response  # one end, not two


def test_tokenised_once_and_when_read(chat):
    calls = []

    class Counting:
        chat_template = "yes"
        eos_token_id = 2

        bos_token_id = None

        def apply_chat_template(self, messages, **options):
            calls.append(messages[-1]["content"])
            return [1, 2, 3]

    prompts = Prompts(ROWS, Counting())
    assert len(prompts) == 3 and calls == []
    assert prompts[1].tokens == prompts[1].tokens == [1, 2, 3]
    assert calls.count("And 3 plus 4?") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat": True}, "chat=True needs a chat template"),
        ({"system": "s"}, "system is part of a chat"),
        ({"enable_thinking": False}, "enable_thinking is part of a chat"),
        ({"template": "no column"}, "every prompt would be the same"),
        (
            {"template": "{prompt} \\boxed{}"},
            r"names no column.*write a literal one twice, as in \\boxed\{\{\}\}",
        ),
        ({"template": "{prompt} {"}, "cannot be read"),
        (
            {"template": "{promt}"},
            r"reads the column 'promt', which row 'a' does not have; did you mean 'prompt'\?",
        ),
    ],
)
def test_options_that_make_no_prompt(plain, options, message):
    with pytest.raises(UserError, match=message):
        Prompts(ROWS, plain, **options)


def test_rows_that_make_no_prompt(plain, chat):
    with pytest.raises(UserError, match="only a chat template can write as text"):
        list(Prompts(ROWS, plain))
    with pytest.raises(UserError, match="no rows"):
        Prompts([], chat)
    with pytest.raises(UserError, match=r"Prompts\(load_rows\(rows\), tokenizer\)"):
        Prompts([{"question": "?"}], chat)
    gemma = tiny_tokenizer()
    gemma.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') "
        "}}{% endif %}x"
    )
    with pytest.raises(UserError, match="refuses row '1': System role not supported"):
        list(Prompts(ROWS, gemma))
    mixed = load_rows([{"prompt": "a", "x": 1}, {"prompt": "b"}])
    with pytest.raises(UserError, match="reads the column 'x', which row '1' does not have"):
        list(Prompts(mixed, chat, template="{prompt} {x}"))
