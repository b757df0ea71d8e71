"""What each of several processes does in a test of samplers beside a student that is spread over
them.

    torchrun --standalone --nproc-per-node N -m tests.sampling.ranks OUT URL URL

The first process writes into OUT, a torch file, what came of it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from safetensors.torch import load_file

import opdkit.sampling.vllm as vllm
from opdkit.models.body import hidden_states
from opdkit.models.engines.weights import checkpoint_weights, save_adapters
from opdkit.models.sharding import reshard, shard
from opdkit.sampling.server import ServerSampler, ServerSettings
from opdkit.sampling.vllm import VllmSampler, VllmSettings
from opdkit.train.divided import divided
from opdkit.train.mesh import Mesh, joined
from opdkit.train.settings import Lora
from opdkit.train.student import with_adapters
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.fake_engine import FakeEngine
from tests.common.tiny import VOCAB, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    Prompt(f"p{i}", TOKENIZER(text)["input_ids"], {})
    for i, text in enumerate(["So", "What is 12 plus 30?", "user"])
]
SAMPLING = Sampling(max_completion_length=6, num_generations=2)


def experts() -> Any:
    """A mixture of experts, whose matrices are one parameter and many in a checkpoint."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return hf.Qwen3MoeForCausalLM(config).eval()


def adapted() -> Any:
    model = with_adapters(tiny_model(seed=1), Lora(r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model.eval()


MODELS = {
    "tied": lambda: tiny_model(seed=1, tie_word_embeddings=True),
    "untied": lambda: tiny_model(seed=1),
    "adapters": adapted,
    "experts": experts,
}


def move(model: Any) -> None:
    """As an optimiser step would, which holds the parts."""
    reshard(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)


def passed(model: Any) -> None:
    """A forward pass, after which some layers are whole until they are told otherwise."""
    with torch.no_grad():
        hidden_states(model, torch.arange(5)[None], None)


def weights_of(make: Any, mesh: Mesh) -> dict[str, Any]:
    """The names in a checkpoint, and which weights differ once the model is spread."""
    alone, spread = make(), shard(make(), mesh.devices)
    passed(spread)
    before, after = dict(checkpoint_weights(alone)), dict(checkpoint_weights(spread))
    differ = [n for n in before if n not in after or not torch.equal(before[n], after[n])]
    held = {"most": most_held(spread), "all": sum(w.nbytes for w in before.values())}
    return {"names": list(after), "differ": differ, "count": len(before)} | held


def most_held(model: Any) -> int:
    """Bytes of weights that a process has at once which goes through them and keeps none."""
    seen: list[Any] = []
    most = 0
    for _, weight in checkpoint_weights(model):
        seen.append(ref(weight))
        most = max(most, sum(w.nbytes for each in seen if (w := each()) is not None))
    return most


def adapters_of(mesh: Mesh) -> list[str]:
    """The adapters in a file that differ once the model is spread."""
    alone, spread = adapted(), shard(adapted(), mesh.devices)
    passed(spread)
    with tempfile.TemporaryDirectory() as folder:
        here, there = Path(folder) / "alone", Path(folder) / "spread"
        save_adapters(alone, here)
        save_adapters(spread, there if mesh.rank == 0 else None)
        one = load_file(here / "adapter_model.safetensors")
        two = load_file(there / "adapter_model.safetensors") if mesh.rank == 0 else one
    return [n for n in {*one, *two} if not torch.equal(one[n], two[n])]


def written(sampler: Any, model: Any) -> list[Rollout]:
    """By the student as it is, and once it has moved."""
    before = sampler.sample(PROMPTS, SAMPLING, seed=0, step=0, policy_version=0)
    move(model)
    passed(model)
    sampler.sync(model, 1)
    after = sampler.sample(PROMPTS, SAMPLING, seed=0, step=1, policy_version=1)
    fewer = sampler.sample(PROMPTS[:1], SAMPLING, seed=0, step=2, policy_version=1)
    return [*before, *after, *fewer]


def by_servers(make: Any, mesh: Mesh, urls: Sequence[str]) -> list[Rollout]:
    model = shard(make(), mesh.devices)
    inner = ServerSampler(model, TOKENIZER, ServerSettings(tuple(urls), retries=0))
    return written(divided(inner, mesh, model), model)


def by_engines(make: Any, mesh: Mesh, **settings: Any) -> list[Rollout]:
    """An engine in each process; with sleep_level 2 those that wrote have no weights any more, and
    those that had nothing to write do.
    """
    model = shard(make(), mesh.devices)
    inner = VllmSampler(model, TOKENIZER, VllmSettings(**settings))
    return written(divided(inner, mesh, model), model)


def main(out: Path, urls: Sequence[str]) -> None:
    torch.set_num_threads(1)
    vllm.Engine = FakeEngine  # type: ignore[assignment, misc]
    with joined("cpu") as mesh:
        found = {
            "weights": {name: weights_of(make, mesh) for name, make in MODELS.items()},
            "adapters": adapters_of(mesh),
            "servers": {n: by_servers(MODELS[n], mesh, urls) for n in ("untied", "adapters")},
            "engines": {n: by_engines(make, mesh) for n, make in MODELS.items()},
            "asleep": by_engines(MODELS["tied"], mesh, sleep_level=2),
        }
        agreed = mesh.every(found["weights"])
        found["agreed"] = all(each == agreed[0] for each in agreed)
    if mesh.rank == 0:
        torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
