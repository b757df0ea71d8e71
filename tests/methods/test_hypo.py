"""HyPO: DPO on the pairs, and a KL on the student's own responses whose gradient is by sampling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.curricula import Preference
from opdkit.methods.hypo import OnlineKL
from opdkit.methods.method import load
from opdkit.objective import ColumnFact, LogpFact, Marked, Objective
from opdkit.testing import check, evaluate, fabricate
from tests.methods.steps import GROUPS, agrees, at, step
from tests.methods.toy import P_S, P_T, binary, close, numbers, reverse_kl_gradient

# chosen, rejected, and two that the student wrote
STUDENT, REFERENCE = (-10.0, -12.0, -9.0, -11.0), (-10.4, -11.8, -9.5, -10.7)
ONLINE = torch.tensor([[False], [False], [True], [True]])


def of_card(group, **arguments):
    """One token to a response: it has the log-prob of the whole."""
    student, reference = (torch.cat([binary([x]) for x in rows]) for rows in (STUDENT, REFERENCE))
    return evaluate(
        load("hypo", **arguments),
        student,
        torch.zeros(4, 1).long(),
        models={"reference": reference},
        group=group,
        correct=[1, 0, 0, 0],
        marks={"online": ONLINE},
    )


def test_the_numbers_of_the_card():
    """D = (.5, -.3); beside each other A = (.8, -.8), alone A = D."""
    together = of_card([0, 0, 0, 0])
    assert close(together.terms[0].value, 0.663597)
    assert close(-together.terms[1].credit[2:, 0], [0.8, -0.8])
    assert close(together.terms[1].value, 0.008) and close(together.loss, 0.671597)
    alone = of_card([0, 0, 1, 2])
    assert close(-alone.terms[1].credit[2:, 0], [0.5, -0.3])
    assert close(alone.terms[1].value, -0.006) and close(alone.loss, 0.657597)
    # each stream has its own count
    assert [t.denominator for t in together.terms] == [2, 2]


def test_the_mean_of_D_is_reported_as_the_kl():
    loss = load("hypo").objective.terms[1].loss
    case = fabricate(load("hypo").objective)
    batch = case.batch(load("hypo").objective)
    told = loss.metrics(batch, batch.trained)["kl/reference"]
    d = batch.read(LogpFact("live")) - batch.read(LogpFact("reference"))
    marked = batch.mark("online").any(1)
    sums = torch.where(batch.mask, d, 0.0).sum(1)[marked]
    assert told.item() == pytest.approx(sums.mean().item(), abs=1e-12) and marked.sum() == 2
    batch.signals.clear()
    batch.facts[ColumnFact("mark:online")] = torch.zeros_like(batch.mask)
    assert loss.metrics(batch, batch.trained) == {}


def drawn(tokens, group):
    """Gradient [n, V] of the KL's term for these tokens of P_S, weight 1."""
    n = len(tokens)
    logits = numbers(*P_S).log().expand(n, 1, 3)
    out = evaluate(
        Objective((OnlineKL() * Marked("online")).per("own_row_sums")),
        logits,
        torch.tensor(tokens)[:, None],
        models={"reference": numbers(*P_T).log().expand(n, 1, 3)},
        group=group,
        marks={"online": torch.ones(n, 1).bool()},
    )
    return out.grad.sum(0)[0]


def test_its_expected_gradient_is_that_of_the_reverse_kl():
    exact = reverse_kl_gradient(P_S, P_T)
    assert close(exact, [0.346243, -0.220389, -0.125854])
    alone = sum(P_S[y] * drawn([y], [0]) for y in range(3))
    assert close(alone, exact, 12)
    pairs = itertools.product(range(3), repeat=2)
    rloo = sum(P_S[a] * P_S[b] * drawn([a, b], [0, 0]) for a, b in pairs)
    assert close(rloo, exact, 12)


def test_D_has_no_gradient():
    """Through both factors the gradient would be (D + log pi_s) grad log pi_s."""
    for y in range(3):
        d = math.log(P_S[y] / P_T[y])
        score = -numbers(*P_S)
        score[y] += 1
        assert close(drawn([y], [0]), d * score, 12)


def test_without_a_weight_it_is_dpo():
    assert load("hypo", lam=0.0, beta=0.3).objective == load("f_dpo", beta=0.3).objective
    assert load("hypo", lam=0.0).curriculum == Preference()


def test_without_pairs_it_draws_the_policy_to_the_reference():
    """300 steps of the expected gradient, by enumeration: the optimum is the reference."""
    z = numbers(*P_S).log()
    for _ in range(300):
        p = z.softmax(-1)
        d = p.log() - numbers(*P_T).log()
        z = z - sum(
            p[y] * d[y] * (torch.eye(3, dtype=torch.float64)[y] - p) for y in range(3)
        )  # as `test_its_expected_gradient` finds it
    assert close(z.softmax(-1), numbers(*P_T), 6)
    out = of_card([0, 1, 2, 3])  # nobody to be compared with
    assert out.terms[0].value == 0 and out.terms[1].value != 0


def test_at_the_reference_the_second_part_is_exactly_zero():
    same = torch.cat([binary([x]) for x in STUDENT])
    out = evaluate(
        "hypo",
        same,
        torch.zeros(4, 1).long(),
        models={"reference": same},
        group=[0] * 4,
        correct=[1, 0, 0, 0],
        marks={"online": ONLINE},
    )
    assert close(out.loss, math.log(2), 12) and (out.grad[2:] == 0).all()


@pytest.mark.parametrize("fresh", [True, False])
def test_it_is_the_naive_formula(fresh):
    """D at the student as it is; off policy each token weighs as its ratio to the sampler says."""
    case = step(5, fresh, ("reference",))
    online = torch.tensor([0, 1, 0, 0, 1, 1]).bool()
    right = [1, 0, 0, 1, 0, 0]
    case.columns["correct"] = right
    case.marks["online"] = online[:, None].expand(case.tokens.shape)

    def reference(ls, said):
        y = case.tokens
        own, mask = at(ls, y), case.mask
        l = torch.where(mask, own - at(said["reference"], y), 0.0).sum(1)
        pairs = [(0, 2), (3, None)]
        dpo = -torch.log(torch.sigmoid(0.3 * (l[pairs[0][0]] - l[pairs[0][1]])))
        d, kl = l.detach(), 0.0
        for b in online.nonzero()[:, 0].tolist():
            others = [i for i in range(6) if i != b and online[i] and GROUPS[i] == GROUPS[b]]
            a = d[b] - (sum(d[i] for i in others) / len(others) if others else 0.0)
            w = (own - at(said["sampler"], y)).exp().detach()
            kl = kl + (w * a * own)[b][mask[b]].sum()
        return dpo + 0.7 * kl / 3

    assert agrees(load("hypo", beta=0.3, lam=0.7), case, reference)


@pytest.mark.parametrize("arguments", [{}, {"lam": 0.0}, {"beta": 1.0, "lam": 2.0}])
def test_check(arguments):
    check(load("hypo", **arguments))


def test_who_writes():
    made = load("hypo")
    assert made.curriculum == Preference(online=2) and "mark:online" in made.needs.columns
    with pytest.raises(UserError, match="lam=-1"):
        load("hypo", lam=-1.0)
    with pytest.raises(UserError, match="beta=0"):
        load("hypo", beta=0.0)
