"""Faults of divergences that other systems shipped (PITFALLS D1 to D5, V2, R5, R8): named by their
number.
"""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.methods.method import load
from opdkit.objective.divergences import JSD, KINDS, ForwardKL, ReverseKL, divergence
from opdkit.objective.losses import Divergence
from opdkit.testing import evaluate, fabricate
from tests.common.toy import FORWARD, REVERSE, Z_S, Z_T, P, Q
from tests.methods.toy import close, tokens

S, T = (
    torch.tensor([[Z_S]], dtype=torch.float64),
    {"teacher": torch.tensor([[Z_T]], dtype=torch.float64)},
)


def jsd(beta, **more):
    return evaluate(load("gkd", beta=beta, **more), S, tokens(0), models=T).loss.item()


def test_D1_the_end_of_the_generalised_jsd_is_a_jump_of_a_thousand():
    assert jsd(0.001) == pytest.approx(0.000522, abs=5e-7) and jsd(0.0) == pytest.approx(
        FORWARD, abs=5e-7
    )
    assert jsd(0.0) / jsd(0.001) == pytest.approx(1000, rel=0.01)
    # the form without the jump
    assert jsd(0.001, normalised=True) == pytest.approx(FORWARD, rel=0.01)
    # and it is said where it is chosen
    assert "1 %" in (JSD.__doc__ or "") and "1 %" in load("gkd").doc


def test_D2_beta_sits_on_the_teacher():
    p, q = (torch.tensor(x, dtype=torch.float64) for x in (P, Q))
    m = 0.3 * q + 0.7 * p
    ours = 0.3 * (q * (q / m).log()).sum() + 0.7 * (p * (p / m).log()).sum()
    other = 0.7 * q + 0.3 * p
    # KDFlow: beta on the student
    theirs = 0.3 * (p * (p / other).log()).sum() + 0.7 * (q * (q / other).log()).sum()
    assert jsd(0.3) == pytest.approx(ours.item(), abs=1e-12) and abs(ours - theirs) > 1e-3
    assert jsd(0.7) == pytest.approx(theirs.item(), abs=1e-12)


