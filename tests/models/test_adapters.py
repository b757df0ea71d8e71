"""Folders of adapters, and models with adapters on them, as peft and TRL leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.models.adapters import base_of, own_adapters
from opdkit.models.load import generation_settings, load_model, load_tokenizer, parameter_count
from opdkit.models.shapes import shape_of
from tests.common.rounding import FORWARD
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 40)[None]


def adapted(model: Any, **settings: Any) -> Any:
    """A model with adapters that change it."""
    torch.manual_seed(0)
    chosen = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear", "init_lora_weights": False}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **(chosen | settings))
    return peft.get_peft_model(model, config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A checkpoint, and adapters to it without a tokenizer."""
    base = save_tiny(tmp_path_factory.mktemp("base"), seed=1)
    adapters = tmp_path_factory.mktemp("adapters")
    adapted(load_model(base)).save_pretrained(adapters)
    return base, str(adapters)


@torch.no_grad()
def test_a_folder_of_adapters_is_the_model_below_with_them_added(folders: tuple[str, str]) -> None:
    base, adapters = folders
    assert base_of(adapters) == base and base_of(base) is None
    expected = adapted(load_model(base))(IDS).logits
    loaded = load_model(adapters)
    assert torch.allclose(loaded(IDS).logits, expected, atol=FORWARD)
    assert not torch.allclose(load_model(base)(IDS).logits, expected, atol=0.1)
    # a plain model, of which every weight can learn and that is saved whole
    assert not hasattr(loaded, "peft_config")
    assert all(p.requires_grad for p in loaded.parameters())
    assert load_tokenizer(adapters).get_vocab() == tiny_tokenizer().get_vocab()
    assert parameter_count(adapters) == parameter_count(base)
    assert shape_of(adapters).layers == 2
    assert generation_settings(adapters).eos_token_id == 2


@torch.no_grad()
def test_adapters_to_a_folder_of_adapters(folders: tuple[str, str], tmp_path: Path) -> None:
    """What is trained on top belongs to both, not to the checkpoint below them."""
    second = adapted(load_model(folders[1]), r=2)
    second.save_pretrained(tmp_path)
    assert base_of(str(tmp_path)) == folders[1]
    assert torch.allclose(load_model(str(tmp_path))(IDS).logits, second(IDS).logits, atol=FORWARD)


def test_a_whole_model_beside_an_adapters_file_is_a_model(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    assert base_of(str(tmp_path)) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_adapters_of_nothing_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="holds adapters"):
        load_model(str(tmp_path))


def test_adapters_that_are_no_weights_are_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(load_model(folders[0]), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="PROMPT_TUNING: tokens before the prompt"):
        load_model(str(tmp_path))


def test_a_cut_file_of_adapters_is_named(folders: tuple[str, str], tmp_path: Path) -> None:
    adapted(load_model(folders[0])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is cut off: \d+ of its \d+"):
        load_model(str(tmp_path))


def test_what_learns_of_a_model_that_comes_with_adapters(tmp_path: Path) -> None:
    model = adapted(tiny_model())
    assert own_adapters(model, None) is model
    model.save_pretrained(tmp_path)
    moved = adapted(tiny_model())
    with torch.no_grad():
        for name, p in moved.named_parameters():
            if "lora_B" in name:
                p.zero_()
    resumed = own_adapters(moved, str(tmp_path))
    with torch.no_grad():
        assert torch.allclose(resumed(IDS).logits, model(IDS).logits, atol=FORWARD)
        # the caller's own object is where the run began, and stays so
        assert torch.allclose(moved(IDS).logits, tiny_model()(IDS).logits, atol=FORWARD)
    assert {n for n, p in resumed.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if "lora" in n
    }
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"none of which is trainable.*is_trainable=True"):
        own_adapters(model, None)


def test_the_configuration_names_the_base(folders: tuple[str, str]) -> None:
    said = json.loads((Path(folders[1]) / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == folders[0]
