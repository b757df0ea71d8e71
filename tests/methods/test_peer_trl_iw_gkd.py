"""IW-OPD and GKD against TRL's own loss functions on the same tensors: losses, gradients, and each
departure by its exact amount.
"""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from opdkit.methods.method import load
from opdkit.testing import evaluate

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", minversion="1.16", reason="compares with TRL 1.16")
pytestmark = pytest.mark.peer

B, T, V = 4, 9, 23
G = torch.Generator().manual_seed(0)
STUDENT, TEACHER, DRIFT = (
    2 * torch.randn(B, T, V, generator=G, dtype=torch.float64) for _ in range(3)
)
TOKENS = torch.randint(V, (B, T), generator=G)
MASK = torch.arange(T) < torch.tensor([[9], [5], [1], [0]])  # an empty response as well
MASK[0, 3] = False  # a tool's token
LABELS = torch.where(MASK, TOKENS, -100)


@pytest.fixture(scope="module")
def trl():
    """TRL's two trainers; they are never built, their loss functions need none of it."""
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.iw_opd import IWOPDTrainer

    return SimpleNamespace(gkd=GKDTrainer, iw_opd=IWOPDTrainer)


def at_tokens(logits):
    return torch.log_softmax(logits, -1).gather(-1, TOKENS[..., None])[..., 0]


def iw_opd(trl, gamma, student=STUDENT, rollout=None, count=None):
    """TRL's IW-OPD: loss and gradient with respect to the student's logits."""
    leaf = student.clone().requires_grad_()
    settings = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=gamma,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    loss = trl.iw_opd._compute_iw_opd_loss(
        settings, leaf, TOKENS, LABELS, at_tokens(TEACHER), rollout, count
    )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def gkd(function, teacher=TEACHER, student=STUDENT, **settings):
    leaf = student.clone().requires_grad_()
    loss = function(leaf, teacher, LABELS, **settings)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def ours(method, student=STUDENT, teacher=TEACHER, **more):
    return evaluate(method, student, TOKENS, MASK, models={"teacher": teacher}, **more)


def near(a, b, relative=1e-9):
    return torch.allclose(a, b, rtol=relative, atol=1e-12)


# relative: a rollout's total |gap| is max(total, 1e-8) in TRL and total + 1e-8, as in the authors'
# code, in ours
EPSILON = 1e-7


# ------------------------------------------------------------------------------------------- IW-OPD


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_iw_opd_has_trl_s_gradient(trl, gamma):
    (_, gradient), out = iw_opd(trl, gamma), ours(load("iw_opd", gamma=gamma))
    assert near(out.grad, gradient, EPSILON) and out.grad.norm() > 0.1


def test_iw_opd_s_value_is_another(trl):
    """Departure: TRL minimises -A log pi_s, ours -A pi_s/pi_sampler.

    One gradient on fresh rollouts, another number in the log.
    """
    value, out = iw_opd(trl, 0.5)[0], ours(load("iw_opd"))
    advantage = out.terms[0].weight * out.terms[0].credit
    assert near(value, -(advantage * at_tokens(STUDENT))[MASK].mean(), EPSILON)
    assert near(out.loss, -advantage[MASK].mean())


def test_iw_opd_on_stale_rollouts(trl):
    """Departure: no importance ratio in TRL.

    Ours weighs each token by pi_s/pi_sampler; the gap itself is the sampler's in both.
    """
    before = STUDENT + 0.1 * DRIFT
    gradient = iw_opd(trl, 0.5, rollout=at_tokens(before))[1]
    out = ours(load("iw_opd"), before_logits=before)
    ratio = (at_tokens(STUDENT) - at_tokens(before)).exp()[..., None]
    assert near(out.grad, ratio * gradient, EPSILON) and not near(out.grad, gradient, 1e-3)


def test_iw_opd_without_cached_scores_takes_the_gap_of_the_moved_student(trl):
    """Departure: where TRL has no cached rollout log-probs it takes the gap from the student being
    trained, we from before the step.
    """
    moved, before = STUDENT, STUDENT + 0.1 * DRIFT
    gradient = iw_opd(trl, 0.5, moved)[1]
    # the same where nothing has moved
    assert near(ours(load("iw_opd"), moved).grad, gradient, EPSILON)
    assert not near(ours(load("iw_opd"), moved, before_logits=before).grad, gradient, 1e-3)


def test_iw_opd_with_a_count_over_micro_batches(trl):
    assert near(
        iw_opd(trl, 0.5, count=torch.tensor(int(MASK.sum())))[1], ours(load("iw_opd")).grad, EPSILON
    )


# ---------------------------------------------------------------------------------------------- GKD


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gkd_is_trl_s(trl, beta, temperature):
    """Departure only in what the trainers pass: TRL's samples at 0.9 and leaves the loss at 1; our
    `temperature` is the loss's.
    """
    value, gradient = gkd(trl.gkd.generalized_jsd_loss, beta=beta, temperature=temperature)
    out = ours(load("gkd", beta=beta, temperature=temperature))
    assert near(out.loss, value) and near(out.grad, gradient)


def test_gkd_with_a_count_over_micro_batches(trl):
    value, gradient = gkd(
        trl.gkd.generalized_jsd_loss, num_items_in_batch=torch.tensor(int(MASK.sum()))
    )
    out = ours(load("gkd"))
    assert near(out.loss, value) and near(out.grad, gradient)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_gkd_where_tokens_are_ruled_out(trl, beta):
    """Departure: a probability of exactly 0 makes TRL's loss infinite (reverse KL) or NaN (both 0);
    ours stays finite.
    """
    student, teacher = STUDENT.clone(), TEACHER.clone()
    teacher[..., 0] = -torch.inf
    if beta == 0.5:
        student[..., 0] = -torch.inf
    value, _ = gkd(trl.gkd.generalized_jsd_loss, teacher, student, beta=beta)
    out = ours(load("gkd", beta=beta), student, teacher)
    assert not value.isfinite() and out.loss.isfinite() and out.grad.isfinite().all()
    if beta == 0.5:  # ruled out by both: as if the vocabulary had one entry less
        less, _ = gkd(trl.gkd.generalized_jsd_loss, teacher[..., 1:], student[..., 1:], beta=beta)
        assert near(out.loss, less)


# ------------------------------------------------------------------- top-k, in TRL's IW-OPD trainer


@pytest.mark.parametrize(("beta", "support"), [(0.0, "teacher"), (0.5, "union"), (1.0, "student")])
@pytest.mark.parametrize(("rest", "add_tail"), [("renormalise", False), ("tail", True)])
def test_top_k_is_trl_s(trl, beta, support, rest, add_tail):
    value, gradient = gkd(trl.iw_opd.generalized_jsd_loss, beta=beta, top_k=5, add_tail=add_tail)
    out = ours(load("opd", support=support, k=5, beta=beta, rest=rest))
    assert near(out.loss, value) and near(out.grad, gradient)
