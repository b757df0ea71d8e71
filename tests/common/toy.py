"""The shared numbers of the estimator tests, and the objective computed the naive way: everything
dense, autograd, no chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdkit.objective.batch import Live
from opdkit.objective.evenness import EvennessFact
from opdkit.objective.facts import (
    ColumnFact,
    EntropyFact,
    Fact,
    GapFact,
    LogpAtFact,
    LogpFact,
    TopFact,
)
from opdkit.objective.grammar import Objective, RolloutLoss
from opdkit.testing import Case

# Two models over four tokens: their logits, probabilities, divergences, and the gradients with
# respect to the student's logits.
Z_S, Z_T = (2.0, 1.0, 0.0, -1.0), (0.5, 1.5, 0.0, 0.5)
# 0.643914, 0.236883, 0.087144, 0.032059
P = tuple(math.exp(z) / sum(map(math.exp, Z_S)) for z in Z_S)
# 0.187800, 0.510493, 0.113906, 0.187800
Q = tuple(math.exp(z) / sum(map(math.exp, Z_T)) for z in Z_T)
REVERSE, FORWARD = 0.531530, 0.523059  # KL(P || Q), KL(Q || P)
REVERSE_GRAD = (0.451164, -0.307792, -0.069658, -0.073714)
FORWARD_GRAD = (0.456114, -0.273611, -0.026762, -0.155741)  # P - Q


def naive_fact(fact: Fact, logps: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """A fact straight from whole log-probs [B, T, V] by model."""
    if isinstance(fact, LogpFact):
        return logps[fact.model].gather(-1, tokens[..., None])[..., 0]
    if isinstance(fact, EntropyFact):
        return torch.distributions.Categorical(logits=logps[fact.model]).entropy()
    if isinstance(fact, TopFact):
        return logps[fact.model].argsort(-1, descending=True)[..., : fact.k]
    if isinstance(fact, LogpAtFact):
        return logps[fact.model].gather(-1, naive_fact(TopFact(fact.owner, fact.k), logps, tokens))
    if isinstance(fact, EvennessFact):
        entropy = naive_fact(EntropyFact(fact.model), logps, tokens)
        return entropy / math.log(logps[fact.model].shape[-1])
    assert isinstance(fact, GapFact) and fact.temperature == 1
    return fact.kind.entries(logps[fact.student], logps[fact.teacher]).sum(-1)  # type: ignore[attr-defined]


def naive(objective: Objective, case: Case) -> tuple[Tensor, Tensor]:
    """Loss and gradient [B, T, V] of a case: dense facts, one graph over all logits, one
    backward.
    """
    batch = case.batch(objective)
    logps = {
        name: source.logits(torch.arange(case.tokens.numel())).log_softmax(-1)
        for name, source in batch.sources.items()
    }
    logps = {name: lp.view(*case.tokens.shape, -1) for name, lp in logps.items()}
    batch.facts = {
        # what a module says is not the formula's to say
        f: v if isinstance(f, ColumnFact) or f.companions else naive_fact(f, logps, case.tokens)
        for f, v in batch.facts.items()
    }
    leaf = case.student.clone().requires_grad_()
    loss = torch.zeros((), dtype=leaf.dtype)
    for part in objective.plan(batch).parts:
        at = part.weight.flatten().nonzero()[:, 0]
        rows = at.div(case.tokens.shape[1], rounding_mode="floor").unique()
        if isinstance(part.term.loss, RolloutLoss):
            logp = leaf.log_softmax(-1).gather(-1, case.tokens[..., None])[..., 0]
            scale = (
                torch.stack([s[w != 0][0] for s, w in zip(part.scale[rows], part.weight[rows])])
                if len(rows)
                else rows
            )
            loss = (
                loss
                + (scale * part.term.loss.value(logp[rows], part.mask[rows], rows, batch)).sum()
            )
        else:
            own = leaf.flatten(0, 1)[at]
            live = Live(batch, at, own, hidden=lambda own=own: own)  # type: ignore[misc]
            loss = loss + (part.scale.flatten()[at] * part.term.loss.value(live)).sum()  # type: ignore[attr-defined]
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]
