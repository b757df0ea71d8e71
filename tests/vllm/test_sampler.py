"""Sampling with vLLM in this process: HFSampler's rollouts, exact log-probs, the model's
distribution, and weights that follow the student.

Tolerances, float32: two implementations of a forward pass add up in other orders, which moves a
log-prob by 1e-6 to 1e-5 nats; allowed is what its roundings may add up to. Other weights move it by
0.01 and more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.body import head_of
from opdkit.models.engines import vllm_worker
from opdkit.models.tokenizers import real_vocabulary
from opdkit.sampling import HFSampler
from opdkit.sampling.draws import _floor
from opdkit.sampling.vllm import VllmSampler
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.rounding import FORWARD
from tests.vllm.conftest import ROWS, SETTINGS, build, questions

pytestmark = pytest.mark.vllm

CLOSE = FORWARD  # nats
EDGE = 1e-5  # of a logit: how far rounding moves the edge of a cut
GREEDY = Sampling(temperature=0, max_completion_length=40)
DRAWN = Sampling(max_completion_length=24, num_generations=3)


@pytest.fixture(scope="module")
def student() -> Any:
    model = build(tied=True)
    model.generation_config.eos_token_id = list(range(2, 12))  # rows end at all lengths
    return model


@pytest.fixture(scope="module")
def sampler(student: Any, tokenizer: Any) -> Iterator[VllmSampler]:
    made = VllmSampler(student, tokenizer, SETTINGS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[Prompt]:
    return [
        Prompt(f"q{i}", tokenizer(text)["input_ids"], {"answer": i})
        for i, text in enumerate(questions()[:4])
    ]


@torch.no_grad()
def logits_of(model: Any, rollout: Rollout, tokens: int) -> Tensor:
    """[T, V] over the tokenizer's real tokens, by a plain forward pass of transformers."""
    ids = torch.tensor([rollout.prompt + rollout.tokens])
    return model(ids).logits[0, len(rollout.prompt) - 1 : -1, :tokens]


def at(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    return logits.log_softmax(-1).gather(1, torch.tensor(list(tokens))[:, None])[:, 0]


def worst(model: Any, rollouts: Sequence[Rollout], tokens: int = 320) -> float:
    """Largest difference of the recorded plain log-probs from transformers'."""
    return max(
        float((torch.tensor(r.logp) - at(logits_of(model, r, tokens), r.tokens)).abs().max())
        for r in rollouts
        if r.tokens
    )


def assert_drawn(model: Any, rollout: Rollout, sampling: Sampling, given: int = 0) -> None:
    """`drawn_logp` is of the cut distribution; a token at the edge of the cut, up to rounding, may
    be in it or not.
    """
    scaled = logits_of(model, rollout, 320) / sampling.temperature
    floor = _floor(scaled, sampling)
    floors = (
        [torch.full_like(scaled[:, :1], -math.inf)]
        if floor is None
        else [floor - EDGE, floor, floor + EDGE]
    )
    drawn = torch.stack(
        [at(scaled.masked_fill(scaled < f, -math.inf), rollout.tokens) for f in floors]
    )
    gaps = (torch.tensor(rollout.drawn_logp) - drawn).abs().amin(0)[given:]
    assert not len(gaps) or float(gaps.max()) < CLOSE


def without_numbers(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return [replace(r, logp=[], drawn_logp=[]) for r in rollouts]


def move(model: Any, seed: int, size: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


# ----------------------------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("stop", [(), ("e",)])
@pytest.mark.parametrize("prefix", [(), (20, 21, 22)])
def test_greedy_rollouts_are_those_of_the_sampler_in_this_process(
    sampler: VllmSampler,
    student: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    stop: Any,
    prefix: Any,
) -> None:
    sampling = replace(GREEDY, stop=stop)
    asked = [replace(p, prefix=list(prefix)) for p in prompts]
    ours = sampler.sample(asked, sampling, seed=3, step=5, policy_version=7)
    theirs = HFSampler(student, tokenizer).sample(asked, sampling, seed=3, step=5, policy_version=7)
    assert without_numbers(ours) == without_numbers(theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), atol=CLOSE, rtol=0)
        torch.testing.assert_close(
            torch.tensor(a.drawn_logp), torch.tensor(b.drawn_logp), atol=CLOSE, rtol=0
        )


def test_a_prefix_that_is_the_whole_response(
    sampler: VllmSampler, student: Any, tokenizer: Any, prompts: list[Prompt]
) -> None:
    """It ends with a stop token, or fills the length; its neighbours are drawn."""
    asked = [
        replace(prompts[0], prefix=[30, 31, 2]),
        replace(prompts[1], prefix=[40] * 40),
        prompts[2],
    ]
    seen: list[int] = []
    ours = sampler.sample(asked, GREEDY, progress=seen.append)
    assert without_numbers(ours) == without_numbers(
        HFSampler(student, tokenizer).sample(asked, GREEDY)
    )
    assert [r.finish for r in ours[:2]] == ["stop", "length"] and worst(student, ours) < CLOSE
    assert seen == [2, 3]


@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 20},
        {"top_p": 0.8, "top_k": 50},
        {"temperature": 0.8, "min_p": 0.05},
    ],
)
@pytest.mark.parametrize("prefix", [(), (20, 21, 22)])
def test_both_log_probs_are_exact(
    sampler: VllmSampler, student: Any, prompts: list[Prompt], cuts: dict[str, Any], prefix: Any
) -> None:
    """`logp` under the plain softmax over the real tokens, `drawn_logp` under what was drawn from;
    the head's padding has no part in either.
    """
    sampling = replace(DRAWN, **cuts)
    rollouts = sampler.sample([replace(p, prefix=list(prefix)) for p in prompts], sampling)
    assert len(rollouts) == 12 and worst(student, rollouts) < CLOSE
    for r in rollouts:
        assert_drawn(student, r, sampling, len(prefix))
        assert r.drawn_logp[: len(prefix)] == r.logp[: len(prefix)] and max(r.tokens) < 320


