"""f-DPG: any f-divergence between the sequences of student and teacher, by policy gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.objective import (
    JSD,
    Around,
    Batch,
    Companion,
    CompanionState,
    Kind,
    LogRatio,
    Objective,
    Reinforce,
    Signal,
    Stepped,
)
from opdkit.objective.divergences import KINDS, kind_of
from opdkit.objective.losses import MOST_APART


def of_responses(batch: Batch, a: str, b: str) -> Tensor:
    """[B, 1]: log(pi_a/pi_b) of whole responses."""
    return torch.where(batch.mask, LogRatio(a, b)(batch), 0.0).sum(1, keepdim=True)


@dataclass(frozen=True)
class PseudoReward(Signal):
    """[B, 1]: -times f'(pi_s/pi_t) of whole responses before the step, at most e^20 in size."""

    kind: Kind
    times: float = 1.0

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        apart = of_responses(batch, "student", "teacher").double()
        rewards = -self.times * self.kind.slope(apart)
        if bool(((apart == torch.inf) & rewards.isinf()).any()):
            raise UserError(
                "the teacher gives a response that the student wrote the probability zero: under "
                f"{self.kind} its pseudo-reward is minus infinity, which no update can follow. "
                "Choose a kind that such a response has a finite one under (js, forward_kl, tv, "
                "reverse_chi2), or a teacher that rules no token out"
            )
        most = torch.tensor(MOST_APART).exp().item()
        return rewards.clamp(-most, most).to(batch.dtype)


@dataclass(frozen=True)
class Importance(Signal):
    """[B, 1]: pi_s / pi_sampler of whole responses, pi_s the student as it is now; at most e^20."""

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        return of_responses(batch, "live", "sampler").clamp_max(MOST_APART).exp()


@dataclass(frozen=True)
class Last(Companion):
    """The last `window` pseudo-rewards that were learnt from."""

    of: PseudoReward
    window: int

    def build(self, around: Around) -> CompanionState:
        return Remembered(self)


class Remembered(CompanionState):
    """They themselves, oldest first."""

    def __init__(self, what: Last):
        self.what, self.values = what, torch.zeros(0, dtype=torch.float64)  # [at most window]

    def after_step(self, stepped: Stepped) -> None:
        rows = (stepped.mask & stepped.batch.mask).any(1)
        new = self.what.of(stepped.batch)[rows, 0].to(self.values)
        self.values = torch.cat([self.values, new])[-self.what.window :]

    def state_dict(self) -> Mapping[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: Any) -> None:
        self.values = state["values"].clone()


@dataclass(frozen=True)
class Baseline(Signal):
    """[1, 1]: the mean of what is remembered; 0 before the first update."""

    last: Last

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        values = batch.companion(self.last).values
        mean = values.mean() if len(values) else torch.zeros(())
        return mean.to(device=batch.device, dtype=batch.dtype).view(1, 1)

    def __str__(self) -> str:
        return f"Baseline({self.last.window})"


def f_dpg(kind: str | Kind = "js", window: int = 1024) -> Objective:
    """f-DPG: reverse KL is not the only way to be near a teacher: any f-divergence between whole
    responses is minimised by one policy gradient.

        D_f = E_t[f(pi_s(y)/pi_t(y))],   u = pi_s(y)/pi_t(y) before the step
        -w (-f'(u) - b) sum_t log pi_s(y_t),   w = pi_s(y)/pi_sampler(y), without gradient
        mean over rollouts

    b is the mean of the last `window` pseudo-rewards -f'(u): those of a step enter it behind its
    update, and before the first there is none.

        js           log 2 - softplus(-log u), of KL(pi_s || m) + KL(pi_t || m), m their mean;
                     twice opdkit's "jsd". A response the teacher rules out has -log 2
        forward_kl   -1/u: pseudo-reward pi_t/pi_s          reverse_kl   1 + log u
        tv           sign(log u)/2                          chi2         2 (u - 1)
        reverse_chi2 1 - u^-2, of KL's Pearson form with the student as weight

    Source: arXiv 2302.08215 and its code. Ours: the target is the teacher, so that Z = 1 and is not
    estimated; a weight and a pseudo-reward are at most e^20. Not offered: proposals kept apart from
    the student, and other targets than a model.

    Arguments:
        kind: the divergence: "js", "forward_kl", "reverse_kl", "tv", "chi2", "reverse_chi2", or
            another kind of `opd`, or a `Kind`. Default: the code's.
        window: pseudo-rewards that the baseline is a mean of, at least 1. Default: the code's.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: the baseline is a mean of so many")
    if isinstance(kind, str) and kind not in ("js", *KINDS):
        raise ValueError(f"kind={kind!r} must be one of js, {', '.join(KINDS)}, or a Kind")
    reward = PseudoReward(JSD(), 2.0) if kind == "js" else PseudoReward(kind_of(kind))
    advantage = reward - Baseline(Last(reward, window))
    return Objective(Reinforce(Importance() * advantage).per("row_sums"))
