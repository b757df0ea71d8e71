"""A student with adapters: sent alone, or added to the weights; either way the engine computes what
the trainer computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.sampling import HFSampler
from opdkit.sampling.vllm import VllmSampler
from opdkit.train.settings import Lora
from opdkit.train.student import with_adapters
from opdkit.types import Prompt, Sampling
from tests.vllm.conftest import SETTINGS, build, questions
from tests.vllm.test_sampler import CLOSE, without_numbers, worst

pytestmark = pytest.mark.vllm

GREEDY = Sampling(temperature=0, max_completion_length=24)


def student(seed: int = 0) -> Any:
    model = with_adapters(build(seed), Lora(r=4)).eval()
    move(model, 100)
    return model


def move(model: Any, seed: int) -> None:
    """Another value for every adapter, as an optimiser step gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture(scope="module", params=[True, False], ids=["alone", "added"])
def sampler(request: pytest.FixtureRequest, tokenizer: Any) -> Iterator[VllmSampler]:
    made = VllmSampler(student(), tokenizer, replace(SETTINGS, enable_lora=request.param))
    yield made
    made.close()


def test_adapters_follow_every_update(sampler: VllmSampler, tokenizer: Any) -> None:
    prompts = [
        Prompt(f"q{i}", tokenizer(text)["input_ids"]) for i, text in enumerate(questions()[:3])
    ]
    frozen = {
        name: p.clone() for name, p in sampler.model.named_parameters() if not p.requires_grad
    }
    for version in range(3):
        if version:
            before = sampler.probe.expected()
            move(sampler.model, version)
            sampler.sync(sampler.model, version)
            assert float((sampler.probe.expected() - before).abs().mean()) > 0.05
        rollouts = sampler.sample(prompts, GREEDY, policy_version=version)
        assert sampler.probe.gap is not None and sampler.probe.gap < CLOSE
        assert without_numbers(rollouts) == without_numbers(
            HFSampler(sampler.model, tokenizer).sample(prompts, GREEDY, policy_version=version)
        )
        assert worst(sampler.model, rollouts) < CLOSE
    assert all(
        torch.equal(p, frozen[n]) for n, p in sampler.model.named_parameters() if n in frozen
    )  # nothing was merged into it
    if sampler.settings.enable_lora:
        assert len(sampler.engine.llm.llm_engine.list_loras()) == 1  # former ones do not pile up


def test_adapters_that_do_not_arrive_stop_the_run(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "_send", lambda version: None)
        move(sampler.model, 50)
        with pytest.raises(UserError, match="not the student's"):
            sampler.sync(sampler.model, 9)
    sampler.sync(sampler.model, 10)


def test_a_rank_that_vllm_has_no_kernel_for(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="rank 600"):
        VllmSampler(
            with_adapters(build(), Lora(r=600)), tokenizer, replace(SETTINGS, enable_lora=True)
        )
