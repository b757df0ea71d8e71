"""f-DPG: pseudo-rewards, their expected gradients, importance weights and the moving baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.f_dpg import Last, PseudoReward
from opdkit.methods.method import load
from opdkit.objective import JSD, Kind, Stepped
from opdkit.objective.divergences import kind_of
from opdkit.testing import Case, check, evaluate
from tests.methods.ragged import mask_of, on, ragged
from tests.methods.steps import agrees, at, step
from tests.methods.toy import P_S, P_T, close, expected, logits, numbers, tokens

Q = (0.4, 0.4, 0.2)  # what the tokens of some were drawn from
# name: divergence, f'(pi/p) of each token, gradient in the logits; pi = (.5, .3, .2),
# p = (.2, .5, .3)
CARD = {
    "forward_kl": (0.193794, (-0.4, -1.666667, -1.5), (0.3, -0.2, -0.1)),
    "reverse_kl": (0.223805, (1.916291, 0.489174, 0.594535), (0.346243, -0.220389, -0.125854)),
    "tv": (0.3, (0.5, -0.5, -0.5), (0.25, -0.15, -0.1)),
    "js": (0.101749, (0.356675, -0.287682, -0.223144), (0.154635, -0.100526, -0.054110)),
    "reverse_chi2": (0.363333, (0.84, -1.777778, -1.25), (0.601667, -0.424333, -0.177333)),
    "chi2": (0.563333, (3.0, -0.8, -0.666667), (0.936667, -0.578, -0.358667)),
}
EVERY = pytest.mark.parametrize("kind", CARD)


def times(kind):
    return 2.0 if kind == "js" else 1.0


def kind_in(name):
    return JSD() if name == "js" else kind_of(name)


def one(kind, y, **facts):
    """A response of one token."""
    return evaluate(
        load("f_dpg", kind=kind), logits(P_S), tokens(y), models={"teacher": logits(P_T)}, **facts
    )


@EVERY
def test_divergences_pseudo_rewards_and_gradients(kind):
    """On fresh rollouts the weight is 1, and before the first update there is no baseline: the
    credit is -f'.
    """
    value, slopes, gradient = CARD[kind]
    entries = kind_in(kind).entries(numbers(*P_S).log(), numbers(*P_T).log())
    assert close(times(kind) * entries.sum(), value)
    credits = torch.cat([one(kind, y).terms[0].credit[0] for y in range(3)])
    assert close(-credits, slopes)
    assert close(expected(load("f_dpg", kind=kind), P_S, P_T), gradient)


@EVERY
def test_gradients_are_those_of_finite_differences(kind):
    def value(z):
        return times(kind) * kind_in(kind).entries(z.log_softmax(-1), numbers(*P_T).log()).sum()

    z, slope = numbers(*P_S).log(), []
    for v in range(3):
        eps = torch.zeros(3).double().index_fill(0, torch.tensor([v]), 1e-6)
        slope.append(((value(z + eps) - value(z - eps)) / 2e-6).item())
    assert close(expected(load("f_dpg", kind=kind), P_S, P_T), slope)


@EVERY
def test_tokens_of_another_policy_are_weighed(kind):
    """w = (1.25, .75, 1), and on average over what drew them the same gradient."""
    facts = {"sampler_logits": logits(Q)}
    outs = [one(kind, y, **facts) for y in range(3)]
    fresh = [one(kind, y) for y in range(3)]
    for out, was, w in zip(outs, fresh, (1.25, 0.75, 1.0)):
        assert close(out.terms[0].credit, w * was.terms[0].credit, 12)
    mean = sum(q * out.grad[0, 0] for q, out in zip(Q, outs))
    assert close(mean, CARD[kind][2])


@dataclass(frozen=True)
class Tilted(Kind):
    """A divergence plus c (u - 1), which is 0 of two distributions."""

    of: Kind
    c: float

    def entries(self, ls, lt):
        return self.of.entries(ls, lt) + self.c * (ls.exp() - lt.exp())


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "tv", "chi2", "hellinger2"])
def test_a_kind_of_ones_own_and_what_changes_no_gradient(kind):
    """Its slope is found by differentiation; c is added to all pseudo-rewards, and no more."""
    own = load("f_dpg", kind=Tilted(kind_of(kind), 1.5))
    credit = evaluate(own, logits(P_S), tokens(1), models={"teacher": logits(P_T)}).terms[0].credit
    assert close(credit, one(kind, 1).terms[0].credit - 1.5, 12)
    assert close(expected(own, P_S, P_T), expected(load("f_dpg", kind=kind), P_S, P_T), 12)


@EVERY
def test_a_student_that_has_arrived_stays(kind):
    outs = [
        evaluate(load("f_dpg", kind=kind), logits(P_S), tokens(y), models={"teacher": logits(P_S)})
        for y in range(3)
    ]
    assert close(sum(p * out.grad for p, out in zip(P_S, outs)), torch.zeros(1, 1, 3), 12)
    if kind not in ("forward_kl", "reverse_kl"):  # these have a pseudo-reward of -+1 there
        assert all((out.grad.abs() < 1e-15).all() for out in outs)


def test_a_wrong_normaliser_matters_to_some():
    """A target that is three times the teacher: forward KL's direction stays, reverse KL only
    shifts, and the others follow another gradient.
    """
    p, u = numbers(*P_S), numbers(*P_S).log() - numbers(*P_T).log()

    def gradient(kind, by):
        f = kind_of(kind).slope(u - math.log(by))
        return p * (f - (p * f).sum())

    assert close(gradient("forward_kl", 3), 3 * gradient("forward_kl", 1), 12)
    assert close(gradient("reverse_kl", 3), gradient("reverse_kl", 1), 12)
    for kind in ("jsd", "tv", "chi2"):
        assert (gradient(kind, 3) - gradient(kind, 1)).norm() > 0.05


@pytest.mark.parametrize(
    ("kind", "reward"),
    [("forward_kl", 0.0), ("js", -math.log(2)), ("tv", -0.5), ("reverse_chi2", -1.0)],
)
def test_a_response_that_the_teacher_rules_out(kind, reward):
    teacher = torch.tensor([[[-math.inf, 0.0, 0.0]]]).double()
    out = evaluate(load("f_dpg", kind=kind), logits(P_S), tokens(0), models={"teacher": teacher})
    assert close(out.terms[0].credit, [[reward]]) and out.grad.isfinite().all()
    for other in ("reverse_kl", "chi2"):
        with pytest.raises(UserError, match="probability zero: under"):
            evaluate(load("f_dpg", kind=other), logits(P_S), tokens(0), models={"teacher": teacher})


def test_huge_ratios_stay_numbers():
    """A teacher that prefers a response by 400 nats, in float32."""
    s, t = [[-2.0] * 200], [[-1e-3] * 200]
    for kind in ("forward_kl", "reverse_chi2", "js", "reverse_kl"):
        made = load("f_dpg", kind=kind)
        student, teacher = (
            torch.stack([x := numbers(*row), (-torch.expm1(x)).log()], -1)[None].float()
            for row in (s[0], t[0])
        )
        ids = torch.zeros(1, 200, dtype=torch.int64)
        out = evaluate(made, student, ids, models={"teacher": teacher})
        assert out.loss.isfinite() and out.grad.isfinite().all()
        reward = out.terms[0].credit.max().item()
        exact = {"js": math.log(0.5) + 399.8, "reverse_kl": 398.8}.get(kind, math.exp(20))
        assert reward == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("fresh", [True, False])
@EVERY
def test_it_is_the_naive_formula(kind, fresh):
    case = step(4, fresh)

    def reference(ls, said):
        y, mask = case.tokens, case.mask

        def total(a, b):  # [B]
            return torch.where(mask, at(a, y) - at(b, y), 0.0).sum(1)

        log_u = total(said["before"], said["teacher"])
        u = log_u.exp()
        slope = {
            "forward_kl": -1 / u,
            "reverse_kl": 1 + log_u,
            "tv": log_u.sign() / 2,
            "js": math.log(2) - torch.nn.functional.softplus(-log_u),
            "reverse_chi2": 1 - u**-2,
            "chi2": 2 * (u - 1),
        }[kind]
        w = total(ls, said["sampler"]).exp().detach()
        logp = torch.where(mask, at(ls, y), 0.0).sum(1)
        return (w * slope * logp).mean()

    assert agrees(load("f_dpg", kind=kind), case, reference)


def test_the_baseline_is_the_mean_of_what_was_learnt_from_before():
    """Absent at first, entered behind the update, and of the last `window` only."""
    rows = [[-1.0], [-0.5, -0.7], [-0.2]]
    teacher = [[-2.0], [-0.4, -0.1], [-0.3]]
    method = load("f_dpg", kind="reverse_kl", window=4)
    facts = {"models": {"teacher": teacher}}
    rewards = numbers(-1.0, 0.7, -0.1) - 1
    out = on(method, rows, **facts)
    assert close(out.terms[0].credit[:, 0], rewards, 12)
    (last,) = method.needs.companions
    assert last == Last(PseudoReward(kind_of("reverse_kl")), 4)
    case = Case(
        torch.zeros(3, 2, dtype=torch.int64),
        ragged(rows),
        mask_of(rows),
        {"teacher": ragged(teacher)},
    )
    beside = out.companions

    def update(trained):
        mask = mask_of(rows) & torch.tensor(trained)[:, None]
        beside.after_step(Stepped(case.batch(method.objective), mask))
        return case.run(method.objective, companions=beside).terms[0].credit[:, 0]

    assert close(update([True] * 3), rewards - rewards.mean(), 12)
    # a minibatch: the second and third again, and the first of the earlier three drops out
    kept = torch.stack([rewards[1], rewards[2], rewards[1], rewards[2]])
    assert close(update([False, True, True]), rewards - kept.mean(), 12)
    assert close(beside[last].values, kept, 12)


def test_a_baseline_changes_no_expected_gradient():
    mean = sum(p * one("reverse_kl", y).grad[0, 0] for y, p in enumerate(P_S))
    method = load("f_dpg", kind="reverse_kl")
    total = 0.0
    for y, p in enumerate(P_S):
        case = Case(tokens(y), logits(P_S), None, {"teacher": logits(P_T)})
        beside = case.run(method.objective).companions
        beside[next(iter(beside))].values = numbers(3.0, 5.0)
        total = total + p * case.run(method.objective, companions=beside).grad[0, 0]
    assert close(total, mean, 12)


@pytest.mark.parametrize("arguments", [{"kind": k} for k in CARD if k != "js"] + [{"window": 2}])
def test_check(arguments):
    check(load("f_dpg", **arguments))


@pytest.mark.parametrize("kind", [JSD(0.1), Tilted(JSD(), 1.0)])
def test_check_of_a_kind_as_it_is(kind):
    check(load("f_dpg", kind=kind))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"window": 0}, "at least 1"), ({"kind": "kl"}, "must be one of js, reverse_kl")],
)
def test_bad_arguments_are_explained(arguments, words):
    with pytest.raises(UserError, match=words):
        load("f_dpg", **arguments)
