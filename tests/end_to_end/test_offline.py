"""Training from a cache, with neither teacher nor sampler: the same first update, the same run when
killed, and what is refused.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.files import read_lines
from opdkit.data.cache import open_cache
from opdkit.models.load import load_model
from opdkit.objective.facts import LogpFact
from opdkit.objective.needs import Needs
from opdkit.objective.supply import Tensors
from opdkit.run import build
from opdkit.run.settings import make_run
from opdkit.sampling import HFSampler
from opdkit.teachers.base import answers
from opdkit.teachers.cached import CachedScorer
from opdkit.train.gather import gather
from opdkit.train.loop import train_step
from opdkit.train.student import Student
from opdkit.types import Rollout
from tests.common.tiny import TEXTS, save_tiny
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows
from tests.end_to_end.crash import assert_same, in_child
from tests.end_to_end.test_cache_teacher import rollouts
from tests.end_to_end.test_errors import refused

KILLED = -9
ROUNDING = 2**-11  # of float16, relative


def test_it_trains_with_neither_teacher_nor_sampler(
    shop: Shop,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the sampler was called")

    loaded = []
    monkeypatch.setattr(HFSampler, "sample", never)
    monkeypatch.setattr(
        "opdkit.models.load.load_model",
        lambda name, **settings: loaded.append(name) or load_model(name, **settings),
    )
    assert shop.offline(tmp_path / "run", cache, "steps=6", "prompts_per_step=6") == 0
    assert loaded == [shop.student]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    gaps = [line["teacher_kl/sampled"] for line in lines]
    assert gaps[-1] < gaps[0] and lines[-1]["tokens/sampled_so_far"] == 0
    assert "data: " + str(cache) in (tmp_path / "run" / "run.yaml").read_text()
    assert "opdkit: the rollouts" not in capsys.readouterr().err  # they are the student's own


def test_the_first_update_is_that_of_online_opd_on_the_same_rollouts(
    shop: Shop, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the loop.

    With the same rounding of the teacher's numbers to float noise; without it, to float16's 2^-11
    of log pi_t.

    A credit log(pi_t/pi_s) is smaller than log pi_t, here by about four, so its relative error is
    larger by as much.
    """
    gradients: list[torch.Tensor] = []
    real = Student.gradient_norm

    def keep(self: Student) -> torch.Tensor:
        gradients.append(
            torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        )
        return real(self)

    monkeypatch.setattr(Student, "gradient_norm", keep)

    def first_update(method: dict[str, Any], teacher: str, **changes: Any) -> torch.Tensor:
        values = {
            "student": shop.student,
            "teacher": teacher,
            "data": shop.data,
            "output": str(tmp_path / "run"),
            "method": method,
        }
        settings = {
            "prompts_per_step": 6,
            "device": "cpu",
            "sampling": {"num_generations": 2, "max_completion_length": 8},
        }
        (tmp_path / "run").mkdir(exist_ok=True)
        job, state = build.prepare(make_run({**values, **settings}))
        for name, change in changes.items():
            owner = job.collector if name == "sampler" else job
            setattr(owner, name, change(getattr(owner, name)))
        train_step(job, state)
        return gradients.pop()

    stored = first_update({"name": "lightning_opd", "denominator": "tokens"}, f"cached:{cache}")
    online = first_update({"name": "opd"}, shop.teacher, sampler=SameDraws)
    rounded = first_update(
        {"name": "opd"},
        shop.teacher,
        sampler=SameDraws,
        scorers=lambda s: {**s, "teacher": Rounded(s["teacher"])},
    )
    size = online.norm()
    assert size > 0.1
    assert (stored - rounded).norm() < 1e-5 * size
    assert 0 < (stored - online).norm() < 4 * ROUNDING * size


class SameDraws:
    """The run's own sampler, with rollouts called as in a cache: the ids key what is drawn."""

    def __init__(self, real: HFSampler):
        self.real = real

    def sample(self, prompts: Any, sampling: Any, *, step: int, **settings: Any) -> list[Rollout]:
        return self.real.sample(prompts, sampling, step=None, **settings)

    def sync(self, model: Any, version: int) -> None:
        self.real.sync(model, version)


class Rounded:
    """A teacher whose log-probs of the tokens are rounded to float16."""

    def __init__(self, real: Any):
        self.real = real

    def facts(self, wanted: Any, layout: Any, positions: torch.Tensor, ids: Any) -> Tensors:
        return {
            fact: values.half().float()
            for fact, values in answers(self.real, wanted, layout, positions, ids).items()
        }


def test_shuffled_rows_and_other_batches_read_the_same_numbers(cache: Path) -> None:
    made, teacher = rollouts(cache), {"teacher": CachedScorer(open_cache(cache))}
    logp = LogpFact("teacher")
    table = gather(made, Needs(frozenset({logp})), teacher).read(logp)
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(
        gather([made[i] for i in order], Needs(frozenset({logp})), teacher).read(logp), table[order]
    )


def test_killed_and_resumed_it_is_the_run_that_was_never_killed(
    shop: Shop, cache: Path, tmp_path: Path
) -> None:
    values = {
        "student": shop.student,
        "teacher": f"cached:{cache}",
        "method": "lightning_opd",
        "steps": 5,
        "prompts_per_step": 2,
        "optim": {"learning_rate": 1e-3, "passes": 2},
        "checkpoint": {"every": 2},
        "device": "cpu",
    }
    assert in_child({**values, "output": str(tmp_path / "unbroken")}) == 0
    assert (
        in_child(
            {**values, "output": str(tmp_path / "run")}, moment="between micro-batches", step=4
        )
        == KILLED
    )
    assert in_child({**values, "output": str(tmp_path / "run")}, resume=True) == 0
    assert_same(tmp_path / "run", tmp_path / "unbroken")


