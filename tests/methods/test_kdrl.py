"""KDRL: estimators and their gradients, the schedule, masks and their denominators, and the limits
GRPO and OPD.
"""

from __future__ import annotations

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.objective import Advantage, Clipped, PolicyGradient
from opdkit.objective.maths import k1
from opdkit.testing import check, evaluate
from tests.methods.ragged import LEVEL, on, shifted, slopes
from tests.methods.toy import P_S, P_T, close, logits, numbers, reverse_kl_gradient, tokens

# log(teacher/student), two prompts with two rollouts each
GAPS = [[0.4, -0.2], [-0.6], [0.1, 0.3], [-0.5]]
FRESH = [[LEVEL] * len(row) for row in GAPS]
ONE = {"beta": 1.0, "beta_min": 1.0}


def distil(estimator, y, **arguments):
    """The KD term alone at one position: one rollout whose reward is nothing to learn from."""
    method = load("kdrl", estimator=estimator, **ONE, **arguments)
    return evaluate(
        method, logits(P_S), tokens(y), models={"teacher": logits(P_T)}, reward=[0.0], group=[0]
    )


def expected(estimator, **arguments):
    """[V]: its gradient, averaged over the token that the student may sample."""
    return sum(p * distil(estimator, y, **arguments).grad[0, 0] for y, p in enumerate(P_S))


def on_two_prompts(reward=(1.0, 0.0, 0.0, 0.0), **arguments):
    return on(
        load("kdrl", **arguments),
        FRESH,
        models={"teacher": shifted(GAPS)},
        reward=list(reward),
        group=[0, 0, 1, 1],
    )


def test_values():
    assert close(k1((numbers(*P_S) / numbers(*P_T)).log()), [0.916291, -0.510826, -0.405465])
    assert close(
        torch.stack([distil("k2", y).loss for y in range(3)]), [0.419794, 0.130471, 0.082201]
    )
    assert close(
        torch.stack([distil("k3", y).loss for y in range(3)]), [0.316291, 0.155841, 0.094535]
    )


@pytest.mark.parametrize("estimator", ["k2", "k1_credit"])
def test_k2_and_the_credit_have_the_gradient_of_the_reverse_kl(estimator):
    tokenwise = [
        (0.458145, -0.274887, -0.183258),
        (0.255413, -0.357578, 0.102165),
        (0.202733, 0.121640, -0.324372),
    ]
    for y, gradient in enumerate(tokenwise):
        assert close(distil(estimator, y).grad[0, 0], gradient)
    assert close(expected(estimator), [0.346243, -0.220389, -0.125854])
    assert close(expected(estimator), reverse_kl_gradient(P_S, P_T), 12)


def test_k3_has_the_gradient_of_the_forward_kl():
    tokenwise = [(0.3, -0.18, -0.12), (1 / 3, -0.466667, 0.133333), (0.25, 0.15, -0.4)]
    for y, gradient in enumerate(tokenwise):
        assert close(distil("k3", y).grad[0, 0], gradient)
    # d KL(teacher || student) / d logits
    assert close(expected("k3"), numbers(*P_S) - numbers(*P_T), 12)


def test_on_other_distributions_too():
    """The numbers that all estimator faults are reported on: student logits (2, 1, 0, -1), teacher
    (0.5, 1.5, 0, 0.5).
    """
    s, t = (
        torch.tensor([[row]], dtype=torch.float64)
        for row in ((2.0, 1.0, 0.0, -1.0), (0.5, 1.5, 0.0, 0.5))
    )
    p, q = (x.softmax(-1)[0, 0] for x in (s, t))
    for estimator, gradient in (("k2", (0.451164, -0.307792, -0.069658, -0.073714)), ("k3", p - q)):
        method = load("kdrl", estimator=estimator, **ONE)
        mean = sum(
            p[y]
            * evaluate(method, s, tokens(y), models={"teacher": t}, reward=[0.0], group=[0]).grad[
                0, 0
            ]
            for y in range(4)
        )
        assert close(mean, gradient)


def test_topk_is_the_renormalised_reverse_kl_on_the_teachers_set():
    out = distil("topk", 0, k=2)
    assert close(out.loss, 0.001322) and close(out.grad[0, 0], [0.0, -0.025287, 0.025287])


@pytest.mark.parametrize(
    ("step", "beta"), [(0, 0.005), (20, 0.004), (40, 0.003), (80, 0.001), (200, 0.001)]
)
def test_schedule(step, beta):
    out = on(
        load("kdrl"),
        FRESH,
        models={"teacher": shifted(GAPS)},
        reward=[1.0, 0, 0, 0],
        group=[0, 0, 1, 1],
        step=step,
    )
    assert close(out.terms[1].weight[0], [beta, beta], 12)


def test_a_floor_above_the_start_is_a_constant():
    out = on_two_prompts(beta=5e-4)
    assert close(out.terms[1].weight[0], [5e-4, 5e-4], 12)


@pytest.mark.parametrize(
    ("mask", "masked_mean", "value"),
    [
        (None, "kept", 0.075833),
        ("response", "kept", 0.088750),
        ("group", "kept", 0.058333),
        ("response", "all", 0.059167),
        ("group", "all", 0.029167),
    ],
)
def test_masks_and_their_denominators(mask, masked_mean, value):
    out = on_two_prompts(mask=mask, masked_mean=masked_mean, **ONE)
    assert close(out.terms[1].value, value)
    credit = on_two_prompts(mask=mask, masked_mean=masked_mean, estimator="k1_credit", **ONE)
    assert close(credit.grad, out.grad, 12)


