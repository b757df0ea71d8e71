"""The dry run: its numbers are those of real models, counted and measured on tiny ones, and
hand-worked for large ones.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from opdkit import UserError
from opdkit.cli import main
from opdkit.models.body import head_of, hidden_states
from opdkit.models.held import HERE, Held, stored
from opdkit.models.layout import Layout
from opdkit.models.precision import compute_in, computing, widen
from opdkit.models.shapes import read_shape, shape_of
from opdkit.objective.head import flat_positions, learn
from opdkit.run.plan import Rates, RunPlan, find_device, plan
from opdkit.run.plan.devices import KNOWN, cpu
from opdkit.run.plan.memory import (
    PHASES,
    activations,
    copies,
    layer_bytes,
    memory_of,
    step_of,
    trained,
    trained_width,
)
from opdkit.run.plan.models import student_dtype
from opdkit.run.plan.work import body, head
from opdkit.run.resolve import on_device
from opdkit.run.settings import Run, make_run
from opdkit.sampling.kv_cache import new_cache
from opdkit.teachers import LocalModel
from opdkit.train.gather import gather
from opdkit.train.student import Student, with_adapters
from tests.common.tiny import save_tiny, tiny_model
from tests.train.rows import rollouts

H100 = KNOWN["h100"]
MODES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float32 and LoRA": {"lora": {"r": 4}},
    "bfloat16 and LoRA": {"dtype": "bfloat16", "lora": {"r": 4}},
}
modes = pytest.mark.parametrize("settings", MODES.values(), ids=MODES.keys())
checkpointing = pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def tiny_run(**settings: Any) -> Run:
    run = make_run({"student": "s", "teacher": "t", "data": "d", **settings})
    return on_device(run, gpu=False)


def qwen_run(**settings: Any) -> Run:
    values = {
        "student": "Qwen/Qwen3-1.7B",
        "teacher": "Qwen/Qwen3-8B",
        "data": "d",
        "dtype": "bfloat16",
        **settings,
    }
    values["sampling"] = {"max_completion_length": 4096, **settings.get("sampling", {})}
    return make_run(values)


def tiny_student(run: Run, **config: Any) -> Any:
    """A model as `engines` would have it."""
    model = tiny_model(**config).to(getattr(torch, student_dtype(run)))
    widen(model)
    if run.lora is not None:
        model = with_adapters(model, run.lora)
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if run.lora is not None:
            model.enable_input_require_grads()
    return model.train()


# ------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("size", "parameters"),  # as their repositories count them, a tied head once
    [
        ("0.6B", 596_049_920),
        ("1.7B", 1_720_574_976),
        ("4B", 4_022_468_096),
        ("8B", 8_190_735_360),
        ("14B", 14_768_307_200),
        ("32B", 32_762_123_264),
    ],
)
def test_the_table_has_the_published_sizes(size: str, parameters: int) -> None:
    shape = shape_of(f"Qwen/Qwen3-{size}-Base")
    assert (shape.parameters, shape.vocab, shape.origin) == (
        parameters,
        151936,
        "table of published shapes",
    )
    embeddings = (1 if size in ("0.6B", "1.7B", "4B") else 2) * shape.head
    norms = shape.layers * (2 * shape.hidden + 2 * shape.head_dim) + shape.hidden
    assert shape.active + embeddings + norms == parameters


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2", "cohere"])
def test_a_folder_is_described_by_its_configuration(kind: str, tmp_path: Path) -> None:
    name, model = save_tiny(tmp_path, kind), tiny_model(kind)
    shape = shape_of(name)
    assert shape.origin == "its configuration"
    assert shape.parameters == model.num_parameters()
    assert (shape.hidden, shape.layers, shape.queries, shape.keys, shape.intermediate) == (
        32,
        2,
        32,
        16,
        64,
    )
    assert (
        shape.active
        == sum(x.inputs * x.outputs for x in shape.linears)
        == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    )


def test_of_experts_only_the_chosen_ones_count_as_work() -> None:
    """Qwen3-30B-A3B: 30.5 billion parameters, of which one token meets 3.3."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )
    shape = read_shape(config, "here")
    assert shape.parameters == 30_532_122_624
    assert shape.active + 2 * shape.head == pytest.approx(3.35e9, rel=0.01)


