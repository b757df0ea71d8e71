"""TCOD: on-policy distillation of agents, over ever more turns."""

from __future__ import annotations

from opdkit.curricula import Depth
from opdkit.methods.method import Method
from opdkit.objective import LogRatio, Objective, PolicyGradient


def tcod(direction: str = "f2b", eta: int = 2, start: int = 1, scale: float = 1.0) -> Method:
    """TCOD: an agent's mistake stays in the history of all later turns; let it act in few turns
    first, then in more.

        -ratio_t scale r_t,   r_t = log pi_t(y_t) - log pi_s(y_t) before the step
        mean over all tokens of the student's turns
        turns of the student's at step n:   k(n) = start + floor(n / eta)
        f2b: the first k turns; the episode is stopped after them
        b2f: the turns after max(0, L - k) replayed ones of the L actions of an expert

    `b2f` reads the expert's actions from the row's column `actions` (a list of texts; TextWorld and
    ScienceWorld bring them); a row without them has a whole episode. What was replayed and what the
    environment says is read by both models and learnt by none. Evaluation is of whole episodes,
    nothing replayed. It needs an environment (`environment=`).

    Source: arXiv 2604.24005; its code clips, here `clip`. The objective is printed as KL(teacher ||
    student); the code's, and this, is the sampled reverse KL. A turn is one row in the code, and
    for ALFWorld each row counts alike; here an episode is one rollout, and its tokens count alike.
    Not offered: dropping turns that are stale, as every step samples anew.

    Arguments:
        direction: "f2b" (front to back, without an expert) or "b2f" (back to front). Default: ours;
            the paper has both.
        eta: steps that each depth is kept, at least 1. Default: the paper's text; its released
            configurations have 6 (f2b), 5 (b2f) and 4 (WebShop).
        start: turns of the student's at the first step, at least 1. Default: the paper's.
        scale: factor of the log-ratio. Default: the paper's.
    """
    credit = LogRatio("teacher", "student")
    return Method(
        Objective(PolicyGradient(credit if scale == 1 else credit * scale)),
        curriculum=Depth(direction, eta, start),
    )
