"""Evaluate an objective on plain logits, and the tests every method must pass.

The code is the one that training runs.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.methods.method import Method, as_method, load
from opdkit.objective.alignment import EOS, OUT, AlignedSource, Alignment
from opdkit.objective.batch import Batch
from opdkit.objective.facts import ColumnFact, Fact
from opdkit.objective.grammar import Loss, Objective, Term, credit_of
from opdkit.objective.head import Head, Source, flat_positions, learn
from opdkit.objective.needs import Needs, needs
from opdkit.objective.supply import supply
from opdkit.types import row_keys

AnyObjective = str | Method | Objective | Term | Loss
Change = Callable[[Tensor], Tensor]


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
) -> Evaluation:
    """Loss, gradient and terms of an objective, from logits [B, T, V] and sampled tokens [B, T].

    mask [B, T] bool, the trained tokens (default all). models: logits [B, T, V] by name, "teacher",
    "reference" or any other. before_logits: the student before this step (default: student_logits);
    sampler_logits: the policy that sampled (default: before_logits). group, reward, correct [B];
    correct defaults to reward > 0. marks: {"guided": [B, T]}. uniform [B, T] replaces the keyed
    draws. Vocabularies of different size are cut to the smallest: what is beyond only pads. Float64
    in, float64 through.

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
        columns={
            k: v
            for k, v in (("group", group), ("reward", reward), ("correct", correct))
            if v is not None
        },
        marks=marks or {},
        settings={"step": step, "total_steps": total_steps, "uniform": uniform, "seed": seed},
        alignments=alignments or {},
    )
    return case.run(as_method(method_or_objective).objective)


@dataclass(frozen=True)
class Case:
    """A step's worth of logits and what is known of its rollouts."""

    tokens: Tensor
    student: Tensor
    mask: Tensor | None = None
    models: Mapping[str, Tensor] = field(default_factory=dict)
    before: Tensor | None = None
    sampler: Tensor | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    marks: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    alignments: Mapping[str, Alignment] = field(default_factory=dict)

    def batch(self, objective: Objective, chunk: int | None = None) -> Batch:
        """The facts of the objective's needs."""
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
                name: _source(x.to(wide), None if name in apart else vocabulary)
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
        batch.facts.update(supply(batch, wanted.facts, flat_positions(mask), chunk))
        return batch

    def _alignment(self, name: str, wanted: Needs) -> Alignment:
        """As given; else token by token."""
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
                f"student_ends, ends, same)}}"
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
    ) -> Evaluation:
        """One optimiser step's loss and gradient, in micro-batches of rows `parts` (default one),
        `chunk` positions at a time.
        """
        batch = self.batch(objective, chunk)
        plan = objective.plan(batch)
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
        (grad,) = torch.autograd.grad(loss, leaf)
        terms = []
        for part, value in zip(plan.parts, sums):
            credit = credit_of(part.term.loss)
            shown = None if credit is None else credit(batch).expand(batch.shape).to(batch.dtype)
            terms.append(TermOut(part.name, part.weight, shown, part.denominator, value))
        return Evaluation(loss.detach(), grad.to(self.student.dtype), tuple(terms))


def _source(logits: Tensor, vocabulary: int | None) -> Source:
    """Logits [B, T, V] as a model; entries beyond the vocabulary are cut."""
    return Source(
        logits.flatten(0, 1),
        torch.arange(logits.shape[0] * logits.shape[1]),
        Head(vocab=vocabulary),
    )


def _by_number(wanted: Needs, model: str) -> bool:
    """Whether a model is only compared token by token, by their numbers, whatever they are."""
    return {getattr(fact, "merge", None) for fact in wanted.of(model)} == {"index"}


def _columns(
    columns: Mapping[str, Any], marks: Mapping[str, Any], dtype: torch.dtype
) -> dict[Fact, Tensor]:
    facts: dict[Fact, Tensor] = {}
    for name, values in columns.items():
        facts[ColumnFact(name)] = torch.as_tensor(values).to(
            {"group": torch.int64, "correct": torch.bool}.get(name, dtype)
        )
    if "reward" in columns and "correct" not in columns:
        facts[ColumnFact("correct")] = facts[ColumnFact("reward")] > 0
    for name, values in marks.items():
        facts[ColumnFact(f"mark:{name}")] = torch.as_tensor(values).bool()
    return facts


# -------------------------------------------------------------------------------------------- check


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    method: Method
    passed: tuple[str, ...]
    failed: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = (
            [f"  pass  {x}" for x in self.passed]
            + [f"  FAIL  {x}" for x in self.failed]
            + [f"  note  {x}" for x in self.notes]
        )
        return "\n".join([f"{self.method.name or 'objective'}: {self.method}", *lines])


class CheckFailed(AssertionError):
    """A method breaks one of the rules that all must keep."""


TOLERANCE = 1e-9  # relative, float64: the sums run in another order, nothing else differs


