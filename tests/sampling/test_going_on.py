"""Responses that go on after a turn is answered, in their rows' own caches: as a plain forward pass
over the whole text computes them, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from opdkit.sampling import HFSampler
from opdkit.types import Prompt, Rollout, Sampling, Turn, Watch
from tests.common.rounding import FORWARD
from tests.common.tiny import tiny_model
from tests.sampling.test_hf import TOKENIZER, passes
from tests.sampling.test_hybrid import KINDS, hybrid

LENGTHS = (5, 33, 20, 1, 9, 14, 2, 40)
PROMPTS = [
    Prompt(str(n), torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in LENGTHS
]
ASKED = Sampling(max_completion_length=90, num_generations=2)


@dataclass
class Echo:
    """Answers a turn by as many tokens as its own tokens say, three times."""

    turn_tokens: int | None = 7
    heard: dict[str, list[Turn]] = field(default_factory=dict)
    said: dict[str, list[int]] = field(default_factory=dict)  # all of a response
    mine: dict[str, list[bool]] = field(default_factory=dict)  # whether the student wrote it
    batches: list[int] = field(default_factory=list)  # turns that were answered together

    def answer(self, turns: Sequence[Turn]) -> list[list[int] | None]:
        self.batches.append(len(turns))
        return [self.one(turn) for turn in turns]

    def one(self, turn: Turn) -> list[int] | None:
        heard = self.heard.setdefault(turn.rollout, [])
        heard.append(turn)
        reply = [5 + i for i in range(1 + sum(turn.tokens) % 23)]
        over = len(heard) == 4 or len(reply) >= turn.room
        reply = [] if over else reply
        self.said.setdefault(turn.rollout, []).extend([*turn.tokens, *reply])
        own = [True] * len(turn.tokens) + [False] * len(reply)
        self.mine.setdefault(turn.rollout, []).extend(own)
        return None if over else reply


def stopping(kind: str = "qwen3", **config: Any) -> Any:
    model = tiny_model(kind, **config)
    model.generation_config.eos_token_id = list(range(2, 60))
    return model


@torch.no_grad()
def gap(model: Any, rollout: Rollout, mine: Sequence[bool]) -> float:
    """The largest difference of recorded log-probs of the student's tokens to those of a plain
    forward pass over everything.
    """
    logits = model(torch.tensor([rollout.prompt + rollout.tokens])).logits
    logps = logits[0, len(rollout.prompt) - 1 : -1].log_softmax(-1)
    own = logps.gather(-1, torch.tensor(rollout.tokens)[:, None])[:, 0]
    return float((own - torch.tensor(rollout.logp))[torch.tensor(mine)].abs().max())


MODELS = {
    "qwen3": stopping,
    "gemma2": lambda: stopping("gemma2", sliding_window=12),
    **{kind: (lambda kind=kind: hybrid(kind)) for kind in KINDS},
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_goes_on_is_what_a_pass_over_all_of_it_computes(kind: str) -> None:
    model, echo = MODELS[kind](), Echo()
    asked = PROMPTS if kind == "qwen3" else PROMPTS[:3]
    rows = 7 if kind == "qwen3" else 4  # not all at once
    longest = max(LENGTHS) + ASKED.max_completion_length
    sampler = HFSampler(model, TOKENIZER, max_batch_tokens=rows * longest)
    rollouts = sampler.sample(asked, ASKED, replies=echo)
    assert {r.id: r.tokens for r in rollouts} == echo.said  # each token once, in its place
    turns = [len(heard) for heard in echo.heard.values()]
    assert max(turns) == 4 and max(echo.batches) > 1
    for rollout in rollouts:
        mine = echo.mine[rollout.id]
        assert gap(model, rollout, mine) < (1e-5 if kind == "qwen3" else FORWARD)
        assert not any(p for p, own in zip(rollout.logp, mine) if not own)
    for heard in echo.heard.values():
        for turn in heard:
            assert 1 <= len(turn.tokens) <= 7 and (turn.stopped or len(turn.tokens) == 7)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_an_episode_does_not_depend_on_its_batch(kind: str) -> None:
    model, together = MODELS[kind](), Echo()
    HFSampler(model, TOKENIZER).sample(PROMPTS, ASKED, seed=3, replies=together)
    alone = Echo()
    for prompt in PROMPTS[1:4]:
        HFSampler(model, TOKENIZER).sample([prompt], ASKED, seed=3, replies=alone)
    assert alone.said == {id: together.said[id] for id in alone.said} and len(alone.said) == 6


def test_history_is_read_once() -> None:
    model = stopping()
    with passes(model) as seen:
        rollouts = HFSampler(model, TOKENIZER).sample(PROMPTS, ASKED, replies=(echo := Echo()))
    prefills = [p for p in seen if p.cached == 0]
    assert len(prefills) == 1  # of the prompts
    # whatever is read later is new: no pass is longer than an answer and the token before it
    assert max(p.tokens for p in seen if p.cached) <= 24
    # answers wait for others: far fewer passes than turns
    answered = sum(p.tokens > 1 for p in seen if p.cached)
    assert answered < sum(len(h) for h in echo.heard.values()) / 3 and len(rollouts) == 16


def test_the_limit_of_a_response_holds_for_all_of_it() -> None:
    echo = Echo(turn_tokens=None)
    asked = replace(ASKED, max_completion_length=30)
    model = tiny_model()
    model.generation_config.eos_token_id = [4, 9]  # most turns are cut
    rollouts = HFSampler(model, TOKENIZER).sample(PROMPTS, asked, replies=echo)
    assert max(len(r.tokens) for r in rollouts) == 30
    for heard in echo.heard.values():
        assert heard[-1].room >= 0 and all(t.room > 0 for t in heard[:-1])


def test_a_stop_string_ends_its_own_turn_only() -> None:
    """The same string in an answer, or in a turn before, ends nothing."""
    echo = Echo(turn_tokens=None)
    asked = replace(ASKED, stop=(TOKENIZER.decode([9]),), max_completion_length=200)
    model = tiny_model()
    model.generation_config.eos_token_id = None
    HFSampler(model, TOKENIZER).sample(PROMPTS, asked, replies=echo)
    ended = [turn for heard in echo.heard.values() for turn in heard if turn.stopped]
    assert len(ended) > 8
    for turn in ended:
        assert turn.tokens[-1] == 2 or asked.stop[0] in TOKENIZER.decode(turn.tokens)
        assert asked.stop[0] not in TOKENIZER.decode(turn.tokens[:-1])


def test_what_is_watched_has_a_place_for_every_token() -> None:
    model, echo = stopping(), Echo()
    sampler = HFSampler(model, TOKENIZER, watch=Watch(True, 3))
    for rollout in sampler.sample(PROMPTS, ASKED, replies=echo):
        notes, mine = rollout.notes, torch.tensor(echo.mine[rollout.id])
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt + rollout.tokens])).logits[0]
        logps = logits[len(rollout.prompt) - 1 : -1].log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        assert (notes.entropy - entropy)[mine].abs().max() < FORWARD
        assert (notes.top_logp - logps.topk(3).values)[mine].abs().max() < FORWARD
        assert not notes.entropy[~mine].any()


def test_what_is_kept_in_a_prefix_opens_the_first_turn() -> None:
    """A prefix that ends with a stop token is a response that goes on, where turns are answered."""
    model, echo = stopping(), Echo()
    prompts = [replace(p, prefix=[70, 80, 2]) for p in PROMPTS[:3]]
    for rollout in HFSampler(model, TOKENIZER).sample(prompts, ASKED, replies=echo):
        assert rollout.tokens == [70, 80, 2, *echo.said[rollout.id]]
        assert gap(model, rollout, [False] * 3 + echo.mine[rollout.id]) < 1e-5
