"""PLD: the card's numbers and identities, the label on rollouts, and the ranking of the top k."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.methods.pld import Ranking
from opdkit.objective import ForwardKL
from opdkit.objective.divergences import divergence
from opdkit.objective.kernels.listwise import choices, descending_ids, listwise
from opdkit.testing import check, evaluate
from tests.methods.made_up import GROUP, REWARD, MadeUp, assert_dense
from tests.methods.toy import close, numbers, tokens

T, S = (2.0, 1.0, 0.0), (0.5, 1.5, -0.5)


def on(student, teacher, y=0, method=None, **facts):
    """Of one token y, from logits."""
    s, t = (torch.tensor([[x]], dtype=torch.float64) for x in (student, teacher))
    return evaluate(method or load("pld"), s, tokens(y), models={"teacher": t}, **facts)


def naive(z: Tensor, q: Tensor, ranking: list[int], rest: Tensor | float = 0.0) -> Tensor:
    """[]: the definition, one choice after the other, of logits z [V] and weights q [V]; `rest` is
    the mass of exp z that stays to be chosen from and never is.
    """
    total = z.new_zeros(())
    for k, v in enumerate(ranking):
        total = total + q[v] * ((z[ranking[k:]].exp().sum() + rest).log() - z[v])
    return total


def test_the_card_without_a_label():
    q = numbers(*T).softmax(-1)
    assert close(q, [0.665241, 0.244728, 0.090031])
    left = numbers(*S).flip(0).logcumsumexp(0).flip(0)[[0, 1, 2]]
    assert close(left - numbers(*S), [1.407606, 0.126928, 0.0])
    out = on(S, T)
    assert close(out.loss, 0.967460) and close(out.grad, [[[-0.502438, 0.413373, 0.089064]]])
    assert close(q[0] * 1.407606, 0.936397)
    assert close(on([x + 7 for x in S], T).loss, 0.967460)


def test_the_card_with_the_label_2():
    """The order (2, 0, 1): 0.090031 * 2.407606 + 0.665241 * 1.313262."""
    assert close(on(S, T, 2, load("pld", label=1.0), correct=[True]).loss, 1.090394)


def test_a_label_that_the_teacher_prefers_too_changes_nothing():
    labelled = on(S, T, 0, load("pld", label=1.0), correct=[True])
    assert torch.equal(labelled.grad, on(S, T).grad)


@pytest.mark.parametrize("label", [0.25, 1.0])
def test_the_label_is_a_share_of_the_loss_of_correct_rollouts(label):
    method = load("pld", label=label)
    right = on(S, T, 2, method, correct=[True])
    assert close(right.loss, label * 1.090394 + (1 - label) * 0.967460)
    assert torch.equal(on(S, T, 2, method, correct=[False]).grad, on(S, T).grad)


def test_a_certain_teacher_leaves_cross_entropy():
    out = on(S, (0.0, -math.inf, -math.inf))
    p = numbers(*S).softmax(-1)
    assert close(out.loss, -p[0].log(), 12) and close(out.grad[0, 0], p - numbers(1, 0, 0), 12)


def test_of_two_tokens_the_first_choice_is_all_there_is():
    q, p = numbers(1.0, 0.2).softmax(-1), numbers(-0.3, 0.4).softmax(-1)
    assert close(on((-0.3, 0.4), (1.0, 0.2)).loss, -q[0] * p[0].log(), 12)


def test_only_the_order_of_the_teacher_and_its_weights_matter():
    ls, lq = numbers(*S).log_softmax(-1)[None], numbers(*T).log_softmax(-1)[None]
    value, slope = choices(ls, lq)
    assert close(value, on(S, T).loss[None], 12) and close(slope, on(S, T).grad[0], 12)
    assert close(on(S, [x + 3 for x in T]).loss, on(S, T).loss, 12)


def test_it_is_convex_in_the_students_logits_and_never_negative():
    g = torch.Generator().manual_seed(0)
    a, b, t = torch.randn(3, 200, 6, generator=g, dtype=torch.float64) * 2
    middle = listwise((a + b) / 2, t)
    assert (middle <= (listwise(a, t) + listwise(b, t)) / 2 + 1e-12).all() and (middle > 0).all()


def test_it_has_no_minimum_at_the_teacher_and_falls_to_nothing_as_the_gaps_grow():
    out = on(T, T)
    assert out.grad.abs().max() > 0.05
    losses = [on([scale * x for x in T], T).loss.item() for scale in (1, 4, 16, 64)]
    assert losses == sorted(losses, reverse=True) and 0 <= losses[-1] < 1e-12


def test_equal_tokens_of_the_teacher_are_ranked_by_id():
    out = on(S, (1.0, 1.0, 0.0))
    q = numbers(1.0, 1.0, 0.0).softmax(-1)
    assert close(out.loss, naive(numbers(*S), q, [0, 1, 2]), 12)
    x = torch.tensor([[0.0, -0.0, 3.0, 3.0, -2.0, -math.inf, -1.5, math.inf]])
    expected = [[7, 2, 3, 0, 1, 6, 4, 5]]
    assert descending_ids(x).tolist() == descending_ids(x.double()).tolist() == expected


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_equal_tokens_among_the_top_k_are_ranked_by_id_too(label):
    """In whatever order the top k names them; a model in bfloat16 has many equals."""
    t = torch.tensor([0.5, 1.0, 0.5, 2.0, 1.0, 0.5, 2.0, -3.0, -4.0, 1.0]).double()
    z = torch.randn(len(t), generator=torch.Generator().manual_seed(3)).double()
    q, y = t.softmax(-1), 9
    order = [3, 6, 1, 4, 9, 0, 2, 5]
    order = [y, *(v for v in order if v != y)] if label else order
    out = on(z.tolist(), t.tolist(), y, load("pld", label=label, k=8), correct=[True])
    assert close(out.loss, naive(z, q, order, z[[7, 8]].exp().sum()), 12)


def test_float32_is_ranked_as_float64_is():
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(descending_ids(x), descending_ids(x.double()))


def test_tokens_that_nobody_can_write_are_no_trouble():
    """Ruled out by the teacher, by the student, by both; and the label ruled out by the teacher."""
    for s, t in (
        (S, (1.0, 0.5, -math.inf)),
        ((0.5, 1.0, -math.inf), T),
        ((0.5, 1.0, -math.inf), (1.0, 0.5, -math.inf)),
    ):
        for y in (0, 2):
            out = on(s, t, y, load("pld", label=0.5), correct=[True])
            assert out.loss.isfinite() and out.grad.isfinite().all()
    both = on((0.5, 1.0, -math.inf), (1.0, 0.5, -math.inf))
    assert close(both.grad[0, 0, :2], on((0.5, 1.0), (1.0, 0.5)).grad[0, 0], 12)
    assert both.grad[0, 0, 2].abs() < 1e-40


def ranked(d: MadeUp, b: int, t: int, k: int | None, labelled: bool) -> Tensor:
    """[]: the loss at one token, by the definition."""
    z, q, y = d["student"][b, t], d["teacher"][b, t].exp(), int(d.tokens[b, t])
    order = q.argsort(descending=True).tolist()
    if labelled:
        order = [y, *(v for v in order if v != y)]
        if k is not None and y not in q.topk(k).indices:
            order = [y, *q.topk(k - 1).indices.tolist()]
    listed = order[:k]
    outside = [v for v in range(len(q)) if v not in listed]
    return naive(z, q, listed, z[outside].exp().sum())


@pytest.mark.parametrize("k", [None, 4, 1, 9])
@pytest.mark.parametrize("label", [0.0, 0.4, 1.0])
def test_the_naive_form(label, k):
    def formula(d: MadeUp) -> Tensor:  # []
        total = 0.0
        for b, t in d.mask.nonzero().tolist():
            share = label * (REWARD[b] > 0)
            total = total + (1 - share) * ranked(d, b, t, k, False)
            if share:
                total = total + share * ranked(d, b, t, k, True)
        return total / d.mask.sum()

    facts = {"correct": [r > 0 for r in REWARD], "group": GROUP} if label else {}
    assert_dense(load("pld", label=label, k=k), formula, **facts)


def test_added_to_a_divergence_it_meets_its_teacher_nearer():
    """Alone it takes the student past the teacher, to a distribution of almost no entropy."""
    t = numbers(*T).log_softmax(-1)[None]

    def fitted(kl: float) -> float:
        z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        for _ in range(500):
            loss = listwise(z, t) + kl * divergence(ForwardKL(), z.log_softmax(-1), t)
            z.data -= 2 * torch.autograd.grad(loss.sum(), z)[0]
        return divergence(ForwardKL(), z.log_softmax(-1), t).item()

    assert fitted(1.0) < 0.1 < 1.0 < fitted(0.0)


@pytest.mark.parametrize(
    "arguments", [{}, {"label": 0.3}, {"label": 1.0, "k": 7}, {"k": 1}, {"k": 131}]
)
def test_check(arguments):
    check(load("pld", **arguments))


def test_a_share_of_zero_asks_for_no_verdict_and_the_top_k_for_no_whole_teacher():
    assert not load("pld").needs.columns and load("pld").needs.whole("teacher")
    assert load("pld", label=0.1).needs.columns == {"correct"}
    assert not load("pld", k=5, label=0.1).needs.whole("teacher")
    assert str(Ranking()) == "Ranking()"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"label": -0.1}, "lie in"), ({"label": 1.1}, "lie in"), ({"k": 0}, "at least 1")],
)
def test_bad_arguments_are_explained(arguments, said):
    with pytest.raises(UserError, match=said):
        load("pld", **arguments)
