"""VLA-OPD: on-policy distillation of a policy that acts in bins."""

from __future__ import annotations

from opdkit.curricula import Several
from opdkit.methods.method import Method
from opdkit.objective import Actions, LogRatio, Objective, Reinforce


def vla_opd(bins: int = 256, group: int = 8, temperature: float = 1.0) -> Method:
    """VLA-OPD: a policy that acts learns in its own episodes from a teacher that scores each of its
    action tokens and never acts.

        -r_t log pi_s(a_t),   r_t = log pi_t(a_t) - log pi_s(a_t) before the step
        mean over all action tokens of the step

    Actions are tokens: the last `bins` ids of the vocabulary stand for the bins of one degree of
    freedom, a decision is as many tokens as it has degrees of freedom. The distributions of student
    and teacher are over these ids alone, their logits divided by the same `temperature`, also where
    the student acts; text has probability exactly 0. r is taken as it is: no mean, no deviation, no
    clip, no ratio, no value. Its expected gradient is that of KL(pi_s || pi_t) over the bins.

    Source: arXiv 2603.26666; bins, mask and temperature as its implementation in RLinf has them.
    Departures: none is known; the paper's own temperature is not. Not offered: one ratio per chunk
    of actions (other forks); its last phase of GRPO is `vla_opd() + grpo()`. Where one copy of the
    weights is the sampler's, it must be the student itself (sampler=hf).

    Arguments:
        bins: how many ids at the end of the vocabulary stand for bins of an action, at least 2; the
            end is that of the ids that the tokenizer and all models share. Default: OpenVLA's.
        group: rollouts from each start, where the run leaves sampling.num_generations at 1; at
            least 1. They only average: there is no baseline among them. Default: the paper's.
        temperature: divides the logits of all models, in the loss and where the student acts; above
            0. sampling.temperature then stays 1. Default: ours, the models themselves; RLinf has
            1.6.
    """
    if group < 1:
        raise ValueError(f"group={group} must be at least 1: it counts rollouts from each start")
    return Method(
        Objective(Reinforce(LogRatio("teacher", "student"))),
        curriculum=Several(group),
        actions=Actions(bins, temperature),
    )
