"""The student's weights for an engine: what a checkpoint of it would hold, adapters added or left
out, the student untouched.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opdkit.base.errors import UserError
from opdkit.models.engines import weights as module
from opdkit.models.engines.vllm_worker import _read
from opdkit.models.engines.weights import (
    adapter_rank,
    checkpoint_weights,
    engine_dtype,
    save_adapters,
    save_weights,
)
from opdkit.train.settings import Lora
from opdkit.train.student import with_adapters
from tests.common.tiny import tiny_model


def adapted(**lora: Any) -> Any:
    model = with_adapters(tiny_model(), Lora(**({"r": 4} | lora)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_names_and_values_are_those_of_a_checkpoint(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    stored, ours = load_file(tmp_path / "model.safetensors"), dict(checkpoint_weights(model))
    assert ours.keys() == stored.keys() and ("lm_head.weight" in ours) is not tied
    assert all(torch.equal(ours[name], stored[name]) for name in stored)


def test_adapters_are_added_to_copies() -> None:
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ours = dict(checkpoint_weights(model))
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert ours.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(ours[name], weight)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(weight.requires_grad for weight in ours.values())


def test_the_weights_below_the_adapters() -> None:
    below = dict(checkpoint_weights(adapted(), merged=False))
    start = dict(tiny_model().named_parameters())
    assert below.keys() == start.keys() and all(
        torch.equal(below[name], start[name]) for name in start
    )


def test_a_head_that_is_trained_as_a_whole() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.fill_(3.0)
    ours = dict(checkpoint_weights(model))
    assert ours.keys() == dict(tiny_model().named_parameters()).keys() and bool(
        (ours["lm_head.weight"] == 3.0).all()
    )


def test_other_adapters_and_quantised_weights_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    dora: Any = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    )
    with pytest.raises(UserError, match="not plain low-rank matrices"):
        dict(checkpoint_weights(dora))
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(UserError, match=r"quantised \(torch.uint8\)"):
        dict(checkpoint_weights(model))


def test_rank_and_dtype() -> None:
    assert adapter_rank(adapted(r=6)) == 6
    with pytest.raises(UserError, match="the student has none"):
        adapter_rank(tiny_model())
    assert (
        engine_dtype(tiny_model(), None) == "float32"
        and engine_dtype(tiny_model(), "bfloat16") == "bfloat16"
    )
    with pytest.raises(UserError, match="does not compute in float64"):
        engine_dtype(tiny_model().double(), None)


def test_files_for_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In shards, in the engine's dtype; the worker reads them back."""
    monkeypatch.setattr(module, "SHARD", 20_000)
    weights, folder = dict(checkpoint_weights(tiny_model())), tmp_path / "new"
    save_weights(weights.items(), folder, torch.bfloat16)
    assert len(list(folder.iterdir())) > 1
    read = dict(_read(folder))
    assert read.keys() == weights.keys() and all(
        torch.equal(read[n], w.bfloat16()) for n, w in weights.items()
    )
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        dict(_read(tmp_path))


def test_adapters_on_their_own(tmp_path: Path) -> None:
    model = adapted()
    save_adapters(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert stored.keys() == trained.keys() and all(
        torch.equal(stored[n], trained[n]) for n in stored
    )
