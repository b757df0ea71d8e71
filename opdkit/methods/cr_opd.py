"""Counterfactual routed on-policy distillation (experimental)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.methods.arguments import inside
from opdkit.objective import (
    Batch,
    Live,
    LogpAtFact,
    LogRatio,
    Objective,
    PolicyGradient,
    Signal,
    TokenLoss,
    TopFact,
)
from opdkit.objective.maths import finite, normalise


def destinations(facts: Batch | Live, k: int, eps: float) -> Tensor:
    """[..., k] log q at the teacher's top k: pi_t renormalised where pi_s >= eps, the sampled token
    left out (-inf).
    """
    reachable = facts.read(LogpAtFact("student", "teacher", k)) >= math.log(eps)
    reachable &= facts.read(TopFact("teacher", k)) != facts.tokens[..., None]
    return normalise(
        facts.read(LogpAtFact("teacher", "teacher", k)).masked_fill(~reachable, -math.inf)
    )


@dataclass(frozen=True)
class Reachable(Signal):
    """[B, T] bool: whether there is a token to move mass to."""

    k: int
    eps: float

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        return (destinations(batch, self.k, self.eps) > -math.inf).any(-1)


@dataclass(frozen=True)
class Route(TokenLoss):
    """[n]: -sum_v q(v) log pi_s(v) over the destinations."""

    k: int
    eps: float
    name: ClassVar[str] = "route"

    def value(self, live: Live) -> Tensor:  # [n]
        return -(
            destinations(live, self.k, self.eps).exp()
            * finite(live.at(live.read(TopFact("teacher", self.k))))
        ).sum(-1)


def cr_opd(
    k: int = 16,
    eps: float = 1e-4,
) -> Objective:
    """CR-OPD (experimental): a token the teacher disowns gives its mass to tokens the teacher
    wants, not to all others alike.

        r_t >= 0, or nowhere to go:   -ratio r_t
        r_t < 0:                      -|r_t| sum_v q(v) log pi_s(v)
        q = pi_t renormalised on its top k where pi_s >= eps before the step, without y_t
        mean over all trained tokens

    Source: proposed and not tested in arXiv 2606.22793; the formula is a reconstruction. Unlike OPD
    its expectation is no gradient of a KL. Not offered: keeping both terms, q from pi_s pi_t.

    Arguments:
        k: size of the teacher's top k, in tokens, at least 1. Default: ours; the survey states
            none.
        eps: probability below which the student cannot reach a token, in (0, 1). Default: ours; the
            survey states none.
    """
    inside(eps=(eps, "it is a probability below which a destination is out of reach"))
    credit = LogRatio("teacher", "student")
    routed = (credit < 0) & Reachable(k, eps)
    return PolicyGradient(credit) * ~routed + Route(k, eps) * abs(credit) * routed
