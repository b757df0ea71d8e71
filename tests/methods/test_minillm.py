"""MiniLLM: returns, whitening, the weight of teacher-mixed sampling, and the gradient of the
sequence divergence.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.methods.method import load
from opdkit.testing import check, evaluate
from tests.methods.ragged import LEVEL, mask_of, on, shifted, slopes
from tests.methods.toy import P_S, P_T, close, logits, numbers, reverse_kl_gradient, tokens

GAPS = [[0.2, -0.4, 0.6]]
BARE = {"scale": 1.0, "whiten": False, "length_norm": False, "single_step": 0.0}
POLICY = {"single_step": 0.0, "whiten": False}


def credit(gaps=GAPS, **arguments):
    """[number of trained tokens]."""
    fresh = [[LEVEL] * len(row) for row in gaps]
    out = on(
        load("minillm", single_step=0.0, **arguments), fresh, models={"teacher": shifted(gaps)}
    )
    return out.terms[0].credit[mask_of(gaps)]


@pytest.mark.parametrize(
    ("discount", "returns", "normed"),
    [
        (1.0, (0.4, 0.2, 0.6), (0.133333, 0.1, 0.6)),
        (0.95, (0.3615, 0.17, 0.6), (0.1205, 0.085, 0.6)),
        (0.0, (0.2, -0.4, 0.6), (0.066667, -0.2, 0.6)),
    ],
)
def test_return_to_go(discount, returns, normed):
    assert close(credit(scale=1.0, discount=discount, whiten=False, length_norm=False), returns)
    assert close(credit(scale=1.0, discount=discount, whiten=False), normed)


def test_scale_and_whitening():
    assert close(credit(whiten=False), [0.241, 0.17, 1.2])
    assert close(credit(), [-0.630180, -0.781338, 1.411518])


def test_whitening_counts_trained_tokens_only():
    """A second row of one token; with its two pads as zeros, as in the official code, it would be
    (-.189050, -.362244, 2.150290).
    """
    assert close(credit([*GAPS, [0.15]]), [-0.564330, -0.733570, 1.721595, -0.423695])
    padded = numbers(0.241, 0.17, 1.2, 0.3, 0.0, 0.0)
    theirs = (padded - padded.mean()) / (padded.var(correction=0) + 1e-8).sqrt()
    assert close(theirs[:4], [-0.189050, -0.362244, 2.150290, -0.045128])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_leaves_nothing_of_equal_returns(dtype):
    """Of four alike the teacher is sure: log 4 / 0.5 meets the clamp at every token.

    The mean of 45 times 0.96 rounds.
    """
    ids = torch.arange(45).view(9, 5) % 4
    student, teacher = (
        torch.zeros(9, 5, 4, dtype=dtype),
        30 * torch.nn.functional.one_hot(ids, 4).to(dtype),
    )
    out = evaluate(
        load("minillm", discount=0.0, clamp=0.96, length_norm=False, single_step=0.0),
        student,
        ids,
        models={"teacher": teacher},
    )
    assert (out.terms[0].credit == 0).all() and out.loss == 0 and (out.grad == 0).all()


def test_clamp_bounds_the_scaled_gap():
    assert close(
        credit(scale=0.5, clamp=0.5, discount=0.0, whiten=False, length_norm=False),
        [0.4, -0.5, 0.5],
    )


def weight(student, teacher, mix):
    """The ratio at a fresh token: the slope of a loss whose credit is the reward's advantage of -1
    (clipping is off).
    """
    method = load(
        "minillm", **{**POLICY, "scale": math.inf}, advantage="rloo", clip=None, teacher_mix=mix
    )
    facts = {
        "models": {"teacher": [[math.log(teacher)], []]},
        "reward": [0.0, 1.0],
        "group": [0, 0],
    }
    return slopes(on(method, [[math.log(student)], []], **facts), [[math.log(student)], []])


@pytest.mark.parametrize(
    ("student", "teacher", "mix", "value"),
    [
        (0.5, 0.2, 0.0, 1.0),
        (0.5, 0.2, 0.2, 1.136364),
        (0.5, 0.2, 1.0, 2.5),
        (0.01, 0.8, 0.2, 0.059524),
    ],
)
def test_weight_of_teacher_mixed_sampling(student, teacher, mix, value):
    assert close(weight(student, teacher, mix), [value])
    assert mix == 1 or weight(student, 1e-12, mix) <= 1 / (1 - mix)


@pytest.mark.parametrize(("mix", "loss"), [(0.2, -0.568182), (1.0, -1.25)])
def test_the_weight_of_mixed_sampling_is_outside_the_clip(mix, loss):
    """A = 0.5, and no move since sampling: the ratio is 1, nothing is clipped, and the weights
    1.136364 and 2.5 (beyond the clip's 1.2) both count in full.
    """
    method = load("minillm", **{**POLICY, "scale": math.inf}, advantage="rloo", teacher_mix=mix)
    student = [[math.log(0.5)], []]
    out = on(
        method, student, models={"teacher": [[math.log(0.2)], []]}, reward=[0.5, 0.0], group=[0, 0]
    )
    assert close(out.loss, loss) and close(slopes(out, student), [loss])


# logit of 1 / P(1), by prefix
STUDENT, TEACHER = {(): 0.0, (0,): 0.0, (1,): 0.5}, {(): 0.7, (0,): 0.4, (1,): 0.9}


def sequence_gradient(**arguments):
    """d KL(student || teacher) of a sequence of two binary tokens, with respect to the logits at
    (), 0 and 1, by enumeration.
    """
    p1 = {prefix: 1 / (1 + math.exp(-z)) for prefix, z in STUDENT.items()}
    total = dict.fromkeys(STUDENT, 0.0)
    for a, b in itertools.product((0, 1), repeat=2):
        s, t = (logits(*((1 - m[q], m[q]) for q in ((), (a,)))) for m in (p1, TEACHER))
        grad = evaluate(
            load("minillm", discount=1.0, clip=None, **arguments),
            s,
            tokens(a, b),
            models={"teacher": t},
        ).grad[0, :, 1]
        chance = (p1[()] if a else 1 - p1[()]) * (p1[a,] if b else 1 - p1[a,])
        for prefix, slope in zip(((), (a,)), grad.tolist()):
            total[prefix] += 2 * chance * slope  # 2: the loss is a mean over two tokens
    return numbers(*total.values())


def test_the_papers_two_parts_make_the_gradient_of_the_sequence_divergence():
    bare = {**BARE, "exact": True}
    long, both = sequence_gradient(**bare), sequence_gradient(**{**bare, "single_step": 1.0})
    assert close(long, [0.062911, 0.0, 0.0])
    assert close(both - long, [-0.211824, 0.050683, -0.199427])
    assert close(both, [-0.148914, 0.050683, -0.199427])


def test_the_return_with_r_itself_makes_it_alone():
    """The official code adds the single-step part to it, which then counts twice."""
    assert close(sequence_gradient(**BARE), [-0.148914, 0.050683, -0.199427])


def test_length_norm_of_the_exact_form_counts_the_tokens_after():
    assert close(credit(scale=1.0, discount=1.0, whiten=False, exact=True), [0.2 / 2, 0.6, 0.0])


def test_stripped_it_is_opd_bit_for_bit():
    facts = {"models": {"teacher": logits(P_T, P_S, P_T)}}
    s = logits(P_S, P_T, P_S)
    ours = evaluate(load("minillm", discount=0.0, clip=None, **BARE), s, tokens(0, 2, 1), **facts)
    opd = evaluate("opd", s, tokens(0, 2, 1), **facts)
    assert torch.equal(ours.grad, opd.grad) and torch.equal(ours.loss, opd.loss)


def test_gradient_by_enumeration():
    """TRL leaves r attached: its gradient at y = 0 is (.958145, -.574887, -.383258), the mean is
    the same.
    """
    method = load("minillm", discount=0.0, **BARE)
    at = [
        evaluate(method, logits(P_S), tokens(y), models={"teacher": logits(P_T)}).grad[0, 0]
        for y in range(3)
    ]
    assert close(at[0], [0.458145, -0.274887, -0.183258])
    assert close(sum(p * g for p, g in zip(P_S, at)), reverse_kl_gradient(P_S, P_T), 12)


def test_single_step_term_is_the_reverse_kl():
    method = load("minillm", scale=math.inf, whiten=False)
    out = evaluate(method, logits(P_S), tokens(0), models={"teacher": logits(P_T)})
    assert close(out.loss, 0.223805) and close(out.grad[0, 0], [0.346243, -0.220389, -0.125854])


def test_agreement_is_zero():
    out = evaluate("minillm", logits(P_S, P_T), tokens(0, 1), models={"teacher": logits(P_S, P_T)})
    assert close(out.loss, 0.0, 12) and close(out.grad, torch.zeros(1, 2, 3), 12)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"exact": True},
        {"teacher_mix": 0.2},
        {"teacher_mix": 0.2, "rollout_cap": 2.0, "dual_clip": 3.0},
        {"scale": 1.0, "discount": 0.0, "length_norm": False, "whiten": False, "advantage": "std"},
        {**BARE, "clip": None},
    ],
)
def test_check(arguments):
    check(load("minillm", **arguments))


def test_bad_arguments_are_explained():
    with pytest.raises(UserError, match="share of the teacher"):
        load("minillm", teacher_mix=1.5)
