"""DistIL: the gradient of the sequence objective by enumeration, its two parts, and which steps
improve.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.distil import CrossEntropy
from opdkit.methods.method import load
from opdkit.objective import Divergence, Gap, Objective, PolicyGradient, ToGo
from opdkit.testing import check, evaluate
from tests.methods.ragged import LEVEL, mask_of, on
from tests.methods.steps import GROUPS, agrees, at, step
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens

# logit of action 1, and the teacher's probability of it, by prefix
STUDENT, TEACHER = {(): 0.3, (0,): -0.2, (1,): 0.5}, {(): 0.6, (0,): 0.1, (1,): 0.7}
ONES = {prefix: 1 / (1 + math.exp(-z)) for prefix, z in STUDENT.items()}


def two_steps(a):
    """[1, 2, 2] each: student and teacher logits along a response that begins with `a`."""
    return [logits(*((1 - p[q], p[q]) for q in ((), (a,)))) for p in (ONES, TEACHER)]


def chance(a, b):
    return (ONES[()] if a else 1 - ONES[()]) * (ONES[a,] if b else 1 - ONES[a,])


def expected(objective):
    """Loss [] and gradient [3] with respect to the logits at (), 0 and 1, over all responses."""
    loss, total = 0.0, dict.fromkeys(STUDENT, 0.0)
    for a, b in itertools.product((0, 1), repeat=2):
        s, t = two_steps(a)
        out = evaluate(objective, s, tokens(a, b), models={"teacher": t})
        loss += chance(a, b) * out.terms[0].value
        for prefix, slope in zip(((), (a,)), out.grad[0, :, 1].tolist()):
            total[prefix] += chance(a, b) * slope
    return loss, numbers(*total.values())


def parts(kind, k=None, shift=0.0):
    """Imitation and future credit of a divergence, the second with a constant baseline."""
    rest = {"support": "full"} if k is None else {"support": "teacher", "k": k, "rest": "target"}
    distance = Gap(kind, **rest)
    later = distance - ToGo(distance)
    later = later + shift if shift else later
    return Divergence(kind, **rest).per("row_sums"), PolicyGradient(later).per("row_sums")


@pytest.mark.parametrize("k", [2, None])
def test_its_mean_gradient_is_that_of_the_sequence_objective(k):
    loss, gradient = expected(load("distil", k=k))
    assert ONES[()] == pytest.approx(0.574443, abs=5e-7)
    assert close(loss, 1.295905) and close(gradient, (-0.024106, 0.149016, -0.044543))
    # and by autograd through the sum over responses
    z = torch.tensor(list(STUDENT.values()), dtype=torch.float64, requires_grad=True)
    p = dict(zip(STUDENT, z.sigmoid()))
    each = {q: -(TEACHER[q] * p[q].log() + (1 - TEACHER[q]) * (1 - p[q]).log()) for q in STUDENT}
    assert [round(x.item(), 6) for x in each.values()] == [0.674355, 0.618139, 0.624077]
    whole = each[()] + (1 - p[()]) * each[0,] + p[()] * each[1,]
    (exact,) = torch.autograd.grad(whole, z)
    assert close(gradient, exact, 12) and close(loss, whole, 12)


def test_its_two_parts():
    imitation, future = parts(CrossEntropy(), 2)
    assert Objective(imitation, future) == load("distil", k=2).objective
    assert close(expected(imitation)[1], (-0.025557, 0.149016, -0.044543))
    assert close(expected(future)[1], (0.001452, 0.0, 0.0))
    of_kl = expected(Divergence("forward_kl").per("row_sums"))[1]
    assert close(expected(imitation)[1], of_kl, 12)


def test_a_constant_baseline_changes_nothing_on_average():
    for shift in (0.7, -3.0):
        moved = expected(Objective(*parts(CrossEntropy(), 2, shift)))[1]
        assert close(moved, expected(load("distil", k=2))[1], 12)


def test_the_mean_of_the_group_shrinks_the_future_part_by_its_own_share():
    """Two rollouts: b is half the token's own C and half its peer's, which does not depend on the
    token. Half of the future part is left, as of the advantage of a group of two.
    """
    total = dict.fromkeys(STUDENT, 0.0)
    every = list(itertools.product((0, 1), repeat=2))
    for first, second in itertools.product(every, repeat=2):
        (s, t), (s2, t2) = two_steps(first[0]), two_steps(second[0])
        out = evaluate(
            load("distil", k=2, baseline="group"),
            torch.cat([s, s2]),
            torch.tensor([first, second]),
            models={"teacher": torch.cat([t, t2])},
            group=[0, 0],
        )
        for row, (a, _) in enumerate((first, second)):
            for prefix, slope in zip(((), (a,)), out.grad[row, :, 1].tolist()):
                total[prefix] += chance(*first) * chance(*second) * slope
    imitation, future = (expected(part)[1] for part in parts(CrossEntropy(), 2))
    assert close(numbers(*total.values()), imitation + future / 2, 12)


def test_a_kl_in_its_place_has_another_future():
    _, gradient = expected(Objective(*parts("forward_kl")))
    assert close(gradient, (-0.093967, 0.149016, -0.044543))
    own = {q: -(t * math.log(t) + (1 - t) * math.log(1 - t)) for q, t in TEACHER.items()}
    value = expected(load("distil", k=2))[0].item() - own[()]
    assert value - sum(p * own[a,] for a, p in ((0, 1 - ONES[()]), (1, ONES[()]))) == pytest.approx(
        0.133646, abs=5e-7
    )


def one_token(kind=None):
    objective = load("distil", k=3) if kind is None else Divergence(kind)
    return evaluate(objective, logits(P_S), tokens(0), models={"teacher": logits(P_T)})


def test_one_token_is_forward_kl():
    out = one_token()
    assert close(out.terms[0].value, 1.223447) and close(out.grad[0, 0], (0.3, -0.2, -0.1))
    assert close(out.grad, one_token("forward_kl").grad, 12) and out.terms[1].value == 0


P, Q, R = numbers(0.1, 0.5, 0.4), numbers(0.4, 0.01, 0.59), numbers(1.0, 0.5, 0.0)


def slope_of(objective):
    """[3]: its gradient at P towards Q, with respect to the logits."""
    s, t = P.log().view(1, 1, 3), Q.log().view(1, 1, 3)
    return evaluate(objective, s, tokens(0), models={"teacher": t}).grad[0, 0]


def test_which_steps_improve_the_reward():
    """A natural-gradient step of the logits moves P by minus the gradient: for the cross-entropy
    towards Q, whose reward is higher; reverse KL makes the better action rarer.
    """
    assert close(R @ P, 0.35) and close(R @ Q, 0.405)
    fisher = P.diag() - P.outer(P)
    natural, plain = {}, {}
    for name, objective in (("ce", load("distil", k=3)), ("rkl", Divergence("reverse_kl"))):
        gradient = slope_of(objective)
        natural[name] = R @ fisher @ torch.linalg.pinv(fisher) @ -gradient
        plain[name] = R @ fisher @ -gradient
    assert close(natural["ce"], 0.055) and close(natural["rkl"], -0.257705)
    apart = (P / Q).log()
    assert close(natural["rkl"], -((P * apart * R).sum() - (P @ apart) * (P @ R)), 12)
    # finite steps of size 0.1: a linear mixture, and a geometric one
    geometric = P**0.9 * Q**0.1
    assert close(R @ (0.9 * P + 0.1 * Q), 0.3555)
    assert close(R @ geometric / geometric.sum(), 0.326791)
    # the plain gradient promises nothing
    assert close(plain["ce"], -0.043850) and close(plain["rkl"], -0.179398)


def future(rows, teacher, **facts):
    """[number of trained tokens]: C, of log-probs of token 0 of two."""
    out = on(
        load("distil", k=2, **facts.pop("arguments", {})),
        rows,
        models={"teacher": teacher},
        **facts,
    )
    return -out.terms[1].credit[mask_of(rows)]


def test_the_last_token_answers_for_nothing_and_the_others_for_what_follows():
    rows, teacher = [[LEVEL] * 3, [LEVEL]], [[-0.5, -1.0, -2.0], [-0.7]]
    p, q = math.exp(LEVEL), [math.exp(x) for x in (-0.5, -1.0, -2.0)]
    h = [-(x * math.log(p) + (1 - x) * math.log(1 - p)) for x in q]
    assert close(future(rows, teacher), [h[1] + h[2], h[2], 0.0, 0.0], 12)
    peers = future(rows, teacher, arguments={"baseline": "group"}, group=[0, 0])
    # the second has ended: C = 0 there
    assert close(peers, [(h[1] + h[2]) / 2, h[2] / 2, 0.0, -(h[1] + h[2]) / 2], 12)


def test_masked_tokens_are_in_neither_part():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[True, False, True, True]])
    out = evaluate(load("distil", k=5), student, ids, mask, models={"teacher": teacher})
    kept = [0, 2, 3]
    without = evaluate(
        load("distil", k=5), student[:, kept], ids[:, kept], models={"teacher": teacher[:, kept]}
    )
    assert (out.grad[0, 1] == 0).all() and close(out.grad[:, kept], without.grad, 12)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("baseline", [None, "group"])
@pytest.mark.parametrize(("k", "clip"), [(3, None), (3, (0.1, 0.1)), (None, None)])
def test_it_is_the_naive_formula(k, clip, baseline, fresh):
    case = step(7, fresh)

    def reference(ls, said):
        y, lt, mask = case.tokens, said["teacher"], case.mask
        ids = lt.topk(k or 7).indices
        q = lt.gather(-1, ids).softmax(-1)
        own = {name: -(q * x.gather(-1, ids)).sum(-1) for name, x in (("live", ls), *said.items())}
        ratio = {name: (at(ls, y) - at(x, y)).exp() for name, x in said.items()}
        outer = (at(said["before"], y) - at(said["sampler"], y)).exp()
        # [B][tokens]: what comes after each
        where = [row.nonzero()[:, 0].tolist() for row in mask]
        ahead = [
            [sum(own["before"][b, u].item() for u in at_[i + 1 :]) for i in range(len(at_))]
            for b, at_ in enumerate(where)
        ]
        total = 0.0
        for b in range(6):
            peers = [ahead[i] for i in range(6) if GROUPS[i] == GROUPS[b]]
            for i, t in enumerate(where[b]):
                u = ahead[b][i]
                if baseline:
                    u -= sum(c[i] for c in peers if i < len(c)) / len(peers)
                r, w = ratio["sampler"][b, t], 1.0
                if clip:
                    r, w = ratio["before"][b, t], outer[b, t]
                    r_u = torch.maximum(r * u, r.clamp(1 - clip[0], 1 + clip[1]) * u)
                else:
                    r_u = r * u
                total = total + own["live"][b, t] + r_u * w
        return total / 6

    assert agrees(load("distil", k=k, baseline=baseline, clip=clip), case, reference)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"baseline": "group"}, {"clip": 0.2}, {"k": None}, {"k": 3, "rollout_cap": 2.0}],
)
def test_check(arguments):
    check(load("distil", **arguments))


def test_its_teacher_is_an_average_of_the_student_with_feedback():
    assert load("distil").models == {
        "teacher": {"kind": "self", "weights": "ema", "rate": 0.05, "view": "peer_or_feedback"}
    }
    assert {f.k for f in load("distil").needs.of("teacher")} == {100}


def test_bad_arguments_are_explained():
    for arguments, message in (
        ({"baseline": "mean"}, "one of None, group"),
        ({"k": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            load("distil", **arguments)
