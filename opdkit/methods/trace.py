"""TRACE: distillation on a few spans early in the run, GRPO on all else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.arguments import one_of
from opdkit.methods.method import Method
from opdkit.objective import Advantage, Batch, Clipped, Divergence, Mark, Objective, Signal


@dataclass(frozen=True)
class Fading(Signal):
    """[1, 1]: 1 until step `start` of the run, then in a straight line to 0 in `length` steps."""

    start: int
    length: int

    def value(self, batch: Batch) -> Tensor:  # [1, 1]
        left = self.start + self.length - batch.step
        share = 1.0 if batch.step < self.start else max(left, 0) / max(self.length, 1)
        return torch.full((1, 1), share, dtype=batch.dtype, device=batch.device)


# what each action distils: the mark of its spans, and the divergence on them
ACTIONS = {
    "forward": (("key", "forward_kl"),),
    "reverse": (("error", "reverse_kl"),),
    "both": (("key", "forward_kl"), ("error", "reverse_kl")),
}


def trace(
    action: str = "forward",
    w0: float = 0.5,
    start: int = 10,
    length: int = 30,
    cap: float | None = 0.05,
    sync: int = 10,
) -> Method:
    """TRACE: distil only the spans that decide, the key ones of right answers or the errors of
    wrong ones, and hand these over to GRPO as the run goes on.

        (1 - s f) max(-A r, -A clip(r))  +  w0 f s d,    A = (R - mean) / (std + 1e-6)
        s = 1 on a span of the action, else 0;   f = 1 before step `start`, 0 from `start + length`
        d = sum_v min(entry of KL(pi_t || pi_s) at v, cap)    on spans marked "key"
            sum_v min(entry of KL(pi_s || pi_t) at v, cap)    on spans marked "error"
        clip(r) to 1 - low .. 1 + high;   mean over each rollout's tokens, then over rollouts

    f falls in a straight line between the two steps. A span whose action is off is learnt from as
    any other token, and a rollout without spans by GRPO alone. The teacher is the student, copied
    every `sync` steps, in the view `span_types`: it is told what kinds of spans there are, and
    neither where nor what. The run's annotator `spans` marks them, by rules unless the run says
    otherwise.

    Source: arXiv 2605.10194, which has no public code. Ours: which side the cap bounds (from
    above), that other spans count as ordinary tokens, and that the first step with f below 1 is
    `start` + 1.

    Arguments:
        action: which spans are distilled: "forward" (key spans of right answers), "reverse" (errors
            of wrong ones) or "both". Default: that of the paper for a strong student; a weak one
            has "reverse".
        w0: weight of the divergence while f is 1, at least 0; 0 is GRPO and loads no teacher.
            Default: the paper's.
        start: steps of the run before the hand-over begins, at least 0. Default: the paper's.
        length: steps that the hand-over takes, at least 0. Default: the paper's.
        cap: upper bound of what each vocabulary entry adds to the divergence, in nats, above 0;
            None: no bound. Default: the paper's.
        sync: steps after which the teacher's weights are those of the student again, at least 1.
            Default: the paper's.
    """
    one_of(action=(action, ACTIONS))
    _refuse(w0, start, length, cap, sync)
    if w0 == 0:  # no span is distilled, all are GRPO's
        return Method(Objective(Clipped(Advantage(), 0.2, 0.28).per("rows")))
    fading, spans = Fading(start, length), [Mark(mark) for mark, _ in ACTIONS[action]]
    inside = spans[0] if len(spans) == 1 else spans[0] | spans[1]
    objective = Objective((Clipped(Advantage(), 0.2, 0.28) * (1 - inside * fading)).per("rows"))
    for mark, kind in ACTIONS[action]:
        objective += (Divergence(kind, cap=cap) * (Mark(mark) * fading * w0)).per("rows")
    return Method(
        objective,
        models={
            "teacher": {"kind": "self", "weights": "sync", "every": sync, "view": "span_types"}
        },
        annotate={"spans": {"kind": "spans", "by": "rules"}},
    )


def _refuse(w0: float, start: int, length: int, cap: float | None, sync: int) -> None:
    """Arguments that mean nothing."""
    if w0 < 0 or start < 0 or length < 0:
        raise ValueError(
            f"w0={w0}, start={start}, length={length} must be at least 0: a weight, and numbers of "
            "steps"
        )
    if sync < 1 or (cap is not None and cap <= 0):
        raise ValueError(
            f"sync={sync} must be at least 1, a number of steps, and cap={cap} above 0: at 0 no "
            "entry that the teacher wants would have a gradient"
        )