def test_draws_are_keyed_by_the_rollout(sampler: VllmSampler, prompts: list[Prompt]) -> None:
    """Other prompts, or their order, change nothing; another seed, number or step does."""
    all_of = {r.id: r.tokens for r in sampler.sample(prompts, DRAWN, seed=1)}
    alone = {r.id: r.tokens for r in sampler.sample(prompts[:0:-2], DRAWN, seed=1)}
    assert alone == {id: all_of[id] for id in alone} and len(alone) == 6
    assert len({tuple(tokens) for tokens in all_of.values()}) == 12
    assert {r.id: r.tokens for r in sampler.sample(prompts, DRAWN, seed=2)} != all_of
    assert [r.tokens for r in sampler.sample(prompts, DRAWN, seed=1, step=1)] != list(
        all_of.values()
    )


def test_tokens_come_in_the_shares_of_the_softmax(
    sampler: VllmSampler, student: Any, prompts: list[Prompt]
) -> None:
    """The first token of 3000 rollouts of one prompt. Chi-square over the 20 most probable tokens
    and the rest: 20 degrees of freedom exceed 45.3 once in a thousand times, and the seed is fixed.
    Their mean log-prob is minus the entropy, up to 4 standard errors.
    """
    n = 3000
    rollouts = sampler.sample(
        prompts[:1], Sampling(max_completion_length=1, num_generations=n), seed=0
    )
    logps = logits_of(student, rollouts[0], 320).log_softmax(-1)[0]
    counts = torch.bincount(torch.tensor([r.tokens[0] for r in rollouts]), minlength=320)
    top = logps.topk(20).indices
    seen = torch.cat([counts[top], (n - counts[top].sum())[None]]).double()
    probs = logps.exp().double()
    expected = n * torch.cat([probs[top], (1 - probs[top].sum())[None]])
    assert float(((seen - expected) ** 2 / expected).sum()) < 45.3
    entropy = -float((probs * logps).sum())
    spread = float((probs * logps**2).sum() - entropy**2) ** 0.5
    assert abs(sum(r.logp[0] for r in rollouts) / n + entropy) < 4 * spread / n**0.5


# --------------------------------------------------------------------------------------------- sync


