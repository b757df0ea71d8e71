"""Trust regions in the place of PPO's clip: what holds a policy gradient near the policy that it
started from by the distance between the two, not by their ratio.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.objective.divergences import ForwardKL, Kind, TotalVariation, divergence

# a log-ratio beyond it, in nats, has no gradient: its exponential would be no number
MOST_APART = 20.0

# over the whole vocabulary, with the policy before as teacher; None: the token's own probability
MASK_KINDS: dict[str, Kind | None] = {
    "tv": None,
    "kl": None,
    "full_tv": TotalVariation(),
    "full_kl": ForwardKL(),
}


class Region(ABC):
    """What a loss's ratio is held by. Subclasses are frozen dataclasses."""

    @property
    def reads(self) -> Kind | None:
        """The divergence over the whole vocabulary that it reads; None: nothing of that."""
        return None

    @abstractmethod
    def loss(
        self, r: Tensor, credit: Tensor, now: Tensor, before: Tensor, apart: Tensor | None
    ) -> Tensor:
        """[...]: the loss of ratios `r` with gradient and of credits, where the student's log-prob
        is `now`, with gradient, and `before` that of the policy it is held to, and what it `reads`
        is `apart`; all [...] of one shape.
        """


@dataclass(frozen=True)
class DivergenceMask(Region):
    """-A r, and nothing where the divergence is at least `delta` and the step increases it.

    kind: "tv" |pi - pi_before| of the token; "kl" KL(pi_before || pi) of the token against all
    others together; "full_tv" and "full_kl" the same over the whole vocabulary, tv halved as usual.
    """

    delta: float
    kind: str = "tv"

    def __post_init__(self) -> None:
        if self.kind not in MASK_KINDS:
            raise ValueError(f"mask_kind={self.kind!r} must be one of {', '.join(MASK_KINDS)}")
        if not _number(self.delta) or not self.delta >= 0:
            raise ValueError(
                f"divergence_mask={self.delta!r} must be a number of at least 0: it is the "
                "divergence from which on a step away is blocked; 0 blocks every such step"
            )

    @property
    def reads(self) -> Kind | None:
        return MASK_KINDS[self.kind]

    def loss(
        self, r: Tensor, credit: Tensor, now: Tensor, before: Tensor, apart: Tensor | None
    ) -> Tensor:
        """[...]."""
        now = now.detach()
        if apart is None:
            apart = self.of_token(now, before)
        away = credit * (now - before) > 0
        return torch.where(away & (apart >= self.delta), 0.0, -credit * r)

    def of_token(self, now: Tensor, before: Tensor) -> Tensor:
        """[...]: how far two log-probs [...] of a token are apart."""
        if self.kind == "tv":
            return (now.exp() - before.exp()).abs()
        return divergence(ForwardKL(), _against_rest(now), _against_rest(before))


@dataclass(frozen=True)
class Smooth(Region):
    """DRPO: -A r + |A| pi_before (q - 1)^2 / (2 eps), q = pi / pi_before with gradient: where r is
    q, the weight of a token falls as 1 - sign(A (r - 1)) |pi - pi_before| / eps.
    """

    eps: float

    def __post_init__(self) -> None:
        if not _number(self.eps) or not self.eps > 0:
            raise ValueError(
                f"smooth={self.eps!r} must be a positive number: it is how far a token's "
                "probability may move before its weight is zero"
            )

    def loss(
        self, r: Tensor, credit: Tensor, now: Tensor, before: Tensor, apart: Tensor | None
    ) -> Tensor:
        """[...]."""
        moved = torch.expm1((now - before).clamp(-MOST_APART, MOST_APART))
        return -credit * r + credit.abs() * before.exp() * moved.square() / (2 * self.eps)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _against_rest(logp: Tensor) -> Tensor:
    """[..., 2]: the log-probs of a token, from log-probs [...], and of all others together."""
    return torch.stack([logp, (-torch.expm1(logp)).clamp_min(0.0).log()], -1)
