"""Whole runs with models as people have them: a base student of an instruct teacher, adapters on
either side, a tokenizer longer than its head, capped attention.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import opdkit
from opdkit.base.errors import UserError
from opdkit.cli import main
from opdkit.models.load import load_model
from opdkit.run.commands import sample_model
from opdkit.run.launch import Result
from opdkit.types import Sampling
from tests.common.rounding import FORWARD
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.models.test_adapters import IDS, adapted

ROWS = [{"prompt": f"What is {i} plus 2?", "response": str(i + 2)} for i in range(4)]


def run(student: Any, teacher: Any, output: Path, **settings: Any) -> Result:
    quick = {
        "steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "sampling__max_completion_length": 8,
        "learning_rate": 1e-3,
        "device": "cpu",
        "sample_every": 1,
        "keep_samples": 64,
        "prompts": ROWS,
    }
    return opdkit.distill(student, teacher, output=str(output), **quick | settings)


def pieces(folder: Path) -> list[list[str]]:
    """The tokens of every rollout that a run wrote."""
    files = sorted((folder / "samples").glob("step_*.jsonl"))
    return [json.loads(line)["pieces"] for f in files for line in f.read_text().splitlines()]


def save_base(folder: Path, seed: int = 0) -> str:
    """A base model as Qwen's: no chat template here, <|im_end|> (2) is a token but no end."""
    model, tokenizer = tiny_model(seed=seed, eos_token_id=0), tiny_tokenizer(chat_template=False)
    with torch.no_grad():
        model.lm_head.weight[2] *= 0.1  # which it writes now and then
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


# --------------------------------------------------------------------------------------------- ends


def test_a_base_student_stops_where_its_instruct_teacher_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = save_base(tmp_path / "s"), save_tiny(tmp_path / "t", seed=1)
    sampling = Sampling(max_completion_length=40, num_generations=32)
    alone = sample_model(student, ["What is 2?"], sampling)
    assert any(2 in r.tokens[:-1] for r in alone)  # by itself it goes on
    more = {"num_generations": 16, "sampling__max_completion_length": 40}
    result = run(student, teacher, tmp_path / "run", **more)
    written = pieces(result.folder)
    assert any("<|im_end|>" in tokens for tokens in written)
    assert not any("<|im_end|>" in tokens[:-1] for tokens in written)
    said = capsys.readouterr().err
    assert "an answer of the student also ends with <|im_end|>" in said
    assert "is a chat model, and the student is asked in plain text" in said
    # whoever samples from the trained model stops there too
    later = sample_model(str(result.model), ["What is 2?"], sampling)
    assert any(2 in r.tokens for r in later)
    assert not any(2 in r.tokens[:-1] for r in later)


def test_a_cache_of_a_base_student_ends_there_too(tmp_path: Path) -> None:
    from opdkit.data.cache import open_cache

    student, teacher = save_base(tmp_path / "s"), save_tiny(tmp_path / "t", seed=1)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = [f"--student={student}", f"--teacher={teacher}", f"--data={data}"]
    sampling = ["max_completion_length=40", "num_generations=16", "device=cpu"]
    assert main(["cache-teacher", *flags, f"--out={tmp_path / 'c'}", *sampling]) == 0
    cache = open_cache(str(tmp_path / "c"))
    prompts = opdkit.data.Prompts(cache.rows, tiny_tokenizer(chat_template=False))
    tokens = [r.tokens for prompt in prompts for r in cache.rollouts(prompt)]
    assert any(2 in t for t in tokens) and not any(2 in t[:-1] for t in tokens)


