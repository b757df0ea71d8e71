"""Thoughts in texts: the marks around them stay, also where they are special tokens."""

import pytest

from opdkit.models.thoughts import decode, opened, special_marks
from opdkit.rewards.math import right
from tests.common.tiny import save_tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("thoughts")
    save_tiny(folder, texts=["so it is 5 or 7", r"\boxed{5}"])
    found = AutoTokenizer.from_pretrained(folder)
    assert special_marks(found) == {}
    return found


@pytest.fixture(scope="module")
def special(tokenizer):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    found.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    return found


TEXTS = [r"<think>\boxed{7}</think>it is \boxed{5}", r"<think>\boxed{7}", r"\boxed{7}</think>no"]


def test_special_marks_stay_and_other_special_tokens_go(special):
    assert set(special_marks(special).values()) == {"<think>", "</think>"}
    tokens = [special.encode(text, add_special_tokens=False) for text in TEXTS]
    plain = special.batch_decode(tokens, skip_special_tokens=True)
    assert not any("think" in text for text in plain)  # what a reward would have read
    assert decode(special, [[*ids, special.eos_token_id] for ids in tokens]) == TEXTS
    assert [right(text, "7") for text in TEXTS] == [False] * 3 and right(TEXTS[0], "5")


def test_without_special_marks_nothing_differs(tokenizer):
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert decode(tokenizer, tokens) == tokenizer.batch_decode(tokens, **settings) == TEXTS


def test_a_thought_that_the_prompt_opens_is_one(special, tokenizer):
    for each in (special, tokenizer):
        ids = each.encode("so it is <think>\n", add_special_tokens=False)
        assert opened(each, ids, r"it is \boxed{7}") == "<think>"
        assert opened(each, ids, r"it is \boxed{7}</think>\boxed{5}") == ""
        assert opened(each, each.encode("so it is", add_special_tokens=False), "5") == ""
