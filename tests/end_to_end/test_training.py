"""Whole runs through the command line and the loop: every method of the first group learns, saves
and loads, and nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.clock import Clock
from opdkit.base.files import read_lines
from opdkit.cli import main
from opdkit.curricula.data import given
from opdkit.run.build import prepare
from opdkit.run.launch import execute
from opdkit.run.plan import use_of
from opdkit.run.resolve import resolve
from opdkit.run.settings import Run, make_run
from opdkit.train import loop
from opdkit.train.checkpoint import State
from opdkit.train.collect.collect import collect
from opdkit.train.job import Job
from opdkit.train.loop import train_step
from opdkit.types import Rollout
from tests.common.rounding import FORWARD
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows

GROUP_ONE = ("opd", "gkd", "gopd", "exopd", "tropd", "iw_opd", "position_opd", "scope", "vopd")
GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k_train.jsonl"
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.exists(),
    reason=f"{GSM8K.name} is not there: the shared data are not part of the repository",
)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def difference(a: Path, b: Path) -> float:
    """The largest difference of two models' weights, relative to the largest weight."""
    x, y = weights(a / "model"), weights(b / "model")
    assert x.keys() == y.keys()
    return max(float((x[k] - y[k]).abs().max() / x[k].abs().max()) for k in x)


def check_trained(folder: Path, start: str, steps: int) -> None:
    """Finite losses, gradients that moved the weights, and two models that load and write."""
    from transformers import AutoModelForCausalLM

    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    prompt = torch.tensor([[1, 40, 50, 60]])
    logits = []
    for path in (folder / f"checkpoint-{steps}", folder / "model"):
        model: Any = AutoModelForCausalLM.from_pretrained(path)
        assert model.generate(
            prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False
        ).shape == (1, 7)
        logits.append(model(prompt).logits)
    # adapters beside the weights, or merged into them
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=FORWARD)
    before = AutoModelForCausalLM.from_pretrained(start)(prompt).logits
    assert (logits[1] - before).abs().max().item() > 10 * FORWARD


# ------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize("lora", [(), ("lora.r=4",)], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["student", "llama"])
@pytest.mark.parametrize("method", GROUP_ONE)
def test_a_method_trains_a_student_of_either_family_with_all_weights_and_with_adapters(
    shop: Shop, tmp_path: Path, method: str, family: str, lora: tuple[str, ...]
) -> None:
    student = getattr(shop, family)
    assert (
        shop.train(
            tmp_path, f"--method={method}", f"--reward={shop.reward}", *lora, student=student
        )
        == 0
    )
    check_trained(tmp_path, student, 2)


@needs_gsm8k
def test_gsm8k_as_published_trains(shop: Shop, tmp_path: Path) -> None:
    assert (
        shop.train(tmp_path, f"data={GSM8K}", "data.limit=8", "--reward=math", "--method=tropd")
        == 0
    )
    check_trained(tmp_path, shop.student, 2)
    # its worked answers guide the first rollouts
    assert metrics(tmp_path)[0]["share/likelihood"] > 0


@pytest.mark.slow
@needs_gsm8k
@pytest.mark.parametrize("lora", [(), ("lora.r=4",)], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["student", "llama"])
@pytest.mark.parametrize("method", GROUP_ONE)
def test_ten_steps_on_gsm8k(
    shop: Shop, tmp_path: Path, method: str, family: str, lora: tuple[str, ...]
) -> None:
    student = getattr(shop, family)
    size = (
        "steps=10",
        "prompts_per_step=4",
        "num_generations=4",
        "max_completion_length=32",
        "checkpoint.every=5",
    )
    assert (
        shop.train(
            tmp_path,
            f"data={GSM8K}",
            "--reward=math",
            f"--method={method}",
            *size,
            *lora,
            student=student,
        )
        == 0
    )
    check_trained(tmp_path, student, 10)


