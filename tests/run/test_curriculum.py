"""A curriculum that a run chooses by name: how it is said, what it joins, what cannot work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from opdkit.base.config import plain
from opdkit.base.errors import UserError
from opdkit.base.files import read_lines
from opdkit.curricula import EntropyLength, Frontier, Mixed, PassRates, Plain, TeacherPrefix
from opdkit.curricula.kinds import KINDS, curriculum_of
from opdkit.methods.method import Method, load
from opdkit.run.build import prepare
from opdkit.run.prompts import as_run, within
from opdkit.run.settings import Run, make_run
from opdkit.train.loop import train
from tests.common.tiny import VOCAB, save_tiny

BASE = {"student": "s", "teacher": "t", "data": "d"}
REWARD = "def even(rollout):\n    return float(sum(rollout.tokens) % 2 == 0)\n"


def run_of(**settings: Any) -> Run:
    return make_run({**BASE, **settings})


def method_of(method: str, **settings: Any) -> Method:
    run = run_of(method=method, **settings)
    return within(run, as_run(load(method), run))


def test_it_is_said_as_a_name_a_group_or_by_its_settings() -> None:
    named = {"fixed", "entropy_length", "frontier", "depth", "teacher_prefix", "replay"}
    assert named <= set(KINDS) and all(KINDS[name].kind == name for name in KINDS)
    for said in (
        make_run(BASE, ["curriculum=frontier", "curriculum.kernel=beta", "curriculum.a=2"]),
        make_run(BASE, ["curriculum={kind: frontier, kernel: beta, a: 2}"]),
        make_run(
            {**BASE, "curriculum": {"kind": "frontier", "kernel": "beta"}}, ["curriculum.a=2"]
        ),
    ):
        assert curriculum_of(said.curriculum) == Frontier("beta", a=2)
        assert make_run(plain(said)) == said  # as its run.yaml has it
    other = make_run(BASE, ["curriculum=frontier", "curriculum.kind=pass_rate"])
    assert curriculum_of(other.curriculum) == PassRates()
    assert run_of().curriculum is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("frontire", "did you mean 'frontier'"),
        ({"sigma": 0.2}, "add curriculum.kind"),
        ({"kind": "frontier", "sigmas": 1}, "unknown key 'curriculum.sigmas'"),
        ({"kind": "frontier", "sigma": -1}, "sigma=-1.0 must be above 0"),
        ({"kind": ["frontier"]}, "is no kind of curriculum"),
        (3, "curriculum must be"),
    ],
)
def test_what_is_no_curriculum_is_refused_at_once(said: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_of(curriculum=said)


def test_it_joins_what_the_method_brings() -> None:
    assert method_of("opd").curriculum == Plain() == method_of("opd", curriculum="fixed").curriculum
    both = method_of("paced", curriculum="frontier").curriculum
    assert set(getattr(both, "parts")) == {PassRates(), Frontier()}  # noqa: B009
    assert method_of("tropd", curriculum="teacher_prefix").curriculum == TeacherPrefix()
    ladder = method_of("opd", curriculum="entropy_length", sampling={"max_completion_length": 300})
    assert ladder.curriculum == EntropyLength((128, 256, 300))
    with pytest.raises(UserError, match="distillm and curriculum=mixed cannot be combined"):
        method_of("distillm", curriculum={"kind": "mixed", "student_share": 0.5})
    with pytest.raises(UserError, match="opd and curriculum=frontier cannot be combined"):
        method_of("opd", curriculum="frontier", rollouts="cache")


def test_text_that_a_run_brings_is_learnt_from_where_its_method_does_not_say_otherwise() -> None:
    """As if the method had brought that curriculum itself."""
    mixed = {"kind": "mixed", "student_share": 0.5}
    made = method_of("topk_opd", curriculum=mixed)
    alone = load("topk_opd")
    assert made.objective == Method(alone.objective, curriculum=Mixed(0.5)).objective
    assert made.objective != alone.objective
    # what a sum has settled stays: opd's term is not about the data that gkd reads
    summed = load("gkd(lmbda=0.5) + opd")
    run = run_of(curriculum="frontier")
    with pytest.raises(UserError, match="not every response is the student's own"):
        as_run(summed, run)
    ladder = as_run(summed, run_of(curriculum="entropy_length"))
    assert ladder.objective == summed.objective


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curriculum")
    save_tiny(folder / "student", seed=1)
    save_tiny(folder / "teacher", seed=2)
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def real(folder: Path, output: Path, **settings: Any) -> Run:
    values = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": str(folder / "data.jsonl"),
        "output": str(output),
        "steps": 4,
        "prompts_per_step": 2,
        "sampling": {"num_generations": 2, "max_completion_length": 8},
        "optim": {"learning_rate": 1e-3},
        "evaluate": {"data": str(folder / "data.jsonl"), "every": 1},
        "device": "cpu",
    }
    return make_run({**values, **settings})


LADDER = {"kind": "entropy_length", "ladder": [3, 5, 8]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluate": None}, "the run evaluates nothing: it would never adapt"),
        ({"evaluate": {"data": "d"}}, "only before its first step and at its end"),
        ({"evaluate": {"data": "d", "every": 4}}, "only before its first step and at its end"),
        (
            {"evaluate": {"data": "d", "every": 1, "sampling": {"temperature": 0}}},
            "set evaluate.sampling.temperature=1",
        ),
        ({"sampling": {"top_k": 5}}, "set evaluate.sampling.temperature=1"),
        ({"curriculum": {**LADDER, "ladder": [128, 900]}}, "goes up to 900 tokens"),
        ({"curriculum": "frontier"}, "the run has no reward"),
        ({"curriculum": None}, "no reward to score them with"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    run = real(folder, tmp_path, **{"curriculum": LADDER, **settings, "student": "nowhere"})
    with pytest.raises(UserError, match=message):
        prepare(run)


def learnt(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics of a run's steps, and its memory at the end."""
    job, state = prepare(run)
    with job.recorder.trackers:
        train(job, state)
    return read_lines(run.folder / "metrics.jsonl"), state.memory


