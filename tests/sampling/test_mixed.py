"""Teacher-mixed sampling: tokens from a mixture of two models, with the student's own log-probs
recorded.
"""

from __future__ import annotations

import torch

from opdkit.models.body import head_of
from opdkit.sampling import Guide, HFSampler
from opdkit.types import Prompt, Sampling
from tests.common.rounding import FORWARD
from tests.common.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
STUDENT, TEACHER = tiny_model("qwen3", seed=1), tiny_model("llama", seed=2, hidden=48)
PROMPTS = [Prompt("a", [5, 6, 7]), Prompt("b", [9, 10, 11, 12, 13])]


def rollouts(share: float, **sampling):
    sampler = HFSampler(STUDENT, TOKENIZER, guide=Guide(TEACHER, head_of(TEACHER), share))
    return sampler.sample(
        PROMPTS, Sampling(max_completion_length=6, num_generations=2, **sampling), seed=3
    )


def logps(model, rollout):
    """[T]: log-probs of the response under a plain forward pass."""
    ids = torch.tensor([rollout.prompt + rollout.tokens])
    with torch.no_grad():
        full = model(input_ids=ids).logits.log_softmax(-1)[0, len(rollout.prompt) - 1 : -1]
    return full.gather(-1, torch.tensor(rollout.tokens)[:, None])[:, 0]


def test_recorded_log_probs_are_the_students_and_the_mixtures():
    for rollout in rollouts(0.3):
        own, other = logps(STUDENT, rollout), logps(TEACHER, rollout)
        assert torch.allclose(torch.tensor(rollout.logp), own, atol=FORWARD)
        mixed = (0.3 * other.exp() + 0.7 * own.exp()).log()
        assert torch.allclose(torch.tensor(rollout.drawn_logp), mixed, atol=FORWARD)


def test_the_ends_are_the_models_themselves():
    settings = Sampling(max_completion_length=6, num_generations=2)
    alone = HFSampler(STUDENT, TOKENIZER).sample(PROMPTS, settings, seed=3)
    assert [r.tokens for r in rollouts(0.0)] == [r.tokens for r in alone]
    teacher = HFSampler(TEACHER, TOKENIZER).sample(PROMPTS, settings, seed=3)
    assert [r.tokens for r in rollouts(1.0)] == [r.tokens for r in teacher]
