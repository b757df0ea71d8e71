"""ULD: sorted probabilities in value and gradient, pairing by number, and what it cannot see."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective.alignment import Alignment
from opdkit.testing import check, evaluate
from opdkit.testing.check import RULES
from tests.methods.toy import P_S, close, logits, numbers, tokens


def uld(student, teacher, **arguments):
    return evaluate(
        load("uld", **arguments),
        logits(*student),
        tokens(*[0] * len(student)),
        models={"teacher": logits(*teacher)},
    )


def test_the_order_of_the_vocabulary_does_not_matter():
    """Identity 1: it cannot teach which token."""
    for order in itertools.permutations((0.2, 0.5, 0.3)):
        out = uld([P_S], [order])
        assert close(out.loss, 0.0, 12) and close(out.grad, torch.zeros(1, 1, 3), 12)
    assert all(
        close(uld([P_S], [order]).loss, 0.2, 12)
        for order in itertools.permutations((0.1, 0.6, 0.3))
    )


def test_two_positions_and_a_longer_vocabulary():
    """Identity 2: .2 and .9, mean .55."""
    student, teacher = (
        [(0.5, 0.3, 0.2), (0.1, 0.2, 0.7)],
        [(0.4, 0.3, 0.2, 0.1), (0.25, 0.25, 0.25, 0.25)],
    )
    assert close(uld(student, teacher).loss, 0.55)
    assert close(uld(student[:1], teacher[:1]).loss, 0.2) and close(
        uld(student[1:], teacher[1:]).loss, 0.9
    )


def test_value_and_gradient():
    """Identity 3: the middle entry is tied and pulls in no direction."""
    out = uld([P_S], [(0.6, 0.3, 0.1)])
    assert close(out.loss, 0.2) and close(out.grad[0, 0], (-0.35, 0.09, 0.26))
    half = uld([P_S], [(0.6, 0.3, 0.1)], distillation_weight=0.5)
    assert close(half.loss, 0.1) and close(half.grad * 2, out.grad, 12)


def test_the_gradient_is_that_of_finite_differences():
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 3, 6, generator=g).double(),
        torch.randn(1, 3, 9, generator=g).double(),
    )
    method, ids, h = (
        load("uld", student_temperature=1.7, teacher_temperature=0.6),
        tokens(0, 0, 0),
        1e-6,
    )

    def at(x):
        return evaluate(method, x, ids, models={"teacher": teacher}).loss.item()

    grad = evaluate(method, student, ids, models={"teacher": teacher}).grad
    for index in itertools.product([0], range(3), range(6)):
        step = torch.zeros_like(student)
        step[index] = h
        assert grad[index].item() == pytest.approx(
            (at(student + step) - at(student - step)) / (2 * h), abs=1e-8
        )


def test_bounds_and_padded_vocabularies():
    """Identity 4: 0 <= u <= 2, padding with zeros changes nothing, one-hot against uniform 2 (1 -
    1/V).
    """
    for size in (2, 3, 7):
        assert close(
            uld([[1.0] + [0.0] * (size - 1)], [[1 / size] * size]).loss, 2 * (1 - 1 / size)
        )
    assert close(uld([[1.0, 0.0]], [[1 / 1000] * 1000]).loss, 2 * (1 - 1 / 1000))
    base = uld([P_S], [(0.4, 0.3, 0.2, 0.1)])
    padded = uld([(*P_S, 0.0, 0.0, 0.0)], [(0.4, 0.3, 0.2, 0.1, 0.0)])
    assert close(padded.loss, base.loss.item(), 12) and close(padded.grad[..., :3], base.grad, 12)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (torch.randn(n, generator=g).mul(4).softmax(0).tolist() for n in (5, 8))
        assert 0 <= uld([a], [b]).loss <= 2


def test_against_the_total_variation():
    """Identity 5: twice the total variation where the ranks agree, else no more than that."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = (torch.randn(6, generator=g).double().softmax(0) for _ in range(2))
        same = q.sort().values[p.argsort().argsort()]
        assert close(uld([p.tolist()], [same.tolist()]).loss, (p - same).abs().sum().item(), 9)
        assert uld([p.tolist()], [q.tolist()]).loss <= (p - q).abs().sum() + 1e-12