def check(method: AnyObjective, seed: int = 0) -> Report:
    """The tests every method must pass, on random logits in float64: raises `CheckFailed` with the
    report, else returns it.

    The gradient does not depend on micro-batches, padding, row order, chunks or padded vocabulary;
    untrained tokens have none and cannot spoil it; it is finite, blind to a constant added to all
    logits, and the same when asked twice; an empty batch is a zero.
    """
    made = as_method(method)
    objective = made.objective
    case = fabricate(objective, seed)
    base = case.run(objective)
    checks: list[tuple[str, Callable[[], bool]]] = [
        ("loss and gradient are finite", lambda: _finite(base)),
        ("some gradient reaches the student", lambda: bool(base.grad.abs().sum() > 0)),
        ("asked twice, the answer is the same", lambda: _equal(base, case.run(objective), 0.0)),
        (
            "micro-batches do not change it",
            lambda: _equal(base, case.run(objective, [[0, 1, 2], [3, 4, 5]])),
        ),
        (
            "chunks do not change it",
            lambda: all(_equal(base, case.run(objective, chunk=c)) for c in (1, 5, 10_000)),
        ),
        ("row order does not change it", lambda: _order(case, objective, base)),
        ("padding does not change it", lambda: _padding(case, objective, base)),
        ("padded vocabulary does not change it", lambda: _padded_vocabulary(case, objective, base)),
        ("untrained tokens have no gradient", lambda: bool((base.grad[~_mask(case)] == 0).all())),
        (
            "infinite or NaN scores of untrained tokens stay there",
            lambda: _poison(case, objective, base),
        ),
        (
            "a constant added to all logits changes nothing",
            lambda: bool(base.grad.sum(-1).abs().max() < TOLERANCE),
        ),
        ("nothing trained is a loss of zero", lambda: _nothing(case, objective)),
        (
            "an empty response is passed over",
            lambda: _finite(
                _with_mask(case, _mask(case) & (torch.arange(6) != 2)[:, None]).run(objective)
            ),
        ),
        ("hashable, comparable, copied and pickled", lambda: _value_like(made)),
    ]
    passed: list[str] = []
    failed: list[str] = []
    for name, test in checks:
        try:
            (passed if test() else failed).append(name)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    same = fabricate(objective, seed, agree=True).run(objective)
    notes = (
        f"teacher == student: gradient norm {same.grad.norm().item():.3g}",
        f"reads {made.needs}",
    )
    report = Report(made, tuple(passed), tuple(failed), notes)
    if failed:
        raise CheckFailed(str(report))
    return report


