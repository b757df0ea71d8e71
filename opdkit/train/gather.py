"""From rollouts and needs to the facts of a step, each from its cheapest exact source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.layout import HELD, Layout
from opdkit.objective.batch import Batch
from opdkit.objective.facts import (
    ColumnFact,
    EntropyFact,
    Fact,
    LogpAtFact,
    LogpFact,
    Noted,
    TopFact,
    VocabularyFact,
)
from opdkit.objective.head import flat_positions
from opdkit.objective.needs import Needs
from opdkit.objective.supply import Tensors, still_asked, supply, with_ids
from opdkit.teachers import Remote, Scorer
from opdkit.teachers.base import scattered
from opdkit.types import Rollout, row_keys


def gather(
    rollouts: Sequence[Rollout],
    needs: Needs,
    scorers: Mapping[str, Scorer | Remote],
    *,
    step: int = 0,
    total_steps: int = 1,
    seed: int = 0,
    memory: Mapping[str, Any] | None = None,
    policy_version: int = 0,
    recompute_student: bool = False,
    correct_sampling: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """The facts that `needs` names.

    `scorers` hold "student" (as it is now) and every other model in this process.

    The student's log-probs before the step are the sampler's where those are the plain softmax of
    the same weights (`policy_version` is the number of optimiser steps these have taken); no other
    forward pass of the student is made unless something else of it is read.
    """
    batch = collate(rollouts, device, dtype, correct_sampling)
    batch.step, batch.total_steps, batch.seed = step, total_steps, seed
    batch.memory = dict(memory or {})
    _columns(batch, rollouts, needs)
    layout, positions = Layout(rollouts, batch.shape[1]), flat_positions(batch.mask)
    # false for responses read from data
    written = all(len(r.logp) == len(r.tokens) for r in rollouts)
    fresh = all(r.policy_version == policy_version for r in rollouts)  # false for replayed ones
    if written and fresh and not recompute_student and not correct_sampling:
        batch.facts[LogpFact("student")] = batch.facts[LogpFact("sampler")]
        _noted(batch, rollouts, needs)
    read = needs.facts - needs.of("live") | {as_student(fact) for fact in needs.of("live")}
    wanted: set[Fact] = {f for f in read if f not in batch.facts and f.read_from != "rollouts"}
    if not written:
        wanted = {f for f in wanted if f != LogpFact("sampler")} | (
            {LogpFact("student")} if LogpFact("sampler") in wanted else set()
        )
    made = _ask(batch, wanted, scorers, layout, positions)
    if not written and LogpFact("sampler") in needs.facts:
        # the student might as well have written it: ratio 1
        made[LogpFact("sampler")] = made[LogpFact("student")]
    for fact, values in made.items():
        _refuse_nan(fact, values, batch, rollouts)
    batch.facts |= made
    # until the first optimiser step the live student is the student before it
    for fact in needs.of("live"):
        batch.facts[fact] = batch.facts[as_student(fact)]
    batch.sources = {
        m: s for m, s in batch.sources.items() if VocabularyFact(m) in needs.facts or needs.spans(m)
    }
    return batch


def _ask(
    batch: Batch,
    wanted: set[Fact],
    scorers: Mapping[str, Scorer | Remote],
    layout: Layout,
    positions: Tensor,
) -> Tensors:
    """The wanted facts [B, T] or [B, T, k]: one pass over the models whose vocabulary is at hand,
    numbers from those elsewhere.

    A model elsewhere is asked twice only where it is read at ids that another model names.
    """
    wanted = with_ids(wanted) - set(batch.facts)
    models = {m for f in wanted for m in still_asked(batch, f)}
    remote = {
        m: s
        for m in models
        if isinstance(s := scorers[m], Remote) and not Needs(frozenset(wanted)).whole(m)
    }
    asked = {m: [f for f in wanted if f.models[0] == m] for m in remote}
    made: Tensors = {}

    def ask(model: str, facts: list[Fact]) -> None:
        if facts:
            known = batch.facts | made
            named = sorted({ids for f in facts for ids in f.needs_first}, key=repr)
            ids = {f: known[f].flatten(0, 1)[positions] for f in named if f in known}
            for fact, values in remote[model].facts(facts, layout, positions, ids).items():
                values = values.to(batch.dtype) if values.is_floating_point() else values
                made[fact] = batch.facts[fact] = scattered(values, positions, batch)

    for model in sorted(remote):
        ask(model, [f for f in asked[model] if not f.others_first])
    whole = any(f.whole_step for f in wanted)
    for part in [positions] if whole else layout.portions(positions, HELD) or [positions]:
        for model in sorted(models - set(remote)):
            scorer: Any = scorers[model]
            batch.sources[model] = scorer.source(layout, part)
        for fact, values in supply(batch, wanted, part).items():
            # each is zero where the other is not
            made[fact] = values if fact not in made else made[fact] + values
    for model in sorted(remote):
        ask(model, [f for f in asked[model] if f.others_first])
    return made


def _noted(batch: Batch, rollouts: Sequence[Rollout], needs: Needs) -> None:
    """What the sampler noted of its distribution is what the student thinks, while it has the same
    weights.
    """
    noted = _notes(batch, rollouts)
    if noted is None:
        return
    deepest = 0 if noted.top_ids is None else noted.top_ids.shape[-1]
    depths = {fact.depth("student") for fact in needs.of("student")} - {0}
    told: list[Fact] = [EntropyFact("student")]
    for k in sorted(depths):
        told += [TopFact("student", k), LogpAtFact("student", "student", k)]
    for fact in (*told, *sorted(needs.of("student"), key=repr)):
        watch = fact.watch("student")
        if watch is None or set(fact.models) != {"student"}:
            continue
        if watch.top <= deepest and (noted.entropy is not None or not watch.entropy):
            batch.facts[fact] = fact.of_notes(noted)


def _notes(batch: Batch, rollouts: Sequence[Rollout]) -> Noted | None:
    """The sampler's notes [B, T] and [B, T, k], zero where a row has ended; None where a rollout
    has none.
    """
    notes = [r.notes for r in rollouts if r.notes is not None]
    if not notes or len(notes) < len(rollouts):
        return None

    def table(parts: list[Tensor | None]) -> Tensor | None:
        """[B, T] or [B, T, k] from [t] or [t, k] of each rollout, if it has been noted in all."""
        held = [part for part in parts if part is not None]
        if len(held) < len(parts):
            return None
        values = torch.cat(held).to(batch.device)
        where = torch.tensor(
            [[t < len(r.tokens) for t in range(batch.shape[1])] for r in rollouts],
            device=batch.device,
        )
        return scattered(
            values.to(batch.dtype) if values.is_floating_point() else values,
            flat_positions(where),
            batch,
        )

    return Noted(
        batch.facts[LogpFact("sampler")],
        table([n.top for n in notes]),
        table([n.top_logp for n in notes]),
        table([n.entropy for n in notes]),
    )


def as_student(fact: Fact) -> Fact:
    """A fact of the live student, as one of the student before the step."""
    before = fact.as_student()
    if before is None:
        raise UserError(
            f"the objective reads {fact.words()}: of the live student only log-probs and "
            "entropies of tokens can be read"
        )
    return before


def refresh(
    batch: Batch, needs: Needs, scorers: Mapping[str, Any], rollouts: Sequence[Rollout]
) -> None:
    """Facts of the live student anew, after it has moved; the signals are computed again."""
    layout, positions = Layout(rollouts, batch.shape[1]), flat_positions(batch.mask)
    facts = needs.of("live")
    for fact in facts:
        del batch.facts[fact]
    batch.sources["live"] = scorers["live"].source(layout, positions)
    batch.facts.update(supply(batch, facts, positions))
    del batch.sources["live"]
    batch.signals.clear()


def collate(
    rollouts: Sequence[Rollout],
    device: torch.device | str,
    dtype: torch.dtype,
    correct_sampling: bool = False,
) -> Batch:
    """Tokens, masks, marks, ids and the sampler's log-probs as tensors, padded on the right."""
    width = max((len(r.tokens) for r in rollouts), default=0)

    def table(rows: list[list[Any]], kind: torch.dtype) -> Tensor:
        """[B, T], zero where a row has ended."""
        return (
            torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=kind)
            .view(len(rows), width)
            .to(device)
        )

    batch = Batch(
        table([r.tokens for r in rollouts], torch.int64),
        table([r.trained for r in rollouts], torch.bool),
        keys=row_keys([r.id for r in rollouts], device),
        rows=[r.row for r in rollouts],
        dtype=dtype,
    )
    if all(len(r.logp) == len(r.tokens) for r in rollouts):
        drawn = [r.drawn_logp if correct_sampling else r.logp for r in rollouts]
        batch.facts[LogpFact("sampler")] = table(drawn, dtype)
    for name in sorted({m for r in rollouts for m in r.marks}):
        batch.facts[ColumnFact(f"mark:{name}")] = table(
            [r.marks.get(name, [False] * len(r.tokens)) for r in rollouts], torch.bool
        )
    return batch