def test_a_method_in_ones_own_file_trains(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from opdkit.objective import LogRatio, Objective, PolicyGradient\ndef gentle(slope: float "
        "= 1.0):\n    return Objective(PolicyGradient(LogRatio('teacher', 'student')) * slope)\n"
    )
    mine = f"--method={tmp_path / 'mine.py'}:gentle"
    assert shop.train(tmp_path / "whole", mine) == 0
    assert shop.train(tmp_path / "half", mine, "method.slope=0.5") == 0
    assert shop.train(tmp_path / "opd") == 0
    check_trained(tmp_path / "whole", shop.student, 2)
    whole, half, opd = (metrics(tmp_path / name)[0]["loss"] for name in ("whole", "half", "opd"))
    assert whole == opd == 2 * half


@pytest.mark.parametrize("method", ["opd", "gkd"])
def test_the_student_comes_nearer_to_its_teacher(shop: Shop, tmp_path: Path, method: str) -> None:
    assert (
        shop.train(
            tmp_path,
            f"--method={method}",
            "steps=40",
            "prompts_per_step=6",
            "learning_rate=5e-3",
            "keep_samples=0",
        )
        == 0
    )
    gaps = [line["teacher_kl/sampled"] for line in metrics(tmp_path)]
    assert sum(gaps[-8:]) < 0.7 * sum(gaps[:8])


# its likelihood of right answers has no zero here
@pytest.mark.parametrize("method", [m for m in GROUP_ONE if m != "scope"])
def test_r5_a_teacher_that_is_the_student_teaches_nothing(
    shop: Shop, tmp_path: Path, method: str
) -> None:
    """Through the loop, in float64: what is left is the rounding of two ways through the same
    network.
    """
    plain = write_rows(
        tmp_path / "plain.jsonl", [{"prompt": row["question"]} for row in gsm8k_rows(4)]
    )  # no answers to be guided by
    assert (
        shop.train(
            tmp_path / "run",
            f"--method={method}",
            f"data={plain}",
            "dtype=float64",
            teacher=shop.student,
        )
        == 0
    )
    first = metrics(tmp_path / "run")[0]
    assert first["grad_norm"] < 1e-12 and abs(first["loss"]) < 1e-12


def test_without_clipping_the_norm_is_still_recorded(shop: Shop, tmp_path: Path) -> None:
    """null and 0 are one run; a limit of a millionth changes what is learnt, not the norm it is
    recorded from.
    """
    for limit in ("null", "0", "1e-6"):
        assert (
            shop.train(tmp_path / limit, f"max_grad_norm={limit}", "eps=1e-3", "keep_samples=0")
            == 0
        )
    none, zero, little = (metrics(tmp_path / limit) for limit in ("null", "0", "1e-6"))
    assert none[0]["grad_norm"] == zero[0]["grad_norm"] == little[0]["grad_norm"] > 1e-3
    assert none[1]["grad_norm"] == zero[1]["grad_norm"] != little[1]["grad_norm"]
    assert main(["train", str(tmp_path / "null" / "run.yaml"), f"output={tmp_path / 'again'}"]) == 0
    assert metrics(tmp_path / "again")[1]["grad_norm"] == none[1]["grad_norm"]


# ----------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("method", ["opd", "gkd", "iw_opd", "scope", "sinkd(items=9)", "eksft"])
def test_micro_batches_change_memory_and_nothing_else(
    shop: Shop, tmp_path: Path, method: str
) -> None:
    common = (
        f"--method={method}",
        f"--reward={shop.reward}",
        "dtype=float64",
        "prompts_per_step=4",
    )
    assert shop.train(tmp_path / "small", *common, "micro_batch_tokens=1") == 0
    assert shop.train(tmp_path / "large", *common, "micro_batch_tokens=100000") == 0
    assert difference(tmp_path / "small", tmp_path / "large") < 1e-9


@pytest.mark.parametrize("lora", [(), ("lora.r=4",)], ids=["full", "lora"])
def test_gradient_checkpointing_changes_memory_and_nothing_else(
    shop: Shop, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    assert shop.train(tmp_path / "kept", "dtype=float64", *lora) == 0
    assert (
        shop.train(tmp_path / "again", "dtype=float64", "gradient_checkpointing=true", *lora) == 0
    )
    assert difference(tmp_path / "kept", tmp_path / "again") < 1e-12


def test_v2_rows_that_pad_the_teachers_vocabulary_change_nothing(
    shop: Shop, tmp_path: Path
) -> None:
    """V1, V2: 384 rows for the same 320 tokens; the padding is huge, so that it would take all the
    mass were it looked at.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(shop.teacher)
    teacher.resize_token_embeddings(384, mean_resizing=False)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[320:] = 100.0
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(shop.teacher).save_pretrained(tmp_path / "teacher")
    for name, path in (("padded", str(tmp_path / "teacher")), ("plain", shop.teacher)):
        assert shop.train(tmp_path / name, "--method=gkd", "dtype=float64", teacher=path) == 0
    assert difference(tmp_path / "padded", tmp_path / "plain") < 1e-12


def test_bfloat16_products_with_float32_weights(shop: Shop, tmp_path: Path) -> None:
    assert shop.train(tmp_path / "half", "--method=gkd", "dtype=bfloat16") == 0
    assert shop.train(tmp_path / "full", "--method=gkd") == 0
    assert metrics(tmp_path / "half")[0]["entropy/student"] == pytest.approx(
        metrics(tmp_path / "full")[0]["entropy/student"], rel=0.05
    )
    assert {w.dtype for w in weights(tmp_path / "half" / "model").values()} == {torch.float32}


# ----------------------------------------------------------------------------------- forward passes


def counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Trains; forward passes of the student (sampling apart) and of the teacher, and
    micro-batches.
    """
    job, state = prepare(run)
    counts = {"learning": 0, "scoring": 0, "teacher": 0, "micro-batches": 0}

    def student(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["past_key_values"] is None:
            counts["learning" if module.training else "scoring"] += 1

    def count(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return called

    job.student.model.get_decoder().register_forward_pre_hook(student, with_kwargs=True)
    teacher = job.scorers["teacher"].model  # type: ignore[attr-defined]
    monkeypatch.setattr(teacher, "get_decoder", count("teacher", teacher.get_decoder))
    monkeypatch.setattr(loop, "learn", count("micro-batches", loop.learn))
    with job.recorder.trackers:
        loop.train(job, state)
    return counts


def test_the_samplers_log_probs_save_a_forward_pass(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = counted(shop.run(tmp_path, steps=3, micro_batch_tokens=64), monkeypatch)
    assert counts["scoring"] == 0
    assert counts["learning"] == counts["micro-batches"] > 3
    assert counts["teacher"] == counts["micro-batches"]  # cut as the learning pass is


def test_the_student_is_scored_again_where_asked(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = counted(shop.run(tmp_path, steps=3, recompute_student=True), monkeypatch)
    assert (counts["scoring"], counts["learning"], counts["teacher"]) == (3, 3, 3)


# ---------------------------------------------------------------------------- where text comes from


def test_gkd_without_the_students_text_learns_from_the_data(shop: Shop, tmp_path: Path) -> None:
    run = shop.run(
        tmp_path, method={"name": "gkd", "lmbda": 0.0}, sampling={"max_completion_length": 64}
    )
    execute(run)
    assert [line["completions/student_written"] for line in metrics(tmp_path)] == [0.0, 0.0]
    sample = read_lines(tmp_path / "samples" / "step_000001.jsonl")[0]
    answers = {f"{row['answer']}<|im_end|>" for row in gsm8k_rows(6)}
    assert "".join(sample["pieces"]) in answers and sample["finish"] == "given"


def first_rollouts(job: Job, state: State) -> list[Rollout]:
    """Those of the first step."""
    clock = Clock(job.student.device)
    collected = collect(
        job.collector, job.student.updates, clock, step=0, total_steps=2, memory=state.memory
    )
    return collected.rollouts


def test_tropds_guided_rollouts_begin_with_the_reference_and_carry_its_mark(
    shop: Shop, tmp_path: Path
) -> None:
    run = shop.run(tmp_path, method="tropd", sampling={"max_completion_length": 8})
    job, state = prepare(run)
    written = first_rollouts(job, state)
    guided = [r for r in written if r.marks]
    # two prompts, two plain rollouts and one guided each
    assert (len(written), len(guided)) == (6, 2)
    prompts: Any = job.collector.prompts
    rows = {row["id"]: index for index, row in enumerate(prompts.rows)}
    for r in guided:
        index = rows[r.row["id"]]
        reference = given(prompts[index], prompts.response_tokens(index), 8, "reference")
        # all of it at the first step
        assert r.tokens == reference.tokens and r.marks["guided"] == [True] * 8


@pytest.mark.parametrize(
    "ends", [2, [2, *range(40, 120)], None], ids=["one end", "a list of ends", "of the template"]
)
def test_m1_padding_that_is_the_end_of_sequence(shop: Shop, tmp_path: Path, ends: Any) -> None:
    """The prompts hold the end of sequence; a response stops with the first end that it writes,
    which is trained, or is cut.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(shop.student),
        AutoTokenizer.from_pretrained(shop.student),
    )
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.eos_token = None if ends is None else tokenizer.eos_token
    model.generation_config.eos_token_id = ends
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    run = shop.run(
        tmp_path / "run",
        student=str(tmp_path / "student"),
        prompts_per_step=6,
        sampling={"num_generations": 4},
    )
    job, state = prepare(run)
    # where nothing of the student's declares an end, its chat template and its teacher still do
    known = set(ends) if isinstance(ends, list) else {2}
    finished = 0
    for r in first_rollouts(job, state):
        assert 2 in r.prompt and all(r.trained) and len(r.trained) == len(r.tokens)
        assert [t for t in r.tokens[:-1] if t in known] == []
        assert (r.finish == "stop") == (r.tokens[-1] in known) and (
            r.finish == "stop" or len(r.tokens) == 8
        )
        finished += r.finish == "stop"
    assert finished > 12 if isinstance(ends, list) else True
    with job.recorder.trackers:
        assert loop.train(job, state).step == 2


def test_several_passes_and_minibatches_are_as_many_optimiser_steps(
    shop: Shop, tmp_path: Path
) -> None:
    job, state = prepare(
        shop.run(
            tmp_path,
            optim={"passes": 3, "minibatches": 2, "schedule": "linear"},
            method="drift_gating",
        )
    )
    with job.recorder.trackers:
        loop.train(job, state)
    assert job.student.updates == 2 * 3 * 2
    assert [line["learning_rate"] for line in metrics(tmp_path)] == pytest.approx(
        [1e-3 * (1 - 5 / 12), 1e-3 * (1 - 11 / 12)]
    )


def test_a_loaded_student_keeps_its_own_start_as_reference(shop: Shop, tmp_path: Path) -> None:
    """exopd reads the student's initial weights; they must stand still while the student, handed
    over as an object, moves.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from opdkit import distill

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path) for path in (shop.student, shop.teacher)
    )
    settings = {
        k: v
        for k, v in shop.values("").items()
        if k not in ("student", "teacher", "data", "output")
    } | {"steps": 4}
    tokenizer = AutoTokenizer.from_pretrained(shop.student)
    distill(
        student,
        teacher,
        shop.data,
        "exopd",
        tokenizer=tokenizer,
        output=str(tmp_path / "objects"),
        **settings,
    )
    distill(
        shop.student, shop.teacher, shop.data, "exopd", output=str(tmp_path / "paths"), **settings
    )
    assert difference(tmp_path / "objects", tmp_path / "paths") == 0


def test_the_student_may_be_its_own_teacher_as_one_object(shop: Shop, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from opdkit import distill

    model = AutoModelForCausalLM.from_pretrained(shop.student)
    settings = {
        k: v
        for k, v in shop.values("").items()
        if k not in ("student", "teacher", "data", "output")
    }
    out = distill(
        model,
        model,
        shop.data,
        tokenizer=AutoTokenizer.from_pretrained(shop.student),
        output=str(tmp_path / "self"),
        **settings,
    )
    assert (
        out.metrics[0]["grad_norm"] < 10 * FORWARD
    )  # credits are the rounding of two passes, log-probs slope by less than 10


# --------------------------------------------------------------------------------------- evaluation

LOSS_PATHS: dict[str, Any] = {
    "sampled token": "opd",
    "whole vocabulary": "gkd",
    "teacher's top k": {"name": "opd", "support": "teacher", "k": 4},
    "student's top k": {"name": "topk_opd", "k": 4},
    "three terms": "tropd",
    "whole rollouts": {"name": "grpo", "loss": "gspo"},
    "memory": "paced",
    "text of the data": {"name": "gkd", "lmbda": 0.0},
}


@pytest.mark.parametrize("path", LOSS_PATHS)
def test_r3_evaluation_works_in_every_loss_path(shop: Shop, tmp_path: Path, path: str) -> None:
    evaluate = {"data": shop.data, "every": 1, "num_generations": 2, "ks": [1, 2]}
    out = execute(
        shop.run(tmp_path, method=LOSS_PATHS[path], reward=shop.reward, evaluate=evaluate)
    )
    assert [(e.name, e.step, e.n_problems) for e in out.evaluations] == [
        ("student", step, 6) for step in range(3)
    ]
    assert all(0 <= e.avg_at_k.value <= e.pass_at_k[2].value <= 1 for e in out.evaluations)
    assert out.evaluations[0].avg_at_k.value > 0


def test_the_best_checkpoint_is_kept_beside_the_last(shop: Shop, tmp_path: Path) -> None:
    run = shop.run(
        tmp_path,
        steps=6,
        reward=shop.reward,
        evaluate={"data": shop.data, "every": 1},
        checkpoint={"every": 0},
        optim={"learning_rate": 0.05},
    )
    out = execute(run)
    scores = {e.step: e.avg_at_k.value for e in out.evaluations if e.step}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == sorted(
        {f"checkpoint-{best}", "checkpoint-6"}
    )


def test_run_yaml_trains_the_same_model_again(shop: Shop, tmp_path: Path) -> None:
    from opdkit.cli import main

    assert shop.train(tmp_path / "first", "--method=gkd", "method.beta=0.25") == 0
    assert (
        main(["train", str(tmp_path / "first" / "run.yaml"), f"output={tmp_path / 'second'}"]) == 0
    )
    assert difference(tmp_path / "first", tmp_path / "second") == 0


def test_several_teachers_each_get_their_own_metrics(shop: Shop, tmp_path: Path) -> None:
    """R10. The rows of a teacher that is the student's twin are at distance 0."""
    rows = [
        {**row, "teacher": name} for row, name in zip(gsm8k_rows(4), ["twin", "far", "twin", None])
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    values = shop.values(tmp_path / "run", data=data, prompts_per_step=4, dtype="float64") | {
        "teacher": {"twin": shop.student, "far": shop.teacher, "default": shop.llama}
    }
    first = execute(make_run(values)).metrics[0]
    fractions = {name: first[f"teacher_token_frac/{name}"] for name in ("twin", "far", "default")}
    assert sum(fractions.values()) == pytest.approx(1) and min(fractions.values()) > 0
    assert (
        abs(first["teacher_kl/twin"])
        < 1e-12
        < 0.1
        < min(first["teacher_kl/far"], first["teacher_kl/default"])
    )
    whole = sum(fractions[name] * first[f"teacher_kl/{name}"] for name in fractions)
    assert first["teacher_kl/sampled"] == pytest.approx(whole)


# ----------------------------------------------------------------------------------- what is logged


def test_a_sampler_that_says_other_log_probs_than_the_trainer_shows(
    shop: Shop, tmp_path: Path
) -> None:
    """As another engine's do: the mean and the largest distance, for a method that reads no student
    log-prob as for one that does.
    """
    for method in ("opd", "gkd"):
        job, state = prepare(shop.run(tmp_path / method, method=method, recompute_student=True))
        train_step(job, state)
        honest = metrics(tmp_path / method)[-1]
        assert honest["sampling/mismatch"] <= honest["sampling/mismatch_max"] < FORWARD
        sample = job.collector.sampler.sample

        def lying(*args: Any, sample: Any = sample, **kwargs: Any) -> list[Rollout]:
            return [
                replace(r, logp=[r.logp[0] - 0.5, *r.logp[1:]]) for r in sample(*args, **kwargs)
            ]

        job.collector.sampler.sample = lying  # type: ignore[method-assign]
        train_step(job, state)
        told, rollouts = metrics(tmp_path / method)[-1], 4
        tokens = told["completions/mean_length"] * rollouts
        assert told["sampling/mismatch_max"] == pytest.approx(0.5, abs=FORWARD)
        assert told["sampling/mismatch"] == pytest.approx(0.5 * rollouts / tokens, abs=FORWARD)


def test_utilisation_is_operations_over_what_the_device_could_do(
    shop: Shop, tmp_path: Path
) -> None:
    """Twice the parameters of the bodies and heads for each token, at the least; no more than the
    padding of tiny models allows.
    """
    run = shop.run(tmp_path / "run")
    execute(run)
    line = metrics(tmp_path / "run")[-1]
    use = use_of(resolve(run))
    assert use is not None
    rollouts = [
        Rollout(f"{i}", [1] * 10, [2] * 8, [True] * 8, [], [], str(i // 2)) for i in range(4)
    ]
    shape = use.models[0].shaped
    learned = use(rollouts, 4, {"learn": 2.0})["mfu/learn"] * 2.0 * use.device.tflops32 * 1e12
    tokens, matrices = 4 * 18, 6 * shape.active
    attention = 12 * shape.layers * shape.queries * 4 * 18**2 / 2
    assert learned == pytest.approx(
        tokens * matrices + attention + 6 * shape.head * 4 * 8, rel=1e-9
    )
    assert 0 < line["mfu/learn"] < 1 and 0 < line["mfu/step"] < 1