@pytest.mark.parametrize("kind", [*KINDS, "jsd normalised"])
@pytest.mark.parametrize("low", [-104.0, -300.0, -1e4, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_D3_what_both_rule_out_contributes_nothing(kind, low, dtype):
    made = KINDS.get(kind, JSD(0.5, True))
    z = torch.tensor([[[1.0, 0.0, low, low]]], dtype=dtype)
    t = torch.tensor([[[0.0, 0.5, low, low]]], dtype=dtype)
    out, short = (
        evaluate(Divergence(made), z[..., :n], tokens(0), models={"teacher": t[..., :n]})
        for n in (4, 2)
    )
    assert out.grad.isfinite().all() and out.loss.item() == pytest.approx(
        short.loss.item(), rel=1e-5
    )
    assert (
        torch.allclose(out.grad[..., :2], short.grad, atol=1e-6)
        and out.grad[..., 2:].abs().max() < 1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "support",
    [
        {},
        {"support": "teacher", "k": 4},
        {"support": "union", "k": 3},
        {"support": "student", "k": 2},
    ],
)
def test_D3_a_token_that_only_the_teacher_rules_out_gives_no_nan(kind, support):
    teacher = torch.tensor([[[0.5, 1.5, -math.inf, -math.inf]]], dtype=torch.float64)
    out = evaluate(Divergence(kind, **support), S, tokens(0), models={"teacher": teacher})
    if kind != "chi2":  # chi-square against a teacher without mass is infinite
        assert out.loss.isfinite() and out.grad.isfinite().all()
    assert not out.loss.isnan() and not out.grad.isnan().any()


def test_D4_directions_are_named_and_pytorchs_is_the_other_way_round():
    ls, lt = (torch.tensor(z, dtype=torch.float64).log_softmax(0) for z in (Z_S, Z_T))
    assert close(divergence(ReverseKL(), ls, lt), REVERSE) and close(
        divergence(ForwardKL(), ls, lt), FORWARD
    )
    kl = torch.nn.functional.kl_div(ls, lt, reduction="sum", log_target=True)  # KL(second || first)
    assert close(divergence(ForwardKL(), ls, lt), kl.item(), 12)
    loss = {
        k: evaluate(Divergence(k), S, tokens(0), models=T).loss
        for k in ("reverse_kl", "forward_kl")
    }
    assert close(loss["reverse_kl"], REVERSE) and close(loss["forward_kl"], FORWARD)


def test_D5_temperature_is_applied_once_and_to_both():
    assert close(
        evaluate(
            Divergence("reverse_kl", temperature=0.7), S, tokens(0), models={"teacher": S}
        ).loss,
        0.0,
        12,
    )
    one_side = evaluate(Divergence("reverse_kl"), S / 0.7, tokens(0), models={"teacher": S}).loss
    # what an in-place division of the student's logits makes of identical models
    assert close(one_side, 0.040110)
    both = evaluate(Divergence("reverse_kl", temperature=0.7), S, tokens(0), models=T).loss
    by_hand = evaluate(
        Divergence("reverse_kl"), S / 0.7, tokens(0), models={"teacher": T["teacher"] / 0.7}
    ).loss
    assert close(both, by_hand.item(), 12)


def test_D5_terms_of_different_temperature_do_not_mix():
    hot, plain = Divergence("reverse_kl", temperature=2.0), Divergence("reverse_kl")
    outs = [evaluate(x, S, tokens(0), models=T) for x in (hot, plain, hot + plain, plain + hot)]
    for both in outs[2:]:
        assert close(both.loss, (outs[0].loss + outs[1].loss).item(), 12) and close(
            both.grad, outs[0].grad + outs[1].grad, 12
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "support",
    [
        {},
        {"k": 3},
        {"k": 3, "rest": "renormalise"},
        {"k": 3, "rest": "tail"},
        {"k": 3, "support": "union"},
    ],
)
def test_R5_an_agreeing_teacher_is_zero_for_every_divergence(kind, support):
    """Alone, and packed as a longer row with rollouts of other lengths."""
    g = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(3, 5, 8, generator=g, dtype=torch.float64)
    ids, mask = (
        torch.randint(8, (3, 5), generator=g),
        torch.arange(5) < torch.tensor([5, 1, 3])[:, None],
    )
    out = evaluate(Divergence(kind, **support), student, ids, mask, {"teacher": student})
    assert abs(out.loss) < 1e-12
    raw_part = "k" in support and "rest" not in support
    if raw_part and kind in ("reverse_kl", "forward_kl", "skew_forward", "skew_reverse"):
        # a KL summed over a part of the vocabulary is no divergence: K2
        assert out.grad.abs().max() > 1e-6
    else:
        assert out.grad.abs().max() < 1e-12


def test_V2_rows_that_only_pad_the_vocabulary_are_cut():
    # zeros, as Liger pads: they would take 0.148421 of the student's mass
    padded = torch.nn.functional.pad(S, (0, 2))
    assert close(1 - padded.softmax(-1)[..., :4].sum(), 0.148421)
    for name in ("opd", "gkd", "tropd", "vopd"):
        plain = evaluate(load(name), S, tokens(1), models=T)
        for student, teacher in (
            (padded, T["teacher"]),
            (S, torch.nn.functional.pad(T["teacher"], (0, 3))),
        ):
            out = evaluate(load(name), student, tokens(1), models={"teacher": teacher})
            assert close(out.loss, plain.loss.item(), 12) and close(
                out.grad[..., :4], plain.grad, 12
            )
            assert (out.grad[..., 4:] == 0).all()


def test_V2_rows_of_minus_infinity_on_both_sides_change_nothing():
    pad = [torch.nn.functional.pad(x, (0, 2), value=-math.inf) for x in (S, T["teacher"])]
    for name in ("opd", "gkd", "tropd", "vopd"):
        plain = evaluate(load(name), S, tokens(1), models=T)
        out = evaluate(load(name), pad[0], tokens(1), models={"teacher": pad[1]})
        assert close(out.loss, plain.loss.item(), 12) and close(out.grad[..., :4], plain.grad, 12)
        assert (out.grad[..., 4:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_R8_chunks_do_not_matter(kind):
    made = load("opd", kind=kind, support="full").objective
    case = fabricate(made)
    base = case.run(made)
    for chunk in (1, 3, 28, 29, 10_000):
        out = case.run(made, chunk=chunk)
        assert (out.grad - base.grad).norm() <= 1e-9 * base.grad.norm() and abs(
            out.loss - base.loss
        ) < 1e-12
