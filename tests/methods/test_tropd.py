"""TrOPD: trust, outliers and guided tokens with the card's numbers, and the schedule of
the prefix.
"""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.curricula import Plain, TeacherPrefix
from opdkit.curricula.prefix import prefix_share
from opdkit.methods.method import load
from opdkit.testing import evaluate
from tests.methods.toy import P_S, P_T, close, logits, numbers, tokens

S, T = logits(P_S), {"teacher": logits(P_T)}
TRUST = (0.4, 1.0, 1.0)  # min(pi_t / pi_s, 1)


def draw(u):
    return torch.full((1, 1), u, dtype=torch.float64)


def run(y=0, u=0.0, student=S, models=T, guided=None, **arguments):
    marks = None if guided is None else {"guided": guided}
    return evaluate(
        load("tropd", **{"k": 2, **arguments}),
        student,
        tokens(y),
        models=models,
        marks=marks,
        uniform=draw(u),
    )


def over_draws(y, read, **arguments):
    """A quantity averaged over the draw: trusted with probability TRUST, else not."""
    trusted, rest = read(run(y, 0.0, **arguments)), read(run(y, 1 - 1e-12, **arguments))
    return TRUST[y] * trusted + (1 - TRUST[y]) * rest


def mean(read, **arguments):
    """... and over the token."""
    return sum(p * over_draws(y, read, **arguments) for y, p in enumerate(P_S))


def trusted(out):
    return out.terms[0].weight.item()


@pytest.mark.parametrize("y", range(3))
def test_a_token_is_trusted_as_in_speculative_sampling(y):
    for u in (0.0, TRUST[y] - 1e-9, TRUST[y] + 1e-9):
        if u < 1:
            assert trusted(run(y, u)) == (u < TRUST[y])


def test_share_and_density_of_trusted_tokens():
    shares = [p * over_draws(y, trusted) for y, p in enumerate(P_S)]
    assert sum(shares) == pytest.approx(0.7)  # 1 - TV
    assert shares == pytest.approx([min(s, t) for s, t in zip(P_S, P_T)])


def test_masking_outliers():
    credit = mean(lambda out: trusted(out) * out.terms[0].credit.item(), outliers="mask")
    assert credit == pytest.approx(0.051083, abs=5e-7)
    assert close(
        mean(lambda out: out.grad[0, 0], outliers="mask"), (0.208799, -0.137923, -0.070877)
    )


def test_a_distrusted_token_teaches_the_teachers_favourites():
    out = run(0, 0.9)
    assert close(out.loss, 0.377052) and close(out.grad[0, 0], (0.4, -0.26, -0.14))
    assert [t.value.item() == 0 for t in out.terms] == [True, False, True]
    # pi_t > pi_s: trusted, OPD
    assert close(run(1, 0.9).grad[0, 0], (0.255413, -0.357578, 0.102165))


def test_expected_gradient_with_the_forward_kl_on_outliers():
    masked = mean(lambda out: out.grad[0, 0], outliers="mask")
    # 0.5 * 0.6 are not trusted
    assert close(mean(lambda out: out.grad[0, 0]), masked + 0.3 * numbers(0.4, -0.26, -0.14), 12)


def test_outlier_divergence_as_credit():
    out = run(0, 0.9, outlier_gradient="credit", rest="renormalise")
    assert close(out.terms[1].credit, [[-0.001312]]) and close(
        out.grad[0, 0], (0.000656, -0.000394, -0.000262)
    )


def test_rest_of_the_teachers_mass():
    raw, target = run(0, 0.9).loss, run(0, 0.9, rest="target").loss
    q = numbers(0.625, 0.375)
    assert close(target, (q * (q / numbers(0.3, 0.2)).log()).sum().item(), 12) and raw != target
    assert close(run(0, 0.9, rest="renormalise").loss, 0.001312)


@pytest.mark.parametrize(
    ("student", "teacher", "credit"), [(0.35, 1e-6, -12.7657), (0.25, 0.4, 0.4700)]
)
def test_scale_of_an_outlier(student, teacher, credit):
    s, t = (logits((p, 1 - p)) for p in (student, teacher))
    out = run(0, 0.0, student=s, models={"teacher": t})
    assert close(out.terms[0].credit, [[credit]], 4)
    assert close(
        run(0, 0.0, student=s, models={"teacher": t}, outliers="clip").terms[0].credit,
        [[max(credit, -2.5)]],
        4,
    )
    assert (run(0, 1e-4, student=s, models={"teacher": t}).terms[0].value == 0) == (
        teacher < student
    )


def test_clip_has_no_draw():
    a, b = (run(0, u, outliers="clip", floor=-0.5) for u in (0.0, 0.99))
    assert torch.equal(a.grad, b.grad) and close(a.terms[0].credit, [[-0.5]]) and trusted(a) == 1


