"""Lightning OPD: offline on-policy distillation."""

from __future__ import annotations

from opdkit.curricula import Cached
from opdkit.methods.method import Method
from opdkit.objective import Clipped, LogRatio, Objective


def lightning_opd(
    denominator: str = "rows",
) -> Method:
    """Lightning OPD: rollouts and teacher log-probs are stored once, then the student trains alone,
    without sampler or teacher.

        A_t = log(pi_t/pi_s),   max(-A rho, -A clip(rho, 1 - low, 1 + high))
        rho = pi_s now / pi_s before this step
        mean over each rollout's tokens, then over rollouts

    The stored teacher meets the student as it is before each step: A shrinks as the student
    arrives, though the rows stay the same. Tokens and prefixes remain those of the model that wrote
    them, so only the first step is on-policy; its gradient is that of `opd`, and a student that
    equals the teacher has gradient zero on any rows. A cap on the rollout's weight (see the ratio
    layer) weighs a token by min(pi_s/pi_writer, cap), from the stored log-probs of the writer.

    `opdkit cache-teacher` writes the rows. The student should have been fine-tuned on responses of
    the very teacher that scores it: with two different teachers the gradient is biased, and no
    number of steps undoes it (the paper's theorem).

    Source: arXiv 2604.13010 and its code. Ours: that cap, which the paper does not have and which
    is off. Not offered: the fine-tuning on the teacher's responses, which comes before.

    Arguments:
        denominator: "rows" (mean of each rollout, then over rollouts) or "tokens" (mean over all).
            Default: that of the official code's framework.
    """
    if denominator not in ("rows", "tokens"):
        raise ValueError(
            f"denominator={denominator!r} must be 'rows' (mean per rollout, then over rollouts) or "
            "'tokens'"
        )
    loss = Clipped(LogRatio("teacher", "student"), 0.2, 0.2, base="student")
    return Method(Objective(loss.per(denominator)), curriculum=Cached())
