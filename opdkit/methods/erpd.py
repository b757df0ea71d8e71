"""ERPD: what an extreme policy has learnt, moved into its base under a trust region
(experimental).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    ratio,
)


@dataclass(frozen=True)
class TrustRegion(Bounds, TokenLoss):
    """PPO's clipped policy gradient whose region lies around what the tokens were drawn from: a
    ratio to the sampler itself. With a cap it lies around the student before the step, as
    `Clipped`'s does.
    """

    takes_region: ClassVar[bool] = True

    @property
    def around(self) -> str | Signal:
        return self.base if self.cap is None else "student"

    def value(self, live: Live) -> Tensor:  # [n]
        return self.bounded_at(live, ratio(live, self.around), live.pick(self.credit))

    @property
    def outer(self) -> Signal:
        return Const(1) if self.cap is None else Outer(self.base, self.cap)


def erpd(
    b: float = 0.05, cap: float | None = 5.0, signal: str = "strong", estimator: str = "k3"
) -> Objective:
    """ERPD (experimental): a policy trained without care on a few rollouts has learnt something and
    lost something; what it learnt is a log-ratio of each token, and only that is moved.

        S_t = log(pi_T/pi_ref),  weak: log(pi_T/pi_U);  within -cap .. cap, no baseline
        max(-S_t w, -S_t clip(w, 0.9, 1.1)) + b k3,   w = pi_s/pi_sampler
        k3 = exp(d) - d - 1,   d = log(pi_ref/pi_s);   mean over all trained tokens

    pi_T, the run's teacher, is the extreme policy: the student after many loosely bounded updates
    on one set of rollouts (`sft` on right answers, `grpo` in many passes, not clipped). pi_ref
    is the base, by default the student's initial weights, from which this stage starts again. With
    a weak pi_T the signal is measured against `models.unlearned`, a policy pushed away from the
    good data. pi_old of the trust region is what the rollouts were drawn from. On average the loss
    is E[-S] + b KL(pi_s || pi_ref), least at pi_ref (pi_T/pi_ref)^(1/b) at each prefix, which at b
    = 1 is pi_T (`gopd` with scale 1/b). k3 has that value, and the gradient of KL(pi_ref || pi_s),
    so it stops earlier; "k3+" and "k2" have the gradient too.

    Source: arXiv 2605.25582, of which the two stages, the log-ratio per token and the re-anchored
    trust region are known; every formula here is a reconstruction, and so are the defaults. Not
    offered: the first stage as a method of its own; several signals (a `mixture` of form geometric
    as the teacher has their mean).

    Arguments:
        b: weight of the penalty that keeps the student near the base, at least 0. Default: ours.
        cap: largest size of a signal, in nats, above 0; None: it has none. Default: ours.
        signal: "strong": against the base; "weak": against the unlearned policy. Default: the
            paper's plain form, as far as it is known.
        estimator: of the penalty's KL: "k3", "k3+" (its value, the gradient of k2) or "k2".
            Default: ours.
    """
    one_of(signal=(signal, ("strong", "weak")))
    if b < 0 or (cap is not None and cap <= 0):
        raise ValueError(
            f"b={b} must be at least 0 and cap={cap} above 0: the weight of the penalty and the "
            "largest size of a signal"
        )
    credit: Signal = LogRatio("teacher", "reference" if signal == "strong" else "unlearned")
    if cap is not None:
        credit = Floor(Ceiling(credit, cap), -cap)
    objective = Objective(TrustRegion(credit, 0.1, 0.1))
    return objective + Estimator(estimator, "reference") * b if b else objective
