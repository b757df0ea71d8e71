"""Generalised knowledge distillation."""

from __future__ import annotations

from opdkit.curricula import Mixed
from opdkit.methods.method import Method
from opdkit.objective import JSD, Divergence, Objective


def gkd(
    beta: float = 0.5, lmbda: float = 1.0, temperature: float = 1.0, normalised: bool = False
) -> Method:
    """GKD: a generalised Jensen-Shannon divergence over the full vocabulary, on text the student or
    the data set wrote.

        beta KL(pi_t || M) + (1 - beta) KL(pi_s || M),   M = beta pi_t + (1 - beta) pi_s
        beta = 0: KL(pi_t || pi_s);   beta = 1: KL(pi_s || pi_t)
        mean over all trained tokens

    Near the ends the divergence vanishes like beta, so beta = 0.01 has about 1 % of the gradient of
    beta = 0: `normalised` divides by beta (1 - beta) and is continuous.

    Source: arXiv 2306.13649. Departures: lmbda 1 (TRL 0.5), temperature 1 (TRL samples at 0.9 and
    leaves the loss at 1); the denominator counts the tokens really trained on, over the whole
    optimiser step.

    Arguments:
        beta: where the divergence lies between forward (0) and reverse KL (1), in [0, 1]. Default:
            TRL's; the paper's best depends on the task.
        lmbda: share of the batches whose responses the student writes, in [0, 1]; in the others
            they are read from the data. Default: the paper's best, all on-policy (TRL: 0.5).
        temperature: divides the logits of both models in the loss, not in sampling; above 0.
            Default: TRL's in the loss.
        normalised: whether to divide by beta (1 - beta), which makes the size continuous up to both
            ends. Default: off, the definition of paper and TRL; the option is ours.
    """
    if not 0 <= lmbda <= 1:
        raise ValueError(
            f"lmbda={lmbda} must lie in [0, 1]: the share of batches that the student writes"
        )
    return Method(
        Objective(Divergence(JSD(beta, normalised), temperature=temperature)),
        curriculum=Mixed(lmbda),
    )
