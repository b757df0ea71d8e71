"""Universal logit distillation."""

from __future__ import annotations

from collections.abc import Sequence

from opdkit.curricula import Mixed
from opdkit.methods.method import Method
from opdkit.objective import Likelihood, Objective, RankDistance, Term


def uld(
    lmbda: float = 1.0,
    distillation_weight: float = 1.0,
    crossentropy_weight: float = 0.0,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    skip_eos: bool = True,
) -> Method:
    """ULD: where vocabularies have no common index, compare the sorted probabilities.

        u_t = sum_k |p_s^(k) - p_t^(k)|
        p^(k) the k-th largest, the shorter vocabulary continued with zeros
        mean over the first min(T_s, T_t) tokens of each rollout, then over rollouts

    The teacher may have any tokenizer: it reads the same text in its own tokens, and the t-th of
    these is compared with the student's t-th; `skip_eos` leaves out the end of sequence on both
    sides. u is a transport distance between 0 and 2 that charges the same for any two different
    tokens, so it cannot teach which token is meant; `gold` can. `crossentropy_weight` adds -log
    pi_s of the text, sensible where that is the data's (lmbda 0): on the student's own samples it
    only makes it surer of itself.

    Source: arXiv 2402.12030 and TRL 1.16. Departures: on-policy (lmbda 1; the paper trains on the
    data's text with weights of about 1.5 and 1); logits are those that predict each token (TRL
    takes those that predict the next); the teacher's vocabulary ends with its tokenizer's last
    token, not with the padding of its matrix.

    Arguments:
        lmbda: share of the batches whose responses the student writes, in [0, 1]; in the others
            they are read from the data. Default: ours, all on-policy; the paper trains on the
            data's text.
        distillation_weight: weight of the distance, above 0. Default: TRL's; the paper has about
            1.5.
        crossentropy_weight: weight of -log pi_s of the text, at least 0. Default: TRL's; the paper
            has 1.
        student_temperature: divides the student's logits in the loss; above 0. Default: TRL's.
        teacher_temperature: divides the teacher's logits in the loss; above 0. Default: TRL's.
        skip_eos: whether the end of sequence is left out on both sides. Default: TRL's.
    """
    distance = RankDistance("index", student_temperature, teacher_temperature, not skip_eos).per(
        "own_rows"
    )
    return with_likelihood([distance], lmbda, distillation_weight, crossentropy_weight)


def with_likelihood(
    terms: Sequence[Term], lmbda: float, distillation_weight: float, crossentropy_weight: float
) -> Method:
    """distillation_weight * terms + crossentropy_weight * likelihood, on text of which the student
    writes a share `lmbda`.
    """
    if not 0 <= lmbda <= 1:
        raise ValueError(
            f"lmbda={lmbda} must lie in [0, 1]: the share of batches that the student writes"
        )
    if distillation_weight <= 0 or crossentropy_weight < 0:
        raise ValueError("distillation_weight must be positive, crossentropy_weight at least 0")
    weighed = [term if distillation_weight == 1 else term * distillation_weight for term in terms]
    likelihood = [Likelihood() * crossentropy_weight] if crossentropy_weight else []
    return Method(Objective(*weighed, *likelihood), curriculum=Mixed(lmbda))
