"""EKSFT: supervised fine-tuning but for tokens that the model is unsure of or has drifted at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.curricula import Mixed
from opdkit.methods.arguments import one_of, shares
from opdkit.methods.method import Method
from opdkit.methods.sft import sft
from opdkit.methods.tip import Highest
from opdkit.objective import (
    Batch,
    Const,
    Divergence,
    EntropyBonus,
    Evenness,
    Gap,
    Likelihood,
    Live,
    Objective,
    Signal,
    Term,
)
from opdkit.objective.maths import masked_mean

AUTHORS = ("student", "guide", "data")


@dataclass(frozen=True)
class EvennessBonus(EntropyBonus):
    """-H(pi_s) / log V: weighed positively it keeps the student undecided."""

    name: ClassVar[str] = "evenness_bonus"

    def value(self, live: Live) -> Tensor:  # [n]
        return super().value(live) / math.log(live.logits.shape[-1])


@dataclass(frozen=True)
class Most(Signal):
    """[B, T] bool: the share of the step's tokens where a signal is highest, whoever wrote them."""

    of: Signal
    share: float

    def value(self, batch: Batch) -> Tensor:  # [B, T] bool
        return Highest(self.of, self.share, Const(1), whole=True, authors=AUTHORS)(batch)


@dataclass(frozen=True)
class MeanOf(Signal):
    """[1, 1]: mean of a signal over some tokens of the step; 0 where there is none."""

    of: Signal
    among: Signal

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        return masked_mean(self.of(batch), self.among(batch).bool()).view(1, 1)


def eksft(
    rho: float = 0.2,
    entropy: float = 0.05,
    kl: float = 0.05,
    entropy_target: float = 0.5,
    kl_target: float = 2.0,
    select: str = "union",
) -> Method:
    """EKSFT: the data's text is learnt where the model is sure and has not drifted; its least sure
    tokens keep their entropy, those that drifted most are held to the reference.

        mean_{t not in M} -log pi_s(y_t)
          - l_H mean_{t in M_H} H(pi_s) / log V  +  l_K mean_{t in M_K} KL(pi_s || pi_ref)
        M_H, M_K: of the step's N tokens the floor(rho N) of highest H, of highest KL
        M = M_H with M_K ("union"), or what is in both ("intersection")
        l_H = 1.05 entropy if mean_{M_H} H / log V < entropy_target, else 0.95 entropy
        l_K = 1.05 kl if mean_{M_K} KL > kl_target, else 0.95 kl

    H and KL that choose tokens, and l_H and l_K, are those before the step, over all of it; of
    equals the earlier token is chosen, rollout by rollout: at the first step, where the model is
    the reference, M_K is the first tokens. rho 0 is `sft`; at rho 1 no token is imitated, and the
    two means over all tokens are what is left. The reference is the initial model.

    Source: arXiv 2605.29303 and its code. Departures, both defects of that code: its KL with
    gradient is sum p (p - log q), ours sum p (log p - log q); its statistics are those of the next
    token, ours of the token itself. It chooses inside each micro-batch, whose size then changes the
    gradient. Its two weights start anew at each step, as here. Not offered: the tokens of lowest H
    or KL.

    Arguments:
        rho: share of the step's tokens in M_H, and in M_K, in [0, 1]; 0 is `sft`. Default: its
            README's.
        entropy: weight of the entropy that is kept, at least 0; 0: it is not. Default: its
            README's; the code's own is 1.0.
        kl: weight of the KL to the reference, at least 0; 0: none. Default: its README's; the
            code's own is 0.5.
        entropy_target: H / log V below which its weight is raised, in [0, 1]. Default: the code's.
        kl_target: KL in nats above which its weight is raised. Default: the code's.
        select: tokens that are not imitated: "union" of M_H and M_K, or "intersection". Default:
            its README's; the code's own is "intersection".
    """
    one_of(select=(select, ("union", "intersection")))
    shares(
        rho=(rho, "the share of tokens that are chosen by entropy, and by KL"),
        entropy_target=(entropy_target, "an entropy over that of a uniform choice"),
    )
    if min(entropy, kl) < 0:
        raise ValueError(
            f"entropy={entropy}, kl={kl} must be at least 0: they are weights, and below 0 the "
            "student would be made surer of itself, or driven from the reference"
        )
    if rho == 0:
        return sft()
    union = select == "union"
    terms = _terms(rho, union, entropy, kl, entropy_target, kl_target)
    return Method(
        Objective(*(term.of(*AUTHORS).per("own") for term in terms)),
        curriculum=Mixed(0.0),
        models={"reference": {"kind": "self", "weights": "fixed"}},
    )


def _terms(
    rho: float, union: bool, entropy: float, kl: float, entropy_target: float, kl_target: float
) -> list[Term]:
    """The imitation of what is not left out, and the two means that have a weight."""
    drift = Gap("reverse_kl", teacher="reference")
    unsure, drifted = Most(Evenness(), rho), Most(drift, rho)
    terms = [Likelihood() * ~(unsure | drifted if union else unsure & drifted)]
    if entropy:
        low = MeanOf(Evenness(), unsure) < entropy_target
        terms.append(EvennessBonus() * unsure * (entropy * (0.95 + 0.1 * low)))
    if kl:
        far = MeanOf(drift, drifted) > kl_target
        distance = Divergence("reverse_kl", teacher="reference")
        terms.append(distance * drifted * (kl * (0.95 + 0.1 * far)))
    return terms
