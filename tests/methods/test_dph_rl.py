"""DPH-RL: the generators of its divergences, and two streams that do not touch each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.curricula import Plain, Rehearsal
from opdkit.methods.dph_rl import Generator
from opdkit.methods.method import Method, load, weight_of
from opdkit.objective import JSD, Chi2, ForwardKL, Likelihood, ReverseKL
from opdkit.testing import check, evaluate
from tests.methods.made_up import GROUP, REWARD, MadeUp, advantages, assert_dense
from tests.methods.toy import close, logits, numbers, tokens

REF, NOW = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
KINDS = {  # of a ratio u > 0
    "forward_kl": lambda u, a: u - 1 - u.log(),
    "js": lambda u, a: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha": lambda u, a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
}
VARIANTS = [{"kind": kind} for kind in KINDS] + [{"kind": "alpha", "alpha": 0.7}, {"eta": 0.0}]


def rehearsed(u: float, **arguments) -> tuple[float, float]:
    """f(u) at one token of probability 0.2 u that the reference gave 0.2, and d f / d log pi_s."""
    s = 0.2 * u
    out = evaluate(
        load("dph_rl", eta=1.0, **arguments),
        logits((s, 1 - s)),
        tokens(0),
        models={"reference": logits((0.2, 0.8))},
        reward=[1.0],
        group=[0],
        marks={"rehearsal": [[True]]},
    )
    assert out.terms[0].value == 0
    return out.loss.item(), out.grad[0, 0, 0].item() / (1 - s)


@pytest.mark.parametrize(
    ("u", "forward", "js", "alphas"),
    [
        (0.5, 0.193147, 0.084950, (0.160318, 0.171573, 0.184059)),
        (2.0, 0.306853, 0.169899, (0.368118, 0.343146, 0.320635)),
        (4.0, 1.613706, 0.963724, (2.303543, 2.0, 1.753076)),
    ],
)
def test_values_of_the_generators(u, forward, js, alphas):
    assert rehearsed(u)[0] == pytest.approx(forward, abs=5e-7)
    assert rehearsed(u, kind="js")[0] == pytest.approx(js, abs=1.1e-6)
    for a, value in zip((0.2, 0.5, 0.8), alphas):
        assert rehearsed(u, kind="alpha", alpha=a)[0] == pytest.approx(value, abs=1.1e-6)


@pytest.mark.parametrize(("u", "forward", "js"), [(0.5, -0.5, -0.202733), (2.0, 1.0, 0.575364)])
def test_coefficients_of_a_token(u, forward, js):
    """u f'(u): u - 1, and u log(2u/(u + 1))."""
    assert rehearsed(u)[1] == pytest.approx(forward, abs=1e-9)
    assert rehearsed(u, kind="js")[1] == pytest.approx(js, abs=5e-7)


@pytest.mark.parametrize("variant", VARIANTS[:4])
def test_nothing_is_lost_where_nothing_has_moved(variant):
    value, slope = rehearsed(1.0, **variant)
    assert abs(value) < 1e-15 and abs(slope) < 1e-15


def drawn_by_reference(loss, weigh=REF, student=NOW, reference=REF):
    """Value and gradient [V] of a loss, averaged over tokens that the reference draws."""
    every = [
        evaluate(loss, logits(student), tokens(y), models={"reference": logits(reference)})
        for y in range(3)
    ]
    value = sum(p * out.loss for p, out in zip(weigh, every))
    return value, sum(p * out.grad[0, 0] for p, out in zip(weigh, every))


def dense(divergence) -> tuple[Tensor, Tensor]:
    """Value and gradient [V] of a function of whole distributions (student, reference)."""
    z = numbers(*NOW).log().requires_grad_()
    value = divergence(z.softmax(0), numbers(*REF))
    return value.detach(), torch.autograd.grad(value, z)[0]


def test_on_average_it_is_the_divergence_with_its_gradient():
    value, gradient = drawn_by_reference(Generator(ForwardKL()))
    assert close(value, 0.2238047, 7)
    torch.testing.assert_close(gradient, numbers(*NOW) - numbers(*REF), rtol=0, atol=1e-12)
    value, gradient = drawn_by_reference(Generator(JSD(), 2.0))
    assert close(value, 0.1017492, 7)

    def twice_js(p, q):
        m = (p + q) / 2
        return (p * (p / m).log()).sum() + (q * (q / m).log()).sum()

    expected = dense(twice_js)
    torch.testing.assert_close(value, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "divergence"),
    [
        (ReverseKL(), lambda p, q: (p * (p / q).log()).sum()),
        (Chi2(), lambda p, q: ((p - q).square() / q).sum()),
    ],
)
def test_any_divergence_has_such_a_generator(kind, divergence):
    """At least 0 at each token, which a plain f is not: u log u is below it for u < 1."""
    found, expected = drawn_by_reference(Generator(kind)), dense(divergence)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    for y in range(3):
        at = tuple(float(i == y) for i in range(3))
        assert drawn_by_reference(Generator(kind), at)[0] >= 0


