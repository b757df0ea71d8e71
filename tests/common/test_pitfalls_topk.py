"""Faults of top-k divergences that other systems shipped (PITFALLS K1 to K7): named by their
number.
"""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.objective.batch import Batch, Live
from opdkit.objective.divergences import KINDS
from opdkit.objective.facts import LogpAtFact, TopFact
from opdkit.objective.grammar import Objective
from opdkit.objective.losses import Divergence
from opdkit.objective.maths import left_over, restrict
from opdkit.objective.support import Support
from opdkit.testing import Case, Evaluation, evaluate
from tests.methods.toy import close, logits, numbers, tokens


def run(loss, student, teacher, **more) -> Evaluation:
    return evaluate(loss, logits(student), tokens(0), models={"teacher": logits(teacher)}, **more)


def test_K1_a_truncated_forward_kl_can_be_negative_and_still_learns():
    p, q = (0.6, 0.35, 0.03, 0.02), (0.5, 0.3, 0.12, 0.08)
    raw = run(Divergence("forward_kl", k=2), p, q)
    assert close(raw.loss, -0.137406) and close(
        raw.grad[0, 0], 0.8 * numbers(*p) - numbers(0.5, 0.3, 0, 0), 12
    )
    assert raw.grad.norm() > 0.04  # a clamp at zero would leave none
    tail = run(Divergence("forward_kl", k=2, rest="tail"), p, q)
    assert close(tail.loss, 0.139853) and close(
        tail.loss, run(Divergence("forward_kl"), p, q).loss.item(), 12
    )


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tv", "hellinger2", "chi2"])
def test_K1_with_the_tail_it_is_between_zero_and_the_whole(kind):
    for seed in range(30):
        p, q = (
            torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            .mul(2)
            .softmax(-1)
            .tolist()
        )
        whole = run(Divergence(kind), p, q).loss
        for support in ("teacher", "student"):
            part = [
                run(Divergence(kind, k=k, support=support, rest="tail"), p, q).loss.item()
                for k in (1, 3, 5, 7)
            ]
            assert 0 <= part[0] <= part[1] + 1e-12 <= part[2] + 2e-12 <= part[3] + 3e-12 and close(
                whole, part[3], 9
            )


@pytest.mark.parametrize(
    ("p", "raw", "full"),
    [
        ((0.4, 0.3, 0.2, 0.1), 0.0, 0.0),
        ((0.30, 0.28, 0.22, 0.20), -0.105623, 0.053975),
        ((0.26, 0.25, 0.245, 0.245), -0.157584, 0.111678),
    ],
)
def test_K2_the_raw_students_top_k_rewards_leaking(p, raw, full):
    q = (0.4, 0.3, 0.2, 0.1)
    assert close(run(Divergence("reverse_kl", k=2), p, q).loss, raw) and close(
        run(Divergence("reverse_kl"), p, q).loss, full
    )
    for rest in ("renormalise", "tail"):  # what to use instead: never below zero
        assert run(Divergence("reverse_kl", k=2, rest=rest), p, q).loss >= -1e-12


def test_K3_renormalised_on_one_token_is_identically_zero_and_warned_of():
    with pytest.warns(UserWarning, match="identically zero"):
        loss = Divergence("reverse_kl", k=1, rest="renormalise")
    out = run(loss, (0.6, 0.3, 0.1), (0.1, 0.3, 0.6))
    assert out.loss == 0 and out.grad.abs().max() < 1e-15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", ["teacher", "student", "union", "intersection"])