def test_a_name_that_is_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match="cannot load the model 'nobody/nothing'"):
        shape_of("nobody/nothing")


# ------------------------------------------------------------------------------------------- memory


@modes
def test_weights_gradients_and_moments_are_counted_to_the_byte(settings: dict[str, Any]) -> None:
    run = tiny_run(**settings)
    model = tiny_student(run)
    shape = read_shape(tiny_model().config, "here")
    student = Student(model, run.optim, 1e-3, 10, run.dtype == "bfloat16")
    with computing(model):
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    learning = sum(p.numel() * p.element_size() for p in student.parameters)
    gradients = sum(p.grad.nbytes for p in student.parameters if p.grad is not None)
    student.optimiser.step()
    moments = sum(
        s[name].nbytes
        for s in student.optimiser.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    )
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    size = trained(shape, run.lora) * trained_width(run)
    assert learning == gradients == size and moments == 2 * size
    # the few vectors (norms) of a frozen model in 16 bits are kept in 32
    assert stored(shape, student_dtype(run), None) == (
        learning if run.lora is None else pytest.approx(frozen, rel=0.01)
    )


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "down_proj"), r".*layers\.1\..*(k|v)_proj"]
)
def test_adapters_are_counted_by_the_layers_they_are_put_on(targets: Any) -> None:
    run = tiny_run(lora={"r": 3, "targets": targets})
    model = tiny_student(run)
    shape = read_shape(tiny_model().config, "here")
    assert run.lora is not None
    assert (
        shape.adapters(run.lora)
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
        > 0
    )


@pytest.mark.parametrize("how", ["8bit", "4bit"])
def test_quantised_weights(how: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from opdkit.models.load import load_model
    from opdkit.models.quantize import size_of

    name = save_tiny(tmp_path, hidden=256)
    held = size_of(load_model(name, dtype="bfloat16", quantize=how))
    assert stored(shape_of(name), "bfloat16", how) == pytest.approx(held, rel=0.03)


@modes
@checkpointing
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_activations_are_what_autograd_keeps(
    kind: str, settings: dict[str, Any], checkpointed: bool
) -> None:
    """Within 5 %.

    Of checkpointed layers autograd keeps the inputs; one layer more is computed again in the
    backward pass.
    """
    run = tiny_run(gradient_checkpointing=checkpointed, **settings)
    model = tiny_student(run, kind=kind, hidden=64, layers=4)
    shape = read_shape(tiny_model(kind, hidden=64, layers=4).config, "here")
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    rows, width = 2, 64
    compute_in(model, getattr(torch, run.dtype))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden_states(model, torch.randint(3, 300, (rows, width)), None)
    measured = sum(storage.nbytes() for storage in kept.values())
    reckoned = activations(run, shape, rows * width)
    if checkpointed:
        reckoned -= rows * width * layer_bytes(run, shape)
        assert measured <= reckoned <= 1.5 * measured
    else:
        assert reckoned + copies(run, shape) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["all weights", "LoRA"])
def test_a_cached_token_takes_what_is_said(dtype: str, lora: Any) -> None:
    run = tiny_run(dtype=dtype, lora=lora)
    model = tiny_model().to(getattr(torch, student_dtype(run)))
    widen(model)
    compute_in(model, getattr(torch, dtype))
    cache = new_cache(model)
    with torch.no_grad():
        hidden_states(model, torch.randint(3, 300, (2, 8)), None, past_key_values=cache)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # type: ignore[attr-defined]
    held = Held("student", "s", HERE, read_shape(model.config, "here"), student_dtype(run))
    assert 16 * held.cached_token(run.dtype) == measured