def test_reference_responses_are_closed_as_the_template_does(tmp_path: Path) -> None:
    """Gemma: <eos> ends a sequence, <end_of_turn> an answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    for name, seed in (("s", 0), ("t", 1)):
        tokenizer.save_pretrained(tmp_path / name)
        tiny_model(seed=seed, eos_token_id=[0, 2]).save_pretrained(tmp_path / name)
    student, teacher = str(tmp_path / "s"), str(tmp_path / "t")
    result = run(student, teacher, tmp_path / "run", method="gkd", method__lmbda=0)
    assert {tokens[-1] for tokens in pieces(result.folder)} == {"<|im_end|>"}


def test_another_chat_template_of_the_teacher_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = save_tiny(tmp_path / "s"), save_tiny(tmp_path / "t", seed=1)
    file = tmp_path / "t" / "chat_template.jinja"
    file.write_text("{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}" + file.read_text())
    run(student, teacher, tmp_path / "run", steps=1)
    said = capsys.readouterr().err
    assert "has another chat template than the student" in said and "Be brief." in said


# ----------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A student, a base, and adapters to that base."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("shelf")
    student, base = save_tiny(folder / "s"), save_tiny(folder / "base", seed=1)
    adapted(load_model(base)).save_pretrained(folder / "adapters")
    tiny_tokenizer().save_pretrained(folder / "adapters")
    return student, base, str(folder / "adapters")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """[1, T, V]: of a model in eval mode."""
    return model.eval()(IDS).logits


def losses(result: Result) -> list[float]:
    return [line["loss"] for line in result.metrics]


def test_adapters_as_the_teacher_are_the_merged_model(
    shelf: tuple[str, str, str], tmp_path: Path
) -> None:
    student, base, adapters = shelf
    whole = str(tmp_path / "whole")
    adapted(load_model(base)).merge_and_unload().save_pretrained(whole)
    tiny_tokenizer().save_pretrained(whole)
    expected = losses(run(student, whole, tmp_path / "r0"))
    assert losses(run(student, adapters, tmp_path / "r1")) == pytest.approx(expected, abs=FORWARD)
    given = run(student, adapted(load_model(base)), tmp_path / "r2")
    assert losses(given) == pytest.approx(expected, abs=FORWARD)
    assert losses(run(student, base, tmp_path / "r3")) != pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("lora", [{}, {"lora__r": 4}])
def test_adapters_as_the_student_begin_with_what_they_were_trained_to(
    shelf: tuple[str, str, str], tmp_path: Path, lora: dict[str, Any]
) -> None:
    _, base, adapters = shelf
    result = run(adapters, base, tmp_path / "run", learning_rate=1e-9, **lora)
    import transformers as hf

    saved = hf.AutoModelForCausalLM.from_pretrained(result.model).eval()
    assert torch.allclose(logits(saved), logits(load_model(adapters)), atol=FORWARD)
    assert not (result.model / "adapter_config.json").exists()


def test_a_student_that_comes_with_adapters_is_merged_in_the_end(
    shelf: tuple[str, str, str], tmp_path: Path
) -> None:
    import peft
    import transformers as hf

    _, base, adapters = shelf

    def student() -> Any:
        return peft.PeftModel.from_pretrained(load_model(base), adapters, is_trainable=True)

    settings = {"tokenizer": tiny_tokenizer(), "checkpoint__every": 1, "learning_rate": 1e-2}
    whole = run(student(), base, tmp_path / "r1", steps=4, **settings)
    saved = hf.AutoModelForCausalLM.from_pretrained(whole.model).eval()
    start = logits(load_model(adapters))
    assert not torch.allclose(logits(saved), start, atol=0.01)
    assert torch.equal(saved.model.embed_tokens.weight, load_model(base).model.embed_tokens.weight)
    # stopped after two steps and resumed with a fresh object, the same model
    run(student(), base, tmp_path / "r2", steps=2, **settings)
    resumed = run(student(), base, tmp_path / "r2", steps=4, resume=True, **settings)
    again = hf.AutoModelForCausalLM.from_pretrained(resumed.model).eval()
    assert torch.equal(logits(again), logits(saved))
    with pytest.raises(UserError, match="has adapters already, and `lora` would put others"):
        run(student(), base, tmp_path / "r3", lora__r=4, **settings)
    frozen = peft.PeftModel.from_pretrained(load_model(base), adapters)
    with pytest.raises(UserError, match="none of which is trainable"):
        run(frozen, base, tmp_path / "r4", **settings)


# ------------------------------------------------------------------------------- heads and contexts


def save_gemma_3_1b(folder: Path, seed: int) -> str:
    """A tokenizer with one id more than its model has rows, as google/gemma-3-1b-it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    tiny_model(seed=seed).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_one_id_longer_than_its_head(tmp_path: Path) -> None:
    student, teacher = save_gemma_3_1b(tmp_path / "s", 0), save_gemma_3_1b(tmp_path / "t", 1)
    plain = run(save_tiny(tmp_path / "s0"), save_tiny(tmp_path / "t0", seed=1), tmp_path / "r0")
    result = run(student, teacher, tmp_path / "r1")
    assert losses(result) == losses(plain)  # the id that nobody can write changes nothing
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "2?", "answer": "2"}\n')
    flags = [f"--data={data}", "--max-completion-length=4"]
    assert main(["eval", student, *flags]) == 0
    with pytest.raises(UserError, match="holds the token '<image_soft_token>'"):
        run(student, teacher, tmp_path / "r2", prompts=["What is in <image_soft_token>?"])


