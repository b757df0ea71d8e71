"""What a step says about its tokens besides the loss: how far, how sure, how early and how many.

Read off facts that are there anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdkit.objective.batch import Batch
from opdkit.objective.divergences import ReverseKL
from opdkit.objective.facts import EntropyFact, GapFact, LogpFact
from opdkit.objective.formula import Const
from opdkit.objective.plan import StepPlan

QUANTILES = {"p01": 0.01, "p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}
TENTHS = 10  # parts of a response
UNSURE = 0.5  # nats of student entropy from which a token counts as uncertain
APART = 0.1  # nats of KL(student || teacher) from which the two count as apart


def quantiles(values: Tensor) -> dict[str, Tensor]:
    """Quantiles of values [n], each one of the values (nearest rank): an infinite one stays where
    it is. None of no values.
    """
    ranked = values.sort().values
    return (
        {name: ranked[round(at * (len(ranked) - 1))] for name, at in QUANTILES.items()}
        if len(ranked)
        else {}
    )


def trust(log_ratio: Tensor) -> Tensor:
    """[]: mean of min(pi_t / pi_s, 1) at tokens that the student drew, from log(teacher/student)
    [n].

    The rate at which speculative sampling would accept them: an estimate of 1 - the total variation
    between the two.
    """
    return log_ratio.clamp_max(0.0).exp().mean()


def effective_tokens(weight: Tensor) -> Tensor:
    """[]: (sum w)^2 / sum w^2 of weights of any shape: n equal ones count as n, one among zeros as
    1; 0 where all are zero.
    """
    weight = weight.double()
    squares = weight.square().sum()
    return torch.where(
        squares > 0, weight.sum().square() / squares.clamp_min(torch.finfo(squares.dtype).tiny), 0.0
    )


def quadrants(entropy: Tensor, gap: Tensor) -> dict[str, Tensor]:
    """Shares of tokens [n] by student entropy and KL(student || teacher), nats: unsure or sure,
    apart or agreed (TIP, arXiv 2604.14084).

    `sure_apart` are confident mistakes; `sure_agreed` have nothing to teach.
    """
    unsure, apart = entropy >= UNSURE, gap >= APART
    kinds = {
        "unsure_apart": unsure & apart,
        "unsure_agreed": unsure & ~apart,
        "sure_apart": ~unsure & apart,
    }
    shares = {name: chosen.double().mean() for name, chosen in kinds.items()}
    return shares | {"sure_agreed": (~unsure & ~apart).double().mean()}


def by_position(values: Tensor, mask: Tensor) -> list[Tensor]:
    """Means of values [B, T] over each tenth of the responses' selected tokens, first to last; NaN
    where no token falls into it.
    """
    rank, length = mask.long().cumsum(1) - 1, mask.sum(1, keepdim=True)
    part = (TENTHS * rank // length.clamp_min(1))[mask]
    total, count = (
        torch.zeros(TENTHS, dtype=torch.float64, device=values.device) for _ in range(2)
    )
    total.index_add_(0, part, values[mask].double())
    count.index_add_(0, part, torch.ones_like(part, dtype=torch.float64))
    return list(total / count)


def of_facts(batch: Batch) -> dict[str, Tensor]:
    """What each fact [B, T] or [B, T, k] has to say of the tokens that the student drew: see
    `Fact.metrics`. Of those that each process has of its own tokens, the mean over all.
    """
    facts, out = batch.facts, dict[str, Tensor]()
    mine = batch.mask if batch.mine is None else batch.mask & batch.mine
    for fact in sorted(facts, key=repr):  # in one order on every process
        if batch.whole is None or not fact.shape:
            out |= fact.metrics(facts, batch.mask)
            continue
        count = mine.sum().to(batch.dtype)
        for name, mean in fact.metrics(facts, mine).items():
            held = torch.where(count > 0, mean.to(batch.dtype), 0.0) * count
            out[name] = batch.whole(held) / batch.whole(count)
    return out


# ---------------------------------------------------------------------------------------- of a step


def of_tokens(batch: Batch, entropy: Tensor, gap: Tensor) -> dict[str, Tensor]:
    """What the facts of a step say of the tokens that the student drew.

    entropy and gap = log(student/teacher) [B, T] are those of the learning pass, NaN where it saw
    none; facts, which cover all trained tokens, go before them.
    """
    facts, out = batch.facts, dict[str, Tensor]()
    if LogpFact("teacher") in facts and LogpFact("student") in facts:
        ratio = facts[LogpFact("teacher")] - facts[LogpFact("student")]
    else:
        ratio = -gap
    own = batch.mask
    known = own & ~ratio.isnan()
    if bool(known.any()):
        out |= {f"log_ratio/{name}": value for name, value in quantiles(ratio[known]).items()}
        out["trust/mean"] = trust(ratio[known])
        tenths = enumerate(by_position(ratio.abs(), known), 1)
        out |= {f"drift/tenth_{i:02}": value for i, value in tenths if not bool(value.isnan())}
    apart = facts.get(GapFact(ReverseKL(), "student", "teacher"))
    unsure = facts.get(EntropyFact("student"), entropy)
    known = own & ~unsure.isnan()
    if apart is not None and bool(known.any()):
        out |= {
            f"quadrants/{name}": value
            for name, value in quadrants(unsure[known], apart[known]).items()
        }
    return out | of_facts(batch)


def of_weights(plan: StepPlan) -> dict[str, Tensor]:
    """Per term, [] each: quantiles of its weights where they are not a mere number, and the
    effective number of its tokens.
    """
    out: dict[str, Tensor] = {}
    for part in plan.parts:
        on = part.weight[part.weight != 0]
        if not isinstance(part.term.weight, Const):
            out |= {f"weights/{part.name}/{name}": value for name, value in quantiles(on).items()}
        out[f"effective_tokens/{part.name}"] = effective_tokens(part.scale)
    return out
