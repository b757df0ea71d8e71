"""MAD-OPD and OPAD: several teachers that have debated the question, on whole answers or on every
turn of a reference trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdkit.curricula import EveryTurn
from opdkit.methods.arguments import one_of
from opdkit.methods.method import Method
from opdkit.objective import (
    JSD,
    Batch,
    ColumnFact,
    Divergence,
    Mark,
    MissingFact,
    Objective,
    Row,
    Signal,
)
from opdkit.objective.maths import group_index


@dataclass(frozen=True)
class Confidence(Signal):
    """[B, 1]: the share of teacher number `of` (from 0) among `count`, the softmax of what each has
    said of itself, in per cent, over 100 tau.

    A teacher at minus infinity, which said nothing, has no share; the others have equal ones where
    the confidence of any is missing.
    """

    of: int
    count: int
    tau: float

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        said = torch.cat([self._said(batch, i) for i in range(self.count)], 1)
        silent = said == -torch.inf
        nobody = silent.all(1, keepdim=True)
        known = ~(said.isnan().any(1, keepdim=True) | nobody)
        scores = torch.where(known, said / (100 * self.tau), 0.0)
        share = scores.masked_fill(silent & ~nobody, -torch.inf).softmax(1)
        return share[:, self.of : self.of + 1]

    def _said(self, batch: Batch, teacher: int) -> Tensor:
        """[B, 1] in per cent, NaN where it is missing."""
        try:
            return Row(f"confidence[{teacher}]")(batch)
        except MissingFact:
            return torch.full((len(batch.tokens), 1), torch.nan, dtype=batch.dtype).to(batch.device)


@dataclass(frozen=True)
class PerQuestion(Signal):
    """[B, 1]: one over the number of rollouts that answer the same question, times their mean
    number: every question of the step counts alike.
    """

    def value(self, batch: Batch) -> Tensor:  # [B, 1]
        try:
            question = batch.read(ColumnFact("question"))
        except MissingFact:  # not said: every group is one
            question = batch.group
        index, count = group_index(question)
        there = batch.mask.any(1).to(batch.dtype)
        rollouts = torch.zeros(count, dtype=batch.dtype, device=batch.device)
        rollouts = rollouts.index_add(0, index, there)
        mean = there.sum() / (rollouts > 0).sum().clamp_min(1)
        return (mean / rollouts.clamp_min(1))[index][:, None]


def mad_opd(
    beta: float = 0.5, tau: float = 1.0, rounds: int = 2, teachers: int = 2, k: int | None = None
) -> Method:
    """MAD-OPD: several teachers discuss the question first; each then scores the student's own
    answer with the debate before its eyes, and counts as much as it is sure of itself.

        sum_i w_i D_beta(pi_s, pi_i) at each prefix,   mean over each rollout's tokens, then over
        rollouts
        w = softmax(c_i / tau),   c_i the confidence of teacher i after the last round, in 0..1
        D_beta = beta KL(pi_i || M) + (1 - beta) KL(pi_s || M),   M = beta pi_i + (1 - beta) pi_s

    beta 0 is KL(pi_i || pi_s), 1 is KL(pi_s || pi_i), in between at most log 2. It is the mean of
    divergences, not the divergence from a mean of teachers; at beta = 1 it has the gradient of the
    normalised product of pi_i^w_i. Where a confidence is missing, all count alike. The student
    never sees the debate. The run names the teachers, `models.teacher_1=MODEL` and so on, one
    tokenizer for all: what it names is seen through the view `debate`, which the annotator of that
    name writes in `rounds` rounds. It also writes the row column `confidence`, a list in per cent;
    data that has such a column may do without a debate (rounds=0).

    Source: arXiv 2605.01347 and its code. Departures: answers on which no teacher said anything
    count in the mean over rollouts, as zeros. `opad` applies it to every turn of trajectories.

    Arguments:
        beta: where the divergence lies between forward (0) and reverse KL (1), in [0, 1]. Default:
            the paper's for agents; it has 1.0 for code, where answers are long.
        tau: temperature of the weights, above 0: large ones make teachers equal. Default: the
            paper's.
        rounds: of the debate, in the first of which each teacher answers alone; 0: no debate.
            Default: the paper's.
        teachers: how many there are, at least 1: models `teacher_1`, `teacher_2` and so on.
            Default: the paper's.
        k: size of each teacher's top k, in tokens, at least 1, both sides renormalised on it; None:
            the whole vocabulary. Default: the paper's; its top k is an option there too.
    """
    _refuse(tau, rounds, teachers)
    names = [f"teacher_{i}" for i in range(1, teachers + 1)]
    return Method(
        _weighed(names, beta, tau, k),
        models={name: {"view": "debate"} for name in names} if rounds else {},
        annotate={"debate": {"kind": "debate", "rounds": rounds, "of": names}} if rounds else {},
    )


def opad(
    beta: float = 0.5,
    tau: float = 1.0,
    rounds: int = 2,
    teachers: int = 2,
    k: int | None = None,
    per: str = "turn",
) -> Method:
    """OPAD: every assistant turn of a reference trajectory is a question of its own, asked with the
    reference's history before it: on-policy within a turn, whatever came before.

        MAD-OPD's loss (`mad_opd`) on the turns that the student writes
        mean over each turn's tokens, then over turns

    Data has column `messages`: system, user, assistant and tool messages. Sample j of a trajectory
    asks with all messages before assistant turn j, and the student writes that turn alone; no
    environment is there, no reward, and the reference's own turn is not used. A step has
    prompts_per_step trajectories, each with all its turns; one without an assistant's message
    teaches nothing and is left out. Any other loss is asked so with the run's
    curriculum=every_turn. History, tools' results and templates are never trained.

    Source: arXiv 2605.01347 and its code. Departure: its splitter passes trajectories without an
    assistant's message through.

    Arguments:
        beta: as in `mad_opd`, in [0, 1]: 0 is forward, 1 reverse KL. Default: the paper's for
            agents.
        tau: as in `mad_opd`, above 0: temperature of the weights. Default: the paper's.
        rounds: as in `mad_opd`, at least 0: rounds of the debate. Default: the paper's.
        teachers: as in `mad_opd`, at least 1: how many there are. Default: the paper's.
        k: as in `mad_opd`, in tokens: each teacher's top k, or None. Default: the paper's.
        per: what counts alike: each "turn", so that a long trajectory counts more, or each
            "trajectory". Default: the paper's.
    """
    one_of(per=(per, ("turn", "trajectory")))
    made = mad_opd(beta, tau, rounds, teachers, k)
    objective = made.objective * PerQuestion() if per == "trajectory" else made.objective
    return Method(objective, curriculum=EveryTurn(), models=made.models, annotate=made.annotate)


def _weighed(names: list[str], beta: float, tau: float, k: int | None) -> Objective:
    """The divergences from these teachers, weighted by their confidence."""
    support = ("full", "raw") if k is None else ("teacher", "renormalise")
    informed = ~Mark("uninformed")
    terms = []
    for i, name in enumerate(names):
        distance = Divergence(JSD(beta), k, *support, teacher=name)
        terms.append((distance * (Confidence(i, len(names), tau) * informed)).per("rows"))
    return Objective(*terms)


def _refuse(tau: float, rounds: int, teachers: int) -> None:
    if tau <= 0:
        raise ValueError(f"tau={tau} must be positive: it is the temperature of the weights")
    if rounds < 0 or teachers < 1:
        raise ValueError(
            f"rounds={rounds} must be at least 0 and teachers={teachers} at least 1: so many "
            "models debate so often"
        )
