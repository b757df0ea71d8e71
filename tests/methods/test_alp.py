"""ALP: one ratio to the sampler, of a token, of all or of those so far, clipped on both sides; the
noise itself is in `tests/objective/test_noise.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.methods.alp import OneRatio, Reach
from opdkit.methods.method import load
from opdkit.objective import LayerNoise
from opdkit.testing import check, evaluate
from tests.methods.ragged import LEVEL, on, shifted, slopes
from tests.methods.steps import GROUPS, advantages, agrees, at, step

MODES: list[dict[str, Any]] = [
    {"mode": "token"},
    {"mode": "sequence"},
    {"mode": "sequence", "geometric": True},
    {"mode": "cumulative"},
]
APART = [[0.3, 0.5, 0.9, 0.2]]  # the card's log pi_s - log pi_sampler


def card(reward: float, **arguments: Any) -> tuple[float, list[float]]:
    """Loss and slope in each log-prob of one rollout: a group of one keeps its reward."""
    student = shifted([[-0.2, -0.1, -0.05, -0.3]], 0.0)
    sampler = [[s - x for s, x in zip(student[0], APART[0])]]
    out = on(load("alp", **arguments), student, sampler=sampler, reward=[reward], group=[0])
    return out.loss.item(), slopes(out, student).tolist()


# --------------------------------------------------------------------------------------- the card


def test_the_ratio_of_a_sequence() -> None:
    """exp(0.3 + 0.5 + 0.9 + 0.2) = exp(1.9), of the mean exp(0.475); all tokens have it."""
    loss, slope = card(-1.0)
    assert loss == pytest.approx(6.685894, abs=5e-7)
    assert slope == pytest.approx([6.685894 / 4] * 4, abs=5e-7)  # rho / tokens, no 1 / length
    loss, slope = card(-1.0, geometric=True)
    assert loss == pytest.approx(1.608014, abs=5e-7)
    assert slope == pytest.approx([1.608014 / 4] * 4, abs=5e-7)


def test_a_ratio_beyond_four_has_no_gradient_where_it_is_credited() -> None:
    loss, slope = card(1.0)
    assert loss == -4.0 and slope == [0.0] * 4


def test_up_to_each_token_and_token_by_token() -> None:
    """exp(.3), exp(.8), exp(1.7) = 5.47 is beyond 4, exp(1.9); and each alone."""
    loss, slope = card(1.0, mode="cumulative")
    assert loss == pytest.approx(-(math.exp(0.3) + math.exp(0.8) + 4 + 4) / 4, rel=1e-12)
    assert slope == pytest.approx([-math.exp(0.3) / 4, -math.exp(0.8) / 4, 0, 0], rel=1e-12)
    loss, slope = card(1.0, mode="token")
    each = [-math.exp(x) / 4 for x in APART[0]]
    assert loss == pytest.approx(sum(each), rel=1e-12) and slope == pytest.approx(each, rel=1e-12)


@pytest.mark.parametrize(("reward", "alive"), [(1.0, True), (-1.0, False)])
def test_a_ratio_below_a_half_has_no_gradient_where_it_is_blamed(
    reward: float, alive: bool
) -> None:
    apart = math.log(0.4)
    sampler = [[LEVEL - apart]]
    out = on(load("alp"), [[LEVEL]], sampler=sampler, reward=[reward], group=[0])
    assert out.loss.item() == pytest.approx(-0.4 if alive else 0.5, rel=1e-12)
    assert slopes(out, [[LEVEL]]).tolist() == pytest.approx([-0.4 if alive else 0.0], rel=1e-12)


def test_the_loss_of_what_is_blamed_is_at_most_c() -> None:
    """exp(3) = 20.1 > 10; with c=None it stays, and at 20 nats the ratio ends."""
    far = {"sampler": [[LEVEL - 3.0]], "reward": [-1.0], "group": [0]}
    out = on(load("alp"), [[LEVEL]], **far)
    assert out.loss.item() == 10.0 and (out.grad == 0).all()
    out = on(load("alp", c=None), [[LEVEL]], **far)
    assert out.loss.item() == pytest.approx(math.exp(3), rel=1e-12) and (out.grad != 0).any()
    out = on(load("alp", c=None), [[LEVEL]], **{**far, "sampler": [[LEVEL - 21.0]]})
    assert out.loss.item() == pytest.approx(math.exp(20), rel=1e-12) and (out.grad == 0).all()


def test_a_cap_bounds_the_ratio_and_a_mask_may_hold_it_in_the_place_of_the_clip() -> None:
    """exp(1.9) capped at 5; a token 0.2 likelier than to the sampler, 0.15 and 0.3 allowed."""
    loss, slope = card(-1.0, rollout_cap=5.0)
    assert loss == 5.0 and slope == [0.0] * 4
    given = {"sampler": [[math.log(0.5)]], "reward": [1.0], "group": [0]}
    for delta, alive in ((0.15, False), (0.3, True)):
        out = on(load("alp", divergence_mask=delta), [[math.log(0.7)]], **given)
        assert out.loss.item() == pytest.approx(-1.4 if alive else 0.0, rel=1e-12)
        assert bool((out.grad != 0).any()) == alive


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_what_was_just_sampled_has_the_ratio_one(arguments: dict[str, Any]) -> None:
    """To the bit: the gradient is that of a plain policy gradient."""
    case = step(0, fresh=True)
    out = case.run(load("alp", **arguments).objective)
    plain = case.run(load("grpo", loss="dapo").objective)
    assert torch.equal(out.grad, plain.grad) and out.loss == plain.loss


# ----------------------------------------------------------------------------- a naive reference


@pytest.mark.parametrize("fresh", [True, False], ids=["on policy", "off policy"])
@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_equal_to_a_dense_reference(arguments: dict[str, Any], fresh: bool) -> None:
    case = step(3, fresh)
    assert case.mask is not None
    mask, reward = case.mask, torch.as_tensor(case.columns["reward"])

    def reference(student: Tensor, others: dict[str, Tensor]) -> Tensor:
        logp, total = at(student, case.tokens), torch.zeros(()).double()
        lr = logp - at(others["sampler"], case.tokens)
        a = advantages(reward, GROUPS, std=True)
        k3 = at(others["reference"], case.tokens) - logp
        for b in range(len(mask)):
            places = mask[b].nonzero()[:, 0].tolist()
            for i, t in enumerate(places):
                log_rho = lr[b, t]
                if arguments["mode"] != "token":
                    upto = places if arguments["mode"] == "sequence" else places[: i + 1]
                    whole = lr[b, upto].sum() / (len(upto) if "geometric" in arguments else 1)
                    log_rho = whole.detach() + logp[b, t] - logp[b, t].detach()
                rho = log_rho.clamp(-20, 20).exp()
                loss = torch.maximum(-a[b] * rho, -a[b] * rho.clamp(0.5, 4.0))
                if a[b] < 0:
                    loss = torch.minimum(loss, -a[b] * 10.0)
                total = total + loss + 0.1 * (k3[b, t].exp() - 1 - k3[b, t])
        return total / mask.sum()

    case = replace(case, models={"reference": step(4, True).student})
    assert agrees(load("alp", **arguments, reference_kl=0.1), case, reference)


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_check(arguments: dict[str, Any]) -> None:
    check(load("alp", **arguments))


# ------------------------------------------------------------------------------------ what it is


def test_what_it_says() -> None:
    made = load("alp", sigma=0.02, layers=[2, 5], learning_rate=0.0)
    assert made.companions == (LayerNoise(0.02, (2, 5), 0.0),)
    assert load("alp", sigma=0.0).companions == ()
    (term,) = load("alp").objective.terms
    assert isinstance(term.loss, OneRatio) and term.loss.reach == Reach("sequence")
    assert dict(load("alp").arguments)["clip"] == (0.5, 3.0)
    assert load("alp").needs.models == {"live", "sampler"}
    assert load("alp", mode="token").needs.models == {"sampler"}
    for wrong, said in (
        ({"mode": "row"}, "mode='row' must be one of"),
        ({"mode": "token", "geometric": True}, "geometric is of mode='sequence'"),
        ({"sigma": -1.0}, "must be at least 0"),
        ({"sigma": math.inf}, "both finite"),
        ({"learning_rate": -1e-3}, "0: widths stay"),
        ({"reference_kl": -0.1}, "must be at least 0: it is the weight of the penalty"),
        ({"layers": (3, 1)}, r"must be \(start, end\), two integers"),
        ({"layers": 0}, r"must be \(start, end\), two integers"),
        ({"layers": (0.5, 2)}, r"must be \(start, end\), two integers"),
        ({"divergence_mask": 0.1, "mask_kind": "full_tv"}, "ratio of tokens of sampler"),
    ):
        with pytest.raises(Exception, match=said):
            load("alp", **wrong)


def test_on_plain_logits_it_is_the_loss_without_noise() -> None:
    z = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    ids, facts = torch.zeros(2, 3, dtype=torch.int64), {"reward": [1.0, 0.0], "group": [0, 0]}
    noisy, bypass = (evaluate(load("alp", sigma=s), z, ids, **facts) for s in (0.5, 0.0))  # type: ignore[arg-type]
    assert torch.equal(noisy.grad, bypass.grad) and not noisy.companions