def test_agreement_is_opd():
    g = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 5, generator=g, dtype=torch.float64)
    ids, u = (
        torch.randint(5, (2, 4), generator=g),
        torch.rand(2, 4, generator=g, dtype=torch.float64),
    )
    sampler = student + 0.3 * torch.randn(student.shape, generator=g, dtype=torch.float64)
    ours, opd = (
        evaluate(
            load(m), student, ids, models={"teacher": student}, sampler_logits=sampler, uniform=u
        )
        for m in ("tropd", "opd")
    )
    assert (
        (ours.terms[0].weight == 1).all()
        and torch.equal(ours.grad, opd.grad)
        and (opd.grad == 0).all()
    )
    # a draw of 0 trusts every token
    lucky, other = torch.zeros_like(u), {"teacher": student + 0.01 * student.square()}
    ours, opd = (
        evaluate(load(m), student, ids, models=other, uniform=lucky) for m in ("tropd", "opd")
    )
    assert torch.equal(ours.grad, opd.grad) and opd.grad.norm() > 0


GUIDED = torch.tensor([[True, False]])
TWO, TWO_T = logits(P_S, P_S), {"teacher": logits(P_T, P_T)}


@pytest.mark.parametrize(("prefix", "sign"), [("likelihood", 1.0), ("credit", None)])
def test_guided_tokens(prefix, sign):
    method = load("tropd", k=2, beta=0.1, prefix=prefix)
    out = evaluate(
        method,
        TWO,
        tokens(1, 1),
        models=TWO_T,
        marks={"guided": GUIDED},
        uniform=torch.zeros(1, 2).double(),
    )
    push = torch.tensor([0, 1, 0]) - numbers(*P_S)  # grad log pi_s(1)
    # the student's own token: plain OPD, over both tokens
    assert close(out.grad[0, 1], -0.510826 / 2 * push)
    if sign:
        assert close(out.grad[0, 0], -0.1 / 2 * push, 12)  # towards the teacher's token
    else:
        # the code's sign: away from it, as pi_t > pi_s
        assert close(out.grad[0, 0], 0.1 * 0.510826 / 2 * push)


@pytest.mark.parametrize("outliers", ["forward_kl", "mask", "clip"])
def test_guided_tokens_are_in_no_other_term(outliers):
    method = load("tropd", k=2, outliers=outliers)
    for u in (0.0, 0.99):
        out = evaluate(
            method,
            TWO,
            tokens(0, 0),
            models=TWO_T,
            marks={"guided": GUIDED},
            uniform=torch.full((1, 2), u).double(),
        )
        assert all(t.weight[0, 0] == 0 for t in out.terms[:-1]) and out.terms[-1].weight[
            0
        ].tolist() == [1e-3, 0]


def test_without_guided_tokens_beta_does_not_matter():
    a, b = (
        evaluate(load("tropd", k=2, beta=b), S, tokens(0), models=T, uniform=draw(0.2))
        for b in (0.0, 7.0)
    )
    assert torch.equal(a.loss, b.loss) and torch.equal(a.grad, b.grad)


def test_an_untrusted_tokens_infinite_log_ratio_stays_out():
    never = {"teacher": logits((0.0, 0.6, 0.4))}
    out = run(0, 0.0, models=never)  # u = 0 and trust 0: not trusted
    assert out.terms[0].credit.item() == -math.inf and trusted(out) == 0
    assert out.loss.isfinite() and close(out.grad[0, 0], (0.5, -0.3, -0.2))  # p_s * mass - p_t


def test_draws_are_keyed():
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(8, 16, 5, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(5, (8, 16), generator=g)

    def weight(**where):
        return (
            evaluate(load("tropd", k=2), student, ids, models={"teacher": teacher}, **where)
            .terms[0]
            .weight
        )

    assert torch.equal(weight(seed=3), weight(seed=3))
    assert not torch.equal(weight(seed=3), weight(seed=4)) and not torch.equal(
        weight(step=0), weight(step=1, total_steps=2)
    )


@pytest.mark.parametrize(
    ("step", "alpha", "length"),
    [(0, 1, 1000), (50, 0.853553, 853), (100, 0.5, 500), (150, 0.146447, 146), (200, 0, 0)],
)
def test_schedule(step, alpha, length):
    assert (
        prefix_share(step, 200) == pytest.approx(alpha, abs=5e-7)
        and math.floor(prefix_share(step, 200) * 1000) == length
    )


def test_the_method_brings_its_curriculum():
    assert load("tropd").curriculum == TeacherPrefix()
    assert load("opd").curriculum == Plain()


@pytest.mark.parametrize("name", ["outliers", "outlier_gradient", "prefix"])
def test_bad_arguments_are_explained(name):
    with pytest.raises(UserError, match=f"{name}='drop' must be one of"):
        load("tropd", **{name: "drop"})
