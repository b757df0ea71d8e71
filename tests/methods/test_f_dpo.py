"""f-DPO: the worth of a response under each divergence, and the card's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from opdkit.base.errors import UserError
from opdkit.curricula import Plain, Preference
from opdkit.methods.method import load
from opdkit.testing import check
from tests.methods.ragged import LEVEL, on, shifted, slopes
from tests.methods.steps import GROUPS, agrees, at, step
from tests.methods.toy import close, numbers

KINDS = ("reverse_kl", "forward_kl", "js", "alpha")
L_W, L_L, BETA = 0.4, -0.2, 0.1
# -exp(-l) and so on, written out anew
WORTH = {
    "reverse_kl": lambda l, a: l,
    "forward_kl": lambda l, a: -torch.exp(-l),
    "js": lambda l, a: math.log(2) - torch.log1p(torch.exp(-l)),
    "alpha": lambda l, a: (1 - torch.exp(-a * l)) / a,
}


def pair(l_w=L_W, l_l=L_L, **arguments):
    """One pair of responses of two and three tokens, whose log-ratios sum to these."""
    gaps = [[0.3, l_w - 0.3], [0.5, -0.1, l_l - 0.4]]
    reference = shifted([[0.0] * len(row) for row in gaps])
    rows = shifted(gaps)
    out = on(
        load("f_dpo", **arguments),
        rows,
        models={"reference": reference},
        group=[0, 0],
        correct=[1, 0],
    )
    return out, slopes(out, rows)


def worth(kind, l, alpha=0.5):
    """beta f'(u) at log u = l, over beta: of a loss of its own."""
    loss = load("f_dpo", kind=kind, alpha=alpha).objective.terms[0].loss
    scale = loss.beta / BETA
    return scale * loss.kind.slope(numbers(l))


@pytest.mark.parametrize(
    ("kind", "chosen", "rejected", "margin", "loss", "slope"),
    [
        ("reverse_kl", 0.4, -0.2, 0.06, 0.663597, 1.0),
        ("forward_kl", -0.670320, -1.221403, 0.055108, 0.665973, 0.670320),
        ("js", 0.180132, -0.104992, 0.028512, 0.678993, 0.401312),
        ("alpha", 0.362538, -0.210342, 0.057288, 0.664913, 0.818731),
    ],
)
def test_the_numbers_of_the_card(kind, chosen, rejected, margin, loss, slope):
    assert close(worth(kind, L_W), [chosen]) and close(worth(kind, L_L), [rejected])
    assert close(BETA * (worth(kind, L_W) - worth(kind, L_L)), [margin])
    out, gradient = pair(kind=kind)
    assert close(out.loss, loss)
    # each token of the chosen one: -beta sigmoid(-m) s(l_w)
    weight = BETA * torch.sigmoid(numbers(-margin))
    l = numbers(L_W).requires_grad_()
    (s,) = torch.autograd.grad(WORTH[kind](l, 0.5).sum(), l)
    assert close(s, [slope])
    assert close(gradient[:2], (-weight * slope).expand(2), 6)
    assert (gradient[2:] > 0).all() and close(gradient[2:], gradient[2].expand(3), 12)


def test_reverse_kl_is_dpo_to_the_bit():
    """-log sigmoid(beta (l_w - l_l)), l summed as the loss sums it."""
    loss = load("f_dpo").objective.terms[0].loss
    l = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 30
    assert torch.equal(loss.kind.slope(l), l)
    out, _ = pair()
    assert close(out.loss, -logsigmoid(numbers(BETA * 0.6))[0], 12)


