"""On-policy self-distillation: the student with the solution teaches the student without it."""

from __future__ import annotations

from opdkit.methods.arguments import itself, one_of, positive, shares
from opdkit.methods.method import Method
from opdkit.objective import JSD, Divergence, LogRatio, Loss, Objective, PolicyGradient


def opsd(
    beta: float = 0.0,
    cap: float | None = 0.05,
    teacher: str = "fixed",
    k: int | None = None,
    decay: float = 0.999,
    support: str = "full",
) -> Method:
    """OPSD: the same model, which has also read the reference solution, scores what it wrote
    without.

        d(v) = the entry v of beta KL(pi_t || M) + (1 - beta) KL(pi_s || M)
               M = beta pi_t + (1 - beta) pi_s;   beta 0: KL(pi_t || pi_s), 1: KL(pi_s || pi_t)
        sum_v min(d(v), cap), mean over all trained tokens

        pi_t = the student's own weights under problem + solution + "now in your own words"

    The cap is an upper one, entry by entry: negative entries stay, so the loss may be negative;
    capped ones have no gradient. It keeps few tokens of style from ruling the sum, and turns the
    push around where it binds: under forward KL only entries that the student overrates are left.
    "sampled" is the policy gradient -ratio r_t, r_t = log pi_t(y_t) - log pi_s(y_t), in expectation
    the gradient of beta = 1 without a cap.

    Source: arXiv 2601.18734 and its code (v3: forward KL, cap 0.05, here; the first release: beta
    0.5, no cap). Departures: the mean is over the optimiser step, not the micro-batch; the sampled
    form has a ratio to the sampler, 1 on fresh rollouts. Not offered: the sampling temperature
    inside the loss (theirs is 1.1 in both), and an analysis that the teacher writes before it
    scores.

    Arguments:
        beta: where the divergence lies between forward (0) and reverse KL (1), in [0, 1]. Default:
            the newer release's; the first has 0.5.
        cap: largest contribution of a vocabulary entry, in nats, above 0; None: no cap. Default:
            the newer release's for 1.7B and 4B; 0.06 for 8B.
        teacher: weights of the teacher: "fixed" (those at the start of the run), "ema" (their
            moving average), "live" (the student's own). Default: the paper's, which is stable.
        k: size of the teacher's top k, on which both are renormalised, in tokens, at least 1; None:
            the whole vocabulary. Default: the paper's; its variant has 50.
        decay: share of the old average that stays at an optimiser step with teacher="ema", in
            [0, 1]; the first step only copies the student. Default: the code's.
        support: "full" (the divergence above) or "sampled" (the policy gradient at the token that
            was drawn; `beta` and `cap` are of the divergence). Default: the paper's.
    """
    shares(
        beta=(beta, "0 is forward KL, 1 reverse KL"),
        decay=(decay, "it is the share of the teacher's average that stays"),
    )
    own = itself("solution", teacher, rate=round(1 - decay, 12), first_copy=True)
    return Method(Objective(compared(beta, cap, k, support)), models={"teacher": own})


def compared(beta: float, cap: float | None, k: int | None, support: str) -> Loss:
    """What is compared at each token."""
    one_of(support=(support, ("full", "sampled")))
    if cap is not None:
        positive(cap=(cap, "it bounds what a vocabulary entry adds; cap=None is no bound"))
    if support == "full":
        top = ("full", "raw") if k is None else ("teacher", "renormalise")
        return Divergence(JSD(beta), k, *top, cap=cap)
    if k is not None:
        raise ValueError(
            f"k={k} chooses entries of the vocabulary, of which support='sampled' reads none but "
            "the token drawn: leave one of them out"
        )
    return PolicyGradient(LogRatio("teacher", "student"))
