"""Privileged information, distilled: the student with it and the student without it train each
other under a reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.curricula import TwoContexts
from opdkit.curricula.two_contexts import PRIVILEGED
from opdkit.methods.arguments import one_of
from opdkit.methods.method import Method
from opdkit.objective import (
    Advantage,
    Batch,
    Bounds,
    Clipped,
    Const,
    Divergence,
    Kind,
    Live,
    LogpFact,
    Mark,
    Objective,
    Reward,
    Signal,
    Term,
    TokenLoss,
    log_ratio,
    maths,
    ratio,
)


@dataclass(frozen=True)
class Apart(Signal):
    """[B, 1] nats: log(pi_T/pi_S) of a whole response, which both of its rows have: pi_T what it
    was drawn from, pi_S the student under the plain prompt before the step.

    A response is known by its group and its tokens; 0 where none of its rows is plain.
    """

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        apart = batch.read(LogpFact("sampler")) - batch.read(LogpFact("student"))
        apart = torch.where(batch.mask, apart, 0.0).sum(1)
        written = torch.where(batch.mask, batch.tokens, -1)
        responses = torch.cat([batch.group[:, None].to(written.dtype), written], 1)
        index = torch.unique(responses, dim=0, return_inverse=True)[1]
        plain = ~batch.mark(PRIVILEGED).any(1)
        zeros = torch.zeros_like(apart)
        total = zeros.index_add(0, index, torch.where(plain, apart, 0.0))
        count = zeros.index_add(0, index, plain.to(apart.dtype))
        return (total / count.clamp_min(1))[index][:, None]


@dataclass(frozen=True)
class FromAnother(Bounds, TokenLoss):
    """[n]: PPO's clipped loss of r = pi_s / pi_sampler, where tokens were drawn from another policy
    than the student: what it disagrees about with that one is inside the clip, and at most `cap`.
    """

    takes_region: ClassVar[bool] = True

    @property
    def outer(self) -> Signal:
        return Const(1)  # [1, 1]: the ratio is all in the loss

    @property
    def around(self) -> str | Signal:
        return self.base

    def value(self, live: Live) -> Tensor:  # [n]
        return self.bounded_at(live, self.moved(live), live.pick(self.credit))

    def moved(self, live: Live) -> Tensor:
        """[n]: the ratio, with gradient."""
        return ratio(live, self.base).clamp_max(math.inf if self.cap is None else self.cap)


@dataclass(frozen=True)
class Tapered(FromAnother):
    """TOPR, [n]: -w A log pi_s, the weight w without gradient: 1 where A > 0, else r clipped to
    1 - low .. 1 + high.
    """

    takes_dual: ClassVar[bool] = False
    takes_region: ClassVar[bool] = False

    def value(self, live: Live) -> Tensor:  # [n]
        credit, r = live.pick(self.credit), self.moved(live).detach()
        weight = torch.where(credit > 0, 1.0, r.clamp(1 - self.low, 1 + self.high))
        return -weight * credit * live.logp


@dataclass(frozen=True)
class Pull(TokenLoss):
    """[n]: r - 1 - log r, r = pi_s / pi_sampler, at a token that the sampler drew: on average
    KL(sampler || student) with its gradient, and nothing where the two agree.
    """

    name: ClassVar[str] = "pull"

    def value(self, live: Live) -> Tensor:  # [n]
        return maths.k3(-log_ratio(live, "sampler"))


@dataclass(frozen=True)
class EntropyWeighed(Kind):
    """CE(student, teacher) - entropy H(student) = sum_v p_s (entropy log p_s - log p_t); at 1
    KL(student || teacher).
    """

    entropy: float

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:  # [..., K]
        return ls.exp() * (self.entropy * ls - lt)


def pi_distill(
    alpha: float = 0.5,
    beta: float = 0.25,
    offpolicy: str = "clip",
    shaped: str = "teacher",
    view: str = "hint",
) -> Method:
    """pi-Distill: the student with privileged information writes, and learns together with the
    student without it, which may never have found a right answer.

        pi_T = pi(. | x, I),  pi_S = pi(. | x),  one set of weights;   y drawn from pi_T
        k = log(pi_T/pi_S) of the whole response before the step
        teacher, a:    max(-A r, -A clip(r)),  r = pi_T / pi_T before,  A = R - beta k less its mean
        student, 1-a:  max(-A r, -A clip(r)),  r = pi_S / pi_T as drawn,  A = R less its mean
                       + beta (r - 1 - log r),  on average the gradient of beta KL(pi_T || pi_S)
        clip(r) to 1 - low .. 1 + high; means over a prompt's responses
        sum over a response's tokens, mean over responses

    a = alpha. On average this is the gradient of a J_T + (1 - a) J_S with J_T = E_T[R] - beta
    KL(pi_T || sg pi_S) and J_S = E_T[pi_S/pi_T R] - beta KL(sg pi_T || pi_S). Without privileged
    information both parts are the same policy gradient of the reward, for every alpha. `offpolicy`
    "topr" has -A log pi_S where A > 0, else -sg(clip(r)) A log pi_S.

    Each response is two rows of the step, one behind each prompt (`curricula.TwoContexts`); k is
    read off them, so that no further model is asked.

    Source: arXiv 2602.04942, objectives as its authors' post has them. Departure: the released
    "topr" does not detach the weight. Not offered: scaled rewards, division by a std.

    Arguments:
        alpha: share of the teacher's part, in [0, 1]; the student's has the rest. Default: the
            paper's most stable of 0, 0.5 and 1.
        beta: weight of the KL of teacher to student in both parts, at least 0, in units of reward
            per nat. Default: a public re-implementation's.
        offpolicy: the student's part on tokens that it did not draw: "clip" or "topr". Default: the
            first of the two in the paper's code.
        shaped: whose reward is R - beta k: that of the "teacher" alone, the student having the
            definition's KL; or of "both", as a public re-implementation has it, without that KL: on
            average its gradient drives the student away from the teacher. Default: the definition.
        view: how the privileged prompt is written: a view by name ("hint" shows the column of that
            name, "solution" a worked solution) or a template with {prompt} and columns in braces.
            Default: ours, for the paper's several forms of information.
    """
    one_of(offpolicy=(offpolicy, ("clip", "topr")), shaped=(shaped, ("teacher", "both")))
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha={alpha} must lie in [0, 1]: the share of the teacher's part, the student has "
            "the rest"
        )
    if beta < 0:
        raise ValueError(f"beta={beta} must be at least 0: it is the weight of a KL")
    own = Tapered if offpolicy == "topr" else FromAnother
    terms = _terms(alpha, beta, own, shaped == "both")
    return Method(Objective(*(t.per("row_sums") for t in terms)), curriculum=TwoContexts(view))


def _terms(alpha: float, beta: float, own: type[FromAnother], both: bool) -> list[Term]:
    """The parts of teacher and student; `both`: the student's reward is less the KL too."""
    less = Reward() - Apart() * beta if beta else Reward()
    privileged = Mark(PRIVILEGED)
    teacher, student = 2 * alpha, 2 * (1 - alpha)  # each response is two rows of a mean over rows
    terms: list[Term] = []
    if alpha > 0:
        terms += [Clipped(Advantage("mean", less), 0.2, 0.2) * (privileged * teacher)]
    if alpha < 1:
        credit = Advantage("mean", less) if both else Advantage("mean")
        terms += [own(credit, 0.2, 0.2) * (~privileged * student)]
    if alpha < 1 and beta and not both:
        terms += [Pull() * (~privileged * (student * beta))]
    return terms


