"""Several devices: what each holds, what they exchange, who is where, and which layout is best; by
hand, by identities, and measured on tiny models.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opdkit import UserError
from opdkit.cli import main
from opdkit.models.body import hidden_states
from opdkit.models.held import HERE, Held
from opdkit.models.layout import Layout as Rows
from opdkit.models.precision import compute_in
from opdkit.models.shapes import read_shape, shape_of
from opdkit.models.sharding import WholeHead, shard
from opdkit.objective.head import flat_positions, learn
from opdkit.run.plan import RunPlan, find_device, fitting, plan, plan_on
from opdkit.run.plan.commands import commands
from opdkit.run.plan.devices import KNOWN, cpu
from opdkit.run.plan.estimate import seconds_text
from opdkit.run.plan.layouts import Layout, Layouts, table
from opdkit.run.plan.machines import LINKS, REACHED, Machines, find_machines
from opdkit.run.plan.memory import PHASES, memory_of, step_of
from opdkit.run.plan.models import models_of, student_dtype
from opdkit.run.plan.servers import smallest
from opdkit.run.plan.use import Use
from opdkit.run.resolve import on_device
from opdkit.run.settings import Run, make_run
from opdkit.teachers import LocalModel
from opdkit.train.gather import gather
from opdkit.train.student import Student
from tests.common.tiny import tiny_model
from tests.run.test_plan import (
    MODES,
    no_network,  # noqa: F401 (a fixture)
    peak_of,
    qwen_run,
    tiny_run,
    tiny_student,
)
from tests.train.rows import rollouts

H100 = KNOWN["h100"]
LARGE = {"student": "Qwen/Qwen3-8B", "teacher": "Qwen/Qwen3-32B", "prompts_per_step": 64}
LONG = {"num_generations": 8, "max_completion_length": 2048}


def machines(each: int, nodes: int = 1, name: str = "h100") -> Machines:
    return Machines(KNOWN[name], nodes, each, LINKS[name])


def on(count: int, run: Run, nodes: int = 1) -> RunPlan:
    """The run in a process on each of so many H100s."""
    return plan_on(run, machines(count, nodes)).as_given


def parts(made: RunPlan) -> dict[str, dict[str, int]]:
    """Bytes by part, whatever share of the weights it is."""
    return {re.sub(r", 1/\d+ of them", "", p.name): p.bytes for p in made.memory.parts}


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 8}}, {"method": "gkd"}], ids=str)
def test_one_process_is_planned_as_ever(settings: dict[str, Any]) -> None:
    run = qwen_run(**settings)
    one, alone = on(1, run), plan(run, H100)
    assert str(one) == str(alone) and one.to_dict() == alone.to_dict()
    assert one.exchanges == []


def test_what_is_spread_falls_as_one_over_the_number_of_processes() -> None:
    for lora in (None, {"r": 8}):
        run = qwen_run(gradient_checkpointing=True, micro_batch_tokens=8192, lora=lora)
        one = parts(on(1, run))
        learnt = [name for name in one if name in ("two moments of AdamW", "gradients", "adapters")]
        assert len(learnt) == (2 if lora is None else 3)
        student = next(name for name in one if name.startswith("student weights"))
        head = 2 * shape_of("Qwen/Qwen3-8B").head  # a frozen model's head stays whole
        for count in (2, 4, 8):
            several = parts(on(count, run))
            for name in (student, *learnt):
                for phase, size in one[name].items():
                    assert several[name][phase] == pytest.approx(size / count, abs=1)
            teacher = [p["teacher weights, bfloat16"]["score"] - head for p in (one, several)]
            assert teacher[1] == pytest.approx(teacher[0] / count, abs=1)
            # every process has all numbers of the step
            assert several["facts of the tokens"] == one["facts of the tokens"]


@pytest.mark.parametrize("lora", [None, {"r": 8}], ids=["all weights", "LoRA"])
def test_more_processes_take_less_each_and_less_time(lora: Any) -> None:
    run = make_run(
        {**LARGE, "data": "d", "lora": lora, "sampling": LONG, "sampler": "server:http://x"}
    )
    plans = [on(count, run) for count in (2, 4, 8)]
    for few, more in pairwise(plans):
        assert more.memory.peak[0] < few.memory.peak[0]
        assert more.step_seconds < few.step_seconds


def test_a_large_run_by_hand() -> None:
    """Qwen3-8B on 8 H100, its layers of 192,946,432 parameters: two matrices of 4096 x 4096, two of
    4096 x 1024, three of 4096 x 12288, norms of 2 x 4096 + 2 x 128.
    """
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    head, all_ = 151936 * 4096, 8_190_735_360
    shape = shape_of("Qwen/Qwen3-8B")
    assert (shape.layer, shape.tied) == (layer, False)
    assert 36 * layer + 2 * head + 4096 == all_
    found = parts(on(8, make_run({**LARGE, "data": "d", "sampling": LONG})))
    assert found["student weights, float32"] == dict.fromkeys(PHASES, all_ * 4 // 8)
    assert found["two moments of AdamW"] == dict.fromkeys(PHASES, all_ * 8 // 8)
    assert found["student whole, as it samples"] == {"sample": 4 * all_}
    assert found["student's head whole"] == dict.fromkeys(PHASES, 4 * head)
    # two layers with their copies in 16 bits; and the gradients of two
    teacher = 2 * 5120 * 8192 + 2 * 5120 * 1024 + 3 * 5120 * 25600 + 2 * 5120 + 2 * 128
    whole = found["layers whole, as they compute"]
    assert whole == {"learn": 2 * (6 * layer + 4 * layer), "score": 2 * max(6 * layer, 2 * teacher)}
    # rollouts are scored where they belong: 512 / 8 of them, the teacher's states and the student's
    states = found["hidden states of scored tokens"]
    assert states == {"score": 64 * 2048 * (5120 + 4096) * 2}


@pytest.mark.parametrize("how", [{"offload": True}, {"quantize": "4bit"}], ids=str)
def test_a_teacher_that_waits_or_is_in_few_bits_is_whole_everywhere(how: dict[str, Any]) -> None:
    run = qwen_run(teacher={"kind": "local", "model": "Qwen/Qwen3-8B", **how})
    one, two = parts(on(1, run)), parts(on(2, run))
    [name] = [name for name in one if name.startswith("teacher weights")]
    assert one[name] == two[name]
    # nothing of it is gathered: in bfloat16 the student is scored too
    assert {e.what.split("'")[0] for e in on(2, run).exchanges if e.phase == "score"} == {
        "student",
        "the student",
        "facts of the tokens, summed",
    }


def test_a_student_in_few_bits_is_whole_on_each() -> None:
    run = qwen_run(lora={"r": 8, "quantize": "4bit"})
    one, two = parts(on(1, run)), parts(on(2, run))
    name = "student weights, 4bit and bfloat16"
    assert two[name] == one[name]
    assert "student whole, as it samples" not in two


@pytest.fixture
def group() -> Any:
    """A group of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_of_a_spread_model_two_layers_at_most_are_whole_in_a_pass(group: Any) -> None:
    """Measured: what a pass allocates does not grow with the layers, copies in 16 bits included."""

    def took(layers: int) -> tuple[int, int]:
        model = tiny_model(hidden=256, layers=layers, vocab_size=64).float()
        compute_in(model, torch.bfloat16)
        shard(model, group)
        tokens = torch.arange(3, 11)[None]
        with torch.no_grad():
            hidden_states(model, tokens, None)
            used = peak_of(lambda: hidden_states(model, tokens, None))
        return used, read_shape(model.config, "here").layer

    few, layer = took(2)
    many, same = took(8)
    assert layer == same and many == pytest.approx(few, rel=0.02)
    assert 4 * layer < many <= 2 * (4 + 2) * layer  # one layer at least, two as is reckoned


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES.keys())
def test_a_learning_pass_of_a_spread_model_takes_what_is_reckoned(
    settings: dict[str, Any], group: Any
) -> None:
    """All that is allocated in it, backward too: at most what is reckoned, which is at most 1.6
    times as much. One process has all of what is spread.
    """
    prompt, response, count, budget = 16, 48, 4, 128
    run = tiny_run(
        data={"source": "d", "max_prompt_length": prompt},
        prompts_per_step=count,
        sampling={"max_completion_length": response},
        micro_batch_tokens=budget,
        gradient_checkpointing=True,
        **settings,
    )
    config: dict[str, Any] = {"hidden": 256, "layers": 4, "vocab_size": 64}
    model = tiny_student(run, **config)
    shape = read_shape(tiny_model(**config).config, "here")
    held = Held("student", "s", HERE, shape, student_dtype(run))
    method = run.method_spec.load()
    step = step_of(run, method.curriculum, cpu())
    one, several = (memory_of(run, method, [held], step, cpu(), ranks) for ranks in (1, 2))
    student = Student(model, run.optim, 1e-3, 10, run.dtype == "bfloat16")
    student.spread(group)
    rows = rollouts(lengths=((prompt, response),) * count, vocabulary=64)
    scorer = LocalModel(model, student.head)
    batch = gather(rows, method.needs, {"student": scorer, "teacher": scorer})
    made, layout = method.objective.plan(batch), Rows(rows, response)
    student._whole = WholeHead()

    def work() -> None:
        for positions in layout.micro_batches(flat_positions(made.selected), budget):
            learned = learn(made, positions, layout.states(model, positions), student.head)
            learned.loss.backward()

    measured = peak_of(work)
    before = ("weights,", "moments", "adapters", "facts", "copies of what learns")
    wholes = ("layers whole", "embedding whole", "head whole")
    reckoned = sum(
        part.bytes.get("learn", 0)
        for memory, kept in ((one, False), (several, True))
        for part in memory.parts
        if any(word in part.name for word in wholes) == kept
        and (kept or not any(word in part.name for word in before))
    )
    assert measured <= reckoned <= 1.6 * measured