def test_a_served_teacher_with_a_tokenizer_longer_than_its_head(tmp_path: Path) -> None:
    from tests.common.fake_server import FakeServer

    student = save_gemma_3_1b(tmp_path / "s", 0)
    with FakeServer(tiny_model(seed=1), tiny_tokenizer()) as server:
        result = run(student, server.url, tmp_path / "run")
    here = run(student, save_gemma_3_1b(tmp_path / "t", 1), tmp_path / "here")
    assert losses(result) == pytest.approx(losses(here), abs=FORWARD)


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_added_tokens_on_one_side(tmp_path: Path, longer: str) -> None:
    """Qwen2.5 and Qwen3: four tokens more, and a head padded for both."""
    extra = tiny_tokenizer()
    extra.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    names = {}
    for name, seed in (("student", 0), ("teacher", 1)):
        folder = tmp_path / name
        (extra if name == longer else tiny_tokenizer()).save_pretrained(folder)
        tiny_model(vocab_size=352, seed=seed).save_pretrained(folder)
        names[name] = str(folder)
    result = run(names["student"], names["teacher"], tmp_path / "run")
    assert all(0 <= line["loss"] < 10 for line in result.metrics)


def test_a_gemma_2_learns_with_the_cap_on_its_attention_scores(tmp_path: Path) -> None:
    cap = {"attn_logit_softcapping": 2.0, "sliding_window": 16, "spread": 0.5}
    student = save_tiny(tmp_path / "s", "gemma2", **cap)
    teacher = save_tiny(tmp_path / "t", "gemma2", seed=1, **cap)
    eager = run(student, teacher, tmp_path / "r1", attn_implementation="eager")
    assert losses(run(student, teacher, tmp_path / "r0")) == losses(eager)
    with pytest.raises(UserError, match="sdpa leaves out the cap"):
        run(student, teacher, tmp_path / "r2", attn_implementation="sdpa")


def test_a_teacher_whose_context_is_too_short(tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "t", seed=1, max_position_embeddings=16)
    with pytest.raises(UserError, match="fit the teacher's context of 16"):
        run(save_tiny(tmp_path / "s"), teacher, tmp_path / "run")


def test_a_hybrid_student_trains_and_is_evaluated(tmp_path: Path) -> None:
    from tests.sampling.test_hybrid import hybrid

    tiny_tokenizer().save_pretrained(tmp_path / "s")
    hybrid("qwen3_5").save_pretrained(tmp_path / "s")
    rows = [{"prompt": "2?", "answer": "2"}]
    settings = {"reward": "exact", "eval_prompts": rows, "prompts": rows}
    result = run(str(tmp_path / "s"), save_tiny(tmp_path / "t"), tmp_path / "run", **settings)
    assert len(result.evaluations) == 2
    assert all(line["loss"] >= 0 for line in result.metrics)