def test_on_average_its_gradient_is_that_of_imitating_the_stored_answers():
    """-log u, the k1 form: SFT on what the reference drew."""
    f, sft = drawn_by_reference(Generator(ForwardKL())), drawn_by_reference(Likelihood())
    torch.testing.assert_close(f[1], sft[1], rtol=0, atol=1e-12)
    assert not torch.allclose(f[0], sft[0])


# ---------------------------------------------------------------------------------- the two streams

ROWS = torch.tensor([False, False, False, True, True, True])  # the group of stored answers
MARKS = {"rehearsal": ROWS[:, None].expand(6, 6)}


def formula(eta: float, kind: str = "forward_kl", a: float = 0.2):
    """L_exp over the tokens of some rows, eta f over those of the others, each by its own count."""

    def both(m: MadeUp) -> Tensor:
        credit = advantages(std=True).expand(m.mask.shape)
        r = (m.at("student") - m.at("before")).exp()
        outer = (m.at("before") - m.at("sampler")).exp().detach()
        ppo = -outer * torch.minimum(r * credit, r.clamp(0.8, 1.28) * credit)
        mine, stored = (m.mask & rows[:, None] for rows in (~ROWS, ROWS))
        total = ppo[mine].sum() / mine.sum()
        if eta:
            u = (m.at("student") - m.at("reference")).exp()
            total = total + eta * KINDS[kind](u, a)[stored].sum() / stored.sum()
        return total

    return both


@pytest.mark.parametrize("kind", KINDS)
def test_dense(kind):
    method = load("dph_rl", kind=kind, eta=0.3)
    models = ("reference",)
    assert_dense(method, formula(0.3, kind), models, reward=True, marks=MARKS)


def test_without_rehearsal_it_is_dapos_loss():
    made = load("dph_rl", eta=0.0)
    assert made.opened == frozenset() and made.curriculum == Plain()
    assert_dense(made, formula(0.0), (), reward=True, marks=MARKS)
    g = torch.Generator().manual_seed(3)
    student, before = (torch.randn(6, 5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    y = torch.randint(7, (6, 5), generator=g)
    facts = {"before_logits": before, "reward": REWARD, "group": GROUP}
    a, b = (
        evaluate(method, student, y, **facts)
        for method in (made, load("grpo", loss="dapo", clip=(0.2, 0.28)))
    )
    assert torch.equal(a.loss, b.loss) and torch.equal(a.grad, b.grad)


def step(reward=REWARD, rows=slice(None)):
    """A step of three rollouts and three stored answers, or of some of these."""
    g = torch.Generator().manual_seed(5)
    student, reference = (torch.randn(6, 6, 9, generator=g, dtype=torch.float64) for _ in "ab")
    y = torch.randint(9, (6, 6), generator=g)
    return evaluate(
        load("dph_rl", eta=0.3),
        student[rows],
        y[rows],
        models={"reference": reference[rows]},
        reward=torch.tensor(reward)[rows],
        group=torch.tensor(GROUP)[rows],
        marks={"rehearsal": MARKS["rehearsal"][rows]},
    )


def test_no_stream_feels_the_other():
    """Neither its rewards nor its length: each is a mean over its own tokens."""
    whole, other = step(), step([1.0, 0.0, 1.0, -7.0, 3.0, 2.0])
    assert torch.equal(whole.grad, other.grad)
    fewer = step(rows=[0, 1, 2, 4])
    torch.testing.assert_close(fewer.grad[:3], whole.grad[:3], rtol=0, atol=1e-15)
    assert (whole.terms[0].weight[3:] == 0).all() and (whole.terms[1].weight[:3] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_the_checks(variant):
    check(load("dph_rl", **variant))


# -------------------------------------------------------------------------------- what lies outside


def test_what_it_brings():
    made = load("dph_rl", samples=4, enough=4, rehearsed=256, drop_unsolved=True)
    assert made.curriculum == Rehearsal(4, 4, 256, True)
    assert made.models == {"reference": {"kind": "recorded", "mark": "rehearsal"}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "reverse_kl"}, "must be one of forward_kl, js, alpha"),
        ({"eta": -0.1}, "eta=-0.1 must be at least 0"),
        ({"kind": "alpha", "alpha": 1.0}, "strictly between 0"),
        ({"samples": 4, "enough": 5}, "enough=5 must be at most samples=4"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        load("dph_rl", **arguments)


def test_another_reference_is_not_silently_taken_for_its_own():
    """A KL to the student as it began, at every token, is not what the stored answers say."""
    for sum_ in ("grpo(reference_kl=0.1) + dph_rl", "dph_rl + grpo(reference_kl=0.1)"):
        with pytest.raises(UserError, match="that of the second the run's own"):
            load(sum_)
    both = load("opd + 0.5 * dph_rl")  # which reads no reference
    assert both.curriculum == Rehearsal() and "reference" in both.models
    with pytest.raises(UserError, match="cannot be combined"):
        load("dph_rl + gkd(lmbda=0.5)")
    with pytest.raises(UserError, match="decides who"):
        load("opd") * Method(load("iw_opd").objective, curriculum=Rehearsal())
    assert weight_of("iw_opd") in (load("dph_rl") * load("iw_opd")).objective.terms[0].by
