"""Prompts at the frontier of what the student can do: asked the more often, the nearer the share of
right answers is to where most is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdkit.base.rules import Rules, at_least, follow
from opdkit.curricula.base import Plain
from opdkit.curricula.pass_rate import outcomes
from opdkit.curricula.writer import Memory
from opdkit.objective.maths import keyed_uniform
from opdkit.types import Rollout, row_keys

KERNELS = ("gaussian", "beta")
SHARE = (lambda share: 0 <= share <= 1, "in [0, 1]")
FRONTIER: Rules = {
    "kernel": (
        lambda kernel: kernel in KERNELS,
        f"one of {', '.join(KERNELS)}",
        "it is the weight of a prompt by its pass rate",
    ),
    "sigma": (
        lambda sigma: 0 < sigma < math.inf,
        "above 0 and finite",
        "it is the width of the Gaussian around a pass rate of 0.5",
    ),
    "a": at_least(0, "the weight p^a (1 - p)^b must stay finite at p = 0"),
    "b": at_least(0, "the weight p^a (1 - p)^b must stay finite at p = 1"),
    "smoothing": (
        lambda share: 0 <= share < 1,
        "at least 0 and below 1",
        "it is the share of the old pass rate that stays when a prompt is asked again",
    ),
    "start": (*SHARE, "it is the pass rate of a prompt that was never asked"),
}


@dataclass(frozen=True)
class Frontier(Plain):
    """A step's prompts are drawn from the whole data set, by weights of their pass rates p.

        "gaussian": w = exp(-(p - 0.5)^2 / (2 sigma^2))            "beta": w = p^a (1 - p)^b
        p <- smoothing p + (1 - smoothing) (share of right ones among its rollouts of the step)

    p is `start` at first, and moves only when its prompt is asked. A step draws without
    replacement: one prompt after the other, each with probability w over the sum of those that are
    left; prompts of weight 0 come last. Draws are keyed by seed, step and question. Gaussian: arXiv
    2605.11403 (whether a batch may repeat a prompt is open there). Beta: the weights of arXiv
    2603.11178, which weighs losses by them, as a way to draw.

    Memory is plain JSON: smoothed_pass_rate, by question.
    """

    kind: ClassVar[str] = "frontier"
    needs_own: ClassVar[bool] = True
    kernel: str = "gaussian"
    sigma: float = 0.35
    a: float = 1.0
    b: float = 1.0
    smoothing: float = 0.9
    start: float = 0.5

    def __post_init__(self) -> None:
        follow(FRONTIER, self)

    def log_weights(self, rates: Tensor) -> Tensor:
        """log w of pass rates, both [Q]; -inf where w is 0."""
        if self.kernel == "gaussian":
            return -(((rates - 0.5) / self.sigma) ** 2) / 2
        return torch.xlogy(self.a, rates) + torch.special.xlog1py(self.b, -rates)  # 0 log 0 = 0

    def choose(
        self, questions: Sequence[str], count: int, step: int, seed: int, memory: Memory
    ) -> list[int]:
        """The `count` highest of log w + Gumbel noise: drawing without replacement, at once."""
        known = memory.get("smoothed_pass_rate", {})
        rates = torch.tensor([known.get(q, self.start) for q in questions], dtype=torch.float64)
        keys = row_keys(questions)
        draws = keyed_uniform(seed, step, "frontier", keys, 1, torch.float64)[:, 0]
        noise = -(-draws.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
        weights = self.log_weights(rates)
        some = weights > -math.inf
        order = torch.where(some, weights + noise, -math.inf).argsort(descending=True)
        last = torch.where(some, -math.inf, noise).argsort(descending=True)
        return [*order[: some.sum()].tolist(), *last[: (~some).sum()].tolist()][:count]

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        rates, keep = dict(memory.get("smoothed_pass_rate", {})), self.smoothing
        for question, results in outcomes(rollouts).items():
            now = sum(results) / len(results)
            rates[question] = keep * rates.get(question, self.start) + (1 - keep) * now
        return {**memory, "smoothed_pass_rate": rates}

    def metrics(
        self, rollouts: Sequence[Rollout], step: int, total_steps: int, memory: Memory
    ) -> dict[str, float]:
        """Smoothed pass rates of all prompts that were ever asked, and of those of this step, as
        they were before it; and how many were ever asked.
        """
        known = memory.get("smoothed_pass_rate", {})
        asked = dict.fromkeys(r.question for r in rollouts)
        found = {"prompts_ever_asked": float(len({*known, *asked}))}
        if known:
            found["mean_smoothed_pass_rate"] = sum(known.values()) / len(known)
        if asked:
            rates = [known.get(question, self.start) for question in asked]
            found["asked_smoothed_pass_rate"] = sum(rates) / len(rates)
        return found
