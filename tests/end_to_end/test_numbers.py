"""Numbers that a run is given mean what they say: its schedule, its lengths, its evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit import UserError, methods
from opdkit.base.files import read_lines
from opdkit.curricula import Plain
from opdkit.curricula.student import StudentWriter
from opdkit.methods.method import Method, load
from opdkit.run import build
from opdkit.run.ask import ask
from opdkit.run.build import prepare
from opdkit.run.launch import execute
from opdkit.run.open import Given
from opdkit.train import checkpoint as checkpoints
from opdkit.train import loop
from opdkit.types import Sampling
from tests.common.tiny import tiny_tokenizer
from tests.end_to_end.conftest import Shop, write_rows


def metrics(output: Path) -> list[dict[str, Any]]:
    return read_lines(output / "metrics.jsonl")


@pytest.mark.parametrize("resumed", [False, True])
def test_the_schedule_counts_the_optimiser_steps_that_are_taken(
    shop: Shop, tmp_path: Path, resumed: bool
) -> None:
    """Eight minibatches of two groups are two: 4 steps of 2 updates, the last of each at 1 - 1/8,
    1 - 3/8, 1 - 5/8 and 1 - 7/8 of the rate; 32 were planned by the settings alone.
    """
    settings = {
        "steps": 4,
        "optim": {"minibatches": 8, "schedule": "linear"},
        "checkpoint": {"every": 1},
    }
    job, state = prepare(shop.run(tmp_path, **settings))
    with job.recorder.trackers:
        if resumed:
            for _ in range(3):
                loop.train_step(job, state)
            checkpoints.save(job.folder, state, job.student, job.tokenizer)
        else:
            loop.train(job, state)
    if resumed:
        job, state = prepare(shop.run(tmp_path, **settings), resume=True)
        with job.recorder.trackers:
            loop.train(job, state)
    assert job.student.updates == 8
    assert [line["learning_rate"] for line in metrics(tmp_path)] == pytest.approx(
        [1e-3 * (1 - n / 8) for n in (1, 3, 5, 7)]
    )


def test_a_run_that_ends_by_its_tokens_ends_its_schedule_with_them(
    shop: Shop, tmp_path: Path
) -> None:
    """The rollouts of the last step say that it is the last: its rate is 1/n of the whole one."""
    run = shop.run(tmp_path, steps=50, max_tokens=100, optim={"schedule": "linear"})
    job, state = prepare(run)
    with job.recorder.trackers:
        loop.train(job, state)
    rates = [line["learning_rate"] for line in metrics(tmp_path)]
    assert 2 < len(rates) < 50 and rates[-1] == pytest.approx(1e-3 / len(rates))
    assert rates == sorted(rates, reverse=True)


def test_dr_grpo_divides_by_the_limit_of_the_run(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is used is printed, and kept in the summary; a length that is given stays."""
    settings = {"method": {"name": "grpo", "arguments": {"loss": "dr_grpo"}}, "reward": shop.reward}
    job, _ = prepare(shop.run(tmp_path / "a", **settings))
    assert [term.denominator for term in job.objective.terms] == [8]
    assert "per 8" in capsys.readouterr().err
    settings["method"]["arguments"]["max_completion_length"] = 20
    result = execute(shop.run(tmp_path / "b", **settings))
    assert "per 20" in json.loads((result.folder / "summary.json").read_text())["objective"]