def peak_of(work: Any) -> int:
    """Bytes that the allocator hands out at once, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@modes
@checkpointing
def test_the_peak_of_a_learning_pass_is_below_the_estimate_and_near_it(
    settings: dict[str, Any], checkpointed: bool
) -> None:
    """All that a pass allocates, backward too, against what is reckoned for it: at most 1.5 times
    as much.
    """
    prompt, response, count, budget = 16, 112, 8, 512
    run = tiny_run(
        data={"source": "d", "max_prompt_length": prompt},
        prompts_per_step=count,
        sampling={"max_completion_length": response},
        micro_batch_tokens=budget,
        gradient_checkpointing=checkpointed,
        **settings,
    )
    config = {"hidden": 128, "layers": 4, "vocab_size": 64}
    model, teacher = tiny_student(run, **config), tiny_model(**config)
    shape = read_shape(teacher.config, "here")
    models = [
        Held("student", "s", HERE, shape, student_dtype(run)),
        Held("teacher", "t", HERE, shape, run.dtype),
    ]
    method = run.method_spec.load()
    memory = memory_of(run, method, models, step_of(run, method.curriculum, cpu()), cpu())
    student = Student(model, run.optim, 1e-3, 10, run.dtype == "bfloat16")
    rows = rollouts(lengths=((prompt, response),) * count, vocabulary=64)
    batch = gather(
        rows,
        method.needs,
        {
            "student": LocalModel(model, student.head),
            "teacher": LocalModel(teacher, head_of(teacher)),
        },
    )
    made, layout = method.objective.plan(batch), Layout(rows, response)

    def work() -> None:
        for positions in layout.micro_batches(flat_positions(made.selected), budget):
            learned = learn(made, positions, layout.states(model, positions), student.head)
            learned.loss.backward()

    held = ("weights,", "moments", "adapters", "facts")  # before the pass begins
    reckoned = sum(
        part.bytes.get("learn", 0)
        for part in memory.parts
        if not any(word in part.name for word in held)
    )
    measured = peak_of(work)
    assert measured <= reckoned <= 1.5 * measured


def test_a_large_run_by_hand() -> None:
    """Qwen3-1.7B and 8B, 128 rollouts of 4096 tokens: the largest parts, worked out on paper."""
    made = plan(qwen_run(gradient_checkpointing=True, sampling={"num_generations": 4}), H100)
    parts = {part.name: part.bytes for part in made.memory.parts}
    small, large = 1_720_574_976, 8_190_735_360
    assert parts["student weights, float32"] == dict.fromkeys(PHASES, 4 * small)
    assert parts["teacher weights, bfloat16"] == dict.fromkeys(PHASES, 2 * large)
    assert parts["two moments of AdamW"] == dict.fromkeys(PHASES, 8 * small)
    assert parts["gradients"] == {"learn": 4 * small}
    # teacher's and student's, whose log-probs in bfloat16 are the trainer's own
    assert parts["hidden states of scored tokens"] == {"score": (1 << 17) * (4096 + 2048) * 2}
    assert parts["bfloat16 copy of the student's head"] == dict.fromkeys(PHASES, 2 * 151936 * 2048)
    between, layer = (
        16384 * 2048 * 4,
        16384 * (26 * 2048 + 10 * 2048 + 10 * 1024 + 8 * 6144 + 4 * (2 + 16 + 16 + 8)),
    )
    assert parts["activations of 16,384 tokens, recomputed layer by layer"] == {
        "learn": 28 * between + layer + 3 * between
    }
    assert made.memory.total("learn") == sum(sizes.get("learn", 0) for sizes in parts.values())
    assert made.memory.fits and made.changes == []


def test_engines_servers_offload_and_sleep() -> None:
    def parts(**settings: Any) -> dict[str, dict[str, int]]:
        return {part.name: part.bytes for part in plan(qwen_run(**settings), H100).memory.parts}

    whole = 2 * 8_190_735_360
    waiting = parts(teacher={"kind": "local", "model": "Qwen/Qwen3-8B", "offload": True})[
        "teacher weights, bfloat16"
    ]
    # its head stays
    assert waiting == {"sample": 2 * 151936 * 4096, "score": whole, "learn": 2 * 151936 * 4096}
    assert not any("teacher" in name for name in parts(teacher="http://elsewhere:8000"))
    engine = parts(
        teacher={"kind": "vllm", "model": "Qwen/Qwen3-8B", "gpu_memory_utilization": 0.25}
    )
    assert engine["teacher's vLLM engine"] == dict.fromkeys(PHASES, round(0.25 * H100.memory))
    sampler = {"kind": "vllm", "dtype": "bfloat16", "gpu_memory_utilization": 0.5}
    assert parts(sampler=sampler)["sampler's vLLM engine"] == dict.fromkeys(
        PHASES, round(0.5 * H100.memory)
    )
    assert parts(sampler={**sampler, "enable_sleep_mode": True})["sampler's vLLM engine"] == {
        "sample": round(0.5 * H100.memory)
    }
    # the student's
    assert "hidden states of scored tokens" in parts(
        sampler=sampler, teacher="http://elsewhere:8000"
    )


def test_what_the_loss_reads_whole_is_held_while_learning() -> None:
    sampled, whole = (plan(qwen_run(method=name), H100).memory for name in ("opd", "gkd"))
    held = 32 * 4096 * 4096 * 2
    assert {p.name: p.bytes for p in whole.parts}["hidden states that the loss reads"] == {
        "score": held,
        "learn": held,
    }
    assert whole.total("learn") > sampled.total("learn")


EMA = """
from opdkit import Method
from opdkit.objective import Ema, LogRatio, Objective, PolicyGradient

