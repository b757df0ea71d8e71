"""Samplers that tell of each rollout as it ends tell the same that they return."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from opdkit.sampling import HFSampler, decode
from opdkit.types import Prompt, Rollout, Sampling, Watch
from tests.common.tiny import tiny_model
from tests.sampling.test_hf import PROMPTS, TOKENIZER, stopping_model
from tests.sampling.test_server import PROMPTS as GUIDED
from tests.sampling.test_server import Vllm, connect

DRAWN = Sampling(max_completion_length=40, num_generations=4)


def asked(sampler: Any, prompts: list[Prompt], sampling: Sampling) -> tuple[Any, list[Rollout]]:
    told: list[Rollout] = []
    made = sampler.sample(prompts, sampling, each=told.append)
    assert made == sampler.sample(prompts, sampling)  # telling changes nothing
    return made, told


@pytest.mark.parametrize("sampling", [DRAWN, replace(DRAWN, temperature=0.7, stop=("a", " t"))])
@pytest.mark.parametrize("rows", [None, 256])
def test_each_rollout_is_told_once_as_it_is_returned(sampling: Sampling, rows: int | None) -> None:
    """Also of prompts that wait for room, with prefixes, and what the sampler watched."""
    prompts = [replace(p, prefix=[40, 41] * (i % 2)) for i, p in enumerate(PROMPTS)]
    sampler = HFSampler(
        stopping_model(), TOKENIZER, max_batch_tokens=rows, watch=Watch(entropy=True, top=2)
    )
    made, told = asked(sampler, prompts, sampling)
    by_id = {rollout.id: rollout for rollout in told}
    assert len(told) == len(by_id) == len(made) == 20
    for rollout in made:
        other = by_id[rollout.id]
        assert other == rollout
        assert rollout.notes is not None and other.notes is not None
        assert rollout.notes.entropy is not None and other.notes.entropy is not None
        assert rollout.notes.entropy.tolist() == other.notes.entropy.tolist()


def test_they_are_told_while_others_are_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rollouts have 4 tokens, the others 40."""
    monkeypatch.setattr(decode, "HEAR_EVERY", 2)
    prompts = [replace(p, prefix=[50] * 36 * (i % 2)) for i, p in enumerate(PROMPTS[:4])]
    model = tiny_model("qwen3")
    sampler, order = HFSampler(model, TOKENIZER), list[str]()
    model.model.register_forward_pre_hook(lambda *_: order.append("pass"))
    rollouts = sampler.sample(
        prompts, Sampling(max_completion_length=40), each=lambda r: order.append(r.id)
    )
    short = [r.id for r, p in zip(rollouts, prompts) if p.prefix]
    assert {x for x in order if x != "pass"} == {r.id for r in rollouts}
    told = max(order.index(id) for id in short)
    assert order[told:].count("pass") >= 30


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_server_tells_of_each_response_as_it_comes(temperature: float) -> None:
    """All but a response that is its prefix. Where they have to be scored yet, log-probs are not
    there.
    """
    sampling = Sampling(temperature=temperature, max_completion_length=8)
    prompts = [*GUIDED, Prompt("whole", [5, 6], prefix=[30] * 8)]
    with ExitStack() as stack:
        servers = [stack.enter_context(Vllm(tiny_model(seed=9), TOKENIZER)) for _ in range(2)]
        made, told = asked(connect(tiny_model(seed=1), servers), prompts, sampling)
    by_id = {rollout.id: rollout for rollout in told}
    assert set(by_id) == {r.id for r in made[:-1]}
    for rollout in made[:-1]:
        known = {"logp": rollout.logp, "drawn_logp": rollout.drawn_logp}
        assert replace(by_id[rollout.id], **known) == rollout
        guided = "guided" in rollout.marks
        assert bool(by_id[rollout.id].logp) == (temperature == 1.0 and not guided)
