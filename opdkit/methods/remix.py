"""ReMix: replay with a clip window that follows the student, two anchors, and an anchor that is
born again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.curricula import MixPolicy
from opdkit.methods.arguments import not_negative
from opdkit.methods.method import Method
from opdkit.objective import (
    Advantage,
    Batch,
    Bounds,
    Const,
    EntropyBonus,
    Estimator,
    Live,
    Objective,
    Previous,
    Signal,
    Snapshot,
    TokenLoss,
    ratio,
)
from opdkit.objective.losses import Outer


@dataclass(frozen=True)
class Recentred(Bounds, TokenLoss):
    """Generalised PPO, [n]: max(-A r, -A clip(r, c - low, c + high)), r = pi_s / pi_base with
    gradient, c = pi_s before the step / pi_base (at most `cap`): the window is around where the
    step begins, whatever the tokens were drawn from. Where c is 1 it is `Clipped`, to the bit. A
    region in the place of the clip lies around the step's beginning as it is: c is then a weight.
    """

    takes_region: ClassVar[bool] = True

    @property
    def outer(self) -> Signal:
        return Const(1)  # [1, 1]: what the base says otherwise is all in r and c

    def value(self, live: Live) -> Tensor:  # [n]
        c, credit = live.pick(Outer(self.base, self.cap)), live.pick(self.credit)
        moved = ratio(live, "student")
        if self.region is not None:
            return c * self.bounded_at(live, moved, credit)
        off = c - 1  # clip(r, c - low, c + high) = clip(r - off, 1 - low, 1 + high) + off
        return self.bounded_at(live, moved * c - off, credit) - credit * off


@dataclass(frozen=True)
class AnchorShare(Signal):
    """[1, 1]: lambda of step t: 1 up to step 50, then 0.1 less at step 51 and every ten steps after
    that, at least 0.5.
    """

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        share = max(1 - 0.1 * math.ceil(max(batch.step - 50, 0) / 10), 0.5)
        return torch.full((1, 1), share, dtype=batch.dtype, device=batch.device)


def remix(
    p: float = 0.4,
    utd: int = 2,
    window: int = 2,
    reincarnate: int = 50,
    beta: float = 1e-3,
    entropy: float = 0.0,
) -> Method:
    """ReMix: rollouts of the last few policies are used again early in a run, near two anchors;
    then the run goes on on-policy, from an anchor that has become the student.

        max(-A r, -A clip(r, c - low, c + high)),   r = pi_s/mu,   c = pi_k/mu without gradient
        + beta (lambda_t KL(pi_s || anchor) + (1 - lambda_t) KL(pi_s || pi_k-1))   - entropy H(pi_s)
        A = (R - mean) / (std + 1e-6) of a prompt's rollouts, kept with them
        lambda_t = max(1 - 0.1 ceil(max(t - 50, 0)/10), 0.5)
        mean over each rollout's tokens, then over rollouts

    mu drew the tokens, pi_k is the student before step t, pi_k-1 that of one step earlier (the
    model `previous`). Fresh rollouts have c = 1: PPO's loss, to the bit. In steps 0 .. T - 1, T =
    reincarnate, a share p of the groups are those of the last `window` steps, and a step goes
    through its rollouts `utd` times (curriculum `MixPolicy`). From step T on nothing is replayed,
    passes are the run's, and the anchor (the model `reference`, at first the student as it began)
    is a frozen copy of the student as it was before step T. Both KLs are k3 estimates, as in GRPO.
    clip is the half-width of the window, dual_clip bounds the loss beyond -A (c - 1), and
    rollout_cap bounds c.

    Source: arXiv 2507.06892; its repository has no code, and of clip, beta and entropy no values
    are known. The published formula adds the entropy to what is minimised; a bonus is meant. The
    group's advantage on replayed rollouts is a reconstruction. Not offered: the PPO variant with a
    critic, the divergence of the anchors over the whole vocabulary.

    Arguments:
        p: share of a step's groups that are replayed, in [0, 1); 0: none. Default: the paper's.
        utd: how often a step before T goes through its rollouts, at least 1. Default: the paper's.
        window: steps back that a replayed group may be from, at least 1. Default: the paper's.
        reincarnate: T, in steps of the run, at least 0; 0: on-policy from the start, with the
            student as it began as anchor. Default: the paper's for GRPO; 50 or 100 for PPO.
        beta: weight of both KLs, at least 0; 0 keeps no copies. Default: ours.
        entropy: weight of the entropy bonus, per nat, at least 0. Default: ours, off.
    """
    not_negative(
        beta=(beta, "it is the weight of both KLs"),
        entropy=(entropy, "it is the weight of an entropy bonus"),
        reincarnate=(reincarnate, "it is the step from which nothing is replayed"),
    )
    if not 0 <= p < 1:
        raise ValueError(f"p={p} must lie in [0, 1): it is the share of groups that are replayed")
    objective = Objective(Recentred(Advantage(), 0.2, 0.2).per("rows"))
    if beta:
        share = AnchorShare()
        objective += (Estimator("k3", "reference") * (share * beta)).per("rows")
        objective += (Estimator("k3", "previous") * ((1 - share) * beta)).per("rows")
    if entropy:
        objective += (EntropyBonus() * entropy).per("rows")
    copies = (Snapshot(reincarnate), Previous()) if beta else ()
    return Method(objective, MixPolicy(p, window, utd, reincarnate), companions=copies)
