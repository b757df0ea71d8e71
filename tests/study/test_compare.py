"""Comparisons: standings by hand, equal budgets and prompts, interruptions that change nothing, one
page and one Parquet file.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import opdkit
from opdkit import recipes
from opdkit.base.config import to_yaml
from opdkit.base.errors import UserError
from opdkit.base.files import read_lines
from opdkit.cli import main
from opdkit.eval import paired_difference
from opdkit.recipes import arithmetic
from opdkit.run.settings import MethodSpec, Run, make_run
from opdkit.study.compare import Comparison, compare, contender
from opdkit.study.page import per_seed, render, write_page
from opdkit.study.screen import ComparisonScreen
from opdkit.study.standings import (
    PLAN,
    accuracy_curve,
    metric_curve,
    read_comparison,
    standings,
    write_parquet,
)
from opdkit.train.checkpoint import State
from opdkit.train.job import Length
from opdkit.train.record import TIMINGS, Recorder
from tests.common.tiny import save_tiny

# --------------------------------------------------------------------------- fabricated comparisons

PROBLEMS = "abcd"
SCORES = {  # method -> seed -> right or wrong on problems a, b, c, d
    "first": {0: (1, 0, 0, 1), 1: (1, 0, 1, 0)},
    "other": {0: (1, 1, 0, 1), 1: (1, 1, 1, 1)},
}


def evaluation(scores: tuple[float, ...], step: int, name: str = "student") -> dict[str, Any]:
    mean = sum(scores) / len(scores)
    return {
        "name": name,
        "n_problems": len(scores),
        "samples_per_problem": 1,
        "avg_at_k": {"value": mean, "low": mean, "high": mean},
        "pass_at_k": {"1": {"value": mean, "low": mean, "high": mean}},
        "mean_length": 5.0,
        "truncated_share": 0.0,
        "reward_mean": mean,
        "seconds": 2.0,
        "step": step,
        "tokens": 20,
        "per_problem": dict(zip(PROBLEMS, scores)),
    }


def fabricate(folder: Path, labels: dict[str, str] | None = None) -> Path:
    """20 steps of 10 tokens ("other", seed 1: 30 tokens); KL 1/step, plus 1 with seed 1; half right
    before the first step.
    """
    methods = []
    for method, seeds in SCORES.items():
        label = (labels or {}).get(method, method)
        methods.append(
            {
                "label": label,
                "folder": method,
                "summary": f"of {label}",
                "formula": "A * B",
                "failed": {},
            }
        )
        for seed, scores in seeds.items():
            run = folder / "runs" / method / f"seed-{seed}"
            (run / "model").mkdir(parents=True)
            (run / "run.yaml").write_text("steps: 20\n")
            (run / "summary.json").write_text("{}")
            tokens = 30 if (method, seed) == ("other", 1) else 10
            lines = [
                {
                    "step": s,
                    "teacher_kl/sampled": 1 / s + seed,
                    "seconds/step": 1.0,
                    "tokens/sampled_so_far": tokens * s,
                }
                for s in range(1, 21)
            ]
            evals = [evaluation((1, 0, 1, 0), 0), evaluation(scores, 20)]
            if (method, seed) == ("first", 0):
                evals.insert(0, evaluation((1, 1, 1, 0.6), 0, "teacher"))
            for name, found in (("metrics", lines), ("evals", evals)):
                (run / f"{name}.jsonl").write_text(
                    "".join(json.dumps(line) + "\n" for line in found)
                )
    plan = {
        "recipe": "none",
        "budget": "200",
        "leader": "first",
        "seeds": [0, 1],
        "methods": methods,
        "run": {"steps": 20},
    }
    (folder / PLAN).write_text(to_yaml(plan))
    return folder


def test_standings_are_the_hand_worked_numbers(tmp_path: Path) -> None:
    first, other = standings(read_comparison(fabricate(tmp_path)).entrants)
    # problem by problem, mean over seeds: first 1, 0, 1/2, 1/2; other 1, 1, 1/2, 1
    assert (first.accuracy.value, other.accuracy.value) == (0.5, 0.875)
    assert first.difference is None and first.by_seed == {}
    assert other.difference == paired_difference([1, 0, 0.5, 0.5], [1, 1, 0.5, 1], samples=2)
    assert other.difference is not None and other.difference.value == 0.375
    assert other.by_seed == {0: 0.25, 1: 0.5}
    # the last tenth of 20 steps; seed 1 lies 1 higher
    assert first.kl == pytest.approx((1 / 19 + 1 / 20) / 2 + 0.5)
    assert (first.tokens, other.tokens) == (200, 400)
    assert first.seconds == 20 * 1.0 + 2 * 2.0  # the teacher's evaluation is nobody's
    assert first.reward is None


def test_a_difference_is_paired_within_the_seeds_that_both_have(tmp_path: Path) -> None:
    (fabricate(tmp_path) / "runs" / "first" / "seed-1" / "model").rmdir()  # unfinished
    first, other = standings(read_comparison(tmp_path).entrants)
    assert (first.seeds, other.seeds) == ((0,), (0, 1))
    assert other.by_seed == {0: 0.25}
    assert other.difference == paired_difference([1, 0, 0, 1], [1, 1, 0, 1])


def test_curves_are_means_and_ranges_over_seeds_by_tokens(tmp_path: Path) -> None:
    first, other = read_comparison(fabricate(tmp_path)).entrants
    accuracy = accuracy_curve(other)
    assert accuracy.tokens == [0, (200 + 600) / 2]
    assert (accuracy.mean, accuracy.low, accuracy.high) == ([0.5, 0.875], [0.5, 0.75], [0.5, 1.0])
    kl = metric_curve(first, "teacher_kl/sampled")
    assert kl.tokens == [10 * s for s in range(1, 21)]
    assert (kl.mean[0], kl.low[0], kl.high[0]) == (1.5, 1.0, 2.0)
    assert accuracy.at([100, 500])[0] == [0.5 + 0.375 * 100 / 400, None]


def test_parquet_holds_every_number(tmp_path: Path) -> None:
    rows = pq.read_table(write_parquet(read_comparison(fabricate(tmp_path)))).to_pylist()
    assert len(rows) == 4 * (20 + 2) + 1
    step = next(
        r for r in rows if (r["method"], r["seed"], r["kind"], r["step"]) == ("other", 1, "step", 3)
    )
    assert (step["tokens"], step["teacher_kl/sampled"], step["eval/avg"]) == (90, 1 / 3 + 1, None)
    last = {
        (r["method"], r["seed"]): dict(r["eval/per_problem"])
        for r in rows
        if r["kind"] == "evaluation" and r["step"] == 20 and r["eval/model"] == "student"
    }
    assert last == {
        (m, s): dict(zip(PROBLEMS, scores))
        for m, seeds in SCORES.items()
        for s, scores in seeds.items()
    }
    assert [r["eval/avg"] for r in rows if r["eval/model"] == "teacher"] == [0.9]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7 * 7 }}"


def test_the_page_escapes_and_asks_no_server(tmp_path: Path) -> None:
    folder = fabricate(tmp_path, {"other": HOSTILE})
    html = write_page(read_comparison(folder)).read_text()
    assert (
        html.count("<script>")
        == html.count("</script>") - html.count('<script type="application/json">')
        == 2
    )
    assert "<img" not in html and "49" not in re.findall(r"alert\(2\).{0,12}", html)[0]
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=[^x]", html)
    assert "default-src 'none'" in html
    for shown in (
        "4 of 4 runs finished",
        "87.5%",
        "+37.5",
        "+25.0, +50.0",
        "teacher",
        "KL to the teacher",
    ):
        assert shown in html


def test_a_page_before_the_first_run_is_finished(tmp_path: Path) -> None:
    folder = fabricate(tmp_path)
    for model in folder.glob("runs/*/*/model"):
        model.rmdir()
    assert "0 of 4 runs finished" in render(read_comparison(folder))


def test_many_seeds_are_told_by_their_range(tmp_path: Path) -> None:
    _, other = standings(read_comparison(fabricate(tmp_path)).entrants)
    assert per_seed(replace(other, by_seed={i: i / 100 for i in range(9)})) == "+0.0 to +8.0"


# ------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("tropd", "tropd"),
        ("tropd:k=32", "tropd(k=32)"),
        ("tropd:k=32,beta=1e-2", "tropd(k=32, beta=0.01)"),
        ("tropd(k=32)", "tropd(k=32)"),
        ("iw_opd:gamma=0.5", "iw_opd"),  # the default: the same method
        (MethodSpec("iw_opd", {"gamma": 2.0}), "iw_opd(gamma=2.0)"),
        ("opd * iw_opd(gamma=2.0)", "opd * iw_opd(gamma=2.0)"),
    ],
)
def test_spellings_of_a_method(text: str, label: str) -> None:
    assert contender(text).label == label


def test_folders_stand_for_method_arguments_and_code(tmp_path: Path) -> None:
    assert contender("opd").folder == "opd"
    assert (
        contender("tropd:k=32").folder
        == contender("tropd(k=32)").folder
        != contender("tropd:k=16").folder
    )
    file = tmp_path / "mine.py"
    code = "from opdkit.objective import LogRatio, PolicyGradient\n"
    code += (
        'def mine(c: float = 1.0):\n    return PolicyGradient(LogRatio("teacher", "student")) * c\n'
    )
    file.write_text(code)
    before = contender(f"{file}:mine:c=2.0")
    assert before.label == f"{file}:mine(c=2.0)"
    assert "/" not in before.folder
    file.write_text(code.replace("* c", "* c * 2"))
    assert contender(f"{file}:mine:c=2.0").folder != before.folder


# --------------------------------------------------------------------------------------- small runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("shop")
    (folder / "reward.py").write_text(
        "def even(rollout):\n    return float(sum(rollout.tokens) % 2 == 0)\n"
    )
    rows = [
        {"prompt": f"What is {i} plus 30?", "response": f"{i + 30}", "answer": str(i + 30)}
        for i in range(9)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_run(
        {
            "student": save_tiny(folder / "student", seed=1),
            "teacher": save_tiny(folder / "teacher", seed=3),
            "data": str(folder / "data.jsonl"),
            "reward": f"{folder / 'reward.py'}:even",
            "steps": 5,
            "prompts_per_step": 2,
            "sampling": {"num_generations": 2, "max_completion_length": 6},
            "optim": {"learning_rate": 1e-3, "schedule": "cosine"},
            "evaluate": {"data": str(folder / "data.jsonl"), "every": 2, "teacher": True},
            "checkpoint": {"every": 1},
            "sample_every": 1,
            "device": "cpu",
        }
    )


METHODS = ("tropd:k=8", "opd")


@pytest.fixture(scope="module")
def made(base: Run, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(METHODS, base, seeds=2, out=tmp_path_factory.mktemp("made") / "out")


def test_one_page_and_one_parquet_file(made: Comparison) -> None:
    assert {p.name for p in made.folder.iterdir()} == {
        "comparison.html",
        "comparison.parquet",
        "comparison.yaml",
        "runs",
    }
    assert (made.page.name, made.parquet.name) == ("comparison.html", "comparison.parquet")
    assert "4 of 4 runs finished" in made.page.read_text()
    assert not list(made.folder.rglob("checkpoint-*"))
    assert len(list(made.folder.glob("runs/*/*/model"))) == 4


def test_budgets_are_equal_in_student_tokens(made: Comparison, base: Run) -> None:
    tropd, opd = (sorted((made.folder / "runs" / contender(m).folder).iterdir()) for m in METHODS)
    for one, other in zip(tropd, opd):
        budget = [line["tokens/sampled_so_far"] for line in read_lines(one / "metrics.jsonl")]
        spent = [line["tokens/sampled_so_far"] for line in read_lines(other / "metrics.jsonl")]
        assert len(budget) == base.steps
        # without guided rollouts on top of the plain ones, the same tokens are more steps
        assert len(spent) > base.steps
        assert spent[-2] < budget[-1] <= spent[-1]
    parquet = pq.read_table(made.parquet).to_pylist()
    assert {r["method"] for r in parquet} == {"opd", "tropd(k=8)"}


def test_the_prefix_that_a_guided_rollout_is_given_is_no_student_token(made: Comparison) -> None:
    run = made.folder / "runs" / contender(METHODS[0]).folder / "seed-0"
    first = read_lines(run / "metrics.jsonl")[0]
    rollouts = read_lines(run / "samples" / "step_000001.jsonl")
    plain = sum(len(r["pieces"]) for r in rollouts if ":guided" not in r["id"])
    assert any(":guided" in r["id"] for r in rollouts)
    # at the first step the whole guided response is given, or cut at the limit
    assert first["tokens/sampled_so_far"] == plain


def test_prompts_are_the_same_for_all_methods_of_a_seed(made: Comparison) -> None:
    def asked(method: str, seed: int, step: int) -> set[str]:
        path = (
            made.folder
            / "runs"
            / contender(method).folder
            / f"seed-{seed}"
            / "samples"
            / f"step_{step:06d}.jsonl"
        )
        return {r["prompt"] for r in read_lines(path)}

    for step in (1, 2, 3):
        for seed in (0, 1):
            assert asked(METHODS[0], seed, step) == asked(METHODS[1], seed, step)
    assert any(asked("opd", 0, step) != asked("opd", 1, step) for step in (1, 2, 3))


def test_the_teacher_is_evaluated_once(made: Comparison) -> None:
    rows = pq.read_table(made.parquet).to_pylist()
    assert [(r["method"], r["seed"]) for r in rows if r["eval/model"] == "teacher"] == [
        ("tropd(k=8)", 0)
    ]


def numbers(comparison: Comparison) -> list[dict[str, Any]]:
    """The Parquet rows without what a clock says."""
    rows = pq.read_table(comparison.parquet).to_pylist()
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMINGS) and k != "eval/seconds"}
        for row in rows
    ]


@pytest.mark.parametrize("steps", [3, 8])  # in the first run, in the second
def test_an_interrupted_comparison_continues_to_the_same_numbers(
    steps: int, base: Run, made: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    real = Recorder.step

    def counted(self: Recorder, *args: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == steps:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(Recorder, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(METHODS, base, seeds=2, out=tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("runs/*/*/model/*")}
    assert bool(before) == (steps > 3)
    again = compare(METHODS, base, seeds=2, out=tmp_path / "out")
    assert numbers(again) == numbers(made)
    assert again.standings == [
        replace(new, seconds=old.seconds) for new, old in zip(made.standings, again.standings)
    ]
    # what was finished is not run again
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_methods_and_seeds_can_be_added_and_settings_cannot_change(
    base: Run, tmp_path: Path
) -> None:
    quick = replace(base, steps=2)
    compare(("opd", "iw_opd"), quick, seeds=1, out=tmp_path)
    model = tmp_path / "runs" / "opd" / "seed-0" / "model" / "model.safetensors"
    made_at = model.stat().st_mtime_ns
    more = compare(("gkd", "opd"), quick, seeds=2, out=tmp_path)
    assert [s.label for s in more.standings] == ["gkd", "opd"] and more.standings[
        1
    ].difference is not None
    assert model.stat().st_mtime_ns == made_at
    with pytest.raises(UserError, match=r"other settings \(steps was 2 and is 3\)"):
        compare(("opd", "iw_opd"), quick, seeds=1, out=tmp_path, steps=3)
    with pytest.raises(UserError, match="what opd samples: name it among the methods"):
        compare(("gkd", "iw_opd"), quick, seeds=1, out=tmp_path)


def test_a_method_that_fails_does_not_stop_the_others(base: Run, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(4)]  # no responses to read
    data = tmp_path / "bare.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = compare(
        ("opd", "gkd:lmbda=0.0", "iw_opd"),
        replace(base, steps=1, data=str(data)),
        seeds=1,
        out=tmp_path / "out",
    )
    assert [s.label for s in out.standings] == ["opd", "iw_opd"]
    assert "no reference response" in out.failed["gkd(lmbda=0.0)", 0]
    assert "no reference response" in out.page.read_text()


def test_a_method_whose_student_writes_nothing_sets_no_budget(base: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sets no budget"):
        compare(("gkd:lmbda=0.0", "opd"), replace(base, steps=1), seeds=1, out=tmp_path)


def test_a_budget_in_tokens_holds_for_all(base: Run, tmp_path: Path) -> None:
    out = compare(("opd", "iw_opd"), base, seeds=1, out=tmp_path, max_tokens=50)
    # a step is at most 2 prompts x 2 responses x 6 tokens
    assert all(50 <= s.tokens < 50 + 24 for s in out.standings)


@pytest.mark.parametrize(
    ("methods", "settings", "told"),
    [
        (("opd",), {}, "two methods or more"),
        (("opd", "opdd"), {}, "did you mean 'opd'"),
        (("opd", "iw_opd:gama=1"), {}, "did you mean 'gamma'"),
        (("opd", "iw_opd:gamma=0.5", "iw_opd"), {}, "iw_opd is named twice"),
        (("opd", "scope"), {"reward": None}, "reward"),
        (("opd", "iw_opd"), {"evaluate": None}, "held-out problems"),
        (("opd", "iw_opd"), {"method.gamma": 2.0}, "behind its name"),
        (("opd", "iw_opd"), {"output": "here"}, "--out"),
        (("opd", "iw_opd"), {"stepps": 2}, "did you mean 'steps'"),
    ],
)
def test_refused_before_anything_is_run(
    methods: tuple[str, ...], settings: dict[str, Any], told: str, base: Run, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        compare(methods, base, out=tmp_path / "out", **settings)
    with pytest.raises(UserError, match=told):  # nor are the recipe's models made
        compare(methods, "quickstart", out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_models_absence_is_refused(base: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from opdkit.objective import LogRatio, PolicyGradient\n"
        'def own():\n    return PolicyGradient(LogRatio("judge", "student"))\n'
    )
    with pytest.raises(UserError, match=r"models\.judge=MODEL"):
        compare(("opd", f"{tmp_path / 'own.py'}:own"), base, out=tmp_path / "out")


@pytest.mark.parametrize("seeds", [0, (), (1, 1)])
def test_seeds_are_one_or_more_and_each_once(seeds: Any, base: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="each once"):
        compare(("opd", "iw_opd"), base, seeds=seeds, out=tmp_path / "out")


def test_a_runs_folder_is_left_alone(base: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("steps: 1\n")
    with pytest.raises(UserError, match="holds a run, not a comparison"):
        compare(("opd", "iw_opd"), base, out=tmp_path)


def test_the_command(base: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(base.yaml())
    out = tmp_path / "out"
    command = [
        "compare",
        "opd",
        "iw_opd:gamma=1.0",
        "--recipe",
        str(tmp_path / "run.yaml"),
        "--seeds",
        "1",
        "--out",
        str(out),
    ]
    assert main([*command, "steps=1", "evaluate.teacher=false"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^iw_opd\(gamma=1\.0\) +\d+\.\d% ", printed.out, re.M)
    assert f"page     {out / 'comparison.html'}" in printed.out
    assert "opdkit: run 2 of 2: iw_opd(gamma=1.0), seed 0; about" in printed.err
    assert "opdkit: a run takes about" in printed.err
    assert main([*command, "steps=2"]) == 2


def test_the_quickstart_recipe_makes_its_models_and_problems_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def untrained(size: str, tokenizer: Any, seed: int, progress: Any) -> Any:
        trained.append((size, seed))
        return arithmetic.model(size, len(tokenizer), seed)

    monkeypatch.setattr(arithmetic, "start", untrained)
    for _ in range(2):
        recipes.make("quickstart", tmp_path)
    assert trained == [("teacher", 0), ("student", 0)]
    run = make_run(recipes.recipe("quickstart", tmp_path))
    assert run.evaluate is not None and isinstance(run.teacher, str)
    asked, held_out = (
        {row["prompt"] for row in read_lines(Path(str(data)))}
        for data in (run.data, run.evaluate.data)
    )
    assert len(held_out) == 256 and not asked & held_out
    assert all((Path(model) / "model.safetensors").exists() for model in (run.student, run.teacher))


def test_the_package_offers_functions_whose_modules_have_the_same_name() -> None:
    for _ in range(2):
        assert callable(opdkit.compare) and callable(opdkit.explain) and callable(opdkit.methods)


# ---------------------------------------------------------------------- ends of runs, and time left


def test_schedules_are_laid_out_for_the_steps_that_a_token_budget_allows() -> None:
    length = Length(80, 1000)
    assert length.expected_steps(State()) == 80  # nothing is known yet
    assert length.expected_steps(State(step=10, tokens=250)) == 40  # 25 tokens a step
    assert length.expected_steps(State(step=10, tokens=10)) == 80  # at most
    assert length.expected_steps(State(step=39, tokens=999)) == 40  # there is one more
    assert [length.ended(State(step=s, tokens=t)) for s, t in ((79, 999), (80, 0), (1, 1000))] == [
        False,
        True,
        True,
    ]
    assert Length(80).expected_steps(State(step=10, tokens=250)) == 80


def test_time_left_is_told_from_the_runs_of_this_session(
    base: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    screen = ComparisonScreen(total=4, done=1, clock=lambda: now)
    screen.begin("opd", replace(base, steps=10))
    now = 20.0
    screen.step(6, {"tokens/sampled_so_far": 60})  # resumed: half of it was there
    assert "left" not in capsys.readouterr().err
    screen.step(10, {"tokens/sampled_so_far": 100})
    screen.end()
    assert "a run takes about 40 s: about 1:20 left for the 2 others" in capsys.readouterr().err
    screen.begin("tropd", replace(base, steps=20, max_tokens=100))
    now = 40.0
    screen.step(5, {"tokens/sampled_so_far": 50})  # half of its tokens
    assert capsys.readouterr().err.endswith("tropd, seed 0, step 5, 50%  about 1:00 left\n")


def test_a_comparison_that_never_began_binds_nobody_and_what_a_kill_left_goes(
    base: Run, made: Comparison, tmp_path: Path
) -> None:
    """Its first run fails, and the corrected one has other settings. Of finished runs only models
    stay, also where the removal of their checkpoints was cut short.
    """
    quick = replace(base, steps=1)
    with pytest.raises(UserError, match="from which the others take their budget"):
        compare(
            ("opd", "iw_opd"), replace(quick, data="/nowhere.jsonl"), seeds=1, out=tmp_path / "a"
        )
    assert not (tmp_path / "a").exists()
    compare(("opd", "iw_opd"), quick, seeds=1, out=tmp_path / "a")
    left = tmp_path / "a" / "runs" / "opd" / "seed-0"
    (left / ".lock").write_text("process 1 on a machine that is gone")
    (left / "report.html").unlink()
    for name in ("checkpoint-4", ".partial-checkpoint-1"):
        (left / name).mkdir()
        (left / name / "optimizer.pt").write_bytes(b"half")
    compare(("opd", "iw_opd"), quick, seeds=1, out=tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").rglob("*")}
    assert (left / "report.html").exists() and ".lock" not in names
    assert not any("checkpoint" in name for name in names)
