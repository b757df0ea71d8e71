"""DistIL: forward cross-entropy on the student's own prefixes, with its whole gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opdkit.methods.arguments import one_of
from opdkit.methods.method import Method
from opdkit.objective import (
    Batch,
    Divergence,
    Gap,
    Kind,
    PolicyGradient,
    Signal,
    ToGo,
)
from opdkit.objective.maths import group_means, side_by_side


@dataclass(frozen=True)
class CrossEntropy(Kind):
    """-sum_v p_t log p_s: KL(teacher || student) and the teacher's own entropy."""

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return -lt.exp() * ls


@dataclass(frozen=True)
class OfPeers(Signal):
    """[B, T]: the mean of a signal over a prompt's rollouts, token by token of the student's; a
    rollout that has ended counts as 0.
    """

    of: Signal

    def value(self, batch: Batch) -> Tensor:  # [B, T]
        def mean(values: Tensor) -> Tensor:  # [B, T]
            least, above, _ = group_means(values, batch.group)
            return least + above

        values = self.of(batch).expand(batch.shape).to(batch.dtype)
        return side_by_side(batch.mask, mean, values)


def distil(k: int | None = 100, baseline: str | None = None) -> Method:
    """DistIL: at every prefix the student imitates itself with feedback, and each of its tokens
    also answers for the disagreement that comes after it.

        H_t = -sum_S q_t log pi_s,   q_t = pi_t on S, the teacher's top k, renormalised there
        sum_t H_t  +  r_t (C_t - b_t),   C_t = sum of H over later tokens, before the step
        r_t = pi_s / pi_sampler;   sum over each rollout's tokens, mean over rollouts

    On average its gradient is that of J = E[sum_t H_t] over responses of the student: imitation at
    each prefix, and future credit, which drives tokens down that lead to much disagreement. C_t
    contains the teacher's own entropy, as the objective is a cross-entropy and no KL. The teacher
    is an average of the student's weights (rate 0.05) in the view `peer_or_feedback`.

    With `clip` the second part is PPO's, max(r U, clip(r) U) of the cost U = C - b, r to the
    student before the step.

    Source: arXiv 2606.05152. Its exact split is derived from the objective and checked by
    enumeration; ours are the top k renormalised, the form of clipping, and the sum over tokens.
    Not offered: tokens sampled from the teacher in the place of its top k.

    Arguments:
        k: size of the teacher's top k, in tokens, at least 1; None: the whole vocabulary. Default:
            the paper's.
        baseline: b: None, or "group", the mean of C over a prompt's rollouts at the same token,
            where those that have ended count as 0. Default: ours; the paper's is not known.
    """
    one_of(baseline=(baseline, (None, "group")))
    support, rest = ("full", "raw") if k is None else ("teacher", "target")
    distance = Gap(CrossEntropy(), support, k, rest)  # [B, T]: H before the step
    credit: Signal = distance - ToGo(distance)  # -C
    if baseline:
        credit = credit - OfPeers(credit)
    imitation = Divergence(CrossEntropy(), k, support, rest)
    return Method(
        imitation.per("row_sums") + PolicyGradient(credit).per("row_sums"),
        models={
            "teacher": {
                "kind": "self",
                "weights": "ema",
                "rate": 0.05,
                "view": "peer_or_feedback",
            }
        },
    )
