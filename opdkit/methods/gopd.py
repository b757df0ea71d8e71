"""Generalised on-policy distillation and reward extrapolation."""

from __future__ import annotations

from opdkit.objective import LogRatio, Objective, PolicyGradient, Signal


def gopd(
    scale: float = 1.0,
) -> Objective:
    """G-OPD: OPD as KL-regularised RL on the implicit reward log(teacher/reference), with that
    reward scaled.

        credit = log(pi_t/pi_s) + (scale - 1) log(pi_t/pi_ref),   mean over all trained tokens
        optimum at each prefix: pi_t^scale pi_ref^(1 - scale), normalised

    scale 0 pulls back to the reference, between 0 and 1 interpolates, 1 is OPD, above 1
    extrapolates past the teacher. The reference is the student's initial weights unless the run
    names another (the teacher's own pre-RL base: "reward correction"). With several teachers each
    row is scored by the one its data column names.

    Source: arXiv 2602.12125. Its equation of the per-token term prints the opposite sign beside a
    maximised objective; the released code has this one. Its ratio layer clips at 0.2, bounds
    negative credits at 3 and caps the rollout's weight at 5: on fresh rollouts only the cap acts.

    Arguments:
        scale: factor of the implicit reward log(pi_t/pi_ref), at least 0: 0 is the reference, 1 the
            teacher, above 1 beyond it. Default: 1, which is OPD.
    """
    credit: Signal = LogRatio("teacher", "student")
    if scale != 1:  # at 1 the reference cancels and is never loaded
        credit = credit + (scale - 1) * LogRatio("teacher", "reference")
    return Objective(PolicyGradient(credit))


def exopd(
    scale: float = 1.25,
) -> Objective:
    """ExOPD: G-OPD with a reward scale above 1, which can carry the student past its teacher.

    Source: arXiv 2602.12125; 1.25 is its choice, 1.5 was unstable. Formula and options: `gopd`.

    Arguments:
        scale: as in `gopd`, above 1. Default: the paper's choice among 0 to 1.5.
    """
    return gopd(scale)