def test_a_threshold_beyond_reach_is_training_at_a_fixed_length_to_the_bit(
    folder: Path, tmp_path: Path
) -> None:
    never = {**LADDER, "min_entropy": math.log(VOCAB) + 1}
    gated, memory = learnt(real(folder, tmp_path / "gated", curriculum=never))
    reward = f"{folder / 'reward.py'}:even"  # which an evaluation without a curriculum must have
    short = {"num_generations": 2, "max_completion_length": 3}
    fixed, _ = learnt(real(folder, tmp_path / "fixed", sampling=short, reward=reward))
    assert memory["length"]["frozen"] and memory["length"]["rung"] == 0
    for name in ("loss", "grad_norm", "teacher_kl/sampled", "entropy/student"):
        assert [line[name] for line in gated] == [line[name] for line in fixed]


def test_lengths_grow_while_the_entropy_lasts_with_one_generation_for_score_and_gate(
    folder: Path, tmp_path: Path
) -> None:
    reward = f"{folder / 'reward.py'}:even"
    lines, memory = learnt(real(folder, tmp_path / "run", curriculum=LADDER, reward=reward))
    assert [line["curriculum/length"] for line in lines] == [3, 5, 8, 8]
    assert [line["completions/max_length"] for line in lines] == [3, 5, 8, 8]
    assert "curriculum/entropy" not in lines[0]
    gates = [line["curriculum/entropy"] for line in lines[1:]]
    assert all(1 < entropy < math.log(VOCAB) for entropy in gates) and len(set(gates)) == 3
    assert memory["length"]["stable_rung"] == 2 and not memory["length"]["frozen"]
    evals = read_lines(tmp_path / "run" / "evals.jsonl")
    assert [e["step"] for e in evals] == [0, 1, 2, 3, 4]


def test_the_frontier_asks_what_is_nearest(folder: Path, tmp_path: Path) -> None:
    """Pass rates of one visit only, and a narrow Gaussian: a prompt of which one response is right
    and one is wrong, as one never asked, is asked before one that is solved always or never.
    """
    reward = f"{folder / 'reward.py'}:even"
    chosen = {"kind": "frontier", "smoothing": 0.0, "sigma": 0.02}
    run = real(folder, tmp_path / "run", curriculum=chosen, reward=reward, sample_every=1, steps=6)
    lines, memory = learnt(run)
    assert [line["curriculum/asked_smoothed_pass_rate"] for line in lines[:3]] == [0.5] * 3
    rates = {}
    for step in range(1, 7):
        results: dict[str, list[float]] = {}
        for row in read_lines(run.folder / "samples" / f"step_{step:06d}.jsonl"):
            results.setdefault(row["id"].split("/")[1], []).append(row["reward"])
        for question in results:
            left = [q for q in map(str, range(8)) if rates.get(q, 0.5) == 0.5]
            assert rates.get(question, 0.5) == 0.5 or len(left) < 2
        rates |= {question: sum(r) / len(r) for question, r in results.items()}
    assert memory["smoothed_pass_rate"] == rates
