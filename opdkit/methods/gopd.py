"""Generalised on-policy distillation and reward extrapolation."""

from __future__ import annotations

from opdkit.methods.opd import Clip
from opdkit.objective import LogRatio, Objective, Signal, policy_gradient


def gopd(
    scale: float = 1.0,
    clip: Clip = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Objective:
    """G-OPD: OPD as KL-regularised RL on the implicit reward log(teacher/reference), with that
    reward scaled.

        credit = log(pi_t/pi_s) + (scale - 1) log(pi_t/pi_ref);  optimum at each prefix: pi_t^scale
        pi_ref^(1 - scale), normalised

    scale 0 pulls back to the reference, between 0 and 1 interpolates, 1 is OPD, above 1
    extrapolates past the teacher. The reference is the student's initial weights unless the run
    names another (the teacher's own pre-RL base: "reward correction"). With several teachers each
    row is scored by the one its data column names.

    Source: arXiv 2602.12125. Its equation of the per-token term prints the opposite sign beside a
    maximised objective; the released code has this one. Its PPO layer is `clip=(0.2, 0.2),
    dual_clip=3, rollout_cap=5`, a no-op but for the cap on fresh rollouts.
    """
    credit: Signal = LogRatio("teacher", "student")
    if scale != 1:  # at 1 the reference cancels and is never loaded
        credit = credit + (scale - 1) * LogRatio("teacher", "reference")
    return Objective(policy_gradient(credit, clip, dual_clip, rollout_cap))


def exopd(
    scale: float = 1.25,
    clip: Clip = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Objective:
    """ExOPD: G-OPD with a reward scale above 1, which can carry the student past its teacher.

    Source: arXiv 2602.12125; 1.25 is its choice, 1.5 was unstable. Formula and options: `gopd`.
    """
    return gopd(scale, clip, dual_clip, rollout_cap)