def test_alpha_goes_from_reverse_to_forward_kl():
    assert close(worth("alpha", L_W, 1e-6), [0.4])
    assert close(worth("alpha", L_W, 1 - 1e-9), [0.329680])
    assert close(worth("alpha", L_W, 1 - 1e-9) - 1, worth("forward_kl", L_W))
    assert close(worth("alpha", L_W, 0.3), [0.376932])
    assert close(worth("alpha", L_W, 0.7), [0.348880])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_log_ratios_are_log_two_and_a_swapped_pair_has_the_opposite_margin(kind):
    assert close(pair(0.3, 0.3, kind=kind)[0].loss, math.log(2), 12)
    there, back = (pair(*ls, kind=kind)[0].loss for ls in ((0.4, -0.2), (-0.2, 0.4)))
    margin = BETA * (worth(kind, 0.4) - worth(kind, -0.2))[0]
    assert close(there, torch.log1p(torch.exp(-margin)), 12)
    assert close(back, torch.log1p(torch.exp(margin)), 12)


def test_the_worth_under_js_is_bounded_and_half_as_steep_near_zero():
    assert close(worth("js", 700.0), [math.log(2)], 12)
    assert worth("js", 5.0) < math.log(2)
    l = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = load("f_dpo", kind="js").objective.terms[0].loss
    (slope,) = torch.autograd.grad((loss.beta / BETA * loss.kind.slope(l)).sum(), l)
    assert close(slope, [0.5], 12)
    assert close(worth("js", 40.0), worth("js", 80.0), 12)  # margins saturate


@pytest.mark.parametrize(("kind", "at_start"), zip(KINDS, (0.0, -1.0, 0.0, 0.0)))
def test_at_the_reference_all_are_worth_the_same(kind, at_start):
    assert close(BETA * worth(kind, 0.0), [BETA * at_start], 12)
    assert close(pair(0.0, 0.0, kind=kind)[0].loss, math.log(2), 12)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_naive_formula(kind, fresh):
    """On and off policy: no ratio to a sampler, and all pairs of each prompt."""
    case = step(3, fresh, ("reference",))
    right = [1, 0, 1, 0, 0, 1]
    case.columns["correct"] = right

    def reference(ls, said):
        gap = at(ls, case.tokens) - at(said["reference"], case.tokens)
        u = WORTH[kind](torch.where(case.mask, gap, 0.0).sum(1), 0.4)
        total = 0.0
        for prompt in (0, 1):
            mine = [i for i in range(6) if GROUPS[i] == prompt]
            losses = [
                -torch.log(torch.sigmoid(0.3 * (u[w] - u[l])))
                for w in mine
                for l in mine
                if right[w] and not right[l]
            ]
            total = total + 3 * sum(losses) / len(losses)
        return total / 6

    assert agrees(load("f_dpo", kind=kind, beta=0.3, alpha=0.4), case, reference)


@pytest.mark.parametrize(
    "arguments",
    [*({"kind": k, "pairs": p} for k in KINDS for p in ("data", "rollouts")), {"alpha": 0.9}],
)
def test_check(arguments):
    check(load("f_dpo", **arguments))


def test_where_pairs_come_from():
    assert load("f_dpo").curriculum == Preference()
    own = load("f_dpo", pairs="rollouts")
    assert own.curriculum == Plain() and own.objective.terms[0].whose == ("student",)
    assert load("f_dpo").needs.models == {"live", "reference"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "tv"}, "one of reverse_kl, forward_kl, js, alpha"),
        ({"pairs": "judge"}, "one of data, rollouts"),
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"kind": "alpha", "alpha": 1.0}, "must lie strictly between 0"),
    ],
)
def test_bad_arguments_are_explained(arguments, said):
    with pytest.raises(UserError, match=said):
        load("f_dpo", **arguments)


def test_log_probs_are_summed_not_averaged():
    """A response of the same log-ratio per token counts more the longer it is."""
    gaps = [[0.2] * n for n in (1, 4)]
    out = on(
        load("f_dpo"),
        shifted(gaps),
        models={"reference": [[LEVEL] * 1, [LEVEL] * 4]},
        group=[0, 0],
        correct=[0, 1],
    )
    assert close(out.loss, math.log1p(math.exp(-0.1 * 0.6)), 12)
