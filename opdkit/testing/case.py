"""Evaluate an objective on plain logits: the code is the one that training runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.methods.method import Method, as_method
from opdkit.objective.actions import Actions
from opdkit.objective.alignment import AlignedSource, Alignment
from opdkit.objective.batch import Batch
from opdkit.objective.companion import Around, Companions
from opdkit.objective.facts import ColumnFact, Fact
from opdkit.objective.grammar import Loss, Objective, Term, credit_of
from opdkit.objective.head import Head, Source, flat_positions, learn
from opdkit.objective.needs import Needs, needs
from opdkit.objective.supply import supply

AnyObjective = str | Method | Objective | Term | Loss


@dataclass(frozen=True)
class TermOut:
    """One term of an objective on a batch."""

    name: str
    weight: Tensor  # [B, T]
    credit: Tensor | None  # [B, T]
    denominator: Tensor  # [] or [B, 1]
    value: Tensor  # []: its share of the loss


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns."""

    loss: Tensor  # []
    grad: Tensor  # [B, T, V]: d loss / d student_logits
    terms: tuple[TermOut, ...]
    # what the objective has beside the student; its parameters' gradients are in their `grad`
    companions: Companions = field(default_factory=Companions)


def evaluate(
    method_or_objective: AnyObjective,
    student_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    models: Mapping[str, Tensor] | None = None,
    before_logits: Tensor | None = None,
    sampler_logits: Tensor | None = None,
    group: Any = None,
    reward: Any = None,
    correct: Any = None,
    marks: Mapping[str, Any] | None = None,
    step: int = 0,
    total_steps: int = 1,
    uniform: Tensor | None = None,
    seed: int = 0,
    alignments: Mapping[str, Alignment] | None = None,
    turn: Tensor | None = None,
    rows: Mapping[str, Any] | None = None,
    rewards: Mapping[str, Any] | None = None,
    memory: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Loss, gradient and terms of an objective, from logits [B, T, V] and sampled tokens [B, T].

    mask [B, T] bool, the trained tokens (default all). models: logits [B, T, V] by name, "teacher",
    "reference" or any other. before_logits: the student before this step (default: student_logits);
    sampler_logits: the policy that sampled (default: before_logits). group, reward, correct [B];
    correct defaults to reward > 0. marks: {"guided": [B, T]}; "guided" (a teacher), "given" (the
    data) and "tool" (the environment) say who wrote a token that the student did not draw: only
    terms that ask for such tokens look at them. turn [B, T]: of each token, from 0. rows: numbers
    of the data [B] by column, {"utility": [B]}; a column of lists, {"confidence": [[90, 60],
    None]}, is one of each of their numbers, {"confidence[0]": [B]}, NaN where a row has none.
    rewards: [B] of each of several rewards by name, None where one does not apply; `reward`
    defaults to their sum. memory: what the method's curriculum remembers.
    uniform [B, T] replaces the keyed draws. Vocabularies of different size are cut to the smallest:
    what is beyond only pads. Float64 in, float64 through.

    A model with a tokenizer of its own has logits [B, U, V_t] at its own U tokens of the same text,
    and an `Alignment` under its name in `alignments`. Without one its tokens are the student's;
    only `uld`, which pairs tokens by number, then takes any U and V_t.
    """
    case = Case(
        tokens=tokens,
        student=student_logits.detach(),
        mask=mask,
        models={name: logits.detach() for name, logits in (models or {}).items()},
        before=before_logits,
        sampler=sampler_logits,
        columns=_given(group=group, reward=reward, correct=correct, turn=turn)
        | _numbers(rows or {}, "row")
        | _numbers(rewards or {}, "reward"),
        marks=marks or {},
        settings=_given(
            step=step, total_steps=total_steps, uniform=uniform, seed=seed, memory=memory
        ),
        alignments=alignments or {},
    )
    method = as_method(method_or_objective)
    return replace(case, actions=method.actions).run(method.objective)


@dataclass(frozen=True)
class Case:
    """The logits of a step and what is known of its rollouts."""

    tokens: Tensor  # [B, T]
    student: Tensor  # [B, T, V] logits
    mask: Tensor | None = None  # [B, T] bool; None: every token is trained
    # [B, T, V] logits by model; [B, U, V_t] of one with an alignment
    models: Mapping[str, Tensor] = field(default_factory=dict)
    before: Tensor | None = None  # [B, T, V]: the student before the step; None: as it is
    sampler: Tensor | None = None  # [B, T, V]: the policy that sampled; None: as before the step
    columns: Mapping[str, Any] = field(default_factory=dict)  # [B] each
    marks: Mapping[str, Any] = field(default_factory=dict)  # [B, T] bool each
    # of the batch: step, total_steps, seed, uniform, keys
    settings: Mapping[str, Any] = field(default_factory=dict)
    alignments: Mapping[str, Alignment] = field(default_factory=dict)
    actions: Actions | None = None  # what all models write, where that is no text

    def batch(
        self,
        objective: Objective,
        chunk: int | None = None,
        companions: Companions | None = None,
    ) -> Batch:
        """The facts of the objective's needs; `companions` as they are, not at their start."""
        before = self.student if self.before is None else self.before.detach()
        sampler = before if self.sampler is None else self.sampler.detach()
        logits = {"live": self.student, "student": before, "sampler": sampler, **self.models}
        wanted, wide = needs(objective), torch.promote_types(self.student.dtype, torch.float32)
        # with vocabularies of their own
        apart = {m for m in self.models if m in self.alignments or _by_number(wanted, m)}
        vocabulary = min(x.shape[-1] for name, x in logits.items() if name not in apart)
        mask = (
            torch.ones_like(self.tokens, dtype=torch.bool)
            if self.mask is None
            else torch.as_tensor(self.mask).bool()
        )
        batch = Batch(
            self.tokens,
            mask,
            _columns(self.columns, self.marks, wide),
            {
                name: self._source(x.to(wide), None if name in apart else vocabulary)
                for name, x in logits.items()
            },
            dtype=wide,
            **self.settings,
        )
        for name in (m for m in self.models if wanted.spans(m) or m in self.alignments):
            alignment, own = self._alignment(name, wanted), batch.sources[name]
            own = (
                own
                if alignment.same is None
                else replace(own, head=Head(vocab=len(alignment.same)))
            )
            batch.sources[name] = AlignedSource(own, alignment)
        around = Around(
            lambda model: batch.sources[model].vocabulary,  # hidden states are the logits
            batch.device,
            wide,
            self.settings.get("seed", 0),
        )
        batch.companions = companions or Companions.build(wanted.companions, around)
        positions = flat_positions(batch.by(wanted.authors))
        batch.facts.update(supply(batch, wanted.facts, positions, chunk))
        return batch

    def _source(self, logits: Tensor, vocabulary: int | None) -> Source:
        """Logits [B, T, V] as a model; entries beyond the vocabulary are cut."""
        return Source(
            logits.flatten(0, 1),
            torch.arange(logits.shape[0] * logits.shape[1]),
            Head(vocab=vocabulary, actions=self.actions),
        )

    def _alignment(self, name: str, wanted: Needs) -> Alignment:
        """The alignment of a model as given; else token by token."""
        shape, other = self.tokens.shape, self.models[name].shape[:2]
        if name in self.alignments:
            if wanted.ids(name):
                what = ", ".join(sorted(fact.words() for fact in wanted.ids(name)))
                raise UserError(
                    f"the objective reads {what}, but {name} has a tokenizer of its own: use gold "
                    "or uld"
                )
            return self.alignments[name]
        if not _by_number(wanted, name) and other != shape:
            asked = (
                f"say which cover the same text with alignments={{{name!r}: Alignment(tokens, "
                "student_ends, ends, same)}"
            )
            raise UserError(
                f"{name} has {other[1]} tokens where the student has {shape[1]}: {asked}"
            )
        mine, theirs = (torch.arange(n).expand(len(self.tokens), -1) for n in (shape[1], other[1]))
        return Alignment(torch.zeros(other, dtype=torch.int64), mine, theirs, shared=other == shape)

    def run(
        self,
        objective: Objective,
        parts: Sequence[Sequence[int]] | None = None,
        chunk: int | None = None,
        rows: Sequence[int] | None = None,
        companions: Companions | None = None,
    ) -> Evaluation:
        """One optimiser step's loss and gradient, on `rows` of the step (default all), in
        micro-batches of rows `parts` (default one), `chunk` positions at a time; with `companions`
        as they are, not at their start.
        """
        batch = self.batch(objective, chunk, companions)
        plan = objective.plan(batch, None if rows is None else torch.tensor(rows))
        leaf = self.student.to(batch.dtype).clone().requires_grad_()
        head = batch.sources["student"].head
        loss = torch.zeros((), dtype=batch.dtype)
        sums = torch.zeros(len(objective.terms), dtype=batch.dtype)
        for rows in parts or [range(len(self.tokens))]:
            inside = torch.zeros(len(self.tokens), 1, dtype=torch.bool)
            inside[list(rows)] = True
            positions = flat_positions(plan.selected & inside)
            learned = learn(plan, positions, leaf.flatten(0, 1)[positions], head, chunk)
            loss, sums = loss + learned.loss, sums + learned.parts
        owned = batch.companions.parameters
        grad, *slopes = torch.autograd.grad(loss, [leaf, *owned])
        for parameter, slope in zip(owned, slopes):
            parameter.grad = slope
        terms = []
        for part, value in zip(plan.parts, sums):
            credit = credit_of(part.term.loss)
            shown = None if credit is None else credit(batch).expand(batch.shape).to(batch.dtype)
            terms.append(TermOut(part.name, part.weight, shown, part.denominator, value))
        grad = grad.to(self.student.dtype)
        return Evaluation(loss.detach(), grad, tuple(terms), batch.companions)


def _by_number(wanted: Needs, model: str) -> bool:
    """Whether a model is only compared token by token, by their numbers, whatever they are."""
    return {getattr(fact, "merge", None) for fact in wanted.of(model)} == {"index"}


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _numbers(rows: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Columns of a kind, [B] numbers each: `name[0]`, `name[1]` ... of one that holds lists."""
    flat: dict[str, Any] = {}
    for name, values in rows.items():
        every = [x.tolist() if hasattr(x, "tolist") else x for x in values]
        wide = max((len(x) for x in every if isinstance(x, Sequence)), default=0)
        if not wide:
            flat[name] = [math.nan if x is None else x for x in every]
        for i in range(wide):
            said = [x[i] if isinstance(x, Sequence) and i < len(x) else None for x in every]
            flat[f"{name}[{i}]"] = [math.nan if x is None else x for x in said]
    return {f"{kind}:{name}": values for name, values in flat.items()}


def _columns(
    columns: Mapping[str, Any], marks: Mapping[str, Any], dtype: torch.dtype
) -> dict[Fact, Tensor]:
    """Columns [B] and marks [B, T] as facts; `correct`, where it is not given, is reward > 0."""
    facts: dict[Fact, Tensor] = {}
    for name, values in columns.items():
        kind = {"group": torch.int64, "turn": torch.int64, "correct": torch.bool}.get(name, dtype)
        facts[ColumnFact(name)] = torch.as_tensor(values, dtype=kind)
    named = [x for fact, x in facts.items() if fact.words().startswith("reward:")]
    if named and "reward" not in columns:
        facts[ColumnFact("reward")] = torch.stack(named).nansum(0)
    if ColumnFact("reward") in facts and "correct" not in columns:
        facts[ColumnFact("correct")] = facts[ColumnFact("reward")] > 0
    for name, values in marks.items():
        facts[ColumnFact(f"mark:{name}")] = torch.as_tensor(values).bool()
    return facts
