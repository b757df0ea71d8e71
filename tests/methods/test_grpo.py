"""GRPO and its variants: advantages, clipping, reductions, the penalty, and what they share."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective import LogRatio, Objective, policy_gradient
from opdkit.objective.algebra import within
from opdkit.testing import check, evaluate
from tests.methods.ragged import LEVEL, on, ragged, shifted, slopes
from tests.methods.toy import (
    P_S,
    P_T,
    close,
    expected,
    logits,
    numbers,
    reverse_kl_gradient,
    tokens,
)

LOG_RATIOS = [[0.2, -0.1], [0.4, 0.1, -0.3, 0.2]]
FRESH = [[LEVEL] * 2, [LEVEL] * 4]
PAIR = {"advantage": "rloo"}  # rewards 1 and 0 have the advantages 1 and -1
LOSSES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")


def moved(method):
    """The loss after the student has moved by LOG_RATIOS since it sampled."""
    return on(method, shifted(LOG_RATIOS), before=FRESH, reward=[1.0, 0.0], group=[0, 0])


@pytest.mark.parametrize(
    ("advantage", "values"),
    [
        ("std", (1.5, -0.5, -0.5, -0.5)),
        ("mean", (0.75, -0.25, -0.25, -0.25)),
        ("rloo", (1.0, -1 / 3, -1 / 3, -1 / 3)),
    ],
)
def test_advantages(advantage, values):
    out = on(
        load("grpo", advantage=advantage), [[LEVEL]] * 4, reward=[1.0, 0.0, 0.0, 0.0], group=[7] * 4
    )
    # the 1e-6 beside the deviation shows in the sixth digit
    assert close(out.terms[0].credit[:, 0], values, 5)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_rewards_teach_nothing(loss):
    out = on(
        load("grpo", loss=loss), shifted(LOG_RATIOS), before=FRESH, reward=[1.0, 1.0], group=[0, 0]
    )
    assert out.loss == 0 and (out.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("advantage", ["std", "mean", "rloo"])
@pytest.mark.parametrize(
    "method",
    [("grpo", {"loss": loss}) for loss in LOSSES] + [("kdrl", {"beta": 0.0}), ("rlad", {})],
    ids=str,
)
def test_equal_rewards_teach_nothing_whatever_they_are(method, advantage, dtype):
    """Sixteen times 0.7 and 32 times 0.96, whose means round in float32, beside a prompt that has
    something to teach.
    """
    name, arguments = method
    reward, group = [0.7] * 16 + [0.96] * 32 + [1.0, 0.0], [0] * 16 + [1] * 32 + [2] * 2
    torch.manual_seed(5)
    student, before, teacher = (torch.randn(50, 3, 8).to(dtype) for _ in range(3))
    ids, mask = torch.randint(8, (50, 3)), torch.rand(50, 3) < 0.8
    mask[:, 0] = True
    out = evaluate(
        load(name, advantage=advantage, **arguments),
        student,
        ids,
        mask,
        models={"teacher": teacher},
        before_logits=before,
        reward=reward,
        group=group,
    )
    assert (out.grad[:48] == 0).all() and (out.grad[48:] != 0).any()
    alone = evaluate(
        load(name, advantage=advantage, **arguments),
        student[:16],
        ids[:16],
        models={"teacher": teacher[:16]},
        before_logits=before[:16],
        reward=reward[:16],
        group=group[:16],
    )
    assert alone.loss == 0 and (alone.grad == 0).all()


@pytest.mark.parametrize(("loss", "value"), [("grpo", 0.0), ("dapo", 1 / 3), ("dr_grpo", 0.125)])
def test_reductions_on_fresh_rollouts(loss, value):
    """-1 on two tokens, +1 on four: 0 as a mean of rollouts, 2/6 as a mean of tokens, 2/(2 * 8)
    over a fixed length.
    """
    out = on(
        load("grpo", loss=loss, max_completion_length=8, **PAIR),
        FRESH,
        reward=[1.0, 0.0],
        group=[0, 0],
    )
    assert close(out.loss, value)


@pytest.mark.parametrize(
    ("loss", "value"), [("grpo", 0.045740), ("dapo", 0.415360), ("dr_grpo", 0.311520)]
)
def test_clipped_losses(loss, value):
    """Token losses -1.221403, -0.904837 | 1.491825, 1.105171, 0.8, 1.221403."""
    out = moved(load("grpo", loss=loss, clip=(0.2, 0.28), max_completion_length=4, **PAIR))
    assert close(out.loss, value)
    # the clipped token has no gradient
    live = numbers(-1.221403, -0.904837, 1.491825, 1.105171, 0.0, 1.221403)
    share = {
        "grpo": numbers(4, 4, 8, 8, 8, 8),
        "dapo": numbers(*[6] * 6),
        "dr_grpo": numbers(*[8] * 6),
    }[loss]
    assert close(slopes(out, shifted(LOG_RATIOS)), live / share)


def test_gspo_clips_whole_rollouts():
    out = moved(load("grpo", loss="gspo", clip=(3e-4, 4e-4), **PAIR))
    assert close(out.loss, 0.052385)
    # the first, 1.051271 with A = 1, is clipped; the second, 1.105171 with A = -1, is not: s / (2
    # rollouts * 4 tokens) each
    assert close(slopes(out, shifted(LOG_RATIOS)), [0, 0, *[1.105171 / 8] * 4])


def test_gspo_token_is_gspo_for_one_advantage_per_rollout():
    """Its ratio sg(s) exp(logp - sg(logp)), written out and averaged per rollout."""
    out = moved(load("grpo", loss="gspo", clip=(0.2, 0.2), **PAIR))
    rows = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in LOG_RATIOS]
    total = torch.zeros((), dtype=torch.float64)
    for a, lr in zip((1.0, -1.0), rows):
        s = lr.detach().mean().exp() * (lr - lr.detach()).exp()
        total = total + torch.maximum(-a * s, -a * s.clamp(0.8, 1.2)).mean() / 2
    total.backward()
    assert close(out.loss, total.item(), 12)
    assert close(slopes(out, shifted(LOG_RATIOS)), torch.cat([row.grad for row in rows]), 12)


@pytest.mark.parametrize(
    ("clip", "weights"),
    [
        ((0.2, 0.28), (1.28, 1.105171, 0.8, 1.221403)),
        ((1, 4), (1.491825, 1.105171, 0.740818, 1.221403)),
    ],
)
def test_cispo_keeps_every_token(clip, weights):
    out = moved(load("grpo", loss="cispo", clip=clip, **PAIR))
    assert close(6 * slopes(out, shifted(LOG_RATIOS))[2:], weights)


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
@pytest.mark.parametrize(
    ("ratio", "value", "slope"), [(0.5, 0.8, 0.0), (1.5, 1.5, 1.5), (12.0, 3.0, 0.0)]
)
def test_dual_clip(loss, ratio, value, slope):
    student = [[-1.0], []]
    method = load("grpo", loss=loss, dual_clip=3.0, **PAIR)
    out = on(
        method, student, before=[[-1.0 - math.log(ratio)], []], reward=[0.0, 1.0], group=[0, 0]
    )
    assert close(out.loss, value) and close(slopes(out, student), [slope])


@pytest.mark.parametrize(
    ("estimator", "value"), [("k3", 0.0408182), ("k2", 0.045), ("k3+", 0.0408182)]
)
def test_reference_penalty(estimator, value):
    method = load("grpo", reference_kl=1.0, reference_estimator=estimator)
    out = on(
        method, [[-1.0]] * 2, models={"reference": [[-1.3]] * 2}, reward=[1.0, 1.0], group=[0, 0]
    )
    assert close(out.loss, value, 7)


@pytest.mark.parametrize(
    ("estimator", "gradient"), [("k3", [0.3, -0.2, -0.1]), ("k2", None), ("k3+", None)]
)  # k3: that of KL(reference || student)
def test_gradient_of_the_penalty(estimator, gradient):
    method = load("grpo", reference_kl=1.0, reference_estimator=estimator)
    s, ref = logits(P_S).expand(2, -1, -1), logits(P_T).expand(2, -1, -1)
    mean = sum(
        p
        * evaluate(
            method,
            s,
            tokens(y).expand(2, -1),
            models={"reference": ref},
            reward=[1.0, 1.0],
            group=[0, 0],
        ).grad.sum(0)[0]
        for y, p in enumerate(P_S)
    )
    assert close(mean, reverse_kl_gradient(P_S, P_T) if gradient is None else gradient)


def test_fresh_rollouts_make_token_forms_one():
    """At ratio 1 PPO's loss, CISPO and plain policy gradient have the same gradient, and GSPO that
    of GRPO.
    """
    make = lambda **a: on(load("grpo", **PAIR, **a), FRESH, reward=[1.0, 0.0], group=[0, 0]).grad  # noqa: E731
    plain = make(loss="dapo", clip=None)
    for other in (make(loss="dapo"), make(loss="cispo"), make(loss="cispo", clip=None)):
        assert close(other, plain, 12)
    assert close(make(loss="gspo"), make(loss="grpo"), 12)


def test_with_the_teachers_credit_it_is_opd():
    """No group, the token mean, A = log(teacher/student): the clipped loss is OPD's on fresh
    rollouts.
    """
    clipped = Objective(policy_gradient(LogRatio("teacher", "student"), clip=(0.2, 0.2)))
    assert close(expected(clipped, P_S, P_T), expected("opd", P_S, P_T), 12)


@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo"])
def test_rollout_cap_weighs_what_trainer_and_sampler_disagree_about(loss):
    """The student is twice as sure as its sampler was: fresh for the ratio, weighed by
    min(2, 1.5).
    """
    student, sampler = [[-0.1] * 2] * 2, [[-0.1 - math.log(2)] * 2] * 2
    out = on(
        load("grpo", loss=loss, rollout_cap=1.5, **PAIR),
        student,
        sampler=sampler,
        reward=[1.0, 0.0],
        group=[0, 0],
    )
    assert close(slopes(out, student), [-1.5 / 4, -1.5 / 4, 1.5 / 4, 1.5 / 4])


def test_reads_a_reference_only_for_its_penalty():
    assert (
        "reference" not in load("grpo").needs.models
        and "reference" in load("grpo", reference_kl=0.04).needs.models
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"clip": None, "advantage": "mean"}, {"reference_kl": 0.1, "rollout_cap": 2.0}],
)
def test_check(loss, arguments):
    check(load("grpo", loss=loss, **arguments))


def test_the_length_of_dr_grpo_is_the_runs_where_it_is_not_given():
    """Within a run of 8 tokens it is `max_completion_length=8`, and without a run 512; one that is
    given stays, and no other denominator changes.
    """
    bare, given = load("grpo", loss="dr_grpo", **PAIR), {"max_completion_length": 8}
    eight = load("grpo", loss="dr_grpo", **given, **PAIR).objective
    assert within(bare.objective, 8) == eight == within(eight, 1024)
    long = load("grpo", loss="dr_grpo", max_completion_length=512, **PAIR)
    assert moved(bare).loss == moved(long).loss != moved(eight).loss
    for loss in LOSSES:
        if loss != "dr_grpo":
            other = load("grpo", loss=loss).objective
            assert within(other, 8) == other
    both = load("grpo(loss='dr_grpo', reference_kl=0.1) + opd").objective
    assert [t.denominator for t in within(both, 8).terms] == [8, 8, "tokens"]


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="one of grpo, dapo"):
        load("grpo", loss="ppo")
    with pytest.raises(UserError, match="use clip"):
        load("grpo", loss="cispo", dual_clip=3.0)
    with pytest.raises(UserError, match="greater than 1"):
        load("grpo", loss="gspo", dual_clip=0.5)
    with pytest.raises(UserError, match="positive length"):
        load("grpo", loss="dr_grpo", max_completion_length=0)


def test_ragged_rows_have_the_log_probs_they_were_given():
    assert close(
        ragged([[-0.5], [-1.0, -2.0]]).log_softmax(-1)[..., 0],
        torch.tensor([[-0.5, LEVEL], [-1.0, -2.0]]).double(),
        12,
    )
