"""Stop strings that name special tokens, for the sampler in this process and for engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from opdkit.sampling import HFSampler
from opdkit.sampling.finish import Response, finish, names_special, rollout_ids
from opdkit.sampling.respond import respond
from opdkit.types import Prompt, Sampling
from tests.common.tiny import END, START, tiny_model, tiny_tokenizer
from tests.sampling.test_respond import Played

ASKED = Sampling(max_completion_length=40, num_generations=64)
PROMPT = Prompt("a", [5, 6, 7])


def base() -> tuple[Any, Any]:
    """A model and its tokenizer, whose <|im_end|> (2) ends nothing by itself: as Qwen's base models
    without their template.
    """
    tokenizer, model = tiny_tokenizer(chat_template=False), tiny_model()
    tokenizer.eos_token = "<|pad|>"
    model.generation_config.eos_token_id = 0
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # a middling logit: it is written now and then
    return model, tokenizer


def test_a_stop_string_may_be_a_special_token() -> None:
    model, tokenizer = base()
    free = HFSampler(model, tokenizer).sample([PROMPT], ASKED)
    assert any(2 in r.tokens[:-1] for r in free)
    stopped = HFSampler(model, tokenizer).sample([PROMPT], replace(ASKED, stop=(END,)))
    for rollout, whole in zip(stopped, free, strict=True):
        at = whole.tokens.index(2) + 1 if 2 in whole.tokens else len(whole.tokens)
        assert rollout.tokens == whole.tokens[:at]
        assert (rollout.finish == "stop") == (2 in whole.tokens or whole.finish == "stop")
        assert rollout.text == tokenizer.decode(whole.tokens[:at], skip_special_tokens=True)


def test_the_text_ends_before_a_stop_string_with_a_special_token_in_it() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(f"It is{START} 42.{END}\nWhat")["input_ids"]
    sampling = Sampling(stop=(f".{END}\n", "never"))
    ids = rollout_ids([PROMPT], sampling, 0)
    written = [Response(tokens, [-1.0] * len(tokens), [-1.0] * len(tokens), stopped=True)]
    (rollout,) = finish([PROMPT], sampling, ids, written, tokenizer, 0)
    assert rollout.text == "It is 42"


def test_an_engine_looks_for_them_in_the_same_text() -> None:
    tokenizer = tiny_tokenizer()
    assert names_special((f"\n{START}user",), tokenizer) and not names_special(("\n",), tokenizer)
    for stop in ((END,), ("\n",)):
        played, sampling = Played(), Sampling(max_completion_length=4, stop=stop)
        special = names_special(stop, tokenizer)
        respond(played, [PROMPT], sampling, ["0/a/0"], {2}, 0, special=special)
        assert played.asked[0].settings["skip_special_tokens"] is not special