# ----------------------------------------------------------------------------------------- exchange


def test_seconds_of_a_gathering_by_hand() -> None:
    """32 GB, of which 8 have an eighth each: seven eighths arrive at 70 % of 450 GB/s. On two
    machines 8 cards of 50 GB/s carry 400, less than what NVLink does inside: 15 sixteenths at that.
    """
    one, two = machines(8), machines(8, 2)
    assert one.gathering(32e9) == pytest.approx(32e9 * 7 / 8 / (0.7 * 450e9))
    assert two.gathering(32e9) == pytest.approx(32e9 * 15 / 16 / (0.7 * 400e9))
    assert machines(2, 2).gathering(1e9) == pytest.approx(1e9 * 3 / 4 / (0.7 * 100e9))
    assert one.summing(1e9) == 2 * one.gathering(1e9) and machines(1).gathering(1e9) == 0
    assert REACHED == 0.7


def test_exchanges_of_a_step_by_hand() -> None:
    """64 rollouts of 1024 tokens and prompts of 200 on 4 devices: 16 each, 19,584 tokens, which are
    3 passes of 8192.
    """
    run = qwen_run(
        student="Qwen/Qwen3-1.7B",
        prompts_per_step=64,
        sampling={"max_completion_length": 2048},
        micro_batch_tokens=8192,
    )
    made = on(4, run)
    found = {(e.phase, e.what.partition(",")[0]): e for e in made.exchanges}
    small, large = 1_720_574_976, 8_190_735_360
    head = 151936 * 2048  # the student's, which is its embedding
    assert found["sample", "the student"].bytes == 4 * small
    teacher = found["score", "teacher's layers"]
    assert teacher.bytes == 3 * 2 * (large - 151936 * 4096) and teacher.behind
    learn = found["learn", "layers there and back and their gradients"]
    assert learn.bytes == 3 * (2 * 4 + 4) * small
    assert found["learn", "the head and its gradient"].bytes == 2 * 4 * head
    for one in made.exchanges:
        assert one.seconds == pytest.approx(one.bytes * 3 / 4 / (0.7 * 450e9))