def opsd_rl(beta: float = 0.25, entropy: float = 1.0) -> Method:
    """OPSD-RL: a reward, and at every prefix a KL to the student itself with privileged
    information.

        max(-A r, -A clip(r)),  r = pi_s / pi_s before the step,  A = R less its prompt's mean
        + beta (CE(pi_s, pi_t) - e H(pi_s)) over the whole vocabulary,  pi_t = pi(. | x, I)
        clip(r) to 1 - low .. 1 + high;   mean over all tokens

    e = entropy; at 1 the second part is beta KL(pi_s || pi_t), and the whole has its optimum at
    pi_t exp(R / beta) up to a factor. The student writes; the teacher is the student as it is at
    the step, in the view `hint`, without gradient.

    Source: arXiv 2602.04942 (the second algorithm of `pi_distill`). Ours: both parts are means over
    all tokens, so that their balance does not depend on length, and the reward's part is that of
    the first algorithm.

    Arguments:
        beta: weight of the KL, at least 0, in units of reward per nat; 0 loads no teacher. Default:
            that of `pi_distill`.
        entropy: weight of the student's own entropy in the KL, at least 0: below 1 it is pulled
            towards what the teacher finds most probable. Default: the exact KL.
    """
    if beta < 0 or entropy < 0:
        raise ValueError(
            f"beta={beta}, entropy={entropy} must be at least 0: they are weights of a KL and of "
            "an entropy"
        )
    objective = Objective(Clipped(Advantage("mean"), 0.2, 0.2))
    if not beta:
        return Method(objective)
    kind = "reverse_kl" if entropy == 1 else EntropyWeighed(entropy)
    return Method(
        objective + Divergence(kind) * beta,
        models={"teacher": {"kind": "self", "weights": "live", "view": "hint"}},
    )