@pytest.mark.parametrize("rest", ["raw", "renormalise", "target", "tail"])
def test_K3_a_k_of_the_whole_vocabulary_is_the_full_divergence(kind, support, rest):
    g = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 2, 3, 6, generator=g, dtype=torch.float64)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    full, part = (
        evaluate(loss, student, ids, models={"teacher": teacher})
        for loss in (Divergence(kind), Divergence(kind, k=6, support=support, rest=rest))
    )
    assert close(part.loss, full.loss.item(), 9) and close(part.grad, full.grad, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("sure", ["both", "student", "teacher"])
def test_K4_a_top_k_that_holds_all_mass_has_a_finite_tail(dtype, kind, sure):
    sharp, flat = (
        torch.tensor([[[30.0, 29.0, -30.0, -31.0]]], dtype=dtype),
        torch.tensor([[[1.0, 0.9, 0.0, -0.1]]], dtype=dtype),
    )
    student, teacher = (sharp if sure in ("both", who) else flat for who in ("student", "teacher"))
    out = evaluate(
        Divergence(kind, k=2, rest="tail"), student, tokens(0), models={"teacher": teacher}
    )
    assert out.loss.isfinite() and out.grad.isfinite().all() and out.loss >= -1e-6
    assert out.loss < 1e-5 if sure == "both" else out.loss > 0.01


def test_K4_the_students_tail_has_a_floor_and_the_teachers_none():
    nearly = numbers(0.6, 0.4).log() + math.log1p(-1e-12)
    half = numbers(0.3, 0.2).log()
    ls, lt = restrict(nearly, nearly - 1e-13, "tail")
    assert ls[-1] == lt[-1] == -math.inf  # nothing left on either side: no entry
    ls, lt = restrict(nearly, half, "tail")
    assert close(ls[-1], math.log(1e-8), 12) and close(lt[-1], math.log(0.5), 12)
    ls, lt = restrict(half, nearly, "tail")
    # as small as it is
    assert close(lt[-1], math.log(1e-12), 3) and left_over(torch.zeros(1).double()) == 0


# A server's answer: ids and log-probs, k + 1 or fewer entries, in any order, an absent entry -inf
# under id 0.
STUDENT = numbers(0.1, 0.5, 0.2, 0.15, 0.05).log()


def served(ids, logps, loss) -> Evaluation:
    """The evaluation with the teacher's top-k as a server returns it."""
    batch = Batch(tokens(1), torch.ones(1, 1, dtype=torch.bool), dtype=torch.float64)
    k = loss.k
    batch.facts = {
        TopFact("teacher", k): torch.tensor([[ids]]),
        LogpAtFact("teacher", "teacher", k): torch.tensor([[logps]]).double(),
    }
    z = STUDENT[None].clone().requires_grad_()
    value = loss.value(Live(batch, torch.tensor([0]), z)).sum()
    return Evaluation(value.detach(), torch.autograd.grad(value, z)[0], ())


NAMED = {3: math.log(0.4), 1: math.log(0.3), 2: math.log(0.2)}


@pytest.mark.parametrize("rest", ["raw", "renormalise", "target", "tail"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_K5_entries_are_read_by_token_id_not_by_column(kind, rest):
    loss = Divergence(kind, k=3, support="teacher", rest=rest)
    base = served(list(NAMED), list(NAMED.values()), loss)
    for order in ((1, 2, 3), (2, 3, 1)):
        out = served(list(order), [NAMED[i] for i in order], loss)
        assert close(out.loss, base.loss.item(), 12) and close(out.grad, base.grad, 12)


@pytest.mark.parametrize("rest", ["raw", "renormalise", "target", "tail"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tv"])
def test_K6_padded_entries_have_no_value_and_no_gradient(kind, rest):
    """Token 0 stands in the padding: it is no candidate, so only the softmax's own pull may move
    it.
    """
    short = served(
        list(NAMED), list(NAMED.values()), Divergence(kind, k=3, support="teacher", rest=rest)
    )
    padded = served(
        [*NAMED, 0, 0],
        [*NAMED.values(), -math.inf, -math.inf],
        Divergence(kind, k=5, support="teacher", rest=rest),
    )
    assert close(padded.loss, short.loss.item(), 12) and close(padded.grad, short.grad, 12)
    if rest == "renormalise":
        assert abs(padded.grad[0, 0]) < 1e-15


def test_K6_with_the_naive_sum_token_zero_would_move():
    loss = Divergence("reverse_kl", k=4, support="teacher")
    padded, other = (served([*NAMED, 0], [*NAMED.values(), x], loss) for x in (-math.inf, -103.0))
    assert abs(other.grad[0, 0] - padded.grad[0, 0]) > 1


def test_K7_whose_top_k_is_named_and_matters():
    p, q = (0.4, 0.3, 0.2, 0.1), (0.1, 0.35, 0.15, 0.4)
    losses = {
        s: run(Divergence("reverse_kl", k=2, support=s), p, q).loss.item()
        for s in ("teacher", "student", "union", "intersection")
    }
    entry = numbers(*p) * (numbers(*p) / numbers(*q)).log()
    # token 1, named twice, counts once
    sets = {"teacher": [3, 1], "student": [0, 1], "union": [0, 1, 3], "intersection": [1]}
    for support, ids in sets.items():
        assert losses[support] == pytest.approx(entry[ids].sum().item(), abs=1e-12)
    assert [Divergence(k, k=2).support for k in ("forward_kl", "reverse_kl", "jsd")] == [
        "teacher",
        "student",
        "union",
    ]
    assert "support=teacher" in str(Divergence("reverse_kl", k=2, support="teacher"))


def test_K7_a_support_says_what_it_needs():
    with pytest.raises(ValueError, match="needs k"):
        Support("teacher")
    with pytest.raises(ValueError, match="takes none"):
        Support("full", 4)
    with pytest.raises(ValueError, match="at least 1"):
        Support("student", 0)


def test_supports_are_those_before_the_step_whatever_the_student_says_now():
    g = torch.Generator().manual_seed(3)
    student, before, teacher = torch.randn(3, 1, 1, 6, generator=g, dtype=torch.float64)
    objective = Objective(Divergence("reverse_kl", k=2))
    case = Case(tokens(0), student, None, {"teacher": teacher}, before)
    ids = before[0, 0].topk(2).indices
    entry = (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1)))[0, 0]
    assert close(case.run(objective).loss, entry[ids].sum().item(), 12)
    assert set(ids.tolist()) != set(student[0, 0].topk(2).indices.tolist())
