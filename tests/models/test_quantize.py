"""Weights in 8 and 4 bits: near the whole ones, smaller by what is promised, with exact gradients,
and plain again at the end.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opdkit import UserError
from opdkit.base.files import read_lines
from opdkit.models import quantize
from opdkit.models.body import check_head, head_of
from opdkit.models.load import evaluating, load_model
from opdkit.models.quantize import QUANTIZE, merged, quantized, size_of
from opdkit.run.doctor import doctor
from opdkit.run.launch import execute
from opdkit.run.open import Given
from opdkit.run.settings import Run, make_run
from opdkit.train import loop
from opdkit.train.settings import Lora, Optim
from opdkit.train.student import Student, with_adapters
from tests.common.rounding import FORWARD, forward_rounding
from tests.common.tiny import save_tiny, tiny_tokenizer

pytest.importorskip(
    "bitsandbytes", reason="quantisation is an extra: pip install 'opdkit[quantize]'"
)

IDS = torch.tensor([[5, 100, 7, 300, 12, 9], [42, 3, 3, 250, 1, 2]])
# bytes per weight of a quantised layer: at least, at most
SIZE = {"8bit": (1.0, 1.1), "4bit": (0.5, 0.55)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> str:
    return save_tiny(folder / "model", hidden=64, seed=1, spread=0.1)


def body(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers but the head."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    }


@torch.no_grad()
def logps(model: Any, ids: Tensor = IDS) -> Tensor:
    with evaluating(model):
        return model(ids).logits.float().log_softmax(-1)


def whole(model: Any, checkpoint: str) -> Any:
    """A plain float32 model of the weights that a quantised one stands for."""
    plain = load_model(checkpoint)
    for name, layer in body(model).items():
        plain.get_submodule(name).weight.data = quantize._dequantised(layer)
    return plain


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(("bits", "nats"), [("8bit", 2e-4), ("4bit", 4e-2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_near_those_of_the_whole_model(
    checkpoint: str, bits: str, nats: float, dtype: str
) -> None:
    """KL(whole || quantised) per token, nats."""
    expected = logps(load_model(checkpoint))
    given = logps(load_model(checkpoint, dtype, quantize=bits))
    gap = (expected.exp() * (expected - given)).sum(-1)
    assert 0 < gap.mean() < nats


@pytest.mark.parametrize("bits", QUANTIZE)
def test_a_quantised_model_is_the_plain_one_of_its_rounded_weights(
    checkpoint: str, bits: str
) -> None:
    model = load_model(checkpoint, quantize=bits)
    torch.testing.assert_close(logps(model), logps(whole(model, checkpoint)), rtol=0, atol=FORWARD)


def test_weights_are_rounded_as_the_formats_say(checkpoint: str) -> None:
    """8 bits: 127 steps on each side of 0, up to the largest of a row; 4 bits: NF4, whose widest
    step is 0.304 of a block's largest.

    What is above half a step comes from float16, which weights pass on their way to 8 bits, and
    from scales in 8 bits, with 4.
    """
    plain = body(load_model(checkpoint))
    for name, layer in body(load_model(checkpoint, quantize="8bit")).items():
        weight: Tensor = plain[name].weight
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((quantize._dequantised(layer) - weight).abs() <= 0.6 * step).all()
    for name, layer in body(load_model(checkpoint, quantize="4bit")).items():
        blocks = plain[name].weight.reshape(-1, 64)
        error = (quantize._dequantised(layer).reshape(-1, 64) - blocks).abs() / blocks.abs().amax(
            1, keepdim=True
        )
        assert error.max() < 0.17 and error.square().mean().sqrt() < 0.05


@pytest.mark.parametrize("bits", QUANTIZE)
def test_a_token_is_scored_alike_whatever_is_beside_it(checkpoint: str, bits: str) -> None:
    """LLM.int8() would choose the columns that it keeps whole by the largest activation of the
    batch.
    """
    model = load_model(checkpoint, quantize=bits)
    with torch.no_grad():
        # a token of the second row
        model.get_input_embeddings().weight[3] = 100.0 * torch.eye(64)[5]
    torch.testing.assert_close(logps(model)[:1], logps(model, IDS[:1]), rtol=0, atol=FORWARD)


@pytest.mark.parametrize("bits", QUANTIZE)
def test_training_and_sampling_see_one_distribution(checkpoint: str, bits: str) -> None:
    model = load_model(checkpoint, quantize=bits)
    sampled = logps(model)
    with torch.inference_mode():
        assert torch.equal(logps(model), sampled)
    trained = model.train()(IDS).logits.log_softmax(-1)
    torch.testing.assert_close(trained, sampled, rtol=0, atol=FORWARD)


# --------------------------------------------------------------------------------- heads and memory


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("gemma2", {}),
        ("granite", {}),
        ("cohere", {}),
    ],
)
def test_head_and_embedding_stay_whole(folder: Path, kind: str, config: dict[str, Any]) -> None:
    path = save_tiny(folder / kind, kind, hidden=64, seed=1, **config)
    for bits in QUANTIZE:
        model = load_model(path, quantize=bits)
        check_head(model)
        plain = load_model(path)
        assert torch.equal(head_of(model).weight, head_of(plain).weight)
        assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
        assert all(quantize._bits(layer) == int(bits[0]) for layer in body(model).values())


def test_a_quantised_head_is_refused(checkpoint: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    for config in (BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)):
        config.llm_int8_skip_modules = ["nothing"]
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=config, device_map={"": "cpu"}
        )
        with pytest.raises(
            UserError,
            match=r"not a plain linear layer[\s\S]*Leave lm_head out of adapters and quantisation",
        ):
            head_of(model)


@pytest.mark.parametrize("bits", QUANTIZE)
def test_the_weights_take_as_many_bytes_as_promised(folder: Path, bits: str) -> None:
    path = save_tiny(folder / "wide", hidden=128, seed=1, intermediate_size=512)
    plain, small = load_model(path, "bfloat16"), load_model(path, "bfloat16", quantize=bits)
    inside = sum(layer.weight.numel() for layer in body(plain).values())
    outside = size_of(plain) - 2 * inside
    least, most = SIZE[bits]
    assert least * inside <= size_of(small) - outside <= most * inside
    assert size_of(plain) == sum(t.nbytes for t in [*plain.parameters(), *plain.buffers()])


# ----------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("bits", QUANTIZE)
def test_adapters_get_the_gradients_of_the_plain_model_of_those_weights(
    checkpoint: str, bits: str
) -> None:
    """Also after sampling, where a CPU would pack 4-bit weights into a form that gradients do not
    pass.
    """
    model = load_model(checkpoint, quantize=bits)
    plain = with_adapters(whole(model, checkpoint), Lora(r=4))
    model = with_adapters(model, Lora(r=4))

    def gradients(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        logps(model)
        model.train()(IDS).logits.log_softmax(-1)[..., 7].sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    exact, given = gradients(plain), gradients(model)
    assert exact.keys() == given.keys() and all("lora_" in name for name in given)
    for name, gradient in exact.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(given[name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
@pytest.mark.parametrize("bits", QUANTIZE)
def test_merged_is_a_plain_model_of_the_function_that_was_trained(
    checkpoint: str, bits: str, targets: Any
) -> None:
    model = with_adapters(load_model(checkpoint, quantize=bits), Lora(r=4, targets=targets))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    trained = logps(model)
    assert (trained - logps(load_model(checkpoint, quantize=bits))).abs().max() > 0.1
    plain = merged(model)
    assert quantized(plain) is None and all(
        type(layer) is nn.Linear for layer in body(plain).values()
    )
    torch.testing.assert_close(logps(plain), trained, rtol=0, atol=forward_rounding(plain, IDS))


@pytest.mark.parametrize("some", [False, True], ids=["all", "beside quantised ones"])
def test_adapters_on_whole_weights_are_merged_too(checkpoint: str, some: bool) -> None:
    """Adapters of the size of the weights: far larger ones, such as all ones, would swamp them and
    amplify roundings a thousandfold.
    """
    from transformers import AutoModelForCausalLM

    config = quantize.config_for("4bit", torch.float32)
    config.llm_int8_skip_modules = ["lm_head", "q_proj"]
    mixed = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, device_map={"": "cpu"}
    )
    quantize.same_when_training(mixed)
    base = mixed if some else load_model(checkpoint)
    start = logps(base)
    model = with_adapters(base, Lora(r=4))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    trained = logps(model)
    assert (trained - start).abs().max() > 0.1
    plain = merged(model)
    torch.testing.assert_close(logps(plain), trained, rtol=0, atol=forward_rounding(plain, IDS))


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def teacher(folder: Path) -> str:
    return save_tiny(folder / "teacher", hidden=64, seed=2, spread=0.1)


def a_run(output: Path, student: str, teacher: Any, **settings: Any) -> tuple[Run, Given]:
    values = {
        "student": student,
        "teacher": teacher,
        "data": "in memory",
        "output": str(output),
        "method": "gkd",
        "steps": 4,
        "prompts_per_step": 4,
        "sampling": {"max_completion_length": 8},
        "optim": {"learning_rate": 1e-2},
        "lora": {"r": 8, "quantize": "4bit"},
        "device": "cpu",
    }
    rows = [{"prompt": f"Tom has {i} apples."} for i in range(8)]
    return make_run(values | settings), Given(rows=rows)


def files(folder: Path, names: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob(names))}


@pytest.mark.parametrize(
    ("bits", "dtype"), [("8bit", "float32"), ("4bit", "float32"), ("4bit", "bfloat16")]
)
def test_a_qlora_run_learns_and_leaves_a_plain_model(
    tmp_path: Path, checkpoint: str, teacher: str, bits: str, dtype: str
) -> None:
    start = files(Path(checkpoint), "*.safetensors")
    run, given = a_run(
        tmp_path,
        checkpoint,
        {"kind": "local", "model": teacher, "quantize": bits},
        steps=24,
        lora={"r": 8, "quantize": bits},
    )
    result = execute(replace(run, dtype=dtype), given)
    losses = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert len(losses) == 24 and sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert files(Path(checkpoint), "*.safetensors") == start

    model = load_model(str(result.model))
    assert quantized(model) is None and "quantization_config" not in json.loads(
        (result.model / "config.json").read_text()
    )
    last = tmp_path / "checkpoint-24"
    assert {p.name for p in last.glob("*.safetensors")} == {"adapter_model.safetensors"}
    from peft import PeftModel

    trained = PeftModel.from_pretrained(load_model(checkpoint, dtype, quantize=bits), last)
    apart = forward_rounding(model, IDS, getattr(torch, dtype))
    torch.testing.assert_close(logps(model), logps(trained), rtol=0, atol=apart)


@pytest.mark.parametrize("bits", QUANTIZE)
def test_interrupted_and_resumed_is_the_run_that_was_not_bit_for_bit(
    tmp_path: Path, checkpoint: str, teacher: str, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"r": 4, "dropout": 0.3, "quantize": bits}
    execute(*a_run(tmp_path / "whole", checkpoint, teacher, lora=lora))
    run, given = a_run(tmp_path / "broken", checkpoint, teacher, lora=lora)
    step = loop.train_step

    def interrupted(job: Any, state: Any) -> None:
        if state.step == 2:
            raise KeyboardInterrupt
        step(job, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", interrupted)
        execute(run, given)
    execute(run, given, resume=True)
    for names in ("model/*.safetensors", "checkpoint-4/*.safetensors"):
        assert files(tmp_path / "broken", names) == files(tmp_path / "whole", names) != {}


def test_the_reference_under_adapters_is_the_quantised_start(
    tmp_path: Path, checkpoint: str, teacher: str
) -> None:
    """At the first step the student is its own reference, so log(teacher/reference) is
    log(teacher/student) again.
    """
    first = []
    for method in ("opd", {"name": "gopd", "arguments": {"scale": 2.0}}):
        output = tmp_path / str(len(first))
        execute(*a_run(output, checkpoint, teacher, method=method, steps=1))
        first.append(read_lines(output / "metrics.jsonl")[0])
    assert (
        first[1]["loss"] == pytest.approx(2 * first[0]["loss"], abs=2 * FORWARD)
        and abs(first[0]["loss"]) > 0.1
    )


def test_gradient_checkpointing_learns_the_same(
    tmp_path: Path, checkpoint: str, teacher: str
) -> None:
    losses = []
    for on in (False, True):
        execute(*a_run(tmp_path / str(on), checkpoint, teacher, gradient_checkpointing=on))
        losses.append([line["loss"] for line in read_lines(tmp_path / str(on) / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# -------------------------------------------------------------------------- what is said beforehand


@pytest.mark.parametrize("value", ["4bits", "int4"])
def test_an_unknown_format_names_the_nearest(tmp_path: Path, checkpoint: str, value: str) -> None:
    said = (
        rf"quantize='{value}' is not a way to store weights; (did you mean '4bit'|known: 4bit, "
        r"8bit)"
    )
    with pytest.raises(UserError, match=r"teacher: " + said):
        a_run(tmp_path, checkpoint, {"kind": "local", "model": checkpoint, "quantize": value})
    with pytest.raises(UserError, match=r"lora: " + said):
        a_run(tmp_path, checkpoint, checkpoint, lora={"quantize": value})


def test_quantize_on_the_command_line_is_the_students(tmp_path: Path, checkpoint: str) -> None:
    values = {"student": checkpoint, "teacher": checkpoint, "data": "in memory"}
    assert make_run(values, ["quantize=4bit"]).lora == Lora(quantize="4bit")


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named_before_anything_is_loaded(
    tmp_path: Path, checkpoint: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = quantize.importlib.util.find_spec
    monkeypatch.setattr(
        quantize.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    said = rf"needs the package {package}, which is not installed: pip install 'opdkit\[quantize\]'"
    with pytest.raises(UserError, match=said):
        load_model("no model", quantize="4bit")
    run, given = a_run(
        tmp_path, checkpoint, {"kind": "local", "model": checkpoint, "quantize": "8bit"}, lora=None
    )
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
        patch.setattr(
            "opdkit.models.load.load_model", lambda *a, **k: pytest.fail("a model was loaded")
        )
        execute(run, given)
    assert re.search(rf"quantize      not available without {package}: pip install", doctor())


def test_doctor_says_what_there_is() -> None:
    assert re.search(r"quantize      8bit and 4bit by bitsandbytes \d", doctor())


def test_float64_is_refused(checkpoint: str) -> None:
    with pytest.raises(UserError, match=r"quantize=4bit keeps two digits.*use float32 or bfloat16"):
        load_model(checkpoint, "float64", quantize="4bit")


def test_a_checkpoint_that_is_quantised_already(tmp_path: Path, checkpoint: str) -> None:
    path = str(tmp_path / "small")
    small = load_model(checkpoint, quantize="4bit")
    small.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    again = load_model(path)
    assert quantized(again) == "4bit" and torch.equal(logps(again), logps(small))
    with (
        pytest.warns(UserWarning, match="already has"),
        pytest.raises(UserError, match=r"is stored as 4bit already: leave out"),
    ):
        load_model(path, quantize="8bit")
    run, given = a_run(tmp_path / "run", path, checkpoint, lora=None)
    with pytest.raises(
        UserError, match=r"the student is stored as 4bit.*Train adapters on them \(lora.r=32\)"
    ):
        execute(run, given)


def test_another_engine_cannot_sample_from_a_quantised_student(
    tmp_path: Path, checkpoint: str, teacher: str
) -> None:
    run, given = a_run(tmp_path, checkpoint, teacher, sampler="server:http://127.0.0.1:9")
    with pytest.raises(
        UserError,
        match=r"the student is stored as 4bit, which another engine cannot take over.*sampler: hf",
    ):
        execute(run, given)


def test_loaded_models_are_taken_as_they_are(tmp_path: Path, checkpoint: str, teacher: str) -> None:
    """Their layers are settled too, so a student handed over as an object ends as the same student
    by name.
    """
    from transformers import AutoModelForCausalLM

    run, given = a_run(tmp_path / "name", checkpoint, teacher)
    by_name = execute(run, replace(given, tokenizer=tiny_tokenizer()))
    config = quantize.config_for("4bit", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=config
    )
    run, given = a_run(tmp_path / "object", checkpoint, teacher)
    by_object = execute(run, replace(given, student=model, tokenizer=tiny_tokenizer()))
    assert files(by_object.model, "*.safetensors") == files(by_name.model, "*.safetensors")
    model = load_model(checkpoint, quantize="4bit")
    # as eval mode leaves it on some CPUs
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    run, given = a_run(tmp_path / "packed", checkpoint, teacher)
    with pytest.raises(
        UserError, match=r"packed its weights into a form that gradients cannot pass: give its name"
    ):
        execute(run, replace(given, student=model, tokenizer=tiny_tokenizer()))
    run, given = a_run(tmp_path / "late", checkpoint, teacher)
    with pytest.raises(UserError, match=r"quantize=4bit is done while a model is read"):
        execute(run, replace(given, student=load_model(checkpoint), tokenizer=tiny_tokenizer()))


# ----------------------------------------------------------------------------------- docs/memory.md

GUIDE = Path(__file__).parents[2] / "docs" / "memory.md"


def trained_bytes(model: Any) -> int:
    """Weights that train, their gradients and AdamW's moments, after one step."""
    student = Student(model, Optim(), 1e-3, 1)
    for p in student.parameters:
        p.grad = torch.ones_like(p)
    weights = sum(p.nbytes + p.grad.nbytes for p in student.parameters if p.grad is not None)
    student.step()
    moments = sum(
        s[k].nbytes for s in student.optimiser.state.values() for k in ("exp_avg", "exp_avg_sq")
    )
    return weights + moments


