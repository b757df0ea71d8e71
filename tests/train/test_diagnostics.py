"""Numbers worked by hand for what a step says of its tokens, and that measuring it neither moves
nor repeats anything.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from opdkit.methods.method import load
from opdkit.models.load import load_model, load_tokenizer
from opdkit.objective.batch import Batch
from opdkit.objective.divergences import ReverseKL
from opdkit.objective.facts import ColumnFact, EntropyFact, GapFact, LogpAtFact, LogpFact, TopFact
from opdkit.objective.grammar import Objective
from opdkit.objective.head import flat_positions, learn
from opdkit.run.launch import distill
from opdkit.testing import fabricate
from opdkit.train import diagnostics
from opdkit.train.record import StepRecord
from tests.common.tiny import save_tiny

NAN = math.nan


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def plain(found):
    return {name: round(value.item(), 9) for name, value in found.items()}


# ------------------------------------------------------------------------------------- pure numbers


def test_quantiles_are_values_of_the_list():
    values = (
        torch.arange(201).double()[torch.randperm(201, generator=torch.Generator().manual_seed(0))]
        / 100
    )
    assert plain(diagnostics.quantiles(values)) == {
        "p01": 0.02,
        "p05": 0.1,
        "p50": 1.0,
        "p95": 1.9,
        "p99": 1.98,
    }
    assert plain(diagnostics.quantiles(numbers(3))) == dict.fromkeys(diagnostics.QUANTILES, 3.0)
    tail = diagnostics.quantiles(
        torch.cat([numbers(-math.inf), torch.zeros(199).double()])
    )  # an outlier is no NaN, and stays outside
    assert (
        plain(tail)["p01"] == 0.0
        and diagnostics.quantiles(numbers(-math.inf, 1.0, 2.0))["p01"] == -math.inf
    )
    assert diagnostics.quantiles(numbers()) == {}


def test_trust_is_one_minus_the_total_variation():
    """pi_s = (.5, .3, .2), pi_t = (.2, .5, .3), tokens as often as the student writes them: (5 * .4
    + 3 * 1 + 2 * 1) / 10 = 0.7.
    """
    ratio = (numbers(0.2, 0.5, 0.3) / numbers(0.5, 0.3, 0.2)).log()
    assert diagnostics.trust(
        ratio.repeat_interleave(torch.tensor([5, 3, 2]))
    ).item() == pytest.approx(0.7)
    assert diagnostics.trust(numbers(-math.inf, 0.0)).item() == 0.5


@pytest.mark.parametrize(
    ("weight", "effective"),
    [
        ([1, 1, 1, 1], 4),
        ([0, 7, 0], 1),
        ([2, 1], 9 / 5),
        ([0.2, 0.1], 9 / 5),
        # rows of one and three tokens, averaged per row: 1 / (1/4 + 3/36)
        ([1 / 2, 1 / 6, 1 / 6, 1 / 6], 3),
        ([0, 0], 0),
    ],
)
def test_effective_tokens(weight, effective):
    assert diagnostics.effective_tokens(torch.tensor(weight)).item() == pytest.approx(effective)


def test_quadrants_of_tips_example():
    """Unsure from 0.5 nats: tokens 1 and 3; apart from 0.1: tokens 1, 2, 3 and 5."""
    entropy, gap = numbers(0.1, 2.0, 0.05, 1.0, 0.4, 0.02), numbers(0, 0.1, 1.5, 0.7, 0.05, 0.3)
    third = round(1 / 3, 9)
    assert plain(diagnostics.quadrants(entropy, gap)) == {
        "unsure_apart": third,
        "unsure_agreed": 0,
        "sure_apart": third,
        "sure_agreed": third,
    }


def test_tenths_count_trained_tokens_of_each_response():
    values = torch.zeros(3, 23, dtype=torch.float64)
    mask = torch.zeros(3, 23, dtype=torch.bool)
    values[0, :23], mask[0, :23] = torch.arange(23).double(), True
    mask[0, [5, 6, 7]] = False  # a tool's tokens: 20 are left, two in each tenth
    values[1, :5], mask[1, :5] = 100.0, True  # tenths 1, 3, 5, 7, 9
    values[2, 0], mask[2, 0] = 1000.0, True  # tenth 1
    found = [round(v.item(), 6) for v in diagnostics.by_position(values, mask)]
    assert found[0] == round((0 + 1 + 100 + 1000) / 4, 6) and found[1] == 2.5
    assert found[2] == round((4 + 8 + 100) / 3, 6) and found[9] == 21.5
    short = diagnostics.by_position(values[2:], mask[2:])
    assert short[0] == 1000 and all(v.isnan() for v in short[1:])


def test_mass_and_overlap_of_the_top_k():
    mask = torch.tensor([[True, True, False]])
    student, teacher = (
        torch.tensor([[[0, 1], [4, 2], [0, 1]]]),
        torch.tensor([[[1, 3], [2, 4], [0, 1]]]),
    )
    facts = {
        TopFact("student", 2): student,
        TopFact("teacher", 2): teacher,
        LogpAtFact("teacher", "teacher", 2): torch.tensor(
            [[[0.5, 0.3], [0.4, 0.2], [NAN, NAN]]]
        ).log(),
        LogpAtFact("student", "teacher", 2): torch.tensor(
            [[[0.2, 0.0], [0.5, 0.5], [NAN, NAN]]]
        ).log(),
        LogpAtFact("reference", "teacher", 2): torch.zeros(1, 3, 2),
    }
    batch = Batch(torch.zeros(1, 3, dtype=torch.int64), mask, facts)
    expected = {
        "overlap/top_2": 0.75,  # one of two, two of two
        "mass/teacher_on_teacher_top_2": 0.7,
        "mass/student_on_teacher_top_2": 0.6,
    }
    found = {k: round(v.item(), 6) for k, v in diagnostics.of_facts(batch).items()}
    assert found == expected
    # of three processes one has the first token, one the second, and one has none
    parts = []
    for mine in ([True, False, False], [False, True, False], [False] * 3):
        batch.mine = torch.tensor([mine])
        sums: list[torch.Tensor] = []
        batch.whole = lambda value, sums=sums: sums.append(value) or value  # type: ignore[misc]
        diagnostics.of_facts(batch)
        parts.append(sums)
    wholes = iter([sum(values) for values in zip(*parts)])
    batch.whole = lambda value: next(wholes)
    again = {k: round(v.item(), 6) for k, v in diagnostics.of_facts(batch).items()}
    assert again == expected


# ---------------------------------------------------------------------------------------- of a step


def batch_of(facts, guided=None):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    marks = {} if guided is None else {"mark:guided": guided}
    out = Batch(torch.zeros(2, 3, dtype=torch.int64), mask, facts, dtype=torch.float64)
    out.facts |= {ColumnFact(k): v for k, v in marks.items()}
    return out


NOTHING = torch.full((2, 3), NAN, dtype=torch.float64)
T, S = LogpFact("teacher"), LogpFact("student")


def test_facts_go_before_the_learning_pass():
    student, teacher = (
        torch.full((2, 3), -1.0, dtype=torch.float64),
        torch.tensor([[-2.0, -1.0, -0.5], [-4.0, NAN, NAN]]).double(),
    )
    gap = NOTHING.clone()
    gap[0, 1] = 9.0
    found = plain(diagnostics.of_tokens(batch_of({T: teacher, S: student}), NOTHING, gap))
    assert (found["log_ratio/p01"], found["log_ratio/p99"]) == (-3, 0.5)
    assert found["trust/mean"] == round((math.exp(-1) + 1 + 1 + math.exp(-3)) / 4, 9)
    assert (
        found["drift/tenth_01"] == 2.0
        and found["drift/tenth_04"] == 0
        and "drift/tenth_02" not in found
    )
    learnt = plain(diagnostics.of_tokens(batch_of({}), NOTHING, gap))
    assert learnt["log_ratio/p50"] == -9 and learnt["drift/tenth_01"] == 9
    assert diagnostics.of_tokens(batch_of({}), NOTHING, NOTHING) == {}


def test_guided_tokens_are_the_teachers_and_left_out():
    student, teacher = (
        torch.zeros(2, 3, dtype=torch.float64),
        torch.tensor([[5.0, 1.0, 1.0], [5.0, 0.0, 0.0]]).double(),
    )
    guided = torch.tensor([[True, False, False], [True, False, False]])
    found = plain(
        diagnostics.of_tokens(batch_of({T: teacher, S: student}, guided), NOTHING, NOTHING)
    )
    assert (
        found["log_ratio/p99"] == 1
        and found["drift/tenth_01"] == 1
        and found["drift/tenth_06"] == 1
    )


def test_quadrants_need_a_divergence_and_take_the_entropy_there_is():
    gap = {
        GapFact(ReverseKL(), "student", "teacher"): torch.tensor(
            [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
        ).double()
    }
    entropy = torch.tensor([[1.0, 1.0, 0.0], [NAN, NAN, NAN]]).double()
    assert plain(diagnostics.of_tokens(batch_of(gap), entropy, NOTHING))[
        "quadrants/sure_apart"
    ] == round(1 / 3, 9)
    whole = gap | {EntropyFact("student"): torch.zeros(2, 3, dtype=torch.float64)}
    assert (
        plain(diagnostics.of_tokens(batch_of(whole), entropy, NOTHING))["quadrants/sure_apart"]
        == 0.5
    )
    assert diagnostics.of_tokens(batch_of({}), entropy, NOTHING) == {}


def test_weights_of_terms():
    objective = load("iw_opd").objective + load("opd").objective
    batch = fabricate(objective).batch(objective)
    found = diagnostics.of_weights(objective.plan(batch))
    first = objective.plan(batch).parts[0].weight[batch.mask]
    assert (
        found["weights/policy_gradient_1/p50"] == first.sort().values[round(0.5 * (len(first) - 1))]
    )
    assert not any(name.startswith("weights/policy_gradient_2") for name in found)  # a mere number
    assert found["effective_tokens/policy_gradient_2"].item() == pytest.approx(
        batch.mask.sum().item()
    )
    assert 1 < found["effective_tokens/policy_gradient_1"] < batch.mask.sum()


# ------------------------------------------------------------------------------- gradients of terms


@pytest.mark.parametrize(
    "method", ["tropd", "scope", "eopd + 0.5 * gkd", "grpo(loss=gspo, reference_kl=0.1)"]
)
@pytest.mark.parametrize("chunk", [2, 1000])
def test_the_gradient_of_a_term_is_that_of_the_term_alone(method, chunk):
    objective = load(method).objective
    case = fabricate(objective)
    batch, leaf = case.batch(objective), case.student.clone().requires_grad_()
    plan = objective.plan(batch)
    total, grads = torch.zeros(len(objective.terms), dtype=torch.float64), []
    for rows in ([0, 1, 2], [3, 4, 5]):  # micro-batches
        inside = torch.zeros(6, 1, dtype=torch.bool)
        inside[rows] = True
        at = flat_positions(plan.selected & inside)
        states, head = leaf.flatten(0, 1)[at], batch.sources["student"].head
        measured = learn(plan, at, states, head, chunk, term_gradients=True)
        usual = learn(plan, at, states, head, chunk)
        assert torch.equal(measured.loss, usual.loss) and (usual.slopes == 0).all()
        both = [
            torch.autograd.grad(out.loss, leaf, retain_graph=True)[0] for out in (measured, usual)
        ]
        assert torch.equal(*both)
        total += measured.slopes
        grads.append(both[0])
    alone = [case.run(Objective(term)).grad.norm() for term in objective.terms]
    assert torch.allclose(total.sqrt(), torch.stack(alone), rtol=1e-9)
    if len(alone) == 1:
        assert torch.allclose(total.sqrt()[0], sum(grads).norm(), rtol=1e-12)


def test_a_record_keeps_what_was_seen_first():
    objective = load("gkd").objective
    case = fabricate(objective)
    batch = case.batch(objective)
    plan, head = objective.plan(batch), batch.sources["student"].head
    record = StepRecord(objective.names, term_gradients=True)
    for shift in (0.0, 1.0):  # two passes; the student moves in between
        for rows in ([0, 1, 2], [3, 4, 5]):
            at = flat_positions(
                plan.selected & torch.isin(torch.arange(6), torch.tensor(rows))[:, None]
            )
            states = (
                (case.student + shift * case.models["teacher"]).flatten(0, 1)[at].requires_grad_()
            )
            record.add(learn(plan, at, states, head, term_gradients=True), at)
        record.close(plan, torch.ones(()), 0.1)
    s, t = (
        x.log_softmax(-1).gather(-1, case.tokens[..., None])[..., 0]
        for x in (case.student, case.models["teacher"])
    )
    gap = s - t
    seen = record.spread(batch, record.gap)
    assert (
        torch.allclose(seen[batch.mask], gap[batch.mask], rtol=1e-9)
        and seen[~batch.mask].isnan().all()
    )
    metrics = record.metrics(batch)
    assert metrics["log_ratio/p50"] == pytest.approx(
        (-gap)[batch.mask].sort().values[round(0.5 * (int(batch.mask.sum()) - 1))].item()
    )
    first = case.run(objective).grad.norm().item()
    assert metrics["term_gradient/jsd"] == pytest.approx(
        torch.stack(record.slope_norms).mean().item()
    )
    assert record.slope_norms[0].item() == pytest.approx(first) and len(record.slope_norms) == 2


# ----------------------------------------------------------------------------------------- of a run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_tiny(folder / "student", seed=1), save_tiny(folder / "teacher", seed=2)


def test_a_run_logs_them_and_the_report_draws_them(models, tmp_path):
    settings = {
        "steps": 3,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 12,
        "device": "cpu",
    }
    out = distill(
        *models,
        ["What is 1 plus 2?", "What is 3 plus 4?"],
        method="tip * iw_opd",
        output=str(tmp_path / "run"),
        term_gradients_every=2,
        **settings,
    )
    logged = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    for line in logged:
        assert (
            line["log_ratio/p01"] <= line["log_ratio/p50"] <= line["log_ratio/p99"]
            and 0 < line["trust/mean"] <= 1
        )
        assert sum(v for k, v in line.items() if k.startswith("quadrants/")) == pytest.approx(1)
        assert (
            1 <= line["weights/reverse_kl/p01"] <= line["weights/reverse_kl/p99"] <= 1.5
            and "nonfinite" not in line
        )
        assert {"drift/tenth_01", "drift/tenth_10", "effective_tokens/reverse_kl"} <= set(line)
    assert ["term_gradient/reverse_kl" in line for line in logged] == [True, False, True]
    html = out.report.read_text()
    assert (
        "Distance by position" in html
        and "Weights of reverse_kl" in html
        and "Gradient per term" in html
    )


def test_measuring_makes_no_forward_pass_and_moves_no_weight(models, tmp_path):
    teacher, calls = load_model(models[1], dtype="float32", device="cpu"), []
    settings = {
        "steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "device": "cpu",
        "sample_every": 0,
    }
    end = []
    for every in (0, 1):
        student = load_model(models[0], dtype="float32", device="cpu")
        count = [0]
        student.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        distill(
            student,
            teacher,
            ["What is 1 plus 2?", "3 plus 4?"],
            tokenizer=load_tokenizer(models[0]),
            method="tropd",
            output=str(tmp_path / str(every)),
            term_gradients_every=every,
            **settings,
        )
        calls.append(count[0])
        end.append([p.detach().clone() for p in student.parameters()])
    assert calls[0] == calls[1] and all(torch.equal(a, b) for a, b in zip(*end))
