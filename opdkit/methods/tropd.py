"""Trust-region on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdkit.curricula import TeacherPrefix
from opdkit.methods.arguments import one_of
from opdkit.methods.method import Method
from opdkit.objective import (
    Divergence,
    Draw,
    Exp,
    Floor,
    Gap,
    Likelihood,
    Live,
    LogRatio,
    Loss,
    Mark,
    Objective,
    PolicyGradient,
    Signal,
    TokenLoss,
    ratio,
)


@dataclass(frozen=True)
class AgainstGuide(TokenLoss):
    """[n]: -ratio * gain at tokens of the teacher's prefix: no policy gradient, as the student had
    no choice.
    """

    gain: Signal
    name: ClassVar[str] = "policy_gradient"

    def value(self, live: Live) -> Tensor:  # [n]
        return -ratio(live, "sampler") * live.pick(self.gain)


def tropd(
    k: int = 64,
    beta: float = 1e-3,
    outliers: str = "forward_kl",
    floor: float = -2.5,
    rest: str = "raw",
    outlier_gradient: str = "backprop",
    prefix: str = "likelihood",
) -> Method:
    """TrOPD: policy gradient only on tokens the teacher could have written, its own favourites
    taught on the others.

        trusted with probability min(pi_t/pi_s, 1):   -ratio r_t
        not trusted:   KL(teacher || student) over the teacher's top k
        guided (a teacher's prefix that the student continued):   beta * -log pi_s
        all over all trained tokens

    `outliers` "mask" drops tokens that are not trusted, "clip" drops the draw instead and floors
    every credit at `floor`. `outlier_gradient` "credit" puts minus the divergence as credit on the
    sampled token, as the released code is reported to do with rest="renormalise". `prefix` "credit"
    is that code's term on guided tokens: its sign pushes the student away wherever pi_t > pi_s, so
    the paper's likelihood is the default. Rows with a reference response get one guided rollout
    more.

    Source: arXiv 2606.01249. The floor of its clip ablation is not stated (ours: -2.5). Its claim
    that the top-k forward KL vanishes when the student has no mass on the teacher's set is wrong:
    it diverges.

    Arguments:
        k: size of the teacher's top k on tokens that are not trusted, in tokens, at least 1.
            Default: the paper's.
        beta: weight of guided tokens; at least 0. Default: the paper's.
        outliers: what tokens that are not trusted teach: "forward_kl", nothing ("mask"), or no draw
            and every credit floored ("clip"). Default: the paper's best.
        floor: least credit in nats with outliers="clip", below 0. Default: ours; the paper's is not
            stated.
        rest: mass outside the top k: "raw" (pi_t as it is, pi_s of the whole vocabulary),
            "renormalise", "target", "tail" (see `opd`). Default: the paper's formula; the code is
            reported to renormalise.
        outlier_gradient: how the forward KL is taught: "backprop" through the student's k, or its
            negative as "credit" of the sampled token. Default: the paper's formula; "credit" is the
            code's.
        prefix: the term of guided tokens: "likelihood", or "credit" beta log(pi_s/pi_t). Default:
            the paper's formula; "credit" is the code's.
    """
    one_of(
        outliers=(outliers, ("forward_kl", "mask", "clip")),
        outlier_gradient=(outlier_gradient, ("backprop", "credit")),
        prefix=(prefix, ("likelihood", "credit")),
    )
    credit, guided = LogRatio("teacher", "student"), Mark("guided")
    trusted = Draw(Exp(credit))  # accepted with probability min(pi_t / pi_s, 1)
    if outliers == "clip":
        objective = Objective(PolicyGradient(Floor(credit, floor)) * ~guided)
    else:
        objective = Objective(PolicyGradient(credit) * trusted * ~guided)
    if outliers == "forward_kl":
        objective += untrusted(k, rest, outlier_gradient, ~trusted) * ~trusted * ~guided
    last = Likelihood() if prefix == "likelihood" else AgainstGuide(-credit)
    return Method(objective + last * guided * beta, curriculum=TeacherPrefix())


def untrusted(k: int, rest: str, gradient: str, where: Signal) -> Loss:
    """The forward KL on tokens `where` [B, T] that are not trusted: backpropagated, or its negative
    as credit of the sampled token.
    """
    if gradient == "backprop":
        return Divergence("forward_kl", k, rest=rest)
    return PolicyGradient(-Gap("forward_kl", "teacher", k, rest) * where)
