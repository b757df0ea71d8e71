"""What ends an answer: by tokenizer, chat template and generation settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opdkit.models.chat import reads_parts, reads_text, reads_thinking, turn_end
from opdkit.models.load import generation_settings, load_model
from opdkit.models.tokenizers import answer_end, end_ids, end_with, same_ends, stop_ids
from tests.common.tiny import TEMPLATE, TEXTS, tiny_model

NAMES = ["<pad>", "<eos>", "<bos>", "<turn>", "<end>", "<user>", "<assistant>"]
PAD, EOS, BOS, TURN, END, USER, ASSISTANT = range(7)
HEADER = "{{ '<turn>' + m['role'] + '\n' + m['content'] }}"


def tokenizer(template: str | None = None, names: list[str] = NAMES, **specials: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    named = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"} | specials
    made = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    made.chat_template = template
    return made


def each(turn: str, last: str = "") -> str:
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{last}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, None),
        (each(HEADER + "<end>\n"), END),  # ChatML, Gemma
        (each("{{ m['content'] | trim }}<end>"), END),  # Llama 3
        (
            each(HEADER + "<end>\n", "{% if not add_generation_prompt %}<eos>{% endif %}"),
            END,
        ),  # Phi
        (
            each(
                "{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}<eos>"
                "{% endif %}"
            ),
            EOS,
        ),
        # no mark closes a turn, the next one opens with its own: GLM
        (each("{{ '<' + m['role'] + '>' + m['content'] }}"), USER),
        # closed as another one in the end of a conversation than inside it: gpt-oss
        (each("{{ m.content }}{% if loop.last %}<eos>{% else %}<end>{% endif %}"), EOS),
        # words, which are no token of their own
        (each("{{ m['role'] }}: {{ m['content'] }}\n\n"), None),
        # content as a list of parts only
        (each("{% for p in m.content %}{{ p.text }}{% endfor %}<end>"), END),
        # one that wants a system message
        (
            each(
                HEADER + "<end>",
                "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}",
            ),
            END,
        ),
        # one that has no place for an answer
        (each("{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}"), None),
    ],
)
def test_the_token_that_a_template_writes_after_an_answer(
    template: str | None, end: int | None
) -> None:
    made = tokenizer(template)
    assert turn_end(made) == end
    assert answer_end(made, chat=True) == (EOS if end is None else end)
    assert answer_end(made, chat=False) == EOS
    assert end_ids(made) == {EOS} | ({end} - {None})


def test_all_that_ends_an_answer_is_one_set() -> None:
    model, made = tiny_model(layers=1), tokenizer(each(HEADER + "<end>\n"))
    model.generation_config.eos_token_id = [PAD, 9]
    assert stop_ids(model, made) == {EOS, END, PAD, 9}


def test_what_the_teacher_ends_with_is_saved_with_the_student(tmp_path: Path) -> None:
    model, made = tiny_model(layers=1), tokenizer()
    model.generation_config.eos_token_id = EOS
    assert end_with(model, made, {EOS, END}) == [END]
    assert end_with(model, made, {EOS, END}) == []
    model.save_pretrained(tmp_path)
    assert stop_ids(load_model(str(tmp_path)), made) == {EOS, END}
    assert generation_settings(str(tmp_path)).eos_token_id == [EOS, END]
    (tmp_path / "generation_config.json").unlink()  # as older checkpoints are
    assert generation_settings(str(tmp_path)).eos_token_id == model.config.eos_token_id


def test_ends_of_another_tokenizer_are_known_by_their_names() -> None:
    made, other = tokenizer(), tokenizer(names=["<end>", "<other>", *NAMES[:4]])
    assert same_ends({0, 1}, other, made) == {END}


@pytest.mark.parametrize(
    ("content", "text", "parts"),
    [
        ("{{ m['content'] }}", True, False),  # writes a list as Python shows it
        ("{{ 'x' + m['content'] }}", True, False),  # fails on a list
        ("{% for p in m.content %}{{ p.text }}{% endfor %}", False, True),
        (
            "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
            "{{ p.text }}{% endfor %}{% endif %}",
            True,
            True,
        ),
        ("{{ m.content | tojson }}", True, False),
    ],
)
def test_which_contents_a_template_reads(content: str, text: bool, parts: bool) -> None:
    made = tokenizer(each(content))
    assert (reads_text(made), reads_parts(made)) == (text, parts)


def test_a_template_that_does_not_read_enable_thinking_is_known() -> None:
    assert not reads_thinking(tokenizer(TEMPLATE))
    assert reads_thinking(tokenizer(TEMPLATE + "{% if enable_thinking is false %}quick{% endif %}"))
