"""MDPO: a mirror-descent step, taken by several updates on one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.arguments import one_of
from opdkit.objective import (
    Advantage,
    Batch,
    Const,
    Divergence,
    Estimator,
    Kind,
    LogRatio,
    Objective,
    PolicyGradient,
    Signal,
    ToGo,
)


@dataclass(frozen=True)
class StepsLeft(Signal):
    """[1, 1]: 1 / t_k = K / (K - k), k the step from 0 and K the steps of the run: from 1 to K."""

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        left = max(batch.total_steps - batch.step, 1)
        weight = max(batch.total_steps, 1) / left
        return torch.full((1, 1), weight, dtype=batch.dtype, device=batch.device)

    def __str__(self) -> str:
        return "1/t_k"


@dataclass(frozen=True)
class LogOfOther(Kind):
    """sum_v p_s log p_t: what is left of a KL where the student's own entropy is paid for."""

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return ls.exp() * lt


def mdpo(
    offpolicy: bool = False,
    t: str | float = "linear",
    kind: str | Kind = "reverse_kl",
    credit: str = "reward",
    lam: float = 0.2,
) -> Objective:
    """MDPO: maximise the linearised return less a KL to the policy that the step began with: what
    clipping only approximates.

        -A r_t  +  (1 / t_k) KL(pi_s || pi_k),   t_k = 1 - k/K at step k = 0 .. K-1 of K
        r_t = pi_s / pi_sampler, not clipped;   pi_k: the student before the step
        mean over all trained tokens

    At each prefix the optimum is pi_k exp(t_k A) up to a factor. At the first update on a batch the
    KL has no gradient: it takes several (`optim.passes` or `optim.minibatches` above 1) to be more
    than a policy gradient. With credit="teacher" A = log(pi_t/pi_k) and the optimum is
    pi_k^(1 - t) pi_t^t, a geometric step towards the teacher: mirror-descent OPD.

    `offpolicy` adds lam sum_v pi_s log pi_k over the vocabulary, so that the whole is
    E_{pi_s}[(1/t) log pi_s + (lam - 1/t) log pi_k - Q], the paper's form for replayed states: at
    1/t = lam a soft actor. Q is the credit to go (of a reward its advantage, of a teacher the
    log-ratios from the token on), at tokens weighed by pi_s / what they were drawn from.

    Source: arXiv 2005.09814 and its code. Departures: A is (R - mean) / (std + 1e-6) of a prompt's
    rollouts, no estimate with a critic; off-policy Q has neither a critic nor the entropy of later
    tokens. Not offered: the Tsallis form.

    Arguments:
        offpolicy: whether the entropy form for replayed rollouts is added. Default: the paper's
            first algorithm.
        t: t_k: "linear", or a constant above 0: small ones hold the student where it is, large ones
            let it go. Default: the code's; its off-policy runs have 1.
        kind: distance to pi_k: a divergence over the whole vocabulary ("reverse_kl" and the others
            of `opd`, or a `Kind`), or "k2", half the squared log-ratio of the token, for which no
            further pass of the student is made. Default: the paper's.
        credit: A: "reward", or "teacher", the log-ratio to the teacher. Default: the paper's.
        lam: weight of the entropy with `offpolicy`, at least 0. Default: the paper's.
    """
    one_of(credit=(credit, ("reward", "teacher")))
    if t != "linear" and not (isinstance(t, (int, float)) and t > 0):
        raise ValueError(f"t={t!r} must be 'linear' or a number above 0: it is the size of a step")
    if lam < 0:
        raise ValueError(f"lam={lam} must be at least 0: it is the weight of an entropy")
    a: Signal = Advantage() if credit == "reward" else LogRatio("teacher", "student")
    if offpolicy and credit == "teacher":
        a = ToGo(a)
    weight = StepsLeft() if isinstance(t, str) else Const(1 / t)
    objective = mirror_step(a, weight, kind)
    return objective + Divergence(LogOfOther(), teacher="student") * lam if offpolicy else objective


def mirror_step(a: Signal, weight: Signal, kind: str | Kind) -> Objective:
    """The policy gradient of a credit and a weighed distance to the student before the step."""
    near = Estimator("k2", "student") if kind == "k2" else Divergence(kind, teacher="student")
    return PolicyGradient(a) + near * weight