def test_the_rules_of_thumb_hold(folder: Path) -> None:
    """Bytes per weight, measured: students after an optimiser step; of quantised models the layers
    that are.
    """
    rows = dict(
        re.findall(
            r"^\| ((?:student|adapters|teacher)[^|]*) \| ([\d.]+) \|", GUIDE.read_text(), re.M
        )
    )
    path = save_tiny(folder / "guide", hidden=256, layers=1, seed=1, intermediate_size=1024)
    whole = load_model(path, "bfloat16")
    count = sum(p.numel() for p in whole.parameters())
    inside = sum(layer.weight.numel() for layer in body(whole).values())
    outside = size_of(whole) - 2 * inside
    adapted = with_adapters(load_model(path, "bfloat16"), Lora(r=8))
    adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    measured = {
        "student, all weights trained": trained_bytes(load_model(path)) / count,
        "student under adapters": size_of(whole) / count,
        "adapters": trained_bytes(adapted) / adapters,
        "teacher": size_of(whole) / count,
        "teacher, offload, while it does not score": 0.0,
    }
    for bits in QUANTIZE:
        per = (size_of(load_model(path, "bfloat16", quantize=bits)) - outside) / inside
        assert per == pytest.approx(quantize.BYTES[bits], rel=0.02)
        measured |= {f"student under adapters, {bits}": per, f"teacher, {bits}": per}
    assert rows.keys() == measured.keys()
    for name, bytes_each in measured.items():
        assert float(rows[name]) == pytest.approx(bytes_each, rel=0.03), name


def test_the_guides_teacher_is_as_large_as_it_says() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36
    )
    (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.tie_word_embeddings,
    ) = 32, 8, 128, False
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    count, inside = (
        sum(p.numel() for p in model.parameters()),
        sum(m.weight.numel() for m in body(model).values()),
    )
    head = model.lm_head.weight.numel()
    said = GUIDE.read_text()
    assert f"{count / 1e9:.2f} billion weights (Qwen3-8B, {2 * head / 1e9:.2f} billion" in said
    sizes = [
        2 * count,
        *(2 * (count - inside) + quantize.BYTES[bits] * inside for bits in QUANTIZE),
        2 * head,
    ]
    numbers = re.search(
        r"([\d.]+) GB as it is, ([\d.]+) GB in 8 bits, ([\d.]+) GB in 4 bits,\s+([\d.]+) GB while",
        said,
    )
    assert numbers is not None and list(numbers.groups()) == [f"{size / 1e9:.1f}" for size in sizes]
