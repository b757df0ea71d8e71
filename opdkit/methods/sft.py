"""Supervised fine-tuning: the baseline of all distillation."""

from __future__ import annotations

from opdkit.curricula import Mixed
from opdkit.methods.method import Method
from opdkit.objective import Likelihood, Objective


def sft() -> Method:
    """SFT: the likelihood of reference responses, which no teacher scores and no student writes.

        -log pi_s(y_t) of the responses in the data
        mean over all trained tokens

    Tokens that a teacher wrote (mark `guided`) are learnt as those of the data are. Where a teacher
    wrote all of them it is sequence-level distillation: the sampled form of
    forward KL on the teacher's prefixes, whose full form is `kl_mixing(lam=0, prefix=teacher)`.

    Source: maximum likelihood; the baseline of arXiv 2605.16826 and of EKSFT. Departure: the mean
    is over the tokens of the whole optimiser step, whatever the micro-batches.
    """
    written = Likelihood().of("student", "guide", "data")
    return Method(Objective(written), curriculum=Mixed(0.0))