def _columns(batch: Batch, rollouts: Sequence[Rollout], needs: Needs) -> None:
    """What is known of the rollouts besides tokens."""
    device, facts = batch.device, batch.facts
    groups: dict[str, int] = {}
    facts[ColumnFact("group")] = torch.tensor(
        [groups.setdefault(r.group, len(groups)) for r in rollouts], device=device
    )
    rewards = [r.reward for r in rollouts]
    if rewards and all(r is not None for r in rewards):
        facts[ColumnFact("reward")] = torch.tensor(rewards, dtype=batch.dtype, device=device)
        right = [
            bool(r.correct) if r.correct is not None else (r.reward or 0) > 0 for r in rollouts
        ]
        facts[ColumnFact("correct")] = torch.tensor(right, device=device)
    for column in sorted(needs.columns):
        kind, _, name = column.partition(":")
        if kind == "memory":
            known = batch.memory.get(name, {})
            facts[ColumnFact(column)] = torch.tensor(
                [known.get(r.group, math.nan) for r in rollouts], dtype=batch.dtype, device=device
            )
        if kind == "row":
            facts[ColumnFact(column)] = torch.tensor(
                [_number(r, name) for r in rollouts], dtype=batch.dtype, device=device
            )


def _number(rollout: Rollout, name: str) -> float:
    value = rollout.row.get(name)
    if not isinstance(value, (int, float)):
        raise UserError(
            f"the method reads the column {name!r} as a number; in the row of rollout {rollout.id} "
            f"it is {value!r}"
        )
    return float(value)


def _refuse_nan(fact: Fact, values: Tensor, batch: Batch, rollouts: Sequence[Rollout]) -> None:
    """NaN in a fact [B, T] or [B, T, k] means that its model is broken; training on it would
    spread it into every weight.
    """
    bad = values.isnan().flatten(2).any(-1) if values.dim() > 2 else values.isnan()
    bad = bad & batch.mask
    if bool(bad.any()):
        row, position = bad.nonzero()[0].tolist()
        raise UserError(
            f"{fact.words()} is NaN at token {position} of rollout {rollouts[row].id}: the "
            "model's output is broken there (its files damaged, its dtype too narrow?). Nothing "
            "was learnt from this step"
        )


def mean_gap(batch: Batch, a: str, b: str, where: Tensor | None = None) -> float:
    """Mean of log pi_a - log pi_b over the trained tokens, or those of a mask [B, T], nats; NaN
    where one was not read.
    """
    facts, mask = batch.facts, batch.mask if where is None else where
    if LogpFact(a) not in facts or LogpFact(b) not in facts or not bool(mask.any()):
        return math.nan
    return (facts[LogpFact(a)] - facts[LogpFact(b)])[mask].mean().item()
