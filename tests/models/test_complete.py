"""Weights that are not those of the configuration beside them are refused, not dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from opdkit.base.errors import UserError
from opdkit.models.load import load_model
from tests.common.tiny import save_tiny


def copy(folder: Path, config: dict[str, Any], change: Any = None) -> str:
    save_tiny(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_norms_that_another_kind_of_model_would_drop(tmp_path: Path) -> None:
    """Qwen3's norms of queries and keys have no place in a Llama, which computes without them."""
    other = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(UserError, match=r"4 tensors that LlamaForCausalLM would drop.*k_norm"):
        load_model(copy(tmp_path / "m", other))


def test_a_layer_that_would_be_dropped(tmp_path: Path) -> None:
    def more(weights: dict[str, Any]) -> dict[str, Any]:
        third = {k.replace(".1.", ".2."): v.clone() for k, v in weights.items() if ".1." in k}
        return weights | third

    with pytest.raises(UserError, match=r"would drop, for example model\.layers\.2\."):
        load_model(copy(tmp_path / "m", {}, more))


def test_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tensors of other shapes than its config\.json describes"):
        load_model(copy(tmp_path / "m", {"intermediate_size": 48}))


def test_parts_that_a_language_model_does_not_have_may_be_dropped(tmp_path: Path) -> None:
    """A tower for pictures, and buffers that the model computes itself."""

    def more(weights: dict[str, Any]) -> dict[str, Any]:
        row = next(iter(weights.values()))[:1].clone()
        return weights | {
            "vision_tower.blocks.0.weight": row,
            "model.layers.0.self_attn.rotary_emb.inv_freq": row.clone(),
        }

    load_model(copy(tmp_path / "m", {}, more))
