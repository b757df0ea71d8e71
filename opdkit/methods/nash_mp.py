"""Nash mirror prox: preferences that need not be transitive, learnt by play against a slow copy of
the student and against itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from opdkit.curricula import Opposed
from opdkit.methods.arguments import one_of, positive, shares
from opdkit.methods.method import Method
from opdkit.objective import (
    Ema,
    LogRatio,
    Objective,
    OfOthers,
    PolicyGradient,
    Reward,
    RowSum,
    Signal,
)


def half_step(reference: Tensor, anchor: Tensor, lost: Tensor, beta: float, eta: float) -> Tensor:
    """[Y]: argmin over pi of E_pi[lost] / beta + KL(pi || reference) + KL(pi || anchor) / eta, for
    probabilities [Y] and lost [Y] = P(opponent > y).
    """
    mean = (eta * reference.log() + anchor.log() - eta / beta * lost) / (1 + eta)
    return mean.softmax(-1)


def mirror_prox(
    beats: Tensor, reference: Tensor, beta: float, eta: float, halves: int = 2
) -> Iterator[Tensor]:
    """[Y] each: pi_0 = reference, pi_1, pi_2 ... of the game beats [Y, Y] = P(row > column). With
    `halves` 1 there is no half-step, and it is mirror descent.
    """
    anchor = reference
    while True:
        yield anchor
        opponent = anchor
        for _ in range(halves):
            opponent = half_step(reference, anchor, opponent @ beats, beta, eta)
        anchor = opponent


def nash_mp(
    beta: float = 0.1,
    eta: float = 0.2,
    kappa: float = 0.99,
    every: int = 1,
    baseline: str = "half",
) -> Method:
    """Nash-MP: where preferences go round in circles no answer is best; play against a copy of
    oneself that follows slowly, then against oneself, and what is reached is the equilibrium.

        U = P(y' > y) + beta log(pi_s/pi_ref)(y) + (beta/eta) log(pi_s/pi_k)(y),   of whole
        responses
        ratio (U - 1/2),   ratio = pi_s / pi_sampler of each token;   sum over a response's tokens,
        mean over responses
        y ~ pi_s,   y' ~ pi_k at steps 0, 2, 4 ...,   y' ~ pi_s at steps 1, 3, 5 ...

    On average the gradient is that of P(mu > pi) + beta KL(pi || pi_ref) + (beta/eta) KL(pi ||
    pi_k), mu who plays: the two proximal steps of mirror prox, one gradient step each in the place
    of an argmin. The anchor pi_k is a copy of the student, anchor <- kappa anchor + (1 - kappa)
    student after every `every` optimiser steps: kappa = 0 is a hard copy, which with two optimiser
    steps for each, or many, is the paper's exact scheme. The reward of a response is P(it beats the
    opponent's): a judge of two answers, `reward=file.py:function` on (row, a, b), or any reward, of
    which the higher wins and equal ones half. The opponent's responses cost as much as the
    student's, and are not learnt from. `half_step` is the closed form for a few answers.

    Source: arXiv 2505.19731, the steps as a review quotes them and its closed form derived; the
    recipe for language models is a reconstruction. Log-ratios are those before the step.

    Arguments:
        beta: price of a nat of log(pi_s/pi_ref) of a whole response, above 0. Default: the largest
            of 0.01 to 0.1.
        eta: size of a proximal step, above 0: the larger, the less the anchor holds. Default: 2
            beta, which the paper's rate needs; far more does not converge.
        kappa: share of the anchor that stays when it moves, in [0, 1]. Default: the lowest of 0.99
            to 0.999.
        every: optimiser steps from one move of the anchor to the next, at least 1. Default: a
            moving average.
        baseline: what is taken from U: "half", 1/2, or "leave_one_out", the mean U of the
            student's other responses to the prompt, 0 where there is none. Default: ours, both are
            unbiased; for several responses to a prompt the other is less noisy.
    """
    positive(
        beta=(beta, "it is the price of a nat"),
        eta=(eta, "it is the size of a proximal step"),
    )
    shares(kappa=(kappa, "it is the share of the anchor that stays"))
    one_of(baseline=(baseline, ("half", "leave_one_out")))
    cost: Signal = 1 - Reward() + RowSum(LogRatio("student", "reference")) * beta
    cost = cost + RowSum(LogRatio("student", "anchor")) * (beta / eta)
    credit = 0.5 - cost if baseline == "half" else -OfOthers(cost)
    return Method(
        Objective(PolicyGradient(credit).per("row_sums")),
        curriculum=Opposed("anchor"),
        companions=(Ema(round(1 - kappa, 12), every, "anchor"),),
    )
