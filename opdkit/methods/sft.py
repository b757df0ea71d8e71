"""Supervised fine-tuning: the baseline of all distillation."""

from __future__ import annotations

from opdkit.curricula import Mixed
from opdkit.methods.method import Method
from opdkit.objective import Likelihood, Objective


def sft() -> Method:
    """SFT: the likelihood of reference responses, which no teacher scores and no student writes.

        -log pi_s(y_t) of the responses in the data
        mean over all trained tokens

    Where a teacher wrote the responses it is sequence-level distillation: the sampled form of
    forward KL on the teacher's prefixes, whose full form is `kl_mixing(lam=0, prefix=teacher)`.

    Source: maximum likelihood; the baseline of arXiv 2605.16826 and of EKSFT. Departure: the mean
    is over the tokens of the whole optimiser step, whatever the micro-batches.
    """
    return Method(Objective(Likelihood()), curriculum=Mixed(0.0))