def test_what_travels_behind_the_computing_takes_time_where_it_takes_longer() -> None:
    run = make_run({**LARGE, "data": "d", "sampling": LONG})
    slow = find_machines("8xh100", link="1GB/s")
    fast, starved = (plan_on(run, m).as_given for m in (machines(8), slow))
    for made in (fast, starved):
        learn = next(p for p in made.phases if p.name == "learn")
        mine = [e for e in made.exchanges if e.phase == "learn"]
        behind = sum(e.seconds for e in mine if e.behind)
        beside = sum(e.seconds for e in mine if not e.behind)
        alone = learn.seconds - beside
        assert alone >= behind and (alone > behind) == (made is fast)


# ------------------------------------------------------------------------------------------ layouts


def laid(device: str, **settings: Any) -> Layouts:
    values = {**LARGE, "data": "d", "sampling": LONG, **settings}
    return plan_on(make_run(values), find_machines(device))


def test_what_one_device_cannot_hold_eight_can() -> None:
    adapters = {"student": "Qwen/Qwen3-32B", "lora": {"r": 32}}
    assert laid("1xh100", **adapters).recommended is None
    assert laid("8xh100", **adapters).recommended is not None
    # all of its weights: 16 bytes each are 61 GiB on each of 8, and a sampler has none left
    whole = laid("8xh100", student="Qwen/Qwen3-32B")
    assert whole.recommended is None and "no layout fits" in str(whole)
    more = {change.setting: change for change in whole.changes}
    assert {"lora.r=32", "--device 4x8xh100"} <= set(more) and all(c.fits for c in more.values())
    grown = laid("4x8xh100", student="Qwen/Qwen3-32B").recommended
    assert grown is not None
    assert max(grown.bytes.values()) >= more["--device 4x8xh100"].peak


