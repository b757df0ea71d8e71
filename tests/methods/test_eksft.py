"""EKSFT: the card's five tokens, its masks, weights and limits, and the whole loss written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.curricula import writer_of
from opdkit.methods.method import load
from opdkit.objective import Batch, EvennessFact, GapFact, ReverseKL
from opdkit.testing import check, evaluate
from tests.methods.made_up import MadeUp, assert_dense
from tests.methods.toy import at_distance, close, logits, numbers, tokens, with_entropy

H, K, CE = (0.1, 2.0, 0.3, 1.5, 0.2), (0.9, 0.05, 0.02, 0.4, 0.01), (1.0, 2.0, 0.5, 3.0, 0.25)


def planned(h: Sequence[float] = H, k: Sequence[float] = K, rows: int = 1, **arguments: object):
    """The terms of a step of these entropies and drifts, in a vocabulary of 8."""
    shape = rows, len(h) // rows
    facts = {
        EvennessFact("student"): numbers(*h).view(shape) / math.log(8),
        GapFact(ReverseKL(), "student", "reference"): numbers(*k).view(shape),
    }
    batch = Batch(torch.zeros(shape).long(), torch.ones(shape).bool(), facts, dtype=torch.float64)
    return load("eksft", **{"rho": 0.4, **arguments}).objective.plan(batch).parts


def chosen(part) -> list[int]:
    """The tokens that a term looks at, row by row."""
    return part.weight.flatten().nonzero()[:, 0].tolist()


def mean(part, values: Sequence[float]) -> Tensor:
    """[]: the term of these losses of its tokens, without its own weight."""
    return (part.scale.flatten() * numbers(*values)).sum() / part.weight.max()


@pytest.mark.parametrize(
    ("select", "kept", "loss"), [("union", [2, 4], 0.375), ("intersection", [0, 1, 2, 4], 0.9375)]
)
def test_what_is_imitated(select, kept, loss):
    parts = planned(select=select)
    assert chosen(parts[0]) == kept and close(mean(parts[0], CE), loss, 12)
    assert chosen(parts[1]) == [1, 3] and chosen(parts[2]) == [0, 3]


def test_the_regularisers_and_the_loss():
    parts = planned()
    evenness = [h / math.log(8) for h in H]
    assert close(mean(parts[1], evenness), 0.841572) and close(mean(parts[2], K), 0.65, 12)
    # 0.841572 is above 0.5, 0.65 below 2: both weights fall
    assert close(parts[1].weight.max(), 0.0475, 12) and close(parts[2].weight.max(), 0.0475, 12)
    losses = (CE, [-x for x in evenness], K)
    total = sum((part.scale.flatten() * numbers(*x)).sum() for part, x in zip(parts, losses))
    assert close(total, 0.365900)


def test_the_weights_rise_where_their_targets_are_missed():
    parts = planned(entropy_target=0.85, kl_target=0.6)
    assert close(parts[1].weight.max(), 0.0525, 12) and close(parts[2].weight.max(), 0.0525, 12)
    parts = planned(entropy_target=0.84, kl_target=0.65)  # a KL at its target is not above it
    assert close(parts[1].weight.max(), 0.0475, 12) and close(parts[2].weight.max(), 0.0475, 12)


def test_the_weights_start_anew_at_each_step():
    """The method keeps nothing: the same step twice has the same weights."""
    assert not load("eksft").needs.companions
    first, again = planned(), planned()
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(first, again))


def test_tokens_are_chosen_from_the_whole_step_and_of_equals_the_earlier():
    h = (0.1, 0.1, 2.0, 1.9, 1.8, 0.1)
    parts = planned(h, [0.0] * 6, rows=2, rho=0.5)
    assert chosen(parts[1]) == [2, 3, 4]  # one of the first rollout, two of the second
    assert chosen(parts[2]) == [0, 1, 2]  # all equal
    assert chosen(planned([1.0] * 6, (*K, 0.0), rows=2, rho=0.34)[1]) == [0, 1]


@pytest.mark.parametrize(("rho", "count"), [(0.19, 0), (0.2, 1), (0.39, 1), (0.6, 3), (1.0, 5)])
def test_as_many_are_chosen_as_the_share_holds_whole(rho, count):
    parts = planned(rho=rho)
    assert len(chosen(parts[1])) == len(chosen(parts[2])) == count


def test_the_kl_of_the_card():
    """Of (0.5, 0.3, 0.2) against (0.2, 0.5, 0.3); the code has sum p (p - log q)."""
    p, q = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
    method = load("eksft", rho=1.0, entropy=0.0, kl=1.0)
    out = evaluate(method, logits(p), tokens(0), models={"reference": logits(q)})
    assert close(out.loss / 0.95, 0.223805)
    wrong = (numbers(*p) * (numbers(*p) - numbers(*q).log())).sum()
    assert close(wrong, 1.633458)


def real() -> tuple[Tensor, Tensor]:
    """[1, 5, 8] each: logits of a student and a reference with the card's entropies and KLs."""
    p = [with_entropy(h, 8) for h in H]
    q = [at_distance(x, k) for x, k in zip(p, K)]
    return torch.stack(p).log()[None], torch.stack(q).log()[None]


