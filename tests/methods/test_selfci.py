"""SelfCI: two teachers and their product, weights and their clamp, and the sampled form that
learns.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import Case, check, evaluate
from tests.methods.steps import agrees, step
from tests.methods.toy import close, logits, numbers, reverse_kl_gradient, tokens

S, A, D = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3), (0.6, 0.3, 0.1)
MODELS = {"allowed": logits(A), "disallowed": logits(D)}


def run(y=0, models=None, **arguments):
    method = load("selfci", **arguments)
    given = {k: v for k, v in (models or MODELS).items() if k in method.needs.models}
    return evaluate(method, logits(S), tokens(y), models=given)


def weighed(utility, integrity, **arguments):
    """One rollout with these columns."""
    columns = {"row:utility": numbers(utility), "row:integrity": numbers(integrity)}
    case = Case(tokens(0), logits(S), models=MODELS, columns=columns)
    return case.run(load("selfci", adaptive=True, **arguments).objective)


def product(v):
    """[3], []: the normalised product of both teachers, `v` the allowed one's share; and Z."""
    q = numbers(*A) ** v * numbers(*D) ** (1 - v)
    return q / q.sum(), q.sum()


def kl(p, q):
    p, q = (torch.as_tensor(x, dtype=torch.float64) for x in (p, q))
    return (p * (p / q).log()).sum()


def test_the_target_is_the_product_of_both_teachers():
    q, z = product(0.5)
    assert close(kl(S, A), 0.223805) and close(kl(S, D), 0.047469)
    assert close(q, (0.381966, 0.427051, 0.190983)) and close(z, 0.906914)
    out = run()
    assert close(out.loss, 0.135637) and close(kl(S, q) - z.log(), out.loss, 12)
    assert close(out.grad[0, 0], (0.115674, -0.117315, 0.001641))
    assert close(out.grad[0, 0], reverse_kl_gradient(S, q.tolist()), 12)


def test_weights_of_one_half_are_the_same_loss():
    half, one = run(w_allowed=0.5, w_disallowed=0.5), run()
    assert torch.equal(half.loss, one.loss) and torch.equal(half.grad, one.grad)


def test_unequal_weights():
    q, z = product(0.8)
    assert close(q, (0.264652, 0.479537, 0.255811))
    for out in (run(w_disallowed=0.25), weighed(0.0, 0.75)):
        assert close(out.loss, 0.188537) and close(out.loss, kl(S, q) - z.log(), 12)


def test_weights_below_one_in_all_scale_the_strength():
    for out in (run(w_allowed=0.2, w_disallowed=0.2), weighed(0.8, 0.8)):
        assert close(out.loss, 0.054255) and close(out.grad, 0.4 * run().grad, 12)


def test_one_teacher_alone_is_reverse_kl_to_it():
    for arguments, teacher in (({"w_allowed": 0}, D), ({"w_disallowed": 0}, A)):
        out = run(**arguments)
        opd = evaluate(
            load("opd", support="full"), logits(S), tokens(0), models={"teacher": logits(teacher)}
        )
        assert torch.equal(out.grad, opd.grad) and close(out.loss, kl(S, teacher), 12)
    assert load("selfci", w_allowed=0).needs.models & {"allowed", "teacher"} == set()
    assert list(load("selfci", w_allowed=0).models) == ["disallowed"]


def test_equal_teachers_are_one():
    twice = run(models={"allowed": logits(A), "disallowed": logits(A)})
    assert close(twice.grad[0, 0], reverse_kl_gradient(S, A), 12)


def test_a_rollout_that_lacks_nothing_is_not_taught():
    out = weighed(1.0, 1.0)
    assert out.loss == 0 and (out.grad == 0).all()
    assert close(weighed(1.0, 0.0).grad[0, 0], reverse_kl_gradient(S, D), 12)


def test_adaptive_weights_scale_those_given():
    assert close(weighed(0.5, 0.0, w_disallowed=0.5).loss, run(w_disallowed=1).loss, 12)


def test_what_the_code_differentiates_has_no_gradient_on_average_and_the_credit_has():
    """d (log pi_s - log pi_k) is that of log pi_s alone: E[grad log pi_s] = 0. As a credit it has
    the gradient of the whole divergence.
    """
    push = torch.eye(3, dtype=torch.float64) - numbers(*S)  # [y, V]: grad log pi_s(y)
    assert close(numbers(*S) @ push, [0.0, 0.0, 0.0], 12)
    mean = sum(p * run(y, support="sampled").grad[0, 0] for y, p in enumerate(S))
    assert close(mean, run().grad[0, 0], 12) and mean.norm() > 0.1


def test_the_top_k_is_the_students_and_renormalised():
    s, a, d = (numbers(*p[:2]) / sum(p[:2]) for p in (S, A, D))
    assert close(run(support="top", k=2).loss, (kl(s, a) + kl(s, d)) / 2, 12)
    assert close(run(support="top", k=3).grad, run().grad, 12)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("support", ["full", "top", "sampled"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_it_is_the_naive_formula(support, adaptive, fresh):
    case = step(3, fresh, ("allowed", "disallowed"))
    utility, integrity = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)).double()
    columns = {**case.columns, "row:utility": utility, "row:integrity": integrity}
    case, given = replace(case, columns=columns), {"w_allowed": 0.9, "w_disallowed": 0.4}

    def distance(ls, lt, said, b, t):
        y = case.tokens[b, t]
        if support == "sampled":
            ratio = (ls[b, t, y] - said["sampler"][b, t, y]).exp()
            return -ratio * (lt[b, t, y] - said["before"][b, t, y])
        ids = said["before"][b, t].topk(3 if support == "top" else 7).indices
        p, q = ls[b, t, ids].log_softmax(-1), lt[b, t, ids].log_softmax(-1)
        return (p.exp() * (p - q)).sum()

    def reference(ls, said):
        total = 0.0
        for b in range(6):
            wa, wd = given["w_allowed"], given["w_disallowed"]
            if adaptive:
                wa, wd = wa * (1 - utility[b]).item(), wd * (1 - integrity[b]).item()
            where = case.mask[b].nonzero()[:, 0].tolist()
            for t in where:
                both = wa * distance(ls, said["allowed"], said, b, t)
                both = both + wd * distance(ls, said["disallowed"], said, b, t)
                total = total + both / max(wa + wd, 1) / len(where) / 6
        return total

    method = load("selfci", support=support, k=3, adaptive=adaptive, **given)
    assert agrees(method, case, reference)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"adaptive": True},
        {"support": "top"},
        {"support": "sampled"},
        {"support": "sampled", "adaptive": True, "clip": 0.2},
        {"w_allowed": 0.0},
        {"w_disallowed": 0.0, "adaptive": True},
    ],
)
def test_check(arguments):
    check(load("selfci", **arguments))


def test_its_teachers_are_the_initial_student_in_two_views():
    assert load("selfci").models == {
        name: {"kind": "self", "weights": "fixed", "view": name}
        for name in ("allowed", "disallowed")
    }


def test_bad_arguments_are_explained():
    for arguments, message in (
        ({"w_allowed": -1}, "at least 0"),
        ({"w_allowed": 0, "w_disallowed": 0}, "not both 0"),
        ({"support": "teacher"}, "must be one of full, top, sampled"),
    ):
        with pytest.raises(UserError, match=message):
            load("selfci", **arguments)