CASES: list[tuple[str, dict[str, Any]]] = [
    ("8xh100", {}),
    ("8xh200", {"method": "gkd"}),
    ("2x8xh100", {}),
    ("4xa100", {"student": "Qwen/Qwen3-0.6B", "teacher": "Qwen/Qwen3-4B"}),
    ("8xl40s", {"student": "Qwen/Qwen3-4B", "teacher": "Qwen/Qwen3-8B", "lora": {"r": 32}}),
    ("3xh100", {"student": "Qwen/Qwen3-1.7B", "teacher": "http://elsewhere:8000"}),
]


def _seconds(text: str) -> float:
    """A printed time in seconds: 8.3 s, 1:10, 2:24:04."""
    if text.endswith(" s"):
        return float(text[:-2])
    out = 0.0
    for word in text.split(":"):
        out = 60 * out + float(word)
    return out


@pytest.mark.parametrize(("device", "settings"), CASES)
def test_the_recommended_layout_is_the_fastest_that_fits_by_the_numbers_shown(
    device: str, settings: dict[str, Any]
) -> None:
    made = laid(device, **settings)
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in made.table().splitlines()]
    head, rows = lines[0], lines[2:]
    fits, step = head.index("fits"), head.index("step")
    best = [row for row in rows if row[fits] == "yes, recommended"]
    assert len(best) == 1 and len(rows) > 2
    times = [_seconds(row[step]) for row in rows if row[fits].startswith("yes")]
    assert _seconds(best[0][step]) == min(times)
    # and of all that were tried, shown or not
    found = made.recommended
    assert found is not None and found.name == best[0][0]
    fastest = min(one.step for one in made.every if one.fits)
    assert seconds_text(found.step) == seconds_text(fastest)


def test_a_layout_uses_every_device_once_and_what_does_not_fit_is_not_recommended() -> None:
    for device, settings in CASES:
        made = laid(device, **settings)
        for one in made.every:
            beside = [s for s in (one.sampling, one.teaching) if s is not None]
            used = one.trainers + sum(s.count * s.devices for s in beside)
            left = 0 if one.sampling is None else one.sampling.devices - 1
            assert made.machines.size - left <= used <= made.machines.size
            assert (
                one.fits
                == (one.plan.memory.fits and all(s.bytes <= 0.95 * H100.memory for s in beside))
                or "h100" not in device
            )


def test_running_ahead_takes_the_time_of_the_slower_part() -> None:
    pairs: dict[Any, dict[int, Layout]] = {}
    for one in laid("8xh100").every:
        if one.sampling is not None:
            key = (one.trainers, one.sampling, one.teaching)
            pairs.setdefault(key, {})[one.ahead] = one
    assert len(pairs) > 5
    for pair in pairs.values():
        spent = pair[0].seconds
        assert pair[0].step == pytest.approx(sum(spent.values()))
        away, here = spent["push"] + spent["sample"], spent["score"] + spent["learn"]
        assert pair[1].step == pytest.approx(max(away, here))
        assert pair[1].rate == pytest.approx(512 * 1024 / pair[1].step)