def close():
    return Method(Objective(PolicyGradient(LogRatio("ema", "student"))), companions=(Ema(),))
"""


@pytest.mark.parametrize("lora", [None, {"r": 8}], ids=["all weights", "LoRA"])
def test_a_copy_of_the_student_takes_what_learns_once_more_and_a_pass(
    lora: Any, tmp_path: Path
) -> None:
    (tmp_path / "ema.py").write_text(EMA)
    made = plan(qwen_run(method=f"{tmp_path / 'ema.py'}:close", lora=lora), H100)
    parts = {p.name: p.bytes for p in made.memory.parts}
    size = trained(made.models[0].shaped, made.run.lora) * 4
    assert parts["copies of the student beside it"] == dict.fromkeys(PHASES, size)
    assert parts["two moments of AdamW"]["learn"] == 2 * size
    assert [(m.role, m.own) for m in made.models] == [("student", True), ("ema", False)]
    assert not any("ema weights" in name for name in parts)
    assert "one pass of student, ema" in {phase.says for phase in made.phases}


def test_a_shared_checkpoint_is_loaded_once() -> None:
    routes = {"math": "Qwen/Qwen3-8B", "code": "Qwen/Qwen3-8B", "default": "Qwen/Qwen3-4B"}
    made = plan(qwen_run(teacher=routes), H100)
    assert [(m.role, m.own) for m in made.models[1:]] == [
        ("teacher.math", True),
        ("teacher.code", False),
        ("teacher.default", True),
    ]
    kept = [p.name for p in made.memory.parts if "teacher" in p.name]
    assert kept == ["teacher.math weights, bfloat16", "teacher.default weights, bfloat16"]


# --------------------------------------------------------------------------------------------- work


@pytest.mark.parametrize("lora", [None, {"r": 8}], ids=["all weights", "LoRA"])
@checkpointing
def test_operations_of_the_body_are_those_counted(lora: Any, checkpointed: bool) -> None:
    """Within 3 %: below adapters the first layer takes no gradient of its input.

    Eager attention computes the whole square.
    """
    run = tiny_run(lora=lora, gradient_checkpointing=checkpointed)
    model = tiny_student(run, hidden=64, layers=3)
    model.set_attn_implementation("eager")
    rows, width = 2, 32
    with FlopCounterMode(display=False) as counter:
        hidden_states(model, torch.randint(3, 300, (rows, width)), None).sum().backward()
    shape = read_shape(tiny_model(hidden=64, layers=3).config, "here")
    reckoned = body(run, shape, rows * width, rows * width**2)
    assert counter.get_total_flops() == pytest.approx(reckoned, rel=0.001 if lora is None else 0.03)


@pytest.mark.parametrize(
    ("method", "also"),  # also: heads of other models projected beside the student's
    [("opd", 0), ("gkd", 1), ({"name": "grpo", "loss": "gspo"}, 0)],
)
def test_operations_of_the_head_are_those_counted(method: Any, also: int) -> None:
    """The counter does not know the product that adds to the head's gradient in place, which `head`
    tells apart.
    """
    run = tiny_run(method=method)
    made, model = run.method_spec.load(), tiny_model()
    rows = rollouts(lengths=((4, 8),) * 4, reward=1.0, correct=True)
    scorer = LocalModel(model, head_of(model))
    batch = gather(rows, made.needs, dict.fromkeys(("student", "teacher", "reference"), scorer))
    ready = made.objective.plan(batch)
    positions = flat_positions(batch.mask)
    states = Layout(rows, 8).states(model, positions)
    with FlopCounterMode(display=False) as counter:
        learn(ready, positions, states, head_of(model))
    counted, in_place = head(run, read_shape(model.config, "here"), len(positions))
    assert counter.get_total_flops() == counted + also * 2 * 320 * 32 * 32
    assert in_place == 2 * 320 * 32 * 32


def test_longer_and_more_rollouts_take_more_memory_and_time() -> None:
    """The sampler's cache apart, which fills the memory that is free with whole rollouts."""

    def take(**settings: Any) -> tuple[int, int, float, float]:
        made = plan(qwen_run(gradient_checkpointing=True, **settings), KNOWN["h200"])
        return (
            made.memory.total("score"),
            made.memory.total("learn"),
            made.step_seconds,
            made.phases[-1].operations,
        )

    for rising in (
        [take(sampling={"max_completion_length": n}) for n in (512, 1024, 4096, 16384, 32768)],
        [take(sampling={"num_generations": n}) for n in (1, 2, 8, 32)],
        [take(prompts_per_step=n) for n in (1, 4, 64, 256)],
        [take(student=f"Qwen/Qwen3-{size}") for size in ("0.6B", "1.7B", "4B", "8B")],
    ):
        for few, more in pairwise(rising):
            assert few[0] <= more[0] and few[1] <= more[1] and few[2] < more[2] and few[3] < more[3]