def fabricate(objective: Objective, seed: int = 0, agree: bool = False) -> Case:
    """Six rollouts of two prompts with ragged lengths, a hole in the mask, and every model and
    column the objective reads.

    With `agree` all models are the student itself.
    """
    rows, length, vocabulary = 6, 7, 131  # more entries than the largest k among the defaults
    g = torch.Generator().manual_seed(seed)

    def logits(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(rows, length, vocabulary, generator=g, dtype=torch.float64)

    wanted = needs(objective)
    before = logits()
    drift = 0.0 if agree else 0.2
    student, sampler = before + drift * logits(), before + drift * logits()
    models = {
        m: before if agree else logits()
        for m in sorted(wanted.models - {"student", "sampler", "live"})
    }
    columns: dict[str, Any] = {
        "group": [0, 0, 0, 1, 1, 1],
        "reward": [1.0, 0.0, 1.0, 0.0, 0.0, 1.0],
    }
    columns |= {
        name: torch.rand(rows, generator=g).double()
        for name in sorted(wanted.columns)
        if name.startswith("row:")
    }
    lengths = torch.tensor([7, 4, 1, 6, 7, 3])
    mask = torch.arange(length) < lengths[:, None]
    mask[0, 2] = False  # a tool's token
    marks = {
        n.partition(":")[2]: (torch.arange(length) < 2) & (torch.arange(rows) % 3 == 0)[:, None]
        for n in wanted.columns
        if "mark:" in n
    }
    tokens = torch.randint(vocabulary, (rows, length), generator=g)
    alignments = {
        m: _fabricated(lengths, length, vocabulary, g)
        for m in models
        if wanted.spans(m) and not agree
    }
    for m, a in alignments.items():
        models[m] = torch.randn(*a.tokens.shape, len(a.same), generator=g, dtype=torch.float64)  # type: ignore[arg-type]
    settings = {"step": 3, "total_steps": 10, "seed": seed, "keys": KEYS}
    return Case(
        tokens, student, mask, models, before, sampler, columns, marks, settings, alignments
    )


def _fabricated(lengths: Tensor, length: int, vocabulary: int, g: torch.Generator) -> Alignment:
    """Another tokenizer on rollouts of `lengths`, every other one with an end of sequence: longer
    and shorter tokens, other ids.
    """
    rows, others, known = len(lengths), length + 2, vocabulary - 30
    closed, column = torch.arange(rows)[:, None] % 2 == 1, torch.arange(others)
    written = column < (lengths[:, None] - closed.long())
    mine = (
        torch.randint(1, 4, (rows, others), generator=g).cumsum(1).where(written, torch.tensor(OUT))
    )
    theirs = (
        torch.randint(1, 4, (rows, others), generator=g)
        .cumsum(1)
        .minimum(total := mine.amax(1, keepdim=True))
    )
    theirs[:, 1:] = theirs[:, 1:].where(theirs[:, :-1] < total, torch.tensor(OUT))
    for ends in (mine, theirs):
        ends[closed & (column == (ends >= 0).sum(1, keepdim=True))] = EOS
    same = torch.randperm(vocabulary, generator=g)[:known].masked_fill(
        torch.arange(known) % 3 == 0, -1
    )
    return Alignment(
        torch.randint(known, (rows, others), generator=g), mine[:, :length], theirs, same
    )


KEYS = row_keys(f"0/{i // 3}/{i % 3}" for i in range(6))


def _mask(case: Case) -> Tensor:
    return torch.ones_like(case.tokens, dtype=torch.bool) if case.mask is None else case.mask


def _finite(out: Evaluation) -> bool:
    return bool(out.loss.isfinite() and out.grad.isfinite().all())


def _equal(a: Evaluation, b: Evaluation, tolerance: float = TOLERANCE) -> bool:
    size = max(a.grad.norm().item(), 1e-30)
    near = (a.grad - b.grad).norm().item() <= tolerance * size
    return near and abs((a.loss - b.loss).item()) <= tolerance * max(1.0, abs(a.loss.item()))


def _map(
    case: Case, change: Change, logits: Change | None = None, ends: Change | None = None
) -> Case:
    """The case with every tensor of its rollouts changed; logits over the student's tokens, and
    ends of tokens, by their own functions.
    """
    wide, end = logits or change, ends or change
    settings = dict(case.settings)
    if case.settings.get("uniform") is not None:
        settings["uniform"] = change(case.settings["uniform"])
    return Case(
        change(case.tokens),
        wide(case.student),
        change(_mask(case)),
        {k: change(v) if k in case.alignments else wide(v) for k, v in case.models.items()},
        None if case.before is None else wide(case.before),
        None if case.sampler is None else wide(case.sampler),
        case.columns,
        {k: change(torch.as_tensor(v)) for k, v in case.marks.items()},
        settings,
        {
            k: Alignment(change(a.tokens), end(a.student_ends), end(a.ends), a.same)
            for k, a in case.alignments.items()
        },
    )


def _with_mask(case: Case, mask: Tensor) -> Case:
    changed = copy.copy(case)
    object.__setattr__(changed, "mask", mask)
    return changed


def _order(case: Case, objective: Objective, base: Evaluation) -> bool:
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    moved = _map(case, lambda x: x[order])
    columns = {k: torch.as_tensor(v)[order] for k, v in case.columns.items()}
    settings = {**moved.settings, "keys": KEYS[order]}
    out = Case(**{**vars(moved), "columns": columns, "settings": settings}).run(objective)
    back = torch.empty_like(out.grad)
    back[order] = out.grad
    return _equal(base, Evaluation(out.loss, back, out.terms))


def _padding(case: Case, objective: Objective, base: Evaluation) -> bool:
    def wider(x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :3]], 1)  # real values where the mask says nothing is

    padded = _map(case, wider, ends=lambda x: torch.nn.functional.pad(x, (0, 3), value=-1))
    mask = _mask(padded).clone()
    mask[:, case.tokens.shape[1] :] = False
    out = _with_mask(padded, mask).run(objective)
    width = case.tokens.shape[1]
    return _equal(base, Evaluation(out.loss, out.grad[:, :width], out.terms)) and bool(
        (out.grad[:, width:] == 0).all()
    )


def _padded_vocabulary(case: Case, objective: Objective, base: Evaluation) -> bool:
    """Two rows more on every model but the student's: they are cut, as they pad the matrix only."""
    if not case.models:
        return True
    models = {k: torch.nn.functional.pad(v, (0, 2), value=0.0) for k, v in case.models.items()}
    return _equal(base, Case(**{**vars(case), "models": models}).run(objective))


def _poison(case: Case, objective: Objective, base: Evaluation) -> bool:
    outside = ~_mask(case)[..., None]

    def spoil(x: Tensor) -> Tensor:
        return torch.where(outside, torch.tensor(float("nan"), dtype=x.dtype), x)

    spoilt = _map(case, lambda x: x, spoil)
    away = {
        k: spoilt.models[k].masked_fill((a.ends == OUT)[..., None], float("nan"))
        for k, a in case.alignments.items()
    }
    return _equal(
        base, Case(**{**vars(spoilt), "models": {**spoilt.models, **away}}).run(objective)
    )


def _nothing(case: Case, objective: Objective) -> bool:
    out = _with_mask(case, torch.zeros_like(_mask(case))).run(objective)
    return out.loss.item() == 0 and bool((out.grad == 0).all())


def _value_like(method: Method) -> bool:
    twin = (
        pickle.loads(pickle.dumps(method))
        if method.name in ("", "own") or ":" in method.name
        else load(method.name, **dict(method.arguments))
    )
    return (
        hash(twin) == hash(method)
        and twin == method
        and copy.deepcopy(method) == method
        and bool(str(method))
    )
