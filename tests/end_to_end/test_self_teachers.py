"""The student as its own teacher in whole runs: from the command line, whatever the weights and the
view; whose weights score; and a copy that follows it goes on exactly after a SIGKILL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.clock import Clock
from opdkit.cli import main
from opdkit.run.build import prepare
from opdkit.run.settings import load_run, make_run
from opdkit.train.collect.collect import collect
from opdkit.train.loop import train_step
from tests.end_to_end.conftest import Shop, gsm8k_rows, write_rows
from tests.end_to_end.crash import in_child
from tests.end_to_end.test_companions import left, tensors


@pytest.fixture(scope="module")
def data(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shop's questions with a worked solution each."""
    file = tmp_path_factory.mktemp("solved") / "rows.jsonl"
    rows = [json.loads(line) for line in Path(shop.data).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["solution"] = (
            f"First think of {number}, then of {number + 1}; the sum is what is asked."
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def train(shop: Shop, folder: Path, data: str, *words: str) -> int:
    values = shop.values(folder)
    return main(
        [
            "train",
            f"student={values['student']}",
            f"data={data}",
            f"output={folder}",
            "steps=3",
            "prompts_per_step=2",
            "sampling.num_generations=2",
            "sampling.max_completion_length=8",
            "optim.learning_rate=1e-3",
            "device=cpu",
            *words,
        ]
    )


@pytest.mark.parametrize(
    "words",
    [
        ("method=opsd",),
        ("method=opsd", "method.teacher=ema"),
        ("method=sdft", "teacher.weights=live"),
        ("method=opd", "teacher=self:sync", "teacher.every=2", "teacher.view=solution"),
        ("method=opd", "teacher=self", 'view.template="{prompt} The answer is {answer}."'),
        ("method=gkd", "teacher.view=solution", "lora.r=2"),
    ],
    ids=" ".join,
)
def test_no_second_model_is_named(
    shop: Shop, tmp_path: Path, data: str, words: tuple[str, ...]
) -> None:
    """Every step has a gradient, as the teacher reads more; run.yaml says who it was, and trains
    the same again.
    """
    assert train(shop, tmp_path / "run", data, *words) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["grad_norm"] > 0 for line in lines)
    said = load_run(tmp_path / "run" / "run.yaml").teacher
    assert isinstance(said, dict) and said["kind"] == "self" and said["view"]
    again = ["train", str(tmp_path / "run" / "run.yaml"), f"output={tmp_path / 'again'}"]
    assert main(again) == 0
    one, other = (
        [json.loads(x)["loss"] for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("run", "again")
    )
    assert one == other


def test_the_same_context_and_live_weights_teach_nothing(
    shop: Shop, tmp_path: Path, data: str
) -> None:
    """opsd identity 6 through the loop: loss and gradient are zero."""
    assert train(shop, tmp_path / "run", data, "method=gkd", "teacher=self:live") == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(line["loss"]) < 1e-6 and line["grad_norm"] < 1e-5 for line in lines)


def test_a_moving_average_goes_on_exactly_after_a_kill(
    shop: Shop, tmp_path: Path, data: str
) -> None:
    values = shop.values(tmp_path / "killed", method={"name": "opsd", "teacher": "ema"}, steps=4)
    del values["teacher"]
    values |= {"data": data, "checkpoint": {"every": 1}}
    assert in_child(values, moment="before the optimiser", step=3) == -9
    assert in_child(values, resume=True) == 0
    assert in_child({**values, "output": str(tmp_path / "whole")}) == 0
    (one, one_beside), (other, other_beside) = left(tmp_path / "killed"), left(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)
    pairs = list(zip(tensors(one_beside), tensors(other_beside), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("method=opd",), "names none: say which with teacher=MODEL"),
        (("method=opsd", "view=hint"), "no row of the data has that"),
        (("method=opsd", "teacher.view=solutoin"), "did you mean 'solution'"),
        (("method=opsd", "teacher.rate=0.5"), "weights=fixed has none"),
        (("method=opsd", "sampling.max_completion_length=4030"), "only 66 fit its context of 4096"),
        (
            (
                "teacher={kind: mixture, of: {a: {kind: self, view: solution}, b: self}}",
                "sampling.max_completion_length=4030",
            ),
            "only 66 fit its context of 4096",
        ),
        (
            ("method=opsd", "reward=exact", "evaluate.data=unread", "evaluate.teacher=true"),
            "the teacher is one that reads the view solution",
        ),
        (
            ("teacher=self:ema", "reward=exact", "evaluate.data=unread", "evaluate.teacher=true"),
            "the teacher is the student itself",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    shop: Shop,
    tmp_path: Path,
    data: str,
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(shop, tmp_path / "run", data, *words) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --------------------------------------------------------------------- whose weights, step by step


def stepped(shop: Shop, output: Path, method: str, **settings: Any) -> list[dict[str, float]]:
    """The metrics of three steps, of which only the first student is known."""
    values = shop.values(output, method=method, reward=shop.reward)
    del values["teacher"]
    run = make_run(values | {"steps": 3} | settings)
    run.folder.mkdir(parents=True)
    job, state = prepare(run)
    for _ in range(3):
        train_step(job, state)
    return [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()]


def losses(shop: Shop, output: Path, method: str, **settings: Any) -> list[float]:
    return [metrics["loss"] for metrics in stepped(shop, output, method, **settings)]


def test_whose_weights_have_read_the_solution(shop: Shop, tmp_path: Path) -> None:
    """All begin with the student's. The average's first move is a copy, so that at the second step
    it is the live student to the bit; at the third it is one no more. The fixed one stays behind.
    """
    fixed, ema, live = (
        losses(shop, tmp_path / w, f"opsd(teacher={w}, cap=None)") for w in ("fixed", "ema", "live")
    )
    assert fixed[0] == ema[0] == live[0] > 0
    assert ema[1] == live[1] != fixed[1]
    assert ema[2] != live[2]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_an_average_at_its_ends(rate: float, shop: Shop, tmp_path: Path) -> None:
    """Rate 0 is the fixed student, rate 1 the live one."""
    other = "fixed" if rate == 0 else "live"
    ours = losses(shop, tmp_path / "ema", f"sdft(rate={rate})")
    assert ours == losses(shop, tmp_path / other, f"sdft(teacher={other})") and max(ours) > 0


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_trust_region_at_its_ends(rate: float, shop: Shop, tmp_path: Path) -> None:
    """Rate 0 is the student as it began, rate 1 as it is: what an average of the same rate is."""
    trust = losses(shop, tmp_path / "trust", f"sdpo(teacher=trust_region, rate={rate})")
    average = losses(shop, tmp_path / "ema", f"sdpo(rate={rate})")
    assert trust == pytest.approx(average, rel=1e-4) and max(trust) > 0


def test_where_nobody_succeeds_and_nothing_is_said_nothing_is_learnt(
    shop: Shop, tmp_path: Path
) -> None:
    never = tmp_path / "never.py"
    never.write_text("def wrong(rollout):\n    return 0.0\n")
    silent = stepped(shop, tmp_path / "silent", "sdpo", reward=f"{never}:wrong")
    assert all(m["loss"] == 0 and m["grad_norm"] == 0 for m in silent)


def test_the_data_alone(shop: Shop, tmp_path: Path) -> None:
    """No teacher is named or loaded, and no answer sampled."""
    rows = [{**row, "response": row["answer"]} for row in gsm8k_rows(4)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = stepped(shop, tmp_path / "run", "sft", data=data)
    assert all(m["completions/student_written"] == 0 for m in found)
    assert found[-1]["loss"] < found[0]["loss"]


def test_supervised_training_never_imitates_what_the_student_wrote(
    shop: Shop, tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """PITFALLS S3: every token of its steps is the data's, and a cache of the student's own
    responses is refused.
    """
    job, _ = prepare(shop.run(tmp_path / "run", method="sft", data=data))
    found = collect(job.collector, 0, Clock(), step=0, total_steps=2, memory={})
    assert found.rollouts and found.tokens == 0
    assert all(r.finish == "given" and not any(r.drawn) for r in found.rollouts)
    assert shop.cache(tmp_path / "cache") == 0
    words = ("method=sft", f"teacher=cached:{tmp_path / 'cache'}", "rollouts=cache")
    assert train(shop, tmp_path / "own", str(tmp_path / "cache"), *words) != 0
    assert "cannot be combined: each brings its own curriculum" in capsys.readouterr().err
