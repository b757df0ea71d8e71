"""Uni-OPD: whole responses are shifted so that right ones outscore wrong ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.methods.arguments import one_of
from opdkit.objective import (
    Batch,
    Const,
    Logp,
    LogRatio,
    Objective,
    PolicyGradient,
    RowMean,
    Signal,
    uniform,
)
from opdkit.objective.maths import group_index

# of the shift: right up, wrong down
SHARES = {"both": (0.5, 0.5), "correct_up": (1.0, 0.0), "incorrect_down": (0.0, 1.0)}
FAILED = -100.0  # log-prob that stands for a score the teacher did not give
MOST_APART = 10.0  # nats: tokens on which the two models differ by more are left out
LEAST_SHARE = 0.25  # of a class, that the margin mask leaves


def gap(right: list[float], wrong: list[float], mode: str) -> float:
    """By how much right answers outscore wrong ones; infinite where there is only one kind."""
    if not right or not wrong:
        return math.inf
    return (
        min(right) - max(wrong)
        if mode == "minmax"
        else sum(right) / len(right) - sum(wrong) / len(wrong)
    )


def lowest(scores: list[float], n: int) -> list[float]:
    """1 for the n lowest scores, 0 for the others."""
    chosen = set(sorted(range(len(scores)), key=scores.__getitem__)[:n])
    return [float(i in chosen) for i in range(len(scores))]


@dataclass(frozen=True)
class ByOutcome(Signal, ABC):
    """[B, 1]: a number per rollout, from the scores of the right and of the wrong answers to its
    prompt (or of the whole step).
    """

    score: Signal  # [B, 1]
    among: Signal  # [B, 1] bool: the rollouts that count; zero for others
    scope: str

    @abstractmethod
    def of(self, right: list[float], wrong: list[float]) -> tuple[list[float], list[float]]:
        """The numbers of the right and of the wrong answers with these scores."""

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        index, _ = group_index(
            batch.group if self.scope == "group" else torch.zeros_like(batch.tokens[:, 0])
        )
        use = (self.among(batch)[:, 0] & batch.mask.any(1)).tolist()
        answers: dict[int, tuple[list[int], list[int]]] = {}  # right and wrong rows of each group
        for row, (group, right) in enumerate(zip(index.tolist(), batch.correct.bool().tolist())):
            if use[row]:
                answers.setdefault(group, ([], []))[0 if right else 1].append(row)
        score, out = self.score(batch)[:, 0].tolist(), [0.0] * len(use)
        for pair in answers.values():
            for rows, numbers in zip(pair, self.of(*([score[i] for i in rows] for rows in pair))):
                for row, number in zip(rows, numbers):
                    out[row] = number
        return torch.tensor(out, dtype=batch.dtype, device=batch.device)[:, None]


@dataclass(frozen=True)
class RolloutDraw(Signal):
    """[B, 1]: a uniform draw for each rollout.

    Prints as `Lot()`: the printed form is the key of the draws, and runs that are taken up again
    must draw the same.
    """

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        return uniform(batch, str(self))[:, :1]

    def __str__(self) -> str:
        return "Lot()"


@dataclass(frozen=True)
class Balanced(ByOutcome):
    """[B, 1]: 1 for the rollouts that stay so that right : wrong is `ratio`, 0 for others; all stay
    where none of a kind would, or one is absent.
    """

    ratio: float

    def of(self, right: list[float], wrong: list[float]) -> tuple[list[float], list[float]]:
        n, m = len(right), len(wrong)
        if n and m and self.ratio in (0, math.inf):
            n, m = (0, m) if self.ratio == 0 else (n, 0)
        elif n and m and n > m * self.ratio:
            n = int(m * self.ratio) or n
        elif n and m and m > n / self.ratio:
            m = int(n / self.ratio) or m
        return lowest(right, n), lowest(wrong, m)


@dataclass(frozen=True)
class MarginShift(ByOutcome):
    """[B, 1]: what lifts right answers and lowers wrong ones until their scores are `delta` apart;
    zero where they are.
    """

    delta: float
    mode: str
    direction: str

    def of(self, right: list[float], wrong: list[float]) -> tuple[list[float], list[float]]:
        lack = max(self.delta - gap(right, wrong, self.mode), 0.0)
        up, down = SHARES[self.direction]
        return [up * lack] * len(right), [-down * lack] * len(wrong)


@dataclass(frozen=True)
class MarginMask(ByOutcome):
    """[B, 1]: 1 for rollouts that stay, 0 for the lowest right and highest wrong ones, dropped one
    by one until the gap is delta or grows no more.
    """

    delta: float
    mode: str

    def of(self, right: list[float], wrong: list[float]) -> tuple[list[float], list[float]]:
        up, down = sorted(right, reverse=True), sorted(wrong)  # the next to go is the last
        least = [max(1, int(LEAST_SHARE * len(scores))) for scores in (up, down)]
        while (now := gap(up, down, self.mode)) < self.delta:
            after = [gap(up[:-1], down, self.mode), gap(up, down[:-1], self.mode)]
            after = [
                x if len(scores) > n else -math.inf
                for x, scores, n in zip(after, (up, down), least)
            ]
            if max(after) <= now:
                break
            (up if after[0] >= after[1] else down).pop()
        return lowest([-x for x in right], len(up)), lowest(wrong, len(down))


def uni_opd(
    delta: float = 0.4,
    mode: str = "mean",
    direction: str = "both",
    action: str = "shift",
    balance: float | None = 1.0,
    scope: str = "group",
    balance_scope: str = "group",
) -> Objective:
    """Uni-OPD: token scores are local and may rank a wrong answer above a right one; calibrate
    whole responses by outcome.

        credit = r_t + s,   s the same for all tokens of a response:
        +(delta - gap)/2 on right, -(delta - gap)/2 on wrong answers of a prompt where gap < delta
        mean over each rollout's tokens, then over rollouts

    gap = mean score of right - mean score of wrong answers, a score being the mean of r_t over a
    response. `action` "mask" drops the worst right or the best wrong answer instead, whichever
    widens the gap more, down to a quarter of each. Rollouts are cut to the ratio `balance` at
    random first; dropped rollouts have no loss and no score.

    Source: arXiv 2605.03677 and its code, with clip=(0.2, 0.28). As there, scores of -100 (a
    teacher that failed) are 0 and tokens with |r_t| >= 10 have no loss; they stay in the
    denominator. Not offered: rollouts without a verdict, balancing before training.

    Arguments:
        delta: least gap between the scores of right and wrong answers, in nats per token; -inf
            shifts nothing. Default: the official code's.
        mode: how the gap is taken: "mean" of right less mean of wrong scores, or "minmax", the
            worst right less the best wrong. Default: the official code's.
        direction: what the shift moves: "both" kinds by half, "correct_up" or "incorrect_down" one
            kind by all of it. Default: the official code's.
        action: "shift" moves the credits, "mask" drops answers. Default: the official code's.
        balance: ratio right : wrong that rollouts are cut to, at least 0 (inf: right ones only);
            None: off. Default: the official code's.
        scope: whose answers are compared: those of a prompt ("group") or of the whole "step".
            Default: the official code's.
        balance_scope: where the ratio holds: in each "group" or in the whole "step". Default: the
            official code's.
    """
    one_of(
        mode=(mode, ("mean", "minmax")),
        direction=(direction, SHARES),
        action=(action, ("shift", "mask")),
        scope=(scope, ("group", "step")),
        balance_scope=(balance_scope, ("group", "step")),
    )
    gained = LogRatio("teacher", "student")
    credit: Signal = gained * (Logp("teacher") > FAILED)
    score, anyone = RowMean(credit), Const(1) > 0
    kept = (
        anyone if balance is None else Balanced(RolloutDraw(), anyone, balance_scope, balance) > 0
    )
    if action == "shift":
        credit = credit + MarginShift(score, kept, scope, delta, mode, direction)
    else:
        kept = MarginMask(score, kept, scope, delta, mode) > 0
    return Objective((PolicyGradient(credit) * (abs(gained) < MOST_APART) * kept).per("rows"))