def test_a_server_takes_as_many_devices_as_its_weights_and_one_rollout_need() -> None:
    """32.8 billion weights of 2 bytes: 61 GiB are on one H100, but on two A100 of 40 GB."""
    run = make_run({**LARGE, "student": "Qwen/Qwen3-32B", "data": "d", "sampling": LONG})
    made = plan_on(run, machines(8)).as_given
    student, step, run = made.models[0], made.step, made.run
    assert smallest(run, student, step, machines(8)) == 1
    assert smallest(run, student, step, machines(8, name="a100-40gb")) == 2
    assert smallest(run, student, step, machines(1, name="a100-40gb")) is None


def settings_of(line: str) -> list[str]:
    """The key=value arguments of a command line."""
    words = shlex.split(line)
    return [
        w for w in words[words.index("train" if "train" in words else "slurm") + 2 :] if "=" in w
    ]


@pytest.mark.parametrize(("device", "settings"), CASES)
def test_commands_say_what_makes_the_layout(device: str, settings: dict[str, Any]) -> None:
    """Their settings are a run's, and their processes and servers as many as the layout has."""
    made = laid(device, **settings)
    for one in made.shown:
        found = commands(one, made.machines, "RUN.yaml")
        ours = [line for line in found if "opdkit train" in line or "opdkit slurm" in line]
        first = next(line for line in ours if "Ray" not in line)
        values = {**LARGE, "data": "d", "sampling": LONG, **settings}
        run = make_run(values, settings_of(first[first.index("opdkit train") :]))
        assert run.ahead == one.ahead
        if one.sampling is None:
            assert run.sampler_settings.kind == one.plan.run.sampler_settings.kind
            assert run.sampler_settings == one.plan.run.sampler_settings
        else:
            assert len(run.sampler_settings.urls) == one.sampling.count  # type: ignore[attr-defined]
        if one.teaching is not None:
            assert len(run.teachers.urls) == one.teaching.count  # type: ignore[attr-defined]
            assert sum("serve-teacher" in line for line in found) == one.teaching.count
        processes = re.search(r"--nproc (\d+)|--nnodes (\d+) --nproc-per-node (\d+)", first)
        assert processes is not None
        numbers = [int(n) for n in processes.groups() if n]
        assert torch.tensor(numbers).prod() == one.trainers


def test_a_sampler_or_a_lag_that_a_method_refuses_is_not_offered() -> None:
    pairs = laid("4xh100", method="f_dpo", teacher=None, student="Qwen/Qwen3-1.7B")
    assert [one.name for one in pairs.every] == ["4 train"]
    few_bits = laid("4xh100", lora={"r": 8, "quantize": "4bit"})
    assert {one.plan.run.sampler_settings.kind for one in few_bits.every} == {"hf"}
    assert "none with sampler=vllm: another engine cannot take over" in str(few_bits)


def test_where_nobody_says_how_fast_a_device_is_the_simplest_that_fits_is_recommended() -> None:
    made = laid("4x80GB", student="Qwen/Qwen3-1.7B", teacher="Qwen/Qwen3-8B")
    best = made.recommended
    assert best is not None and best is made.shown[0] and "unknown" in made.table()
    assert "how fast the device is nobody has said" in str(made)
    assert made.to_dict()["recommended"]["step"] is None
    json.dumps(made.to_dict(), allow_nan=False)


# ------------------------------------------------------------------------------- devices, the page


def test_devices_by_name_and_number() -> None:
    assert find_machines("8xH100") == machines(8)
    assert find_machines("2x8xh100") == machines(8, 2)
    assert find_machines("h100", 8) == machines(8) == find_machines("8xh100", 8)
    assert find_machines("H100") == machines(1) and machines(1).words == "H100"
    assert machines(8).words == "8xH100" and machines(8, 2).words == "2x8xH100"
    assert find_machines("4xa100-40gb").device == find_device("a100-40gb")
    given = find_machines("8x80GB", tflops=400.0, link="100GB/s", network="10GB/s")
    assert (given.each, given.device.memory, given.device.tflops) == (8, 80_000_000_000, 400)
    assert (given.link.inside, given.link.between) == (0.1, 0.01)
    for words, told in (
        (("0xh100", None), "1 to 1024 machines"),
        (("1000000xh100", None), "of 1 to 128 devices"),
        (("8xh1000", None), "did you mean 'h100'"),
        (("8xh100", 4), "leave one of them out"),
        (("h100", 0), "1 or more"),
    ):
        with pytest.raises(UserError, match=told):
            find_machines(*words)
    with pytest.raises(UserError, match="nothing could travel"):
        find_machines("8xh100", link="0GB/s")