def test_seconds_by_hand() -> None:
    """The teacher's pass: 32 rows of 200 + 2048 tokens."""
    made = plan(qwen_run(recompute_student=False), H100, rates=Rates(score=0.5))
    score = next(phase for phase in made.phases if phase.name == "score")
    matrices = 2 * 6_945_767_424 * 32 * 2248
    attention = 4 * 36 * 4096 * 32 * 2248**2 / 2
    assert score.operations == pytest.approx(
        matrices + attention + 2 * 151936 * 4096 * 32 * 2048, rel=1e-12
    )
    assert score.seconds == pytest.approx(score.operations / (989e12 * 0.5), rel=1e-12)
    assert made.seconds == pytest.approx(100 * sum(p.seconds for p in made.phases))


def test_updates_of_steps_that_differ_count_on_average() -> None:
    """Two passes in 50 of 100 steps, one in the others: half as much again as one in each."""
    one, more, always = (
        plan(qwen_run(method=method, reward="math", sampling={"num_generations": 4}), H100).phases[
            -1
        ]
        for method in ("remix(utd=1)", "remix", "remix(reincarnate=100)")
    )
    assert more.seconds == pytest.approx(1.5 * one.seconds)
    assert always.seconds == pytest.approx(2 * one.seconds)
    assert one.says.endswith("1 update") and always.says.endswith("2 updates")
    assert more.says.endswith("1.5 updates on average")


