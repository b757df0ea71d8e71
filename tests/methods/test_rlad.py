"""RLAD: the ratio to a mixture of old student and teacher, its clipping, and its limit GRPO."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import check
from tests.methods.ragged import on, slopes
from tests.methods.toy import close


def one_token(a, advantage, student, before, teacher, **arguments):
    """Minus the loss, and its slope, at one token whose rollout has the advantage 1 or -1; the
    other rollout is empty.
    """
    method = load("rlad", a=a, advantage="rloo", **arguments)
    reward = [1.0, 0.0] if advantage > 0 else [0.0, 1.0]
    models = {"teacher": [[teacher], []]} if a != 1 else {}
    out = on(
        method, [[student], []], before=[[before], []], models=models, reward=reward, group=[0, 0]
    )
    return -out.loss, -slopes(out, [[student], []])


@pytest.mark.parametrize(
    ("a", "up", "down", "clipped"),
    [
        (1.0, 1.2, -1.221403, (True, False)),
        (0.5, 0.951229, -0.951229, (False, False)),
        (0.0, 0.740818, -0.8, (False, True)),
    ],
)
def test_ratio_and_objective(a, up, down, clipped):
    """log pi_s -0.8, before -1.0, teacher -0.5: ratios 1.221403, 0.951229, 0.740818."""
    for advantage, value, flat in ((1.0, up, clipped[0]), (-1.0, down, clipped[1])):
        objective, slope = one_token(a, advantage, -0.8, -1.0, -0.5)
        assert close(objective, value) and close(slope, [0.0 if flat else value])


def test_clamped_teacher_loses_its_part_of_the_gradient():
    r, slope = one_token(0.5, 1.0, -0.8, -1.0, -3.0, clip=None)
    assert close(r, 1.822119) and close(slope, [0.911059])
    r, slope = one_token(0.5, 1.0, -0.8, -1.0, -3.0, clip=None, clamp=10.0)
    assert close(r, 3.320117) and close(slope, [3.320117])


@pytest.mark.parametrize(
    ("d", "advantage", "value", "slope"),
    [
        (0.4, 1.0, 0.818731, 0.818731),
        (0.5, -1.0, -0.8, 0.0),  # already below the teacher: not pushed down
        (0.5, 1.0, 0.778801, 0.778801),
        (-0.5, 1.0, 1.2, 0.0),  # already above: not pushed up
        (-0.5, -1.0, -1.284025, -1.284025),
    ],
)
def test_fresh_rollouts(d, advantage, value, slope):
    """The ratio starts at exp(-d/2), d = log(teacher/student), not at 1."""
    objective, slopes_ = one_token(0.5, advantage, -1.0, -1.0, -1.0 + d)
    assert close(objective, value) and close(slopes_, [slope])


ROWS, BEFORE = [[-0.8, -1.3], [-0.4, -1.1, -0.9]], [[-1.0, -1.2], [-0.9, -1.0, -1.2]]
PAIR = {"before": BEFORE, "reward": [1.0, 0.0], "group": [0, 0]}


def test_all_weight_on_the_student_is_grpo():
    grpo, rlad = on(load("grpo", loss="dapo"), ROWS, **PAIR), on(load("rlad", a=1.0), ROWS, **PAIR)
    assert torch.equal(grpo.loss, rlad.loss) and torch.equal(grpo.grad, rlad.grad)
    assert "teacher" not in load("rlad", a=1.0).needs.models


@pytest.mark.parametrize("a", [0.0, 0.3, 0.5])
def test_a_teacher_like_the_old_student_is_grpo(a):
    grpo, rlad = (
        on(load("grpo", loss="dapo"), ROWS, **PAIR),
        on(load("rlad", a=a), ROWS, models={"teacher": BEFORE}, **PAIR),
    )
    assert close(grpo.loss, rlad.loss.item(), 12) and close(grpo.grad, rlad.grad, 12)


def test_without_advantage_nothing_is_learnt():
    out = on(
        load("rlad"),
        ROWS,
        models={"teacher": [[-0.1, -0.1], [-3.0] * 3]},
        before=BEFORE,
        reward=[1.0, 1.0],
        group=[0, 0],
    )
    assert out.loss == 0 and (out.grad == 0).all()


def test_penalty():
    method = load("rlad", reference_kl=1.0)
    models = {"teacher": ROWS, "reference": [[x - 0.3 for x in row] for row in ROWS]}
    out = on(method, ROWS, models=models, before=BEFORE, reward=[1.0, 1.0], group=[0, 0])
    assert close(out.loss, math.exp(-0.3) + 0.3 - 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"a": 0.0},
        {"a": 1.0},
        {"clip": None},
        {"reference_kl": 0.1, "dual_clip": 3.0, "rollout_cap": 2.0},
    ],
)
def test_check(arguments):
    check(load("rlad", **arguments))


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="ratio to the old student alone"):
        load("rlad", a=1.5)
    with pytest.raises(UserError, match="greater than 1"):
        load("rlad", dual_clip=1.0)
