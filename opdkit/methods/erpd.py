"""ERPD: what an extreme policy has learnt, moved into its base under a trust region
(experimental).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opdkit.methods.arguments import one_of
from opdkit.objective import (
    Bounds,
    Ceiling,
    Const,
    Estimator,
    Floor,
    Live,
    LogRatio,
    Objective,
    Outer,
    Signal,
    TokenLoss,
    clipped,
    ratio,
)


@dataclass(frozen=True)
class TrustRegion(Bounds, TokenLoss):
    """PPO's clipped policy gradient whose region lies around what the tokens were drawn from: a
    ratio to the sampler itself. With a cap it lies around the student before the step, as
    `Clipped`'s does.
    """

    def value(self, live: Live) -> Tensor:  # [n]
        r = ratio(live, self.base if self.cap is None else "student")
        return clipped(r, live.pick(self.credit), self.low, self.high, self.dual)

    @property
    def outer(self) -> Signal:
        return Const(1) if self.cap is None else Outer(self.base, self.cap)


def erpd(
    clip: float = 0.1, b: float = 0.05, cap: float | None = 5.0, signal: str = "strong"
) -> Objective:
    """ERPD (experimental): a policy trained without care on a few rollouts has learnt something and
    lost something; what it learnt is a log-ratio of each token, and only that is moved.

        S_t = log(pi_T/pi_ref),  weak: log(pi_T/pi_U);  within -cap .. cap, no baseline
        max(-S_t w, -S_t clip(w, 1 - clip, 1 + clip)) + b k3,   w = pi_s/pi_sampler
        k3 = exp(d) - d - 1,   d = log(pi_ref/pi_s);   mean over all trained tokens

    pi_T, the run's teacher, is the extreme policy: the student after many loosely bounded updates
    on one set of rollouts (`sft` on right answers, `grpo` with many passes and clip=None). pi_ref
    is the base, by default the student's initial weights, from which this stage starts again. With
    a weak pi_T the signal is measured against `models.unlearned`, a policy pushed away from the
    good data. pi_old of the trust region is what the rollouts were drawn from. Without clip and
    penalty on fresh rollouts the credit is that of `gopd` less log(pi_ref/pi_s); at b = 1 the
    optimum at each prefix is pi_T itself.

    Source: arXiv 2605.25582, of which the two stages, the log-ratio per token and the re-anchored
    trust region are known; every formula here is a reconstruction, and so are the defaults. Not
    offered: the first stage as a method of its own; several signals (a `mixture` of form geometric
    as the teacher has their mean).

    Arguments:
        clip: half width of the trust region of w, at least 0. Default: ours; the paper has a tight
            one.
        b: weight of the penalty that keeps the student near the base, at least 0. Default: ours.
        cap: largest size of a signal, in nats, above 0; None: it has none. Default: ours.
        signal: "strong": against the base; "weak": against the unlearned policy. Default: the
            paper's plain form, as far as it is known.
    """
    one_of(signal=(signal, ("strong", "weak")))
    if clip < 0 or b < 0 or (cap is not None and cap <= 0):
        raise ValueError(
            f"clip={clip}, b={b} must be at least 0 and cap={cap} above 0: the width of the trust "
            "region, the weight of the penalty and the largest size of a signal"
        )
    credit: Signal = LogRatio("teacher", "reference" if signal == "strong" else "unlearned")
    if cap is not None:
        credit = Floor(Ceiling(credit, cap), -cap)
    objective = Objective(TrustRegion(credit, clip, clip))
    return objective + Estimator("k3", "reference") * b if b else objective