def test_the_gradients_lie_where_the_masks_say():
    student, reference = real()
    ids, models = tokens(0, 1, 2, 3, 4), {"reference": reference}
    alone = {"entropy": 0.0, "kl": 0.0}
    imitated = evaluate(load("eksft", rho=0.4, **alone), student, ids, models=models)
    ce = -student.log_softmax(-1)[0, [2, 4], [2, 4]].mean()
    assert close(imitated.loss, ce, 12)
    assert imitated.grad.abs().sum(-1)[0].gt(0).tolist() == [False, False, True, False, True]
    both = evaluate(load("eksft", rho=0.4, select="intersection"), student, ids, models=models)
    only = evaluate(load("eksft", rho=1.0, kl=0.0), student, ids, models=models)
    assert both.terms[1].weight.gt(0).tolist() == [[False, True, False, True, False]]
    assert both.terms[2].weight.gt(0).tolist() == [[True, False, False, True, False]]
    assert (only.terms[0].weight == 0).all() and only.loss < 0
    evenness = numbers(*H).mean() / math.log(8)  # 0.394 < 0.5
    assert close(only.loss, -0.05 * 1.05 * evenness)


def test_where_the_model_is_the_reference_the_kl_is_nothing():
    student, _ = real()
    out = evaluate(
        load("eksft", rho=0.4, entropy=0.0),
        student,
        tokens(0, 1, 2, 3, 4),
        models={"reference": student},
    )
    assert chosen(out.terms[1]) == [0, 1] and out.terms[1].value == 0
    assert (out.grad[0, 0] == 0).all()  # chosen by its place, held to what it is


def test_without_a_share_it_is_sft():
    student, reference = real()
    ids = tokens(0, 1, 2, 3, 4)
    plain = evaluate(load("sft"), student, ids)
    ours = evaluate(load("eksft", rho=0.0), student, ids)
    assert torch.equal(ours.grad, plain.grad) and load("eksft", rho=0.0).needs.facts == frozenset()
    few = evaluate(load("eksft", rho=0.1), student, ids, models={"reference": reference})
    assert close(few.grad, plain.grad, 12)  # 0.1 of five tokens is none


def test_with_a_share_of_1_nothing_is_imitated():
    student, reference = real()
    out = evaluate(
        load("eksft", rho=1.0), student, tokens(0, 1, 2, 3, 4), models={"reference": reference}
    )
    assert out.terms[0].value == 0 and out.loss.isfinite() and out.grad.isfinite().all()
    assert out.grad.abs().max() > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rho": 0.35, "select": "intersection"},
        {"rho": 0.5, "entropy": 1.0, "kl": 0.5, "entropy_target": 0.9, "kl_target": 0.3},
    ],
)
def test_the_naive_form(arguments):
    settings = {"rho": 0.2, "entropy": 0.05, "kl": 0.05, "entropy_target": 0.5, "kl_target": 2.0}
    settings |= {"select": "union"} | arguments

    def formula(d: MadeUp) -> Tensor:  # []
        def statistics(s: Tensor) -> tuple[Tensor, Tensor]:  # [N], [N]
            s, q = s[d.mask], d["reference"][d.mask]
            return -(s.exp() * s).sum(-1) / math.log(9), (s.exp() * (s - q)).sum(-1)

        h, k = statistics(d["before"])
        count = int(settings["rho"] * len(h) + 1e-9)
        by_h, by_k = (x.sort(descending=True, stable=True).indices[:count] for x in (h, k))
        live_h, live_k = statistics(d["student"])
        apart = set(by_h.tolist()), set(by_k.tolist())
        left_out = apart[0] | apart[1] if settings["select"] == "union" else apart[0] & apart[1]
        rest = [i for i in range(len(h)) if i not in left_out]
        l_h = settings["entropy"] * (1.05 if h[by_h].mean() < settings["entropy_target"] else 0.95)
        l_k = settings["kl"] * (1.05 if k[by_k].mean() > settings["kl_target"] else 0.95)
        imitation = -d.at("student")[d.mask][rest].mean()
        return imitation - l_h * live_h[by_h].mean() + l_k * live_k[by_k].mean()

    assert_dense(load("eksft", **arguments), formula, models=("reference",))


def test_the_data_writes_every_response_and_the_reference_is_the_initial_model():
    method = load("eksft")
    writer = writer_of(method.curriculum)
    assert writer.reads_data and not writer.draws
    assert method.models == {"reference": {"kind": "self", "weights": "fixed"}}


def test_what_the_data_wrote_is_chosen_and_learnt_like_any_other_text():
    student, reference = real()
    ids, given = tokens(0, 1, 2, 3, 4), torch.ones(1, 5, dtype=torch.bool)
    outs = [
        evaluate(load("eksft", rho=0.4), student, ids, models={"reference": reference}, marks=marks)
        for marks in ({}, {"given": given}, {"guided": given})
    ]
    assert all(torch.equal(out.grad, outs[0].grad) for out in outs[1:])
    tool = evaluate(
        load("eksft", rho=0.4), student, ids, models={"reference": reference}, marks={"tool": given}
    )
    assert tool.loss == 0 and (tool.grad == 0).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"select": "intersection"},
        {"rho": 0.0},
        {"rho": 1.0},
        {"entropy": 0.0},
        {"kl": 0.0, "rho": 0.5},
        {"entropy": 0.0, "kl": 0.0},
    ],
)
def test_check(arguments):
    check(load("eksft", **arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rho": 1.5}, "lie in"),
        ({"entropy_target": -0.1}, "lie in"),
        ({"entropy": -1.0}, "at least 0"),
        ({"kl": -1.0}, "at least 0"),
        ({"select": "both"}, "must be one of union, intersection"),
    ],
)
def test_bad_arguments_are_explained(arguments, said):
    with pytest.raises(UserError, match=said):
        load("eksft", **arguments)