def test_of_five_and_three_tokens_three_are_compared():
    """Identity 6; the tokens beyond have no gradient."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 5, 4, generator=g).double(),
        torch.randn(1, 3, 6, generator=g).double(),
    )
    out = evaluate("uld", student, tokens(0, 0, 0, 0, 0), models={"teacher": teacher})
    short = evaluate("uld", student[:, :3], tokens(0, 0, 0), models={"teacher": teacher})
    assert (
        close(out.loss, short.loss.item(), 12)
        and close(out.grad[:, :3], short.grad, 12)
        and (out.grad[:, 3:] == 0).all()
    )
    assert out.terms[0].weight.tolist() == [[1, 1, 1, 0, 0]]
    other = evaluate("uld", teacher, tokens(0, 0, 0), models={"teacher": student})
    assert other.terms[0].weight.tolist() == [[1, 1, 1]]


def test_the_end_of_sequence_is_left_out_on_both_sides_and_an_answer_without_text_is_a_zero():
    """V3: a one-token answer contributes; an answer that is only an end of sequence is a row of
    zero loss.
    """
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(3, 3, 4, generator=g).double(),
        torch.randn(3, 4, 6, generator=g).double(),
    )
    ids = torch.zeros(3, 3, dtype=torch.int64)
    # two tokens, one token, none; and the end of sequence
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    ends = torch.tensor([[2, 5, -1], [3, -1, -1], [-1, -1, -1]])
    others = torch.tensor([[1, 3, 5, -1], [3, -1, -1, -1], [-1, -1, -1, -1]])
    alignment = Alignment(torch.zeros(3, 4, dtype=torch.int64), ends, others)
    out = evaluate(
        "uld", student, ids, mask, models={"teacher": teacher}, alignments={"teacher": alignment}
    )

    def u(b, t):
        a, c = (
            torch.nn.functional.pad(x[b, t].softmax(0), (0, 6 - x.shape[-1])).sort().values
            for x in (student, teacher)
        )
        return (a - c).abs().sum()

    assert close(out.loss, (((u(0, 0) + u(0, 1)) / 2 + u(1, 0)) / 3).item(), 12)
    assert out.terms[0].weight.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert (
        (out.grad[2] == 0).all() and (out.grad[0, 2] == 0).all() and out.grad[1, 0].abs().sum() > 0
    )


def test_temperatures_are_each_models_own():
    student, teacher = logits(P_S), logits((0.6, 0.3, 0.1))
    out = evaluate(
        load("uld", student_temperature=2.0, teacher_temperature=0.5),
        student,
        tokens(0),
        models={"teacher": teacher},
    )
    scaled = evaluate("uld", student / 2, tokens(0), models={"teacher": teacher * 2})
    assert close(out.loss, scaled.loss.item(), 12) and close(out.grad, scaled.grad / 2, 12)


def test_the_likelihood_is_a_term_of_its_own_and_off():
    assert [t.name for t in uld([P_S], [P_S]).terms] == ["rank_distance"]
    out = uld([P_S], [P_S], crossentropy_weight=2.0)
    assert close(out.loss, 2 * -numbers(0.5).log().item(), 9)
    assert (
        load("uld").curriculum.student_share == 1
        and load("uld", lmbda=0.25).curriculum.student_share == 0.25
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_vocabulary_is_sorted_as_torch_sorts(dtype):
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 3, 20_000, generator=g, dtype=dtype),
        torch.randn(1, 3, 30_000, generator=g, dtype=dtype),
    )
    out = evaluate("uld", student, tokens(0, 0, 0), models={"teacher": teacher})
    leaf = student.double().requires_grad_()
    a, b = (x.double().softmax(-1).sort(-1, descending=True).values for x in (leaf, teacher))
    loss = (torch.nn.functional.pad(a, (0, 10_000)) - b).abs().sum(-1).mean()
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (
        close(out.loss.double(), loss.item(), 5)
        and (out.grad - grad).norm() < (1e-12 if dtype == torch.float64 else 2e-2) * grad.norm()
    )


def test_check_passes():
    assert len(check("uld").passed) == len(RULES)
    assert (
        not check(load("uld", crossentropy_weight=0.5, lmbda=0.0)).failed
        and not check(load("uld", skip_eos=False)).failed
    )


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="share of batches"):
        load("uld", lmbda=-0.1)
    with pytest.raises(UserError, match="divide logits"):
        load("uld", student_temperature=0.0)
    with pytest.raises(UserError, match="at least 0"):
        load("uld", crossentropy_weight=-1.0)


def test_it_asks_for_no_token_ids():
    needs = load("uld").needs
    assert (
        needs.spans("teacher")
        and not needs.ids("teacher")
        and needs.whole("teacher")
        and needs.models == {"teacher"}
    )
    assert load("gkd").needs.ids("teacher") and not load("gkd").needs.spans("teacher")