def test_log_probs_follow_every_update(
    sampler: VllmSampler, student: Any, prompts: list[Prompt]
) -> None:
    """Prompts are the same each time: keys and values of older weights in the prefix cache would
    show.
    """
    for version in range(1, 4):
        before = sampler.probe.expected()
        move(student, version)
        sampler.sync(student, version)
        moved = float((sampler.probe.expected() - before).abs().mean())
        assert sampler.probe.gap is not None and sampler.probe.gap < CLOSE and moved > 0.05
        assert worst(student, sampler.sample(prompts, DRAWN, policy_version=version)) < CLOSE


def test_an_update_that_does_not_arrive_stops_the_run(
    sampler: VllmSampler, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sampler.engine, "load", lambda weights: sampler.engine.reset())
        move(student, 10)
        with pytest.raises(UserError, match=r"optimiser step 4.* not the student's.*the run stops"):
            sampler.sync(student, 4)
        # so wide that the numbers pass: they are still those of before, to a bit
        patch.setattr(sampler.probe, "tolerance", 5.0)
        with pytest.raises(UserError, match=r"to a bit what they were before"):
            sampler.sync(student, 4)
            move(student, 11)
            sampler.sync(student, 5)
    sampler.sync(student, 6)


def test_the_packed_copy_of_a_tied_head_is_renewed(
    sampler: VllmSampler, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PITFALLS R2b: without that, vLLM's reload on a CPU leaves it behind, and the probe catches
    it.
    """
    with monkeypatch.context() as patch:
        patch.setattr(vllm_worker, "_pack_again", lambda model: None)
        move(student, 20)
        with pytest.raises(UserError, match="not the student's"):
            sampler.sync(student, 7)
    sampler.sync(student, 8)
    assert sampler.probe.gap is not None and sampler.probe.gap < CLOSE


def test_another_model_is_refused(sampler: VllmSampler) -> None:
    with pytest.raises(ValueError, match="another model"):
        sampler.sync(build(1), 1)


def test_an_engine_beside_another_is_its_own_and_its_end_harms_none(
    sampler: VllmSampler, student: Any, tokenizer: Any, prompts: list[Prompt]
) -> None:
    """An untied model in bfloat16; the generators of this process are left as they were."""
    other = build(5, tied=False)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    second = VllmSampler(other, tokenizer, replace(SETTINGS, dtype="bfloat16"))
    assert torch.equal(torch.rand(3), expected)
    rollouts = second.sample(prompts, GREEDY)
    assert second.probe.gap is not None and 1e-4 < second.probe.gap < 0.1
    assert 1e-4 < worst(other, rollouts) < 1.0 and max(max(r.tokens) for r in rollouts) < 320
    second.close()
    assert worst(student, sampler.sample(prompts, GREEDY)) < CLOSE


# ----------------------------------------------------------------------------------------- refusals


def test_what_vllm_would_change_on_its_own_is_refused(
    sampler: VllmSampler, prompts: list[Prompt]
) -> None:
    with pytest.raises(UserError, match="outside what vLLM samples with"):
        sampler.sample(prompts, Sampling(temperature=2.5))
    with pytest.raises(UserError, match="max_model_len="):
        sampler.sample(prompts, Sampling(max_completion_length=384))
    with pytest.raises(UserError, match="enable_sleep_mode=true frees a GPU's memory"):
        VllmSampler(sampler.model, sampler.tokenizer, replace(SETTINGS, enable_sleep_mode=True))
    with pytest.raises(UserError, match="has none"):
        VllmSampler(sampler.model, sampler.tokenizer, replace(SETTINGS, enable_lora=True))


def test_broken_weights_are_named(
    sampler: VllmSampler, student: Any, prompts: list[Prompt]
) -> None:
    weight = student.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.raises(UserError, match="no log-probs"):
        sampler.sync(student, 9)
    with torch.no_grad():
        weight.copy_(kept)
    sampler.sync(student, 10)


def test_the_padded_head_is_cut(sampler: VllmSampler, tokenizer: Any) -> None:
    assert sampler.engine.rows == ROWS and real_vocabulary(tokenizer) == 320
    assert head_of(sampler.model, 320).vocab == 320