def test_what_is_not_sampled_is_not_counted_and_what_stands_beside_is() -> None:
    """Pairs are read, an opponent's answers are written beside, rehearsed ones were before."""
    four = {"data": "d", "reward": "exact", "prompts_per_step": 4}

    def planned(method: str, **more: Any) -> RunPlan:
        return plan(qwen_run(**four | {"method": method, "teacher": None} | more), H100)

    pairs = planned("f_dpo")
    assert (pairs.step.rollouts, pairs.load.written) == (8, 0)
    assert [p.name for p in pairs.phases] == ["score", "learn"]
    assert pairs.phases[0].says == "one pass of student, reference"
    two = {"sampling": {"num_generations": 2}}
    assert (planned("hypo", **two).step.rollouts, planned("hypo", **two).step.sampled) == (16, 8)
    played = planned("nash_mp", **two)
    assert (played.step.rollouts, played.step.sampled) == (8, 16)
    kept = planned("dph_rl", **two)
    assert (kept.step.rollouts, kept.step.sampled) == (16, 8)
    assert "8 responses to every prompt" in str(kept) and "is not counted" in str(kept)
    evaluate = {"data": {"source": "d", "limit": 10}, "every": 0}
    of_pairs, of_own = (planned(m, evaluate=evaluate, **two) for m in ("f_dpo", "grpo"))
    assert of_pairs.evaluations == pytest.approx(of_own.evaluations)  # answers are sampled there


def test_evaluations_count_where_the_number_of_problems_is_known() -> None:
    evaluate = {"data": {"source": "e", "limit": 30}, "every": 25}
    known = plan(qwen_run(reward="exact", evaluate=evaluate), H100)
    count, each = known.evaluations
    assert count == 5 and each > 0  # before, at 25, 50, 75, and after
    assert known.seconds == pytest.approx(100 * known.step_seconds + 5 * each)
    unknown = plan(qwen_run(reward="exact", evaluate={"data": "e"}), H100)
    assert unknown.evaluations[0] == 2 and "evaluate.data.limit says" in str(unknown)
    assert unknown.seconds == pytest.approx(100 * unknown.step_seconds)


# -------------------------------------------------------------------------------- devices, the page


def test_devices_by_name_by_numbers_and_changed() -> None:
    assert find_device("H100") == KNOWN["h100"]
    given = find_device("h100", memory="40GiB", tflops=400, bandwidth="300 GB/s")
    assert (given.memory, given.tflops, given.bandwidth) == (40 * 2**30, 400, 0.3)
    alone = find_device(memory="80GB", tflops=400, bandwidth="3.35TB/s", setting="cpu")
    assert (alone.memory, alone.tflops32, alone.bandwidth, alone.gpu) == (
        80_000_000_000,
        25,
        3.35,
        True,
    )
    assert find_device("cpu").gpu is False and find_device(setting="cpu") == cpu()
    for arguments, told in (
        ({"name": "h1000"}, "did you mean 'h100'"),
        ({"memory": "much"}, "as in --device-memory 80GB"),
        ({"tflops": 400.0, "setting": "cpu"}, "add --device-memory"),
    ):
        with pytest.raises(UserError, match=told):
            find_device(**arguments)


def test_what_does_not_fit_is_said_with_what_would() -> None:
    run = qwen_run(gradient_checkpointing=False, micro_batch_tokens=16384)
    tight = plan(run, KNOWN["l4"])
    assert not tight.memory.fits and "does not fit" in str(tight)
    found = {change.setting: change for change in tight.changes}
    assert {
        "lora.r=32",
        "gradient_checkpointing=true",
        "micro_batch_tokens=5120",
        "teacher.offload=true",
    } <= set(found)
    assert [c.peak for c in tight.changes] == sorted(c.peak for c in tight.changes)
    # each is what the setting does
    for setting in ("lora.r=32", "gradient_checkpointing=true", "micro_batch_tokens=5120"):
        values = {
            "student": run.student,
            "teacher": run.teacher,
            "data": "d",
            "dtype": "bfloat16",
            "gradient_checkpointing": False,
            "micro_batch_tokens": 16384,
            "sampling": {"max_completion_length": 4096},
        }
        alone = plan(make_run(values, [setting]), KNOWN["l4"])
        assert (alone.memory.peak[0], alone.memory.fits) == (
            found[setting].peak,
            found[setting].fits,
        )


