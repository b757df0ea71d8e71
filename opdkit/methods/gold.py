"""GOLD: on-policy distillation between any two tokenizers."""

from __future__ import annotations

from opdkit.methods.method import Method
from opdkit.methods.uld import with_likelihood
from opdkit.objective import JSD, HybridDistance, RankDistance, SharedDivergence, SpanLoss, Term


def gold(
    beta: float = 0.5,
    lmbda: float = 0.5,
    hybrid: bool = False,
    merge: str = "observed",
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    longer: str = "token",
    distillation_weight: float = 1.0,
    crossentropy_weight: float = 0.0,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    skip_eos: bool = True,
) -> Method:
    """GOLD: align two tokenisations of the same text by its bytes, and compare the models once per
    span that both divide alike.

        u = sum_k |P_s^(k) - P_t^(k)|,   mean over the spans of each rollout, then over rollouts
        hybrid:  w_m D_beta(P_s, P_t) on the tokens both have  +  w_u u on the others

    P is the next-token distribution where the span is one token; for tokens y_i .. y_j `merge`
    "observed" takes p_i(.) times the probability of y_{i+1} .. y_j, "bayesian" p_j(.) times that of
    y_i .. y_{j-1}, whose entry at y_j is the probability of the whole span. P is not normalised (so
    D_beta may be negative) and its gradient goes through all factors. `longer` "rank" compares
    spans of several tokens by rank alone, with w_u: the entry of one token there stands for
    different texts on the two sides, and "token" teaches the student to avoid the span. D_beta is
    that of `gkd`, u that of `uld`; with the student's own tokenizer it is `gkd(beta)`.

    Source: TRL 1.16 (GOLDTrainer) and its authors' report. Departures: logits are those that
    predict each token (TRL's "observed" takes those that predict the next, so the two differ there
    alone); tokens are the same where they stand for the same bytes (TRL: the same spelling, so
    "Ġthe" is not "▁the"), and so are the two ends of sequence; the teacher's vocabulary ends with
    its tokenizer's last token, not with the padding of its matrix; what is no text (a character cut
    in the middle) is left out. Not offered: extended=False (`uld`), temperature .9 (the run's).

    Arguments:
        beta: of D_beta (see `gkd`), in [0, 1]; with `hybrid` or one common tokenizer. Default:
            TRL's.
        lmbda: share of the batches whose responses the student writes, in [0, 1]; in the others
            they are read from the data. Default: TRL's.
        hybrid: whether tokens that both vocabularies have are compared by D_beta. Default: TRL's.
        merge: what stands for a span of several tokens: "observed" or "bayesian". Default: TRL's.
        matched_weight: w_m, at least 0, given with w_u; None: the share of the teacher's tokens
            that the student has. Default: TRL's adaptive weight.
        unmatched_weight: w_u, at least 0, given with w_m; None: 1 less that share. Default: TRL's.
        longer: how `hybrid` compares longer spans: by "token" or "rank" (ours). Default: TRL's.
        distillation_weight: weight of the distance, above 0. Default: TRL's.
        crossentropy_weight: weight of -log pi_s of the text, at least 0. Default: TRL's.
        student_temperature: divides the student's logits in the loss; above 0. Default: TRL's.
        teacher_temperature: divides the teacher's logits in the loss; above 0. Default: TRL's.
        skip_eos: whether the end of sequence is left out on both sides. Default: TRL's.
    """
    weights = fixed_weights(hybrid, merge, matched_weight, unmatched_weight, longer)
    kind, settings = JSD(beta), (merge, student_temperature, teacher_temperature, not skip_eos)
    spans: SpanLoss = RankDistance(*settings, shared=False)
    if hybrid:
        spans = HybridDistance(*settings, shared=False, kind=kind, weights=weights, longer=longer)
    same = SharedDivergence(kind, student_temperature, teacher_temperature)
    terms = [spans.per("own_rows"), Term(same)]
    return with_likelihood(terms, lmbda, distillation_weight, crossentropy_weight)


def fixed_weights(
    hybrid: bool, merge: str, matched: float | None, unmatched: float | None, longer: str
) -> tuple[float, float] | None:
    """w_m and w_u where they are given; arguments that do not go together are refused."""
    if merge not in ("bayesian", "observed"):
        raise ValueError(
            f"merge={merge!r} must be 'bayesian' or 'observed': what stands for a span of several "
            "tokens"
        )
    if not hybrid and (matched, unmatched, longer) != (None, None, "token"):
        raise ValueError(
            "matched_weight, unmatched_weight and longer are of the hybrid loss: set hybrid=True"
        )
    if (matched is None) != (unmatched is None):
        raise ValueError(
            "give both matched_weight and unmatched_weight, or neither: their default follows the "
            "two vocabularies"
        )
    return None if matched is None or unmatched is None else (matched, unmatched)
