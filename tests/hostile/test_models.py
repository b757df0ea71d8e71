"""The door of models and tokenizers: folders in which one file is not what it should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.common.tiny import tiny_model, tiny_tokenizer
from tests.hostile.conftest import Ground
from tests.hostile.judge import EITHER, REFUSED, WORKS, Attack

pytestmark = pytest.mark.hostile

HTML = b"<!DOCTYPE html><html><body>404: not found</body></html>"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
)
BROKEN = {
    "is empty": b"",
    "is HTML": HTML,
    "is an LFS pointer": POINTER,
    "is zeros": bytes(4096),
    "is null": b"null",
    "is a list": b"[]",
    "is an empty object": b"{}",
    "is cut JSON": b'{"a": ',
    "is deep JSON": b"[" * 3000 + b"]" * 3000,
    "is not UTF-8": b"\xff\xfe\x00{",
}
NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
CONFIG: dict[str, Any] = {
    "vocab_size": [0, -1, 3, 10**12, "many", None, 319],
    "hidden_size": [0, -8, 33, 64, "wide", 10**9],
    "num_hidden_layers": [0, -1, 3, 1, 10**4, "two", None],
    "num_attention_heads": [0, 3, 8, -4],
    "num_key_value_heads": [0, 3, 4],
    "head_dim": [0, 16, -8],
    "intermediate_size": [0, 65, 63],
    "model_type": ["llama", "bert", "t5", "nothing", "", None, 3],
    "architectures": [[], ["Nobody"], "Qwen3ForCausalLM", ["BertModel"]],
    "hidden_act": ["nothing", None, 3],
    "rope_parameters": [3, {"rope_type": "nothing"}, {"rope_type": "yarn"}, []],
    "max_position_embeddings": [0, -1, 3, "long"],
    "rms_norm_eps": [-1, "small", 0],
    "torch_dtype": ["float7"],
    "dtype": ["float7", 3],
    "tie_word_embeddings": [True, "no"],
    "quantization_config": [
        {},
        {"quant_method": "nothing"},
        3,
        {"quant_method": "gptq", "bits": 4},
    ],
    "auto_map": [{"AutoModelForCausalLM": "modeling.Mine"}],
    "eos_token_id": [10**9, -1, "end", [2, 10**9]],
}
# that change nothing a tiny model of this kind computes, or that transformers reads as a default
FINE = {
    "architectures",
    "torch_dtype",
    "dtype",
    "eos_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "auto_map",
    "quantization_config",
    "tie_word_embeddings",
    "max_position_embeddings",
}


class Copies:
    """The student, once more for each change."""

    def __init__(self, ground: Ground):
        self.ground, self.count = ground, 0

    def __call__(self, change: Callable[[Path], object]) -> str:
        self.count += 1
        folder = self.ground.folder / "copies" / str(self.count)
        shutil.copytree(self.ground.student, folder)
        change(folder)
        return str(folder)

    def config(self, **changed: Any) -> str:
        def change(folder: Path) -> None:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changed))

        return self(change)

    def weights(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
        def rewrite(folder: Path) -> None:
            path = folder / "model.safetensors"
            save_file(change(load_file(path)), path, metadata={"format": "pt"})

        return self(rewrite)


@pytest.fixture(scope="module")
def copies(ground: Ground) -> Copies:
    return Copies(ground)


def test_files(ground: Ground, copies: Copies, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for name in NAMES:
            for what, content in BROKEN.items():
                folder = copies(lambda f, n=name, c=content: (f / n).write_bytes(c))
                end = REFUSED if name in NAMES[:2] else EITHER
                yield ground.train(f"{name} {what}", end=end, student=folder)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            folder = copies(lambda f, n=name: (f / n).unlink())
            end = EITHER if name == "tokenizer.json" else REFUSED
            yield ground.train(f"{name} is gone", end=end, student=folder)
        for role in ("student", "teacher"):
            for what, content in weights(Path(ground.student) / "model.safetensors").items():
                folder = copies(lambda f, c=content: (f / "model.safetensors").write_bytes(c))
                yield ground.train(f"weights of the {role}: {what}", **{role: folder})
        for role in ("student", "teacher"):
            for path in (
                ground.data,
                "/dev/null",
                str(ground.folder),
                "a b",
                "x" * 300,
                "../..",
                "//",
            ):
                yield ground.train(f"a {role} {path[-20:]!r}", **{role: path})

    judged("models: files", attacks())


def weights(path: Path) -> dict[str, bytes]:
    """A file of weights, damaged in several ways."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    return {
        "empty": b"",
        "HTML": HTML,
        "an LFS pointer": POINTER,
        "cut in the middle": whole[: len(whole) // 2],
        "cut in the header": whole[: size // 2],
        "cut by one byte": whole[:-1],
        "one byte more": whole + b"x",
        "a header of 10^18 bytes": (10**18).to_bytes(8, "little") + whole[8:],
        "a header that is no JSON": whole[:8] + b"x" * size + whole[8 + size :],
        "a pickle": b"\x80\x04\x95.",
        "zeros": bytes(len(whole)),
    }


def test_configs(ground: Ground, copies: Copies, judged) -> None:
    def attacks() -> Iterator[Attack]:
        for key, values in CONFIG.items():
            for value in values:
                folder = copies.config(**{key: value})
                end = EITHER if key in FINE else REFUSED
                yield ground.train(f"{key}={str(value)[:40]}", end=end, student=folder)

    judged("models: configurations", attacks())


def test_weights_of_other_shapes(ground: Ground, copies: Copies, judged) -> None:
    norms = ("q_norm", "k_norm")

    def attacks() -> Iterator[Attack]:
        for what, change in {
            "a layer is gone": lambda w: {k: v for k, v in w.items() if ".layers.1." not in k},
            "a matrix is gone": lambda w: {k: v for k, v in w.items() if "up_proj" not in k},
            "a layer too many": lambda w: (
                w | {k.replace(".1.", ".2."): v.clone() for k, v in w.items() if ".layers.1." in k}
            ),
            "a matrix is turned": lambda w: {
                k: v.T.contiguous() if "up_proj" in k else v for k, v in w.items()
            },
            "a row too few": lambda w: {
                k: v[:-1].clone() if "embed" in k or "lm_head" in k else v for k, v in w.items()
            },
            "not numbers": lambda w: {k: v * float("nan") for k, v in w.items()},
            "infinite": lambda w: {k: v * float("inf") for k, v in w.items()},
            "other names": lambda w: {f"x.{k}": v for k, v in w.items()},
            "without its norms": lambda w: {
                k: v for k, v in w.items() if not any(n in k for n in norms)
            },
        }.items():
            yield ground.train(f"weights: {what}", student=copies.weights(change))
            yield ground.train(f"weights of the teacher: {what}", teacher=copies.weights(change))
        dropped = copies.config(model_type="llama", architectures=["LlamaForCausalLM"])
        yield ground.train("Qwen3 weights under a Llama config", student=dropped, said="k_norm")
        yield ground.train("a teacher so", teacher=dropped, said="k_norm")
        yield Attack("sampled so", ("sample", dropped, "hello"), said="k_norm")

    judged("models: weights of other shapes", attacks())


def test_tokenizers(ground: Ground, copies: Copies, judged) -> None:
    def saved(name: str, tokenizer: Any, **model: Any) -> str:
        folder = ground.folder / "tokenizers" / name
        tiny_model(**model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def attacks() -> Iterator[Attack]:
        letters = saved("letters", _letters())
        yield Attack("no unknown token", ("sample", letters, "What is 12 + 30?"), said="tokenizer")
        yield ground.train("no unknown token", student=letters, teacher=letters)
        other = saved("other", tiny_tokenizer(["other words altogether here"] * 3))
        yield ground.train("a teacher with other tokens", teacher=other, said="tokenizer")
        small = saved("small", tiny_tokenizer(), vocab_size=300)
        yield ground.train("more tokens than rows of the head", student=small, end=EITHER)
        short = saved("short", tiny_tokenizer(), max_position_embeddings=8)
        yield ground.train("a teacher whose context is too short", teacher=short, said="context")
        yield ground.train("a student whose context is too short", student=short, said="context")
        yield Attack("sampled so", ("sample", short, "hello " * 9, "--max-completion-length=9"))
        yield ground.train("itself", end=WORKS, teacher=ground.student)

    judged("models: tokenizers", attacks())


def _letters() -> Any:
    """A tokenizer that knows a few letters and no unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *"abcdefg"])}
    core = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