def test_processes_of_a_cpu_share_it() -> None:
    two = find_machines("cpu", 2)
    assert two.device.memory == cpu().memory // 2 and two.device.tflops == cpu().tflops / 2
    made = plan_on(
        make_run({"student": "Qwen/Qwen3-0.6B", "teacher": "Qwen/Qwen3-0.6B", "data": "d"}), two
    )
    assert [one.name for one in made.every] == ["2 train and sample in turn, hf"]


def test_text_and_json_of_several_say_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("student: Qwen/Qwen3-0.6B\nteacher: Qwen/Qwen3-4B\ndata: d\n")
    command = ["train", str(file), "--dry-run", "--device=4xh100"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert main(["train", str(file), "--dry-run", "--device=h100", "--nproc=4"]) == 0
    assert capsys.readouterr().out == text
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["machines"]["each"] == 4 and len(told["layouts"]) > 10
    best = told["recommended"]
    assert f"recommended: {best['name']}: " in text
    for line in best["commands"]:
        assert f"  {line}\n" in text + "\n" and "RUN.yaml" not in line
    assert "memory of each of 4xH100" in text and "exchange: peaks of 450 GB/s" in text
    assert main(["train", str(file), "--device-link=1GB/s"]) == 2
    assert "--device-link is about an estimate" in capsys.readouterr().err


def test_a_table_for_pages_is_what_the_dry_run_prints() -> None:
    """`OPDKIT_WRITE=1` writes the one in docs/memory.md anew."""
    made = laid("8xh100")
    shown = table(make_run({**LARGE, "data": "d", "sampling": LONG}), "8xh100")
    assert shown == made.table() and shown in str(made)
    page = Path(__file__).parents[2] / "docs" / "memory.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- layouts -->\n")
    there, end, after = rest.partition("\n<!-- /layouts -->")
    if os.environ.get("OPDKIT_WRITE"):
        page.write_text(before + begin + shown + end + after, encoding="utf-8")
    else:
        assert there == shown


def test_passes_that_fit_are_those_of_a_process_among_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too large for one device, a run has small passes there; on several there is room."""
    values = {"student": "Qwen/Qwen3-4B", "teacher": "Qwen/Qwen3-4B", "data": "d"}
    run = on_device(make_run(values), gpu=True)
    monkeypatch.setattr("opdkit.run.plan.estimate.find_device", lambda **_: KNOWN["a100-40gb"])
    alone = fitting(run)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert alone is None and fitting(run) == 16384


def test_the_share_of_the_arithmetic_is_of_all_devices() -> None:
    run = on_device(make_run({**LARGE, "data": "d"}), gpu=True)
    method = run.method_spec.load()
    models = models_of(run, method)
    rows = rollouts(lengths=((8, 8),) * 4)
    one, four = (Use(run, method, models, H100, n)(rows, 4, {"learn": 1.0}) for n in (1, 4))
    assert set(one) == {"mfu/learn", "mfu/step"}
    assert {n: value / 4 for n, value in one.items()} == pytest.approx(four)


def test_of_adapters_alone_servers_are_told_little_and_started_for_it() -> None:
    whole, few = laid("8xh100"), laid("8xh100", lora={"r": 16})
    split = [next(one for one in made.every if one.sampling) for made in (whole, few)]
    pushed = [one.seconds["push"] for one in split]
    shape = shape_of("Qwen/Qwen3-8B")
    share = shape.adapters(few.run.lora) / shape.parameters  # type: ignore[arg-type]
    # one process trains, and so puts nothing together: 2 bytes a weight at 2 GB/s
    assert split[0].trainers == split[1].trainers == 1
    assert pushed == pytest.approx([8.190735360, share * 8.190735360])
    best = few.recommended
    assert best is not None and best.sampling is not None
    lines = commands(best, few.machines, "RUN.yaml")
    assert "--enable-lora --max-lora-rank 16" in lines[0] and "enable_lora: true" in lines[1]
