"""Trust-region on-policy distillation."""

from __future__ import annotations

from opdkit.curricula import TeacherPrefix
from opdkit.methods.method import Method
from opdkit.methods.opd import Clip
from opdkit.objective import (
    Divergence,
    Draw,
    Exp,
    Floor,
    Gap,
    Likelihood,
    LogRatio,
    Mark,
    Objective,
    policy_gradient,
)


def tropd(
    k: int = 64,
    beta: float = 1e-3,
    outliers: str = "forward_kl",
    floor: float = -2.5,
    rest: str = "raw",
    outlier_gradient: str = "backprop",
    prefix: str = "likelihood",
    clip: Clip = None,
    dual_clip: float | None = None,
    rollout_cap: float | None = None,
) -> Method:
    """TrOPD: policy gradient only on tokens the teacher could have written, its own favourites
    taught on the others.

        trusted with probability min(pi_t/pi_s, 1):  -ratio r_t
        not trusted:  KL(teacher || student) over the teacher's top k (`rest` raw: pi_t as it is,
        pi_s of the whole vocabulary)
        guided (a teacher's prefix the student continued):  beta * -log pi_s;            all over
        all trained tokens

    `outliers` "mask" drops tokens that are not trusted, "clip" drops the draw instead and floors
    every credit at `floor`. `outlier_gradient` "credit" puts minus the divergence as credit on the
    sampled token, as the released code is reported to do with rest="renormalise". `prefix` "credit"
    is that code's term on guided tokens, beta log(pi_s/pi_t): its sign pushes the student away
    wherever pi_t > pi_s, so the paper's likelihood is the default. Rows with a reference response
    get one guided rollout more.

    Source: arXiv 2606.01249. The floor of its clip ablation is not stated (ours: -2.5). Its claim
    that the top-k forward KL vanishes when the student has no mass on the teacher's set is wrong:
    it diverges.
    """
    for name, value, known in (
        ("outliers", outliers, ("forward_kl", "mask", "clip")),
        ("outlier_gradient", outlier_gradient, ("backprop", "credit")),
        ("prefix", prefix, ("likelihood", "credit")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    credit, guided = LogRatio("teacher", "student"), Mark("guided")
    trusted = Draw(Exp(credit))  # accepted with probability min(pi_t / pi_s, 1)
    layer = (clip, dual_clip, rollout_cap)
    if outliers == "clip":
        objective = Objective(policy_gradient(Floor(credit, floor), *layer) * ~guided)
    else:
        objective = Objective(policy_gradient(credit, *layer) * trusted * ~guided)
    if outliers == "forward_kl" and outlier_gradient == "backprop":
        objective += Divergence("forward_kl", k, rest=rest) * ~trusted * ~guided
    elif outliers == "forward_kl":
        objective += (
            policy_gradient(-Gap("forward_kl", "teacher", k, rest) * ~trusted, *layer)
            * ~trusted
            * ~guided
        )
    objective += (
        (Likelihood() if prefix == "likelihood" else policy_gradient(-credit)) * guided * beta
    )
    return Method(objective, curriculum=TeacherPrefix())
