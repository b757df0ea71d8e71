"""DistiLLM: skewed divergences on replayed student text."""

from __future__ import annotations

from opdkit.curricula import Plain, Replay
from opdkit.methods.method import Method
from opdkit.objective import Divergence, Objective, SkewForward, SkewReverse


def distillm(
    kind: str = "skew_forward",
    alpha: float = 0.1,
    schedule: str | None = "decreasing",
    threshold: float = 0.0,
    tolerance: float = 0.1,
    capacity: int = 1000,
) -> Method:
    """DistiLLM: mix a little of one model into the other, which bounds the divergence, and generate
    only as often as it pays.

        skew_forward:  KL(pi_t || alpha pi_t + (1 - alpha) pi_s)
        skew_reverse:  KL(pi_s || (1 - alpha) pi_t + alpha pi_s)
        over the full vocabulary, mean over all trained tokens

    over the full vocabulary, mean over all trained tokens; at most -log alpha; alpha = 0 is forward
    / reverse KL. Batches come from the student, from a store of what it wrote before, or from the
    data: `Replay(threshold, tolerance, capacity)`, whose share of student text rises when the
    validation loss does and whose fresh part follows `schedule` ("decreasing", "constant",
    "increasing"; None: the student writes every batch). The paper takes skew_reverse for its larger
    students.

    Source: arXiv 2402.03898 and its code, which reports the cross-entropy -sum pi_t log(mixture):
    same gradient, larger by the teacher's entropy. Not offered: likelihood on the data beside the
    divergence (its kd_ratio is 1), a pre-training corpus. Its other losses are `gkd` (js at l is
    beta = 1 - l) and `opd(kind=...)`.

    Arguments:
        kind: which of the two divergences: "skew_forward" or "skew_reverse". Default: that of the
            paper's smallest student.
        alpha: share of the first model in the mixture, in [0, 1); 0 is forward or reverse KL.
            Default: the paper's.
        schedule: how the freshly written part of the student's text goes over the run:
            "decreasing", "constant", "increasing"; None: the student writes every batch. Default:
            the official code's.
        threshold: share of student text at the start, in [0, 1]. Default: the official code's.
        tolerance: rise of the validation loss, in nats, at which that share rises by 0.1. Default:
            the official code's.
        capacity: responses that the store keeps, at least 1. Default: the official code's.
    """
    kinds = {"skew_forward": SkewForward, "skew_reverse": SkewReverse}
    if kind not in kinds:
        raise ValueError(f"kind={kind!r} must be 'skew_forward' or 'skew_reverse'")
    if not 0 <= alpha < 1:
        raise ValueError(
            f"alpha={alpha} must lie in [0, 1): the share of the first model in the mixture; at 1 "
            "the divergence is zero"
        )
    source = Plain() if schedule is None else Replay(schedule, threshold, tolerance, capacity)
    return Method(Objective(Divergence(kinds[kind](alpha))), curriculum=source)