def test_no_rollout_kept_is_a_zero():
    """Every rollout is right, or every prompt has a right one."""
    for mask, reward in (("response", (1.0, 1.0, 1.0, 1.0)), ("group", (1.0, 0.0, 0.0, 1.0))):
        assert on_two_prompts(reward, mask=mask, **ONE).terms[1].value == 0


@pytest.mark.parametrize("estimator", ["k2", "k1_credit"])
def test_reward_and_teacher_together(estimator):
    """Advantages 1, -1 | 0, 0 and a weight of 2e-3 on fresh rollouts: -(A + 0.002 r) / 6."""
    out = on_two_prompts(
        (2.0, 0.0, 0.0, 0.0), beta=2e-3, beta_min=2e-3, estimator=estimator, advantage="mean"
    )
    assert close(
        slopes(out, FRESH), [-0.166800, -0.166600, 0.166867, -0.000033, -0.000100, 0.000167]
    )


def test_clipping_reaches_the_credit_and_not_the_separate_loss():
    """A = 1 and a ratio of e^0.5 > 1.2: the reward's gradient is clipped in both, the teacher's
    only inside the credit.
    """
    student, before = [[-1.0], [-1.0]], [[-1.5], [-1.0]]
    facts = {
        "before": before,
        "models": {"teacher": [[-0.9], [-1.0]]},
        "reward": [1.0, 0.0],
        "group": [0, 0],
    }
    make = lambda e: load("kdrl", estimator=e, advantage="rloo", **ONE)  # noqa: E731
    assert close(slopes(on(make("k1_credit"), student, **facts), student)[0], 0.0)
    assert close(slopes(on(make("k2"), student, **facts), student)[0], -0.1 / 2)


def test_the_reward_is_clipped_as_the_papers_grpo_is():
    """Advantages 1 and -1, ratios e^0.5 = 1.648721 > 1.2 and 1, mean over the two tokens:
    (max(-1.648721, -1.2) + 1) / 2 = -0.1; without clipping (-1.648721 + 1) / 2 = -0.324361.
    """
    student = [[-1.0], [-1.0]]
    facts = {
        "before": [[-1.5], [-1.0]],
        "models": {"teacher": [[-0.9], [-1.0]]},
        "reward": [1.0, 0.0],
        "group": [0, 0],
    }
    for arguments, value in (
        ({}, -0.1),
        ({"clip": (0.2, 0.2)}, -0.1),
        ({"clip": (0.2, 0.8)}, -0.324361),
        ({"clip": None}, -0.324361),
    ):
        out = on(load("kdrl", advantage="rloo", **ONE, **arguments), student, **facts)
        assert close(out.terms[0].value, value) and close(out.terms[1].value, 0.1**2 / 2 / 2)
    assert load("kdrl").objective.terms[0].loss == Clipped(Advantage(), 0.2, 0.2)
    assert load("kdrl", clip=None).objective.terms[0].loss == PolicyGradient(Advantage())


def test_without_a_weight_it_is_grpo():
    for clip in ((0.2, 0.2), None):
        of_grpo = load("grpo", loss="dapo", clip=clip)
        assert load("kdrl", beta=0.0, clip=clip).objective == of_grpo.objective
    assert "teacher" not in load("kdrl", beta=0.0).needs.models


def test_without_a_signal_from_rewards_it_is_opd():
    facts = {"models": {"teacher": shifted(GAPS)}}
    opd = on("opd", FRESH, **facts).grad
    for estimator in ("k2", "k1_credit"):
        assert close(on_two_prompts((0.0,) * 4, estimator=estimator, **ONE).grad, opd, 12)


@pytest.mark.parametrize("estimator", ["k2", "k1_credit", "k3", "topk"])
def test_a_teacher_that_agrees_adds_nothing(estimator):
    reward, group = [1.0, 0.0, 0.0, 0.0], [0, 0, 1, 1]
    with_teacher = on(
        load("kdrl", estimator=estimator, k=2),
        FRESH,
        models={"teacher": FRESH},
        reward=reward,
        group=group,
    )
    assert close(
        with_teacher.grad, on(load("kdrl", beta=0.0), FRESH, reward=reward, group=group).grad, 12
    )


def test_excluded_tokens_have_no_teacher():
    """The second token of two is left out: what is kept counts for both, its own gradient
    is gone.
    """
    method = load("kdrl", exclude_tokens=(2,), **ONE)
    s, t = (logits(p, p) for p in (P_S, P_T))
    out = evaluate(method, s, tokens(0, 2), models={"teacher": t}, reward=[0.0], group=[0])
    assert close(out.loss, 0.419794) and (out.grad[0, 1] == 0).all()
    both = load("kdrl", exclude_tokens=(2,), mask="response", masked_mean="all", **ONE)
    assert close(
        evaluate(both, s, tokens(0, 2), models={"teacher": t}, reward=[0.0], group=[0]).loss,
        0.419794 / 2,
    )


@pytest.mark.parametrize("estimator", ["k2", "k1_credit", "k3", "topk"])
@pytest.mark.parametrize(
    "arguments", [{}, {"mask": "response"}, {"mask": "group", "masked_mean": "all"}]
)
def test_check(estimator, arguments):
    check(load("kdrl", estimator=estimator, **arguments))


@pytest.mark.parametrize(
    "arguments",
    [{"exclude_tokens": (2, 3)}, {"clip": (0.2, 0.2), "dual_clip": 3.0, "rollout_cap": 2.0}],
)
def test_check_of_options(arguments):
    check(load("kdrl", **arguments))


def test_bad_arguments_are_explained():
    for arguments, message in (
        ({"estimator": "k1"}, "one of k2"),
        ({"mask": "token"}, "response"),
        ({"masked_mean": "own"}, "kept"),
    ):
        with pytest.raises(UserError, match=message):
            load("kdrl", **arguments)
