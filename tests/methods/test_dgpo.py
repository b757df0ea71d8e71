"""DGPO: where a response's credit goes, and that it is neither made nor lost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
from tests.methods.steps import GROUPS, advantages, agrees, at, ppo, step
from tests.methods.toy import close, logits

STUDENT = logits((0.7, 0.2, 0.1), (0.4, 0.3, 0.3), (0.98, 0.01, 0.01))
REFERENCE = logits((0.6, 0.3, 0.1), (0.1, 0.6, 0.3), (0.5, 0.25, 0.25))
A = 1 / math.sqrt(2) / (1 + 1e-6 * math.sqrt(2))  # of rewards 1 and 0: 0.5 / (sqrt(0.5) + 1e-6)


def weights(student, reference, mask=None, **arguments):
    """[B, T]: the credit of each token over its response's advantage, of two equal responses of
    which the first is right.
    """
    twice = (2, *student.shape[1:])
    out = evaluate(
        load("dgpo", **arguments),
        student.expand(twice),
        torch.zeros(twice[:2]).long(),
        None if mask is None else mask.expand(twice[:2]),
        models={"reference": reference.expand(twice)},
        reward=[1.0, 0.0],
        group=[0, 0],
    )
    assert close(out.terms[0].credit[1], -out.terms[0].credit[0], 12)
    return out.terms[0].credit[0] / A


def parts(kappa):
    """What the softmax is taken of: d h^kappa of the three tokens."""
    p, q = STUDENT.exp()[0], REFERENCE.exp()[0]
    d = 1 - (p * q).sqrt().sum(-1)
    return (
        d,
        -(p * p.log()).sum(-1) / math.log(3),
        d * (-(p * p.log()).sum(-1) / math.log(3)) ** kappa,
    )


def test_values():
    d, h, s = parts(1.0)
    assert close(d, [0.006977, 0.075736, 0.200000]) and close(h, [0.729847, 0.991159, 0.101858])
    assert close(s, [0.005092, 0.075066, 0.020372])
    assert close(weights(STUDENT, REFERENCE), [0.943027, 1.084683, 0.972290])
    assert close(weights(STUDENT, REFERENCE, tau=0.1), [0.717992, 1.445486, 0.836522])
    assert close(weights(STUDENT, REFERENCE, kappa=0.0), [0.829056, 0.951277, 1.219667])


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_it_is_the_softmax_of_its_parts(kappa, tau):
    expected = 3 * (parts(kappa)[2] / tau).softmax(0)
    assert close(weights(STUDENT, REFERENCE, kappa=kappa, tau=tau), expected, 10)


def random(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_credit_is_moved_and_neither_made_nor_lost(seed):
    case = step(seed, fresh=False, models=("reference",))
    out = case.run(load("dgpo", tau=0.1).objective)
    a = advantages(case.columns["reward"], GROUPS, std=True)
    credit = torch.where(case.mask, out.terms[0].credit, 0.0)
    assert close(credit.sum(1), a * case.mask.sum(1), 10)
    assert (credit.sign()[case.mask] == a.sign()[:, None].expand_as(credit)[case.mask]).all()
    assert credit[0, case.mask[0]].std() > 1e-3


def test_a_student_at_its_reference_has_grpo_to_the_bit():
    """Not only on the first update: what is compared is the student before the step."""
    for fresh in (True, False):
        case = step(0, fresh, models=("reference",))
        case = replace(case, models={"reference": case.before})
        ours, plain = (case.run(load(name).objective) for name in ("dgpo", "grpo"))
        assert torch.equal(ours.grad, plain.grad) and ours.loss == plain.loss


def test_equal_tokens_have_the_advantage_itself():
    """Also of 49 tokens, though 49 * (1 / 49) is less than 1."""
    z = random(0, 2, 49, 5)
    how = {"models": {"reference": z}, "reward": [1.0, 0.0], "group": [0, 0]}
    credit = evaluate(load("dgpo"), z, torch.zeros(2, 49).long(), **how).terms[0].credit
    plain = evaluate(load("grpo"), z, torch.zeros(2, 49).long(), **how).terms[0].credit
    assert torch.equal(credit, plain)


def test_infinite_temperature_is_grpo():
    case = step(1, fresh=False, models=("reference",))
    ours, plain = (case.run(m.objective) for m in (load("dgpo", tau=math.inf), load("grpo")))
    assert torch.equal(ours.grad, plain.grad) and ours.loss == plain.loss
    near = case.run(load("dgpo", tau=1e4).objective)
    assert 0 < (near.grad - plain.grad).abs().max() < 1e-4


def test_a_token_without_doubt_is_not_favoured_however_far_it_is():
    sure = logits((1 - 2e-12, 1e-12, 1e-12), (0.5, 0.3, 0.2))
    same = logits((1 / 3, 1 / 3, 1 / 3), (0.5, 0.3, 0.2))
    assert close(weights(sure, same, tau=0.1), [1.0, 1.0], 6)  # s = 0 of both
    far = weights(sure, same, tau=0.1, kappa=0.0)
    assert far[0] > 1.9 > 0.1 > far[1]


def test_tokens_outside_take_no_part():
    mask = torch.tensor([[True, False, True, True]])
    z, ref = random(1, 1, 4, 3), random(2, 1, 4, 3)
    inside = weights(z[:, mask[0]], ref[:, mask[0]])
    for noise in (0.0, 7.0):
        moved = z + noise * (~mask[..., None]) * random(3, 1, 4, 3)
        assert close(weights(moved, ref, mask)[mask[0]], inside, 12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_reference_by_its_top_k_is_a_lower_bound(k):
    """With all other tokens as one entry; with k one less than the vocabulary nothing is lost."""
    z, ref = random(4, 1, 6, 5), random(5, 1, 6, 5)
    p, q = z.softmax(-1)[0], ref.softmax(-1)[0]
    top = torch.zeros_like(q, dtype=torch.bool).scatter(-1, q.topk(k).indices, True)
    pairs = [
        torch.cat([torch.where(top, x, 0.0), torch.where(top, 0.0, x).sum(-1, keepdim=True)], -1)
        for x in (p, q)
    ]
    bucketed = 1 - (pairs[0] * pairs[1]).sqrt().sum(-1)
    d = 1 - (p * q).sqrt().sum(-1)
    assert (bucketed <= d + 1e-12).all()
    assert close(weights(z, ref, k=k, kappa=0.0), 6 * (bucketed / 0.5).softmax(0), 10)
    assert (k == 4) == close(bucketed, d, 10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"kappa": 2.0, "tau": 0.05}, {"kappa": 0.0}])
def test_equal_to_a_dense_reference(seed, fresh, arguments):
    """On fresh rollouts and on others, whose tokens were drawn from a third policy."""
    case = step(seed, fresh, models=("reference",))
    kappa, tau = (arguments.get(k, v) for k, v in (("kappa", 1.0), ("tau", 0.5)))

    def formula(now, models):
        before, ref = models["before"], models["reference"]
        d = 1 - ((before + ref) / 2).exp().sum(-1)
        h = -(before.exp() * before).sum(-1) / math.log(before.shape[-1])
        total = 0.0
        for b, a in enumerate(advantages(case.columns["reward"], GROUPS, std=True)):
            own = case.mask[b]
            s = (d * h**kappa)[b, own]
            w = own.sum() * (s / tau).exp() / (s / tau).exp().sum()
            y = case.tokens[b : b + 1]
            at_ = [at(x[b : b + 1], y)[0, own] for x in (now, before, models["sampler"])]
            loss = (at_[1] - at_[2]).exp() * ppo((at_[0] - at_[1]).exp(), a * w)
            total = total + loss.mean() / 6
        return total

    assert agrees(load("dgpo", **arguments), case, formula)


def test_what_it_reads():
    needs = load("dgpo").needs
    assert needs.models >= {"reference"} and needs.whole("reference")
    top = load("dgpo", k=8)
    assert not top.needs.whole("reference") and "teacher" not in top.needs.models
    gated, free = (str(load("dgpo", kappa=k).needs) for k in (1.0, 0.0))
    assert "entropy over log V" in gated and "entropy" not in free


def test_bad_arguments_are_explained():
    for arguments, words in (
        ({"kappa": -1.0}, "kappa=-1.0 must be at least 0"),
        ({"kappa": math.nan}, "kappa=nan"),
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"k": 0}, "k=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            load("dgpo", **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"kappa": 0.0}, {"kappa": 2.5, "tau": 0.01}, {"tau": math.inf}, {"k": 5}, {"clip": None}],
)
def test_check(arguments):
    check(load("dgpo", **arguments))
