"""DPH-RL: reinforcement learning that rehearses what the student could do when it began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.curricula import Rehearsal
from opdkit.curricula.rehearsal import REHEARSAL
from opdkit.methods.arguments import inside, not_negative, one_of
from opdkit.methods.method import Method
from opdkit.objective import (
    JSD,
    Advantage,
    Alpha,
    Clipped,
    ForwardKL,
    Kind,
    Live,
    Mark,
    Objective,
    TokenLoss,
    log_ratio,
)


@dataclass(frozen=True)
class Generator(TokenLoss):
    """[n]: f(u), u = pi_s / pi_model, at a token that the model drew: on average the divergence
    E_model f(u) with its gradient, at least 0, and nothing where the two agree.

    f is that of a `Kind`, times `scale`, with the multiple of u - 1 (0 on average) that makes its
    slope at u = 1 vanish.
    """

    kind: Kind
    scale: float = 1.0
    model: str = "reference"
    name: ClassVar[str] = "rehearsal"

    def value(self, live: Live) -> Tensor:  # [n]
        l = log_ratio(live, self.model)
        one = torch.zeros_like(l)  # log u at u = 1
        f = self.kind.entries(l, one) - self.kind.slope(one) * torch.expm1(l)
        return self.scale * f


def dph_rl(
    kind: str = "forward_kl",
    eta: float = 0.02,
    alpha: float = 0.2,
    samples: int = 8,
    enough: int = 6,
    rehearsed: int | None = None,
    drop_unsolved: bool = False,
) -> Method:
    """DPH-RL: rewards on what the student has yet to learn, and beside them a divergence from the
    student as it began on answers that it gave right then, so that it unlearns none of them.

        prompts to learn:  max(-A r, -A clip(r, 1 - low, 1 + high)),   A and r as in `grpo`
        rehearsed answers: eta f(u),   u = pi_s / pi_ref at each token of an answer drawn by pi_ref
        f_forward_kl(u) = u - 1 - log u              E_ref f = KL(pi_ref || pi_s)
        f_js(u) = u log u - (u + 1) log((u + 1)/2)   E_ref f = 2 JS(pi_ref, pi_s)
        f_alpha(u) = (u^(1-a) - (1 - a) u - a) / (a (a - 1))
        each a mean over its own tokens

    a = alpha -> 0 is KL(pi_s || pi_ref), -> 1 KL(pi_ref || pi_s). Rehearsed tokens carry the mark
    `rehearsal` and have no advantage; the curriculum `Rehearsal` makes and stores them before the
    first step. pi_ref is the student that wrote them: in a run its log-probs are those stored with
    them (`reference: recorded:rehearsal`), and no reference is loaded; `evaluate` takes logits in
    models={"reference": ...}, and a run that names a `reference` model asks that one.

    Source: arXiv 2509.07430 and its code. Departures: the code also cuts the forward f at 10, which
    is left out, as E_ref f is then no divergence; log u has no gradient beyond 20 nats, as in the
    code. Ours: the rehearsed slice is two answers per prompt of a step, the script's 256 for 128.
    Not offered: the code's "js" by estimators of both halves, and reverse KL, which read a
    reference at every step (`grpo(reference_kl=...)` has the latter).

    Arguments:
        kind: the divergence of rehearsed answers: "forward_kl", "js" or "alpha". Default: the
            paper's DPH-F.
        eta: weight of rehearsal, at least 0; at 0 nothing is rehearsed and every prompt is to be
            learnt. Default: within the code's 0.01 to 0.05; js has 0.05 to 0.2.
        alpha: a of kind="alpha", strictly between 0 and 1. Default: the script's.
        samples: responses to each prompt before the first step, at least 1. Default: the paper's.
        enough: right ones among them with which a prompt is mastered and rehearsed, if one more is
            right too. Default: the paper's for Llama; it has 7 for Qwen, the script 4 of 4.
        rehearsed: answers that a step rehearses, at least 1; None: two per prompt. Default: the
            script's ratio.
        drop_unsolved: whether prompts without any right response are never asked. Default: ours;
            the paper leaves it open.
    """
    inside(alpha=(alpha, "it lies between reverse KL (0) and forward KL (1)"))
    kinds = {"forward_kl": ForwardKL(), "js": JSD(), "alpha": Alpha(alpha)}
    one_of(kind=(kind, kinds))
    not_negative(eta=(eta, "it is the weight of a divergence"))
    rehearsal = Mark(REHEARSAL)
    learnt = (Clipped(Advantage(), 0.2, 0.28) * ~rehearsal).per("own")
    if eta == 0:
        return Method(Objective(learnt))
    # half of E_ref[u log u - (u + 1) log((u + 1)/2)] is the divergence at beta = 1/2
    kept = Generator(kinds[kind], 2.0 if kind == "js" else 1.0)
    return Method(
        learnt + (kept * (rehearsal * eta)).per("own"),
        curriculum=Rehearsal(samples, enough, rehearsed, drop_unsolved),
        models={"reference": {"kind": "recorded", "mark": REHEARSAL}},
    )
