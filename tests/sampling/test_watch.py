"""What the sampler notes on the way is what a scoring pass would say, and then no scoring pass of
the student is made.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from opdkit import load
from opdkit.models.body import head_of
from opdkit.objective.facts import EntropyFact, LogpAtFact, LogpFact, TopFact
from opdkit.objective.needs import watched
from opdkit.sampling import HFSampler
from opdkit.teachers import LocalModel
from opdkit.train.gather import gather
from opdkit.types import Watch
from tests.common.rounding import FORWARD
from tests.common.tiny import VOCAB, tiny_model, tiny_tokenizer
from tests.sampling.test_hf import DRAWN, PROMPTS, TOKENIZER, forward_logp, stopping_model

# dH = -sum p log p dlog p: at most H times what log-probs move by, and H is at most log V
ENTROPY = math.log(VOCAB) * FORWARD


@pytest.mark.parametrize("prefix", [[], [7, 11, 5]], ids=["free", "guided"])
def test_notes_are_those_of_a_plain_forward_pass(prefix: list[int]) -> None:
    model = stopping_model()
    prompts = [replace(p, prefix=prefix if i % 2 else []) for i, p in enumerate(PROMPTS)]
    rollouts = HFSampler(
        model, TOKENIZER, watch=Watch(entropy=True, top=4), max_batch_tokens=300
    ).sample(prompts, DRAWN)
    assert len({len(r.tokens) for r in rollouts}) > 3  # rows that come and go
    for rollout in rollouts:
        logps = forward_logp(model, rollout)
        notes: Any = rollout.notes
        torch.testing.assert_close(
            notes.entropy, -(logps.exp() * logps).sum(-1), rtol=0, atol=ENTROPY
        )
        torch.testing.assert_close(
            notes.top_logp, logps.gather(-1, notes.top), rtol=0, atol=FORWARD
        )
        torch.testing.assert_close(notes.top_logp, logps.topk(4).values, rtol=0, atol=FORWARD)


def test_watching_changes_nothing_of_what_is_written() -> None:
    model = stopping_model()
    plain, seen = (
        HFSampler(model, TOKENIZER, watch=w).sample(PROMPTS, DRAWN)
        for w in (Watch(), Watch(True, 3))
    )
    assert plain == seen and all(r.notes is None for r in plain)


METHODS: list[tuple[str, dict[str, Any], Watch]] = [
    ("reopold", {}, Watch(entropy=True)),
    ("opd", {"support": "student", "k": 4}, Watch(top=4)),
    ("opd", {}, Watch()),
    ("tip", {}, Watch()),  # reads a gap as well, for which the student is passed anyway
    ("topk_opd", {"mode": "intersect_sg_norm", "k": 4}, Watch(top=4)),
]


@pytest.mark.parametrize(("name", "arguments", "watch"), METHODS, ids=str)
def test_what_is_watched_is_found_from_the_method(
    name: str, arguments: dict[str, Any], watch: Watch
) -> None:
    assert watched(load(name, **arguments).needs) == watch


@pytest.mark.parametrize(
    ("name", "arguments"), [(n, a) for n, a, w in METHODS if w != Watch()], ids=str
)
def test_noted_facts_need_no_pass_of_the_student(name: str, arguments: dict[str, Any]) -> None:
    needs = load(name, **arguments).needs
    student, teacher = tiny_model("qwen3"), tiny_model("llama", seed=3)
    rollouts = HFSampler(student, tiny_tokenizer(), watch=watched(needs)).sample(
        PROMPTS, DRAWN, policy_version=2
    )
    scorers = {"teacher": LocalModel(teacher, head_of(teacher))}
    noted = gather(rollouts, needs, scorers, policy_version=2)  # there is no student to ask
    with pytest.raises(KeyError, match="student"):
        gather(rollouts, needs, scorers, policy_version=3)  # stale: it has to be asked
    scorers["student"] = LocalModel(student, head_of(student))
    asked = gather(rollouts, needs, scorers, policy_version=2, recompute_student=True)
    for fact in needs.facts:
        if isinstance(fact, (LogpFact, EntropyFact, TopFact, LogpAtFact)):
            allowed = ENTROPY if isinstance(fact, EntropyFact) else FORWARD
            torch.testing.assert_close(
                noted.read(fact)[noted.mask], asked.read(fact)[asked.mask], rtol=0, atol=allowed
            )
