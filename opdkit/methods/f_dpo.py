"""f-DPO: preferences learnt from directly, under a divergence of one's choice."""

from __future__ import annotations

from opdkit.curricula import Plain, Preference
from opdkit.methods.arguments import inside, one_of, positive
from opdkit.methods.method import Method
from opdkit.objective import JSD, Alpha, ForwardKL, LogU, Objective, PairLoss

# e^30 of a slope is as much as the norm of a gradient can square in float32, many tokens over
STEEPEST = 30.0


def f_dpo(
    kind: str = "reverse_kl", beta: float = 0.1, alpha: float = 0.5, pairs: str = "data"
) -> Method:
    """f-DPO: what is preferred becomes the likelier answer, against the reference, at the price
    that a divergence sets.

        -log sigmoid(m),   m = beta f'(u_w) - beta f'(u_l),   log u = l = sum_t log(pi_s/pi_ref)
        f'(u):   reverse_kl  l                forward_kl  -exp(-l)
                 js  log 2 - softplus(-l)     alpha  (1 - exp(-alpha l)) / alpha
        mean over pairs

    reverse_kl is DPO. w was preferred to l, both of one prompt: `chosen` and `rejected` of a data
    row, or among the student's own responses (`pairs` "rollouts") every right one and every wrong
    one; a group of these adds the mean over its pairs, weighed by its rollouts. js is the symmetric
    divergence times 2, as in the paper. Its worth is at most log 2 and its slope half of DPO's near
    l = 0; alpha lies between reverse KL (0) and forward KL (1). Log-probs are sums over tokens, not
    means. The curves `pairs/chosen`, `pairs/rejected`, `pairs/margin` and `pairs/accuracy` are of
    beta f'(u). The reference is the student as it began, unless the run names another.

    Source: arXiv 2309.16240 and its code. Departure: the exponential of an l below -30 (below -30 /
    alpha) stays what it is there, and so does its gradient, where the code's cap leaves none. Not
    offered: total variation and chi-square, for which the closed form does not hold.

    Arguments:
        kind: the divergence from the reference: "reverse_kl" (DPO), "forward_kl", "js" or "alpha".
            Default: DPO's, the most accurate and least diverse in the paper.
        beta: strength of the constraint, above 0: the larger, the nearer to the reference.
            Default: the paper's.
        alpha: of kind="alpha", strictly between 0 and 1. Default: the middle of the paper's 0.3,
            0.5 and 0.7.
        pairs: where pairs come from: "data" (columns chosen and rejected) or "rollouts" (the
            student's own, which a reward judges). Default: the paper's.
    """
    positive(beta=(beta, "it is the strength of the constraint"))
    one_of(pairs=(pairs, ("data", "rollouts")))
    losses = {
        "reverse_kl": PairLoss(LogU(), beta),
        "forward_kl": PairLoss(ForwardKL(), beta, -STEEPEST),
        "js": PairLoss(JSD(0.5), 2 * beta),
    }
    one_of(kind=(kind, (*losses, "alpha")))
    inside(alpha=(alpha, "it lies between reverse KL (0) and forward KL (1)"))
    loss = losses.get(kind) or PairLoss(Alpha(alpha), beta, -STEEPEST / alpha)
    return Method(Objective(loss), curriculum=Preference() if pairs == "data" else Plain())
