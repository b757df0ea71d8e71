"""HyPO: preferences of the data, and a KL to the reference on the student's own responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.curricula import Preference
from opdkit.methods.arguments import positive
from opdkit.methods.f_dpo import f_dpo
from opdkit.methods.method import Method
from opdkit.objective import (
    Batch,
    Live,
    LogRatio,
    LogU,
    Marked,
    OfOthers,
    PairLoss,
    RatioWeighted,
    Reinforce,
    RowSum,
    Signal,
    TokenLoss,
)

ONLINE = Marked("online")
KL = RowSum(LogRatio("live", "reference"))  # [B, 1]: D of each response, at the student as it is


@dataclass(frozen=True)
class OnlineKL(TokenLoss):
    """[n]: A log pi_s of responses marked "online", A = D less the mean of the others to the same
    prompt, at most the ratio to what was sampled as its weight: the gradient of KL(pi_s || pi_ref)
    of whole responses.
    """

    name: ClassVar[str] = "online_kl"

    @property
    def credit(self) -> Signal:
        return -OfOthers(KL, ONLINE)

    def value(self, live: Live) -> Tensor:  # [n]
        return RatioWeighted(Reinforce(self.credit), "sampler").value(live)

    def metrics(self, batch: Batch, mask: Tensor) -> dict[str, Tensor]:
        """The estimate of the KL, [], over the responses of `mask` [B, T]."""
        own = KL(batch)[ONLINE(batch) & (mask & batch.mask).any(1, keepdim=True)]
        return {"kl/reference": own.mean()} if len(own) else {}


def hypo(beta: float = 0.1, lam: float = 0.01) -> Method:
    """HyPO: DPO holds the policy where its data are and nowhere else; a KL to the reference on the
    student's own responses holds it there too, without a reward.

        -log sigmoid(beta l_w - beta l_l)  +  lam A log pi_s(y),   y ~ pi_s, marked "online"
        l = sum_t log(pi_s/pi_ref),   D = l of y, no gradient,   A = D - mean D of the others
        mean over pairs, and by itself mean over the student's responses

    The second part has the gradient of KL(pi_s || pi_ref) of whole responses, not its value: the
    KL is the curve `kl/reference`, the mean of D. `others` are the student's other responses to the
    prompt (RLOO); where there is none, A = D. D is the student's now; on rollouts of an earlier
    update each token is weighed by its ratio to what was sampled. The student writes 2 responses to
    the prompt of each pair, or the run's num_generations where that is set.

    Source: arXiv 2406.01462; its code was not at hand, the detached form is the one with that
    gradient. Not to be confused with Hybrid-DPO (arXiv 2602.11902).

    Arguments:
        beta: strength of DPO's constraint, above 0. Default: the paper's 0.05 to 0.1.
        lam: weight of the KL on the student's own responses, at least 0; 0 is DPO, and samples
            nothing. Default: the largest of the usual 1e-4 to 1e-2; tune it so that the KL stays
            bounded.
    """
    positive(beta=(beta, "it is the strength of the constraint"))
    if lam < 0:
        raise ValueError(f"lam={lam} must be at least 0: it is the weight of the KL")
    if lam == 0:
        return f_dpo(beta=beta)
    return Method(
        PairLoss(LogU(), beta, apart="online") + (OnlineKL() * (ONLINE * lam)).per("own_row_sums"),
        curriculum=Preference(online=2),
    )