@pytest.mark.parametrize("disable", [True, False])
def test_a_student_whose_configuration_has_dropout(
    shop: Shop, tmp_path: Path, disable: bool
) -> None:
    """Its own teacher: nothing to learn, and the sampler says what the trainer says. With dropout
    the trainer sees another student.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=320, n_positions=512)
    config.eos_token_id = config.bos_token_id = 2
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    settings = {"student": path, "teacher": path, "steps": 1, "disable_dropout": disable}
    execute(shop.run(tmp_path / "run", method="gkd", **settings))
    (line,) = metrics(tmp_path / "run")
    assert (abs(line["loss"]) < 1e-6) == disable
    assert (line["sampling/mismatch_max"] < 1e-5) == disable


# and with what the views of some methods show
WITH_RESPONSES = [
    {
        "question": f"What is {i}?",
        "response": f" {i}",
        "hint": f"it is {i}",
        "allowed": ["numbers"],
        "disallowed": ["names"],
        "chosen": f" It is {i}.",
        "rejected": " Who knows?",
    }
    for i in range(4)
]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "the run evaluates nothing"),
        ({"evaluate": {}}, "only before its first step and at its end"),
        ({"evaluate": {"every": 4}}, "only before its first step and at its end"),
        ({"evaluate": {"every": 1}}, "evaluation set has none"),
    ],
    ids=["no evaluation", "no cadence", "not before the end", "no responses"],
)
def test_a_schedule_that_would_never_adapt_is_refused(
    shop: Shop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    said: str,
) -> None:
    """Before a model is loaded, with the remedy."""
    monkeypatch.setattr(build, "open_models", None)
    questions = write_rows(tmp_path / "e.jsonl", [{"question": "What is 2?"}])
    if "evaluate" in settings:
        settings = {"evaluate": {"data": questions, **settings["evaluate"]}}
    run = shop.run(tmp_path / "run", method="distillm", steps=4, **settings)
    with pytest.raises(UserError, match=said) as error:
        prepare(run)
    assert "response" in str(error.value)


def test_distillm_validates_without_a_reward(shop: Shop, tmp_path: Path) -> None:
    """The loss on held-out responses is measured before the run and at each evaluation: with no
    tolerance for it and a student that is made worse, the share of student text rises.
    """
    data = write_rows(tmp_path / "e.jsonl", WITH_RESPONSES)
    settings = {"name": "distillm", "arguments": {"tolerance": 0.0}}
    run = shop.run(
        tmp_path / "run",
        method=settings,
        data=data,
        steps=4,
        evaluate={"data": data, "every": 2},
        optim={"learning_rate": 0.5},
    )
    job, state = prepare(run)
    with job.recorder.trackers:
        assert loop.train(job, state).memory["phi"] > 0
    assert not read_lines(tmp_path / "run" / "evals.jsonl")


@pytest.mark.parametrize("arguments", [{"schedule": None}, {"threshold": 1.0}])
def test_a_schedule_that_does_not_adapt_needs_no_evaluation(
    shop: Shop, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    run = shop.run(tmp_path, method={"name": "distillm", "arguments": arguments})
    assert prepare(run)[0].held_out.measure is None


# what they compare the responses to a prompt for: baselines, pass rates, shares, margins
COMPARE = {"scope", "paced", "kdrl", "rlad", "uni_opd", "grpo", "pi_distill", "opsd_rl", "trace"}
COMPARE |= {"dph_rl", "remix"}
COMPARE |= {"skill_sd", "cord", "alp", "recap"}
COMPARE |= {"dgpo", "gtpo", "dmpo", "rapo", "apo", "fg_expo"}
COMPARE |= {"clip_cov", "kl_cov", "mdpo"}


@pytest.mark.parametrize("name", methods())
def test_with_one_generation_a_method_trains_or_is_refused(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Refused before a model is loaded are those that compare responses; the others learn, but for
    sdpo, which shows the teacher a peer's success or feedback, where there is neither.
    """
    data = write_rows(tmp_path / "d.jsonl", WITH_RESPONSES)
    more: dict[str, Any] = {"sampling": {"num_generations": 1}, "reward": shop.reward}
    if name == "distillm":
        more |= {"steps": 2, "evaluate": {"data": data, "every": 1}}
    if name == "lightning_opd":
        assert shop.cache(tmp_path / "cache", "--num-generations=1") == 0
        more |= {"teacher": f"cached:{tmp_path / 'cache'}", "data": str(tmp_path / "cache")}
    if name == "salsa":
        more |= {"reference": f"soup:{shop.student},{shop.teacher}"}
    if name in ("mad_opd", "opad"):
        more |= {"models": {"teacher_1": shop.teacher, "teacher_2": shop.llama}}
        more |= {"annotate": {"debate": {"max_tokens": 4}}}
    run = shop.run(tmp_path / "run", **{"data": data, "method": name, **more})
    if name in COMPARE:
        monkeypatch.setattr(build, "open_models", None)
        with pytest.raises(UserError, match=rf"{name}.*num_generations=1.*Set num_generations"):
            prepare(run)
        return
    job, state = prepare(run)
    with job.recorder.trackers:
        loop.train_step(job, state)
    assert (metrics(tmp_path / "run")[0]["grad_norm"] > 0) == (name != "sdpo")


@pytest.mark.parametrize(
    ("method", "sampling", "said"),
    [
        ("opd + 0.1 * grpo", {"num_generations": 1}, "Set num_generations"),
        ("tip * paced", {"num_generations": 1}, "Set num_generations"),
        ("minillm(advantage='std')", {"num_generations": 1}, "Set num_generations"),
        ("grpo", {"num_generations": 4, "temperature": 0}, "Set temperature"),
        ("uni_opd(scope='step', balance_scope='step')", {"num_generations": 1}, None),
        ("opd", {"num_generations": 4, "temperature": 0}, None),
    ],
)
def test_what_compares_responses_is_known_by_what_it_reads(
    shop: Shop, tmp_path: Path, method: str, sampling: dict[str, Any], said: str | None
) -> None:
    run = shop.run(tmp_path, method=method, sampling=sampling, reward=shop.reward)
    if said is None:
        ask(run, Given())
        return
    with pytest.raises(UserError, match=said):
        ask(run, Given())


def test_a_writer_of_several_responses_says_so(shop: Shop, tmp_path: Path) -> None:
    """Then the number of a run's generations is not what counts."""

    class Thrice(StudentWriter):
        def per_prompt(self, sampling: Sampling) -> int:
            return 3 * sampling.num_generations

    class Often(Plain):
        writer = Thrice()  # type: ignore[assignment]

    method = Method(load("grpo").objective, curriculum=Often())
    run = shop.run(tmp_path, sampling={"num_generations": 1}, reward=shop.reward)
    assert ask(run, Given(method=method)).method.curriculum == method.curriculum


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dynamic_sampling": True}, "dynamic_sampling goes by the rewards"),
        ({"overlong_margin": 4}, "overlong_margin goes by the rewards"),
        ({"dynamic_sampling": True, "sampling": {"num_generations": 1}}, "one response"),
        ({"dynamic_sampling": True, "sampling": {"temperature": 0}}, "temperature above 0"),
        ({"overlong_margin": 9}, "more than max_completion_length=8"),
    ],
)
def test_rules_that_could_never_act_are_refused(
    shop: Shop, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    reward = {} if "goes by" in said else {"reward": shop.reward}
    with pytest.raises(UserError, match=said):
        ask(shop.run(tmp_path, **reward, **settings), Given())


def test_a_warm_up_longer_than_the_run_is_told(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of at most two updates: 5 of warm-up end at 4/5, 4 are reached."""
    for warm, told in ((5, True), (4, False)):
        optim = {"warmup_steps": warm, "minibatches": 2}
        ask(shop.run(tmp_path, optim=optim), Given())
        assert ("ends at 4/5" in capsys.readouterr().err) == told
