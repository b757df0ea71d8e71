"""Teachers that wait on the CPU: there while they score, gone afterwards whatever happened, and the
scores are the same.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opdkit import UserError
from opdkit.base.files import read_lines
from opdkit.models.body import check_head, head_of
from opdkit.models.layout import Layout
from opdkit.models.load import load_model
from opdkit.models.offload import Offloaded
from opdkit.models.quantize import tensor_slots
from opdkit.objective.divergences import ReverseKL
from opdkit.objective.facts import GapFact, LogpFact
from opdkit.objective.needs import Needs
from opdkit.run.launch import execute
from opdkit.run.open import Given
from opdkit.run.settings import Run, make_run
from opdkit.teachers import LocalModel, MixtureScorer, Routed
from opdkit.train.gather import gather
from opdkit.train.settings import Lora
from opdkit.train.student import with_adapters
from tests.common.tiny import save_tiny, tiny_model
from tests.train.rows import rollouts

NEEDS = Needs(frozenset({LogpFact("teacher"), GapFact(ReverseKL(), "student", "teacher")}))


class Device:
    """Stands for a GPU: what is fetched to it are copies, whose memory it watches and does not keep
    alive.
    """

    def __init__(self) -> None:
        self.fetched: list[weakref.ref[np.ndarray[Any, Any]]] = []
        self.most = 0  # bytes there at once

    def __call__(self, tensor: Tensor) -> Tensor:
        memory = np.array(tensor.numpy())
        self.fetched.append(weakref.ref(memory))
        self.most = max(self.most, sum(m.nbytes for m in self.here))
        return torch.from_numpy(memory)

    @property
    def here(self) -> list[np.ndarray[Any, Any]]:
        return [memory for ref in self.fetched if (memory := ref()) is not None]

    def holds(self, tensor: Tensor) -> bool:
        return any(memory.ctypes.data == tensor.data_ptr() for memory in self.here)


def offloaded(model: Any, device: Device) -> LocalModel:
    head = head_of(model)
    return LocalModel(model, head, around=Offloaded(model, head, "cpu", device))


def body_bytes(model: Any) -> int:
    """Parameters and buffers but those of the head."""
    head = head_of(model).weight
    return sum(t.nbytes for t in {*model.parameters(), *model.buffers()} if t is not head)


def facts(teacher: Any, rows: Any = None) -> Any:
    student = tiny_model(seed=1)
    return gather(
        rows or rollouts(),
        NEEDS,
        {"student": LocalModel(student, head_of(student)), "teacher": teacher},
    )


def assert_same(a: Any, b: Any) -> None:
    for fact in NEEDS.facts:
        assert torch.equal(a.read(fact), b.read(fact))


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_it_is_on_the_device_only_while_it_scores_and_scores_the_same(
    config: dict[str, Any],
) -> None:
    expected = facts(
        LocalModel(tiny_model(seed=2, **config), head_of(tiny_model(seed=2, **config)))
    )
    model, device = tiny_model(seed=2, **config), Device()
    teacher = offloaded(model, device)
    before = [getattr(owner, name).data_ptr() for owner, name in tensor_slots(model)]
    seen = []

    def look(module: Any, args: Any) -> None:
        head = model.lm_head.weight
        assert all(
            device.holds(getattr(o, n)) or getattr(o, n).data_ptr() == head.data_ptr()
            for o, n in tensor_slots(model)
        )
        seen.append(sum(memory.nbytes for memory in device.here))

    model.get_decoder().register_forward_pre_hook(look)
    assert_same(facts(teacher), expected)
    # tied: without the embedding, which stays with the head
    assert seen and set(seen) == {body_bytes(model)}
    assert device.here == []
    assert [getattr(owner, name).data_ptr() for owner, name in tensor_slots(model)] == before
    assert_same(facts(teacher), expected)  # and again


def test_the_head_stays_and_what_it_is_read_for_needs_no_body() -> None:
    model, device = tiny_model(seed=2), Device()
    rows = rollouts()
    teacher = offloaded(model, device)
    source = teacher.source(Layout(rows, 8), torch.arange(5))
    assert source.head.weight is model.lm_head.weight and not device.here
    assert not any(
        t.data_ptr() == model.lm_head.weight.data_ptr() for _, _, t in teacher.around.kept
    )  # type: ignore[attr-defined]
    assert source.logits(torch.arange(5)).shape == (5, 320) and not device.here


@pytest.mark.parametrize("arranged", [Routed, MixtureScorer])
def test_of_several_teachers_one_is_there_at_a_time(arranged: Any) -> None:
    device, names = Device(), ("a", "b", "c")
    rows = [replace(r, row={"teacher": name}) for r, name in zip(rollouts(), "abcab")]
    models = {name: tiny_model(seed=seed) for seed, name in enumerate(names, 2)}
    expected = facts(
        arranged({name: LocalModel(m, head_of(m)) for name, m in models.items()}), rows
    )
    assert_same(
        facts(arranged({name: offloaded(m, device) for name, m in models.items()}), rows), expected
    )
    assert (
        len(device.fetched) % 3 == 0 and device.most == body_bytes(models["a"]) and not device.here
    )


def test_an_error_in_the_middle_sends_it_back() -> None:
    model, device = tiny_model(seed=2), Device()
    teacher = offloaded(model, device)

    def fail(*args: Any) -> None:
        assert device.here
        raise RuntimeError("in the middle")

    hook = model.get_decoder().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        facts(teacher)
    hook.remove()
    assert not device.here
    facts(teacher)


def test_a_device_that_fills_up_on_the_way_is_left_empty_and_explained() -> None:
    model, device = tiny_model(seed=2).requires_grad_(False), Device()

    def small(tensor: Tensor) -> Tensor:
        if len(device.fetched) == 5:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."
            )
        return device(tensor)

    head = head_of(model)
    teacher = LocalModel(model, head, around=Offloaded(model, head, "cpu", small))
    with pytest.raises(
        UserError,
        match=r"out of memory while Qwen3ForCausalLM scored[\s\S]*offload: true.*quantize: 8bit or "
        r"4bit",
    ):
        facts(teacher)
    assert len(device.fetched) == 5 and not device.here


def test_out_of_memory_with_the_student_says_what_helps_it() -> None:
    model = with_adapters(tiny_model(), Lora(r=2))

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.get_decoder().register_forward_pre_hook(full)
    with pytest.raises(
        UserError,
        match=r"CUDA out of memory\.\nTrain adapters .*quantize: 4bit.*gradient_checkpointing",
    ):
        LocalModel(model, head_of(model)).source(Layout(rollouts(), 8), torch.arange(5))


def test_mode_gradients_and_random_state_are_left_alone() -> None:
    model, device = tiny_model(seed=2), Device()
    teacher = offloaded(model.train(), device)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    state = torch.get_rng_state()
    facts(teacher)
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())
    assert bool((model.lm_head.weight.grad == 1).all())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]


def test_inside_itself_it_stays_until_the_outermost_is_left() -> None:
    model, device = tiny_model(seed=2), Device()
    around: Any = offloaded(model, device).around
    with around():
        count = len(device.here)
        with around():
            assert len(device.here) == count > 0
        assert len(device.here) == count
    assert not device.here


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_move_with_all_that_belongs_to_them(tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    path = save_tiny(tmp_path, hidden=64, seed=2)
    whole = load_model(path, quantize=bits)
    expected = facts(LocalModel(whole, head_of(whole)))
    model, device = load_model(path, quantize=bits), Device()
    check_head(model)
    teacher = offloaded(model, device)
    layer = model.model.layers[0].mlp.up_proj

    def look(module: Any, args: Any) -> None:
        scale = layer.weight.SCB if bits == "8bit" else layer.weight.quant_state.state2.absmax
        assert device.holds(layer.weight.data) and device.holds(scale)

    layer.register_forward_pre_hook(look)
    assert_same(facts(teacher), expected)
    assert not device.here
    assert_same(facts(teacher), expected)


# --------------------------------------------------------------------------------------- whole runs


def a_run(tmp_path: Path, teacher: Any, **settings: Any) -> tuple[Run, Given]:
    values = {
        "student": save_tiny(tmp_path / "student", seed=1),
        "teacher": teacher,
        "data": "in memory",
        "steps": 2,
        "prompts_per_step": 2,
        "sampling": {"max_completion_length": 6},
        "device": "cpu",
    }
    return make_run(values | settings), Given(
        rows=[{"prompt": f"Tom has {i} apples."} for i in range(4)]
    )


def test_a_run_is_the_same_with_its_teacher_offloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the teacher itself is evaluated, for which it has to be there."""
    path, device, met = save_tiny(tmp_path / "teacher", seed=2), Device(), []

    class Watched(Offloaded):
        def __init__(self, model: Any, head: Any, where: str):
            super().__init__(model, head, where, device)
            model.get_decoder().register_forward_pre_hook(
                lambda *_: met.append(device.holds(model.model.norm.weight))
            )

    monkeypatch.setattr("opdkit.teachers.local.Offloaded", Watched)
    lines = []
    for offload in (False, True):
        output = tmp_path / str(offload)
        evaluate = {"data": "in memory", "teacher": True}
        teacher = {"kind": "local", "model": path, "offload": offload}
        run, given = a_run(tmp_path, teacher, output=str(output), evaluate=evaluate)
        execute(
            run,
            replace(
                given,
                eval_rows=given.rows,
                reward=lambda rollout: float(sum(rollout.tokens) % 2 == 0),
            ),
        )
        lines.append([line["loss"] for line in read_lines(output / "metrics.jsonl")])
        lines.append([line["avg_at_k"] for line in read_lines(output / "evals.jsonl")])
    assert lines[:2] == lines[2:] and len(lines[0]) == 2
    assert met and all(met) and not device.here
    assert (
        f"offload of {path} changes nothing here: the run's device is the CPU"
        in capsys.readouterr().err
    )


def test_a_teacher_that_takes_part_in_sampling_cannot_be_away(tmp_path: Path) -> None:
    teacher = {"kind": "local", "model": save_tiny(tmp_path / "teacher", seed=2), "offload": True}
    run, given = a_run(
        tmp_path,
        teacher,
        output=str(tmp_path / "run"),
        method={"name": "minillm", "arguments": {"teacher_mix": 0.2}},
    )
    with pytest.raises(
        UserError, match=r"draws tokens from a mixture with the teacher.*set offload: false"
    ):
        execute(run, given)


def test_weights_of_another_quantisation_are_not_moved() -> None:
    model = tiny_model()
    model.hf_quantizer = type(
        "Quantizer", (), {"quantization_config": type("Config", (), {"quant_method": "gptq"})}
    )
    with pytest.raises(
        UserError,
        match=r"stored as gptq, whose layers keep tensors of their own\. Set offload: false",
    ):
        offloaded(model, Device())
