"""Plackett-Luce distillation: the teacher's ranking of the vocabulary, and nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.methods.arguments import shares
from opdkit.objective import Correct, Live, LogpFact, Objective, Support, TokenLoss
from opdkit.objective.kernels.listwise import listwise


@dataclass(frozen=True)
class Ranking(TokenLoss):
    """Minus the log-prob of each choice in the teacher's ranking of the vocabulary, times its
    probability to the teacher.

    labelled: the sampled token has the first place. k: rank the teacher's k most probable tokens
    alone; all others are one entry that is never chosen.
    """

    labelled: bool = False
    k: int | None = None
    name: ClassVar[str] = "ranking"

    def __post_init__(self) -> None:
        self.where()

    def where(self) -> Support:
        return Support("full") if self.k is None else Support("teacher", self.k, "tail")

    def value(self, live: Live) -> Tensor:  # [n]
        tokens = live.tokens
        if self.k is None:
            y = live.vocabulary("teacher").logits
            return listwise(live.logits, y, tokens if self.labelled else None)
        where = self.where()
        ids, lt = where.entries(live.read)
        first = None
        if self.labelled:  # in the place of the last where it is not among them
            there = ids == tokens[:, None]
            there[:, -1] |= ~there.any(1)
            ids = torch.where(there, tokens[:, None], ids)
            lt = torch.where(there, live.read(LogpFact("teacher"))[:, None], lt)
        ids, by_id = ids.sort(-1)  # of equals the lower comes first, as in the whole vocabulary
        if self.labelled:
            first = (ids == tokens[:, None]).long().argmax(1)
        ls, lt = where.pair(live.at(ids), lt.gather(-1, by_id))
        return listwise(ls, lt, first, tail=True)


def pld(label: float = 0.0, k: int | None = None) -> Objective:
    """PLD: the student learns in which order the teacher prefers tokens; each choice counts as much
    as the teacher believes in it.

        sum_k q_r(k) ( log sum_{l >= k} exp s_r(l)  -  s_r(k) ),   mean over all trained tokens
        q = pi_t,   s the student's logits,   r the vocabulary by decreasing q, the first term
        is the cross-entropy with the teacher's first choice times its probability

    Of tokens that are equal to the teacher the lower id comes first; which of them are still among
    its top k, the teacher says. With `label` a share of the loss of rollouts that are correct ranks
    the token they have before all others, the verified one; the other rollouts, which hold no
    label, keep the teacher's own order. With `k` the teacher's k most probable tokens are ranked,
    the verified one among them; the others stay in every denominator as what is left to choose
    from. k of the whole vocabulary is k=None.

    Order alone does not fix probabilities: the loss has no minimum at pi_s = pi_t, its infimum 0
    lies where the student has lost all entropy. Add a loss that matches values, as in `pld + gkd`.

    Source: arXiv 2506.12542, without official code. Departures: a mean over tokens in place of
    images; the label, which there is the class, is ours to define on rollouts (see above); so is
    the truncation, of which the paper has none.

    Arguments:
        label: share of the loss of a correct rollout in which its own token is ranked first, in [0,
            1]; above 0 a verdict is needed. Default: ours, off; the paper's images always have a
            label, which is 1.
        k: size of the teacher's top k that is ranked, in tokens, at least 1; None: the whole
            vocabulary. Default: the paper's.
    """
    shares(label=(label, "the share of a correct rollout's loss in which its token comes first"))
    if label == 0:
        return Objective(Ranking(k=k))
    plain, verified = 1 - label * Correct(), label * Correct()
    return Ranking(k=k) * plain + Ranking(True, k) * verified
