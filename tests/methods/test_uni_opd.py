"""Uni-OPD: the margin shift and mask, the balance of right and wrong, and where it is OPD."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.methods.uni_opd import Balanced, MarginMask, RolloutDraw, gap
from opdkit.objective import Const, LogRatio, policy_gradient
from opdkit.testing import check
from tests.methods.ragged import LEVEL, on, shifted
from tests.methods.toy import close

SCORES = [[-0.10], [-0.50], [-0.05], [-0.40]]  # one prompt, the first two answers right
OPD = policy_gradient(LogRatio("teacher", "student")).per("rows")


def run(method, gaps=SCORES, correct=(True, True, False, False), group=None, **facts):
    """On fresh rollouts whose log(teacher/student) is given."""
    student = [[LEVEL] * len(row) for row in gaps]
    correct, group = torch.tensor(correct), [0] * len(gaps) if group is None else group
    return on(
        method, student, models={"teacher": shifted(gaps)}, correct=correct, group=group, **facts
    )


def credits(**arguments):
    return run(load("uni_opd", **arguments)).terms[0].credit[:, 0]


@pytest.mark.parametrize(
    ("mode", "direction", "values"),
    [
        ("mean", "both", (0.1375, -0.2625, -0.2875, -0.6375)),
        ("mean", "correct_up", (0.375, -0.025, -0.05, -0.40)),
        ("mean", "incorrect_down", (-0.10, -0.50, -0.525, -0.875)),
        ("minmax", "both", (0.325, -0.075, -0.475, -0.825)),
    ],
)
def test_shift_makes_the_gap_exactly_delta(mode, direction, values):
    credit = credits(mode=mode, direction=direction)
    assert close(credit, values)
    assert gap(credit[:2].tolist(), credit[2:].tolist(), mode) == pytest.approx(0.4, abs=1e-12)


def test_a_second_shift_changes_nothing():
    once = credits()
    twice = run(load("uni_opd"), [[x] for x in once.tolist()]).terms[0].credit[:, 0]
    assert close(twice, once, 12)


def test_mask_drops_the_worst_right_then_the_best_wrong():
    """Without -.50 the gap is .125, then without -.05 .30; each kind keeps its last."""
    out = run(load("uni_opd", action="mask"))
    assert out.terms[0].weight[:, 0].tolist() == [1, 0, 0, 1]
    # those that stay are as they were
    assert close(out.terms[0].credit[:, 0], [x for (x,) in SCORES])
    assert (out.grad[1:3] == 0).all() and (out.grad[[0, 3]] != 0).all()


def test_mask_stops():
    mask = MarginMask(Const(0), Const(1), "group", 0.4, "mean")
    assert mask.of([0.9, 0.1], [0.0]) == ([1, 1], [1])  # at 0.5 already
    assert mask.of([0.3, 0.1], [0.0]) == ([1, 0], [1])  # 0.2, then 0.3: a kind keeps at least one
    assert mask.of([0.25] * 4, [0.0] * 4) == ([1] * 4, [1] * 4)  # no removal raises the gap


def test_of_two_equal_removals_the_right_answer_goes():
    """0.125 to 0.25 either way."""
    mask = MarginMask(Const(0), Const(1), "group", 0.2, "mean")
    assert mask.of([0.125, 0.375], [0.0, 0.25]) == ([0, 1], [1, 1])


def test_least_share_of_a_kind_stays():
    """Eight right answers: int(0.25 * 8) = 2 stay, however far the gap."""
    right, _ = MarginMask(Const(0), Const(1), "group", 100.0, "mean").of(
        [float(i) for i in range(8)], [0.0]
    )
    assert right == [0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "correct"),
    [
        ({}, (True, True, True, True)),
        ({}, (False, False, False, False)),
        ({"delta": -0.1}, (True, True, False, False)),  # the gap is -0.075
        ({"delta": -math.inf}, (True, True, False, False)),
        ({"delta": -math.inf, "action": "mask"}, (True, True, False, False)),
        ({"mode": "minmax", "delta": -0.5}, (True, True, False, False)),
    ],
)
def test_nothing_to_correct_is_opd_bit_for_bit(arguments, correct):
    out, opd = run(load("uni_opd", **arguments), correct=correct), run(OPD)
    assert torch.equal(out.loss, opd.loss) and torch.equal(out.grad, opd.grad)


def test_shift_is_constant_inside_a_response_and_keeps_the_mean():
    gaps = [[0.1, -0.4, 0.2], [-0.3, 0.0, -0.6], [0.2, 0.3, -0.1], [0.4, -0.2, 0.1]]
    credit = run(load("uni_opd"), gaps).terms[0].credit
    before = torch.tensor(gaps, dtype=torch.float64)
    assert close(credit - credit[:, :1], before - before[:, :1], 12) and not close(
        credit, before, 2
    )
    # as many right as wrong, all of one length
    assert close(credit.mean(), before.mean().item(), 12)


def test_prompts_are_calibrated_apart_or_together():
    apart = run(load("uni_opd"), group=[0, 1, 0, 1]).terms[0].credit[:, 0]
    # gaps -0.05 and -0.1
    assert close(apart, [-0.10 + 0.225, -0.50 + 0.25, -0.05 - 0.225, -0.40 - 0.25])
    together = run(load("uni_opd", scope="step"), group=[0, 1, 0, 1]).terms[0].credit[:, 0]
    assert close(together, credits())


def kept(right, wrong, ratio):
    parts = Balanced(RolloutDraw(), Const(1), "group", ratio).of(
        [i / 10 for i in range(right)], [i / 10 for i in range(wrong)]
    )
    return tuple(int(sum(part)) for part in parts)


@pytest.mark.parametrize(
    ("right", "wrong", "ratio", "stay"),
    [
        (5, 2, 1.0, (2, 2)),
        (2, 5, 1.0, (2, 2)),
        (5, 2, 2.0, (4, 2)),
        (1, 6, 2.0, (1, 6)),  # int(0.5) = 0 would stay
        (4, 0, 1.0, (4, 0)),
        (0, 4, 1.0, (0, 4)),
        (3, 2, 0.0, (0, 2)),
        (3, 2, math.inf, (3, 0)),
        (3, 0, 0.0, (3, 0)),
    ],
)
def test_balance(right, wrong, ratio, stay):
    assert kept(right, wrong, ratio) == stay


def test_balance_takes_rollouts_out_of_loss_and_scores():
    """Four right, one wrong: one right one is drawn, and it alone is set against the wrong one."""
    gaps, correct = [[0.1], [0.2], [0.3], [0.4], [0.0]], (True, True, True, True, False)
    drawn = set()
    for seed in range(20):
        out = run(load("uni_opd", delta=1.0), gaps, correct, seed=seed)
        weight = out.terms[0].weight[:, 0]
        (chosen,) = weight[:4].nonzero()[:, 0].tolist()
        drawn.add(chosen)
        lack = 1.0 - gaps[chosen][0]
        assert weight.sum() == 2 and close(
            out.terms[0].credit[[chosen, 4], 0], [gaps[chosen][0] + lack / 2, -lack / 2], 12
        )
        assert close(out.terms[0].denominator[:, 0], [5.0] * 5)  # the mean is still over all five
    assert drawn == {0, 1, 2, 3}


def test_balance_over_the_step():
    out = run(
        load("uni_opd", balance_scope="step"), correct=(True, True, True, False), group=[0, 0, 1, 1]
    )
    assert out.terms[0].weight.sum() == 2 and out.terms[0].weight[3, 0] == 1


def test_far_tokens_and_failed_scores_have_no_loss():
    """|r| of 10 and more is left out; a teacher's -100 counts as 0 in the score of its response."""
    gaps = [[-0.1, 0.5], [-10.0, 0.0], [-0.05, -100.0 - LEVEL], [-0.4, 0.0]]
    out = run(load("uni_opd"), gaps)
    assert out.terms[0].weight.tolist() == [[1, 1], [0, 1], [1, 0], [1, 1]]
    right, wrong = (0.2 - 5.0) / 2, (-0.025 - 0.2) / 2
    assert close(out.terms[0].credit[0, 0], -0.1 + (0.4 - (right - wrong)) / 2, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mode": "minmax"},
        {"direction": "correct_up"},
        {"direction": "incorrect_down"},
        {"action": "mask"},
        {"balance": None},
        {"balance": 2.0, "scope": "step", "balance_scope": "step"},
        {"clip": (0.2, 0.28), "dual_clip": 3.0, "rollout_cap": 2.0},
    ],
)
def test_check(arguments):
    check(load("uni_opd", **arguments))


@pytest.mark.parametrize("name", ["mode", "direction", "action", "scope", "balance_scope"])
def test_bad_arguments_are_explained(name):
    with pytest.raises(UserError, match=f"{name}='x' must be one of"):
        load("uni_opd", **{name: "x"})