def test_readme_s_three_lines_fit_a_card() -> None:
    """Nothing said of the device: on a GPU bfloat16, checkpointing, and passes that fit."""
    values = {
        "student": "Qwen/Qwen3-0.6B",
        "teacher": "Qwen/Qwen3-4B",
        "data": "openai/gsm8k:main",
        "method": "iw_opd",
    }
    sizes = {}
    for card in ("h100", "a100-40gb", "l4"):
        made = plan(make_run(values), KNOWN[card])
        assert made.memory.fits and made.run.dtype == "bfloat16" and made.run.gradient_checkpointing
        sizes[card] = made.run.micro_batch_tokens
    assert sizes["h100"] == 16384 and sizes["l4"] < 16384  # smaller where there is less room
    on_cpu = on_device(make_run(values), gpu=False)
    assert (on_cpu.dtype, on_cpu.gradient_checkpointing) == ("float32", False)


def test_text_and_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "train",
        "--student=Qwen/Qwen3-0.6B",
        "--teacher=Qwen/Qwen3-4B",
        "--data=d",
        "--dry-run",
        "--device=h100",
        "dtype=bfloat16",
    ]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    memory, time = told["memory"], told["time"]
    assert (
        f"memory: about {memory['peak'] / 2**30:.2f} GiB in {memory['peak_phase']}" in text
        and memory["fits"] is True
    )
    assert (
        sum(part["bytes"].get("learn", 0) for part in memory["parts"]) == memory["total"]["learn"]
    )
    assert [phase["name"] for phase in time["phases"]] == list(PHASES)
    assert time["step"] == pytest.approx(sum(phase["seconds"] for phase in time["phases"]))
    assert [(m["role"], m["parameters"]) for m in told["models"]] == [
        ("student", 596_049_920),
        ("teacher", 4_022_468_096),
    ]
    assert told["run"]["dtype"] == "bfloat16" and told["passes"][-1].startswith(
        "student, with gradient"
    )


def test_rates_lengths_and_unknown_devices(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "train",
        "--student=Qwen/Qwen3-0.6B",
        "--teacher=Qwen/Qwen3-4B",
        "--data=d",
        "--dry-run",
        "dtype=bfloat16",
        "--json",
    ]

    def told(*flags: str) -> Any:
        assert main([*command, *flags]) == 0
        return json.loads(capsys.readouterr().out)["time"]

    slow, fast = told("--device=h100", "--mfu=0.2"), told("--device=h100", "--mfu=0.4")
    assert slow["phases"][2]["seconds"] > 1.5 * fast["phases"][2]["seconds"]
    assert slow["phases"][1]["seconds"] == fast["phases"][1]["seconds"]
    short, long = (
        told("--device=h100", "--response-length=64"),
        told("--device=h100", "--response-length=512"),
    )
    assert short["step"] < long["step"]
    # a device of which only the memory is known
    assert told("--device-memory=80GB")["step"] is None
    for flags in (["--mfu=2"], ["--response-length=0"], ["--device=h1"]):
        assert main([*command, *flags]) == 2
    assert main(["train", "--student=s", "--teacher=t", "--data=d", "--device=h100"]) == 2
    assert "--device is about an estimate: add --dry-run" in capsys.readouterr().err


def test_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loads)
    monkeypatch.setattr("opdkit.run.prompts.load_rows", loads)
    made: RunPlan = plan(qwen_run(method="tropd * iw_opd"), H100)
    assert "objective: " in str(made) and "teacher, without gradient" in str(made)


def test_what_the_run_would_refuse_is_refused() -> None:
    with pytest.raises(UserError, match="the run has no reward"):
        plan(qwen_run(method="grpo"), H100)
    with pytest.raises(UserError, match="a cached teacher cannot say"):
        plan(qwen_run(method="gkd", teacher={"kind": "cached", "folder": "/nowhere"}), H100)


def test_a_reward_that_is_not_installed_here_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(reward: Any, weights: Any) -> None:
        raise UserError("math_verify is not installed")

    monkeypatch.setattr("opdkit.run.plan.estimate.load_reward", missing)
    made = plan(qwen_run(reward="math"), H100)
    assert str(made).endswith(
        "note: the reward cannot be used on this machine: math_verify is not installed"
    )
    with pytest.raises(UserError):
        plan(qwen_run(reward="maths"), H100)
