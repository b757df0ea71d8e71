"""From rollouts and needs to the facts of a step, each from its cheapest exact source."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from opdkit.base.clock import Clock
from opdkit.base.errors import UserError
from opdkit.models.layout import HELD, Layout
from opdkit.objective.batch import Batch
from opdkit.objective.companion import Companions
from opdkit.objective.facts import (
    ColumnFact,
    EntropyFact,
    Fact,
    LogpAtFact,
    LogpFact,
    Noted,
    TopFact,
)
from opdkit.objective.head import flat_positions
from opdkit.objective.needs import Needs
from opdkit.objective.supply import Tensors, still_asked, supply, with_ids
from opdkit.teachers import Remote, Scorer
from opdkit.teachers.base import elsewhere, scattered
from opdkit.train.mesh import ALONE, Mesh
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
    companions: Companions | None = None,
    policy_version: int = 0,
    recompute_student: bool = False,
    correct_sampling: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mesh: Mesh = ALONE,
    clock: Clock | None = None,
) -> Batch:
    """The facts that `needs` names, at the tokens that its authors wrote.

    `scorers` hold "student" (as it is now) and every other model in this process; `clock` is told
    when others elsewhere are waited for.

    A rollout's student log-probs before the step are its sampler's where those are the plain
    softmax of the same weights (`policy_version` is the number of optimiser steps these have
    taken); no other forward pass of the student is made on it unless something else is read.
    """
    batch = collate(rollouts, device, dtype, correct_sampling)
    batch.step, batch.total_steps, batch.seed = step, total_steps, seed
    batch.memory, batch.companions = dict(memory or {}), companions or Companions()
    _columns(batch, rollouts, needs)
    layout, everywhere = Layout(rollouts, batch.shape[1]), batch.by(needs.authors)
    batch.facts[LogpFact("sampler")] = _zero_outside(everywhere, batch.facts[LogpFact("sampler")])
    if mesh.size > 1:
        mine = mesh.mine(rollouts, batch.shape[1]).to(batch.device)
        batch.mine, batch.whole = mine, mesh.total
    where = everywhere if batch.mine is None else everywhere & batch.mine
    again = recompute_student or correct_sampling
    fresh = [written(r) and r.policy_version == policy_version and not again for r in rollouts]
    wanted = _wanted(batch, rollouts, needs, everywhere)
    told = {
        fact: _zero_outside(everywhere, values)
        for fact, values in _told(batch, rollouts, fresh, needs).items()
    }
    if not all(fresh):
        told = _completed(batch, told, fresh, wanted, scorers, layout, where, mesh)
    batch.facts |= told
    made = _ask(batch, wanted, scorers, layout, flat_positions(where), mesh, clock)
    for fact, values in (told | made).items():
        _refuse_nan(fact, values, where, rollouts)
    batch.facts |= _wholes(batch, made)
    if LogpFact("sampler") in needs.facts and LogpFact("student") in batch.facts:
        # what nobody drew, the student might as well have: ratio 1
        drawn = torch.tensor([written(r) for r in rollouts], device=batch.device)[:, None]
        sampler, student = (batch.facts[LogpFact(m)] for m in ("sampler", "student"))
        batch.facts[LogpFact("sampler")] = torch.where(drawn, sampler, student)
    if not batch.companions.disturb:  # else it is still to be read: see `refresh`
        _not_moved(batch, needs)
    batch.sources = {m: s for m, s in batch.sources.items() if needs.kept(m) or needs.spans(m)}
    return batch


def _not_moved(batch: Batch, needs: Needs) -> None:
    """Until the first optimiser step the live student is the student before it."""
    for fact in needs.of("live"):
        if fact.read_from == "loss":
            batch.sources["live"] = batch.sources["student"]
        else:
            batch.facts[fact] = batch.facts[as_student(fact)]


def written(rollout: Rollout) -> bool:
    """Whether a sampler wrote a rollout, and said how probable its tokens were."""
    return len(rollout.logp) == len(rollout.tokens)


def _wanted(batch: Batch, rollouts: Sequence[Rollout], needs: Needs, where: Tensor) -> set[Fact]:
    """The facts that models are to be asked for at the positions `where` [B, T]."""
    live = {as_student(fact) for fact in needs.of("live")}
    read = needs.facts - needs.of("live") | (set() if batch.companions.disturb else live)
    wanted: set[Fact] = {f for f in read if f not in batch.facts and f.read_from != "rollouts"}
    unwritten = torch.tensor([not written(r) for r in rollouts], device=batch.device)[:, None]
    if LogpFact("sampler") in needs.facts and bool((where & unwritten).any()):
        wanted.add(LogpFact("student"))
    return wanted


def _completed(
    batch: Batch,
    told: Tensors,
    fresh: Sequence[bool],
    wanted: set[Fact],
    scorers: Mapping[str, Scorer | Remote],
    layout: Layout,
    where: Tensor,
    mesh: Mesh,
) -> Tensors:
    """What was told of `fresh` rollouts, with what the student says of the others at positions
    `where` [B, T]; nothing where a pass of the student over all of them is made anyway.
    """
    rest = with_ids(wanted) - set(told)
    if any("student" in still_asked(batch, fact) for fact in rest):
        return {}
    told = {fact: values for fact, values in told.items() if fact in with_ids(wanted)}
    stale = torch.tensor([not x for x in fresh], device=batch.device)[:, None]
    made = _ask(batch, set(told), scorers, layout, flat_positions(where & stale), mesh)
    batch.sources.clear()
    whole = _wholes(batch, {fact: made[fact] for fact in told})
    return {f: torch.where(_like(stale, v), whole[f], v) for f, v in told.items()}


def _wholes(batch: Batch, made: Tensors) -> Tensors:
    """Facts as `_whole` has them: one after the other, in the same order on every process."""
    return {fact: _whole(batch, fact, made[fact]) for fact in sorted(made, key=repr)}


def _whole(batch: Batch, fact: Fact, values: Tensor) -> Tensor:
    """A fact [B, T] that this process has found of its own tokens, as all together have it; one
    [B, T, k], which would be much to send, as it is.
    """
    if batch.whole is None or fact.shape:
        return values
    return batch.whole(values).to(values.dtype)


def _zero_outside(where: Tensor, values: Tensor) -> Tensor:
    """Values [B, T] or [B, T, k] at positions `where` [B, T]; zero elsewhere, as what models are
    asked for is, so that a formula that forgets its mask counts nothing of what others wrote.
    """
    return torch.where(where if values.dim() == 2 else where[..., None], values, 0)


def _like(rows: Tensor, values: Tensor) -> Tensor:
    """Rows [B, 1] with as many dimensions as values [B, T] or [B, T, k]."""
    return rows.view(len(rows), *[1] * (values.dim() - 1))


def _ask(
    batch: Batch,
    wanted: set[Fact],
    scorers: Mapping[str, Scorer | Remote],
    layout: Layout,
    positions: Tensor,
    mesh: Mesh,
    clock: Clock | None = None,
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
            with _waiting(clock, remote[model]):
                found = remote[model].facts(facts, layout, positions, ids)
            for fact, values in found.items():
                values = values.to(batch.dtype) if values.is_floating_point() else values
                made[fact] = batch.facts[fact] = scattered(values, positions, batch)

    for model in sorted(remote):
        ask(model, [f for f in asked[model] if not f.others_first])
    whole = any(f.whole_step for f in wanted)
    parts = [positions] if whole else layout.portions(positions, HELD) or [positions]
    for part in mesh.level(parts, positions[:0]):
        for model in sorted(models - set(remote)):
            scorer: Any = scorers[model]
            with _waiting(clock, scorer):
                batch.sources[model] = scorer.source(layout, part)
        for fact, values in supply(batch, wanted, part).items():
            # each is zero where the other is not
            made[fact] = values if fact not in made else made[fact] + values
    for model in sorted(remote):
        ask(model, [f for f in asked[model] if f.others_first])
    return made


def _waiting(clock: Clock | None, scorer: Any) -> AbstractContextManager[None]:
    """The time in which a scorer elsewhere is asked."""
    return clock.waiting("score") if clock is not None and elsewhere(scorer) else nullcontext()


def _told(
    batch: Batch, rollouts: Sequence[Rollout], fresh: Sequence[bool], needs: Needs
) -> Tensors:
    """What the samplers of `fresh` rollouts say of the student, which has the same weights still;
    [B, T] or [B, T, k], elsewhere of no meaning.
    """
    if not any(fresh):
        return {}
    told: Tensors = {LogpFact("student"): batch.facts[LogpFact("sampler")]}
    noted = _notes(batch, rollouts, fresh)
    if noted is None:
        return told
    deepest = 0 if noted.top_ids is None else noted.top_ids.shape[-1]
    depths = {fact.depth("student") for fact in needs.of("student")} - {0}
    every: list[Fact] = [EntropyFact("student")]
    for k in sorted(depths):
        every += [TopFact("student", k), LogpAtFact("student", "student", k)]
    for fact in (*every, *sorted(needs.of("student"), key=repr)):
        watch = fact.watch("student")
        if watch is None or set(fact.models) != {"student"}:
            continue
        if watch.top <= deepest and (noted.entropy is not None or not watch.entropy):
            told[fact] = fact.of_notes(noted)
    return told


def _notes(batch: Batch, rollouts: Sequence[Rollout], fresh: Sequence[bool]) -> Noted | None:
    """The notes [B, T] and [B, T, k] of fresh rollouts' samplers, zero elsewhere; None where one
    of these rollouts has none.
    """
    notes = [r.notes for r, now in zip(rollouts, fresh) if now]
    held = [n for n in notes if n is not None]
    if len(held) < len(notes):
        return None
    lengths = [len(r.tokens) if now else 0 for r, now in zip(rollouts, fresh)]
    places = torch.arange(batch.shape[1], device=batch.device)
    where = flat_positions(places < torch.tensor(lengths, device=batch.device)[:, None])

    def table(parts: list[Tensor | None]) -> Tensor | None:
        """[B, T] or [B, T, k] from [t] or [t, k] of each rollout, if it has been noted in all."""
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        values = torch.cat(known).to(batch.device)
        return scattered(
            values.to(batch.dtype) if values.is_floating_point() else values, where, batch
        )

    return Noted(
        batch.facts[LogpFact("sampler")],
        table([n.top for n in held]),
        table([n.top_logp for n in held]),
        table([n.entropy for n in held]),
    )


def as_student(fact: Fact) -> Fact:
    """A fact of the live student, as one of the student before the step."""
    before = fact.as_student()
    if before is None:
        raise UserError(
            f"the objective reads {fact.words()}: of the live student only log-probs and "
            "entropies of tokens can be read, or its whole vocabulary by a loss"
        )
    return before


def refresh(
    batch: Batch,
    needs: Needs,
    scorers: Mapping[str, Any],
    rollouts: Sequence[Rollout],
    updates: int = 0,
) -> None:
    """Facts of the live student anew, after it has moved, from passes as it learns in in the
    optimiser step number `updates` (from 0); the signals are computed again.
    """
    where = batch.by(needs.authors)
    positions = flat_positions(where if batch.mine is None else where & batch.mine)
    facts = needs.of("live")
    for fact in facts:
        batch.facts.pop(fact, None)
    with batch.companions.disturbed(updates) as hear:
        layout = Layout(rollouts, batch.shape[1], hear)
        batch.sources["live"] = scorers["live"].source(layout, positions)
    made = supply(batch, facts, positions)
    batch.facts |= _wholes(batch, made)
    if not needs.kept("live"):
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
        drawn=correct_sampling,
        dtype=dtype,
    )
    logps = [r.drawn_logp if correct_sampling else r.logp for r in rollouts]
    batch.facts[LogpFact("sampler")] = table(logps, dtype)
    if any(r.turns for r in rollouts):
        turns = [r.turns or [0] * len(r.tokens) for r in rollouts]
        batch.facts[ColumnFact("turn")] = table(turns, torch.int64)
    for name in sorted({m for r in rollouts for m in r.marks}):
        batch.facts[ColumnFact(f"mark:{name}")] = table(
            [r.marks.get(name, [False] * len(r.tokens)) for r in rollouts], torch.bool
        )
    return batch


def _columns(batch: Batch, rollouts: Sequence[Rollout], needs: Needs) -> None:
    """What is known of the rollouts besides tokens."""
    device, facts = batch.device, batch.facts
    for name in ("group", "question"):
        numbers: dict[str, int] = {}
        facts[ColumnFact(name)] = torch.tensor(
            [numbers.setdefault(getattr(r, name), len(numbers)) for r in rollouts], device=device
        )
    rewards = [r.reward for r in rollouts]
    if rewards and all(r is not None for r in rewards):
        facts[ColumnFact("reward")] = torch.tensor(rewards, dtype=batch.dtype, device=device)
    if any(r is not None for r in rewards):  # of the others nobody says that they are right
        right = [
            bool(r.correct) if r.correct is not None else (r.reward or 0) > 0 for r in rollouts
        ]
        facts[ColumnFact("correct")] = torch.tensor(right, device=device)
    for name in sorted({name for r in rollouts for name in r.rewards}):
        facts[ColumnFact(f"reward:{name}")] = torch.tensor(
            [r.rewards.get(name, math.nan) for r in rollouts], dtype=batch.dtype, device=device
        )
    for column in sorted(needs.columns):
        kind, _, name = column.partition(":")
        if kind == "memory":
            known = batch.memory.get(name, {})
            facts[ColumnFact(column)] = torch.tensor(
                [known.get(r.question, math.nan) for r in rollouts],
                dtype=batch.dtype,
                device=device,
            )
        if kind == "row":
            facts[ColumnFact(column)] = torch.tensor(
                [_number(r, name) for r in rollouts], dtype=batch.dtype, device=device
            )


def _number(rollout: Rollout, name: str) -> float:
    """A number of a rollout's row, or, as `name[0]`, one in the list of a column: NaN where the
    row has no such number.
    """
    if entry := re.fullmatch(r"(.+)\[(\d+)\]", name):
        name, index = entry[1], int(entry[2])
        value = rollout.row.get(name)
        if value is None:
            return math.nan
        if not isinstance(value, (list, tuple)):
            raise UserError(
                f"the method reads a list of numbers in the column {name!r}; in the row of rollout "
                f"{rollout.id} it is {value!r}"
            )
        value = value[index] if index < len(value) else None
        if value is None:
            return math.nan
    else:
        value = rollout.row.get(name)
    if not isinstance(value, (int, float)):
        raise UserError(
            f"the method reads the column {name!r} as a number; in the row of rollout {rollout.id} "
            f"it is {value!r}"
        )
    return float(value)


def _refuse_nan(fact: Fact, values: Tensor, where: Tensor, rollouts: Sequence[Rollout]) -> None:
    """NaN in a fact [B, T] or [B, T, k] at positions `where` [B, T] means that its model is broken;
    training on it would spread it into every weight.
    """
    bad = values.isnan().flatten(2).any(-1) if values.dim() > 2 else values.isnan()
    bad = bad & where
    if bool(bad.any()):
        row, position = bad.nonzero()[0].tolist()
        raise UserError(
            f"{fact.words()} is NaN at token {position} of rollout {rollouts[row].id}: the "
            "model's output is broken there (its files damaged, its dtype too narrow?). Nothing "
            "was learnt from this step"
        )


def mean_gap(batch: Batch, a: str, b: str, where: Tensor | None = None) -> float:
    """Mean of log pi_a - log pi_b over the student's tokens, or those of a mask [B, T], nats; NaN
    where one was not read.
    """
    facts, mask = batch.facts, batch.mask if where is None else where
    if LogpFact(a) not in facts or LogpFact(b) not in facts or not bool(mask.any()):
        return math.nan
    return (facts[LogpFact(a)] - facts[LogpFact(b)])[mask].mean().item()
