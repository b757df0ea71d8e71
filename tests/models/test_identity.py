"""Two checkpoints have the same digest exactly where they are the same model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opdkit.models.identity import (
    Identity,
    checkpoint_digest,
    has_digest,
    identify,
    tokenizer_digest,
)
from tests.common.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("identity") / "model", seed=1))


def changed(model: Path, tmp_path: Path, change: Any) -> str | None:
    """The digest after a change of the weights."""
    folder = tmp_path / "changed"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return checkpoint_digest(folder)


def first_entry(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][0] += 1e-6


def other_dtype(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()


def other_name(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.scale"] = weights.pop("model.norm.weight")


def test_the_same_weights_anywhere_else_are_the_same(model: Path, tmp_path: Path) -> None:
    digest = checkpoint_digest(model)
    assert digest is not None and changed(model, tmp_path, lambda weights: None) == digest
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(
        json.dumps({**config, "transformers_version": "0", "_name_or_path": "x"})
    )
    weights = load_file(model / "model.safetensors")  # in two files instead of one
    names = sorted(weights)
    (tmp_path / "changed" / "model.safetensors").unlink()
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: weights[n] for n in part}, tmp_path / "changed" / f"model-{i}.safetensors")
    assert identify(str(tmp_path / "changed")) == Identity(str(tmp_path / "changed"), digest)


@pytest.mark.parametrize("change", [first_entry, other_dtype, other_name])
def test_any_change_of_the_model_changes_it(model: Path, tmp_path: Path, change: Any) -> None:
    assert changed(model, tmp_path, change) != checkpoint_digest(model)


def test_another_configuration_is_another_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert checkpoint_digest(tmp_path / "m") != checkpoint_digest(model)


def test_without_files_the_name_is_all_there_is(tmp_path: Path) -> None:
    assert identify("nobody/has-downloaded-this") == Identity("nobody/has-downloaded-this")
    assert identify(str(tmp_path)) == Identity(str(tmp_path))  # a folder without weights
    assert Identity("a", "1").same(Identity("b", "1")) and not Identity("a", "1").same(
        Identity("a", "2")
    )
    assert Identity("a", "1").same(Identity("a")) and not Identity("a").same(Identity("b", "1"))


def test_a_tokenizer_is_its_map_of_ids() -> None:
    assert tokenizer_digest(tiny_tokenizer()) == tokenizer_digest(
        tiny_tokenizer(chat_template=False)
    )
    assert tokenizer_digest(tiny_tokenizer()) != tokenizer_digest(
        tiny_tokenizer(["abc abd", "dada"])
    )


def test_digests_stored_by_caches_and_said_by_servers_are_both_known() -> None:
    """sha256 of `[["a", 0], ["b", 1]]`, as caches (64 digits) and servers (16) have always had it;
    fewer digits tell nothing apart.
    """

    class Two:
        def get_vocab(self) -> dict[str, int]:
            return {"b": 1, "a": 0}

    digest = hashlib.sha256(b'[["a", 0], ["b", 1]]').hexdigest()
    assert tokenizer_digest(Two()) == digest
    assert has_digest(Two(), digest) and has_digest(Two(), digest[:16])
    assert not has_digest(Two(), digest[:15]) and not has_digest(Two(), "")
    assert not has_digest(Two(), digest[1:17]) and not has_digest(tiny_tokenizer(), digest)
