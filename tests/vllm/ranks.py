"""What each of several processes does in a test of engines in all of them.

    torchrun --standalone --nproc-per-node N -m tests.vllm.ranks OUT

The first process writes the rollouts and the probe's gaps of all processes into OUT, a torch file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from opdkit.models.sharding import reshard, shard
from opdkit.sampling.vllm import VllmSampler, VllmSettings
from opdkit.train.divided import divided
from opdkit.train.mesh import Mesh, joined
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.tiny import tiny_tokenizer
from tests.vllm import test_adapters as adapters
from tests.vllm.conftest import SMALL, WRITTEN, build

TOKENIZER = tiny_tokenizer()
PROMPTS = [Prompt(f"q{i}", TOKENIZER(text)["input_ids"], {}) for i, text in enumerate(WRITTEN[:3])]
GREEDY = Sampling(temperature=0, max_completion_length=12)
MODELS = {
    "tied": lambda: build(3),
    "untied": lambda: build(3, tied=False),
    "adapters": adapters.student,
}


def move(model: Any) -> None:
    """As an optimiser step would, which holds the parts."""
    reshard(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.2)


def written(sampler: Any, model: Any) -> list[Rollout]:
    """By the student as it is, and once it has moved; in the end fewer than there are processes."""
    before = sampler.sample(PROMPTS, GREEDY, seed=0, step=0, policy_version=0)
    move(model)
    sampler.sync(model, 1)
    after = sampler.sample(PROMPTS, GREEDY, seed=0, step=1, policy_version=1)
    fewer = sampler.sample(PROMPTS[:1], GREEDY, seed=0, step=2, policy_version=1)
    return [*before, *after, *fewer]


def found(name: str, mesh: Mesh) -> tuple[list[Rollout], list[float]]:
    model = shard(MODELS[name](), mesh.devices)
    inner = VllmSampler(model, TOKENIZER, VllmSettings(**SMALL, enable_lora=name == "adapters"))
    rollouts = written(divided(inner, mesh, model), model)
    inner.close()
    return rollouts, mesh.every(float(inner.probe.gap or 0.0))


def main(out: Path) -> None:
    with joined("cpu") as mesh:
        every = {name: found(name, mesh) for name in MODELS}
        if mesh.rank == 0:
            torch.save(every, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