def test_other_methods_take_their_rollouts_from_it_where_they_say_so(
    shop: Shop, cache: Path, tmp_path: Path
) -> None:
    """The teacher's top k from the cache, and of the live teacher on the same stored rollouts."""
    forms = [
        "--method=opd",
        "method.support=teacher",
        "method.k=3",
        "method.kind=forward_kl",
        "rollouts=cache",
    ]
    assert shop.offline(tmp_path / "stored", cache, *forms) == 0
    assert (
        shop.offline(
            tmp_path / "live", cache, *forms, f"--teacher={shop.teacher}", f"--data={cache}"
        )
        == 0
    )
    stored, live = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("stored", "live"))
    assert (
        stored["loss"] != live["loss"]
        and abs(stored["loss"] - live["loss"]) < 2 * ROUNDING * live["loss"]
    )
    assert abs(stored["grad_norm"] - live["grad_norm"]) < 2 * ROUNDING * live["grad_norm"]
    assert stored["tokens/sampled_so_far"] == 0


def test_rollouts_may_be_of_the_data_they_came_from_or_of_a_part(
    shop: Shop, cache: Path, tmp_path: Path
) -> None:
    """Rows then are those of the data, such as with a corrected answer; prompts must be what they
    were.
    """
    assert shop.offline(tmp_path / "a", cache) == 0
    assert shop.offline(tmp_path / "b", cache, f"data={shop.data}") == 0
    a, b = (read_lines(tmp_path / name / "metrics.jsonl")[-1] for name in "ab")
    assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    assert shop.offline(tmp_path / "c", cache, "data.limit=2") == 0
    assert read_lines(tmp_path / "c" / "metrics.jsonl")[0]["tokens/trained"] < a["tokens/trained"]


def test_a_reward_and_an_evaluation_work_beside_it(shop: Shop, cache: Path, tmp_path: Path) -> None:
    more = [f"--reward={shop.reward}", f"evaluate.data={shop.data}", "max_completion_length=8"]
    assert shop.offline(tmp_path / "run", cache, *more) == 0
    assert 0 <= read_lines(tmp_path / "run" / "metrics.jsonl")[0]["correct/mean"] <= 1
    assert [line["step"] for line in read_lines(tmp_path / "run" / "evals.jsonl")] == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--method=opd"],
            [
                "trains on responses written at each step",
                "lightning_opd",
                "rollouts=cache",
                "live teacher",
            ],
        ),
        (
            ["--method=opd", "rollouts=cache", "method.support=teacher", "method.k=5"],
            ["top 5", "--top-k 5", "k=4"],
        ),
        (
            ["--method=opd", "rollouts=cache", "method.support=student", "method.k=2"],
            ["student's top 2", "cannot say"],
        ),
        (["--method=gkd", "rollouts=cache"], ["whole vocabulary", "cannot say"]),
        (["--method=gkd", "rollouts=cache", "method.lmbda=0.5"], ["cannot"]),
        (["--method=tropd", "rollouts=cache"], ["tropd and rollouts=cache cannot be combined"]),
        (["rollouts=stored"], ["rollouts='stored' must be one of student, cache"]),
        (
            ["--teacher={teacher}", "--data={data}"],
            ["takes its rollouts from a folder that `opdkit cache-teacher` wrote"],
        ),
        (["--teacher=cached:{teacher}"], ["holds no cache"]),
        (["data={other}"], ["2 prompts of the data are not in", "for example 6"]),
        (["data={changed}"], ["has other tokens than the one in"]),
        (["data.system=Think."], ["data.system writes prompts as text"]),
        (
            ["evaluate.data={data}", "--reward={reward}", "evaluate.teacher=true"],
            ["the teacher is of the kind cached"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_a_cache_is_not_for_is_refused_with_a_way_out(
    shop: Shop,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    other = write_rows(tmp_path / "more.jsonl", gsm8k_rows(8))
    changed = write_rows(
        tmp_path / "changed.jsonl",
        [{**row, "question": row["question"] + "!"} for row in gsm8k_rows(6)],
    )
    known = {
        "teacher": shop.teacher,
        "data": shop.data,
        "other": other,
        "changed": changed,
        "reward": shop.reward,
    }
    refused(
        capsys,
        shop.offline(tmp_path / "run", cache, *(a.format(**known) for a in arguments)),
        *words,
    )


def test_another_student_is_warned_of_and_another_tokenizer_refused(
    shop: Shop, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.offline(tmp_path / "a", cache, f"--student={shop.llama}") == 0
    said = capsys.readouterr().err
    assert f"were written by {shop.student} (" in said and "off-policy from the first step" in said
    backwards = save_tiny(tmp_path / "backwards", texts=[text[::-1] for text in TEXTS])
    refused(
        capsys,
        shop.offline(tmp_path / "b", cache, f"--student={backwards}"),
        "tokenizer is not that of",
    )


def test_another_teacher_than_the_fine_tunings_is_warned_of(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.cache(tmp_path / "c", f"--sft-teacher={shop.llama}") == 0
    assert shop.offline(tmp_path / "run", tmp_path / "c") == 0
    warned = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "was fine-tuned on responses of" in line
    ]
    # when it is written, and when it is used
    assert len(warned) == 2 and shop.llama in warned[0] and "biased" in warned[0]
    copied = shutil.copytree(shop.teacher, tmp_path / "the same under another name")
    assert shop.cache(tmp_path / "d", f"--sft-teacher={copied}") == 0
    assert "fine-tuned" not in capsys.readouterr().err
