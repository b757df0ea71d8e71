"""Checkpoints whose files are not what their names say: one message, with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.models.files import damages
from opdkit.models.load import load_model, load_tokenizer
from tests.common.tiny import save_tiny

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PAGE = b"<!DOCTYPE html><html>not found</html>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path)
    return tmp_path


def test_whole_files_are_not_damaged(folder: Path) -> None:
    assert list(damages(folder)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: POINTER, "model.safetensors is a Git LFS pointer.*git lfs pull"),
        (lambda b: PAGE, "model.safetensors is a web page.*download it again"),
        (lambda b: b"", "model.safetensors is empty"),
        (lambda b: b[: len(b) // 2], r"model.safetensors is cut off: \d+ of its \d+ bytes"),
        (lambda b: b[:5], "model.safetensors is no whole safetensors file"),
        (lambda b: b[:8] + b"x" * (len(b) - 8), "model.safetensors is no safetensors file"),
    ],
)
def test_damaged_weights(folder: Path, change: Callable[[bytes], bytes], message: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(POINTER, "Git LFS pointer"), (PAGE, "a web page"), (b"{", "is no JSON"), (b"", "is empty")],
)
def test_damaged_settings(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    load = load_model if name == "config.json" else load_tokenizer
    with pytest.raises(UserError, match=f"{name} .*{message}|{name} {message}"):
        load(str(folder))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_weights_that_need_a_package_for_their_form(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"stored as {method}, which needs a package.*vllm serve"):
        load_model(str(folder))


def test_weights_of_another_architecture(folder: Path) -> None:
    """Qwen3 below a Llama configuration: its norms of queries and keys would be dropped unsaid."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"4 tensors that LlamaForCausalLM would drop.*k_norm"):
        load_model(str(folder))


def test_weights_of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(
        UserError, match="21 tensors of other shapes than its config"
    ):
        load_model(str(folder))
