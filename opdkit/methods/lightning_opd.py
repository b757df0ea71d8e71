"""Lightning OPD: offline on-policy distillation."""

from __future__ import annotations

from opdkit.curricula import Cached
from opdkit.methods.method import Method
from opdkit.methods.opd import Clip
from opdkit.objective import LogRatio, Objective, policy_gradient


def lightning_opd(
    clip: Clip = (0.2, 0.2),
    denominator: str = "rows",
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Method:
    """Lightning OPD: rollouts and teacher log-probs are stored once, then the student trains alone,
    without sampler or teacher.

        A_t = log(pi_t/pi_s),  max(-A rho, -A clip(rho, 1 - low, 1 + high)),  rho = pi_s now / pi_s
        before this step;  mean over each
        rollout's tokens, then over rollouts

    The stored teacher meets the student as it is before each step: A shrinks as the student
    arrives, though the rows stay the same. Tokens and prefixes remain those of the model that wrote
    them, so only the first step is on-policy; its gradient is that of `opd`, and a student that
    equals the teacher has gradient zero on any rows. `denominator` "tokens" is the mean over all
    tokens. `rollout_cap` weighs a token by min(pi_s/pi_writer, cap), from the stored log-probs of
    the writer.

    `opdkit cache-teacher` writes the rows. The student should have been fine-tuned on responses of
    the very teacher that scores it: with two different teachers the gradient is biased, and no
    number of steps undoes it (the paper's theorem).

    Source: arXiv 2604.13010 and its code. Ours: `rollout_cap`, which the paper does not have and is
    off. Not offered: the fine-tuning on the teacher's responses, which comes before.
    """
    if denominator not in ("rows", "tokens"):
        raise ValueError(
            f"denominator={denominator!r} must be 'rows' (mean per rollout, then over rollouts) or "
            "'tokens'"
        )
    term = policy_gradient(
        LogRatio("teacher", "student"), clip, dual_clip, rollout_cap, base="student"
    )
    return Method(Objective(term.per(denominator)), curriculum=Cached())
