"""The rules that every method must keep, each tried on made-up rollouts in float64."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.methods.method import Method, as_method, load
from opdkit.objective.alignment import OUT, Alignment
from opdkit.objective.companion import Companions, Stepped
from opdkit.objective.grammar import Objective
from opdkit.testing.case import AnyObjective, Case, Evaluation
from opdkit.testing.fabricate import KEYS, fabricate
from opdkit.types import MARK_OF

Change = Callable[[Tensor], Tensor]  # of a tensor [B, T, ...], into one of as many dimensions

TOLERANCE = 1e-9  # relative, float64: the sums run in another order, nothing else differs
FLOAT32 = 1e-3  # relative: many roundings of 6e-8 of logits that are not small


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


@dataclass(frozen=True)
class Subject:
    """A method with rollouts to try it on, and what it makes of them."""

    method: Method
    case: Case
    out: Evaluation

    @property
    def objective(self) -> Objective:
        return self.method.objective

    def run(self, case: Case | None = None, **how: Any) -> Evaluation:
        """What the method makes of these or of other rollouts; see `Case.run`."""
        return (case or self.case).run(self.objective, **how)

    def same(self, other: Evaluation, tolerance: float = TOLERANCE) -> bool:
        """Whether an evaluation has the same loss and gradient [B, T, V], and the same gradients of
        what stands beside the student.
        """

        def close(a: Tensor, b: Tensor) -> bool:  # [...], [...]
            return (a - b).norm().item() <= tolerance * max(a.norm().item(), 1e-30)

        near = close(self.out.grad, other.grad) and all(
            close(a, b.to(a.dtype)) for a, b in zip(slopes(self.out), slopes(other), strict=True)
        )
        scale = max(1.0, abs(self.out.loss.item()))
        return near and abs((self.out.loss - other.loss).item()) <= tolerance * scale


def check(method: AnyObjective, seed: int = 0) -> Report:
    """The tests every method must pass, on random logits in float64: raises `CheckFailed` with the
    report, else returns it.

    The gradient does not depend on micro-batches, whether they follow the groups or not, on
    padding, row order, chunks or padded vocabulary; untrained tokens, and those that others wrote
    where no term asks for them, have none and cannot spoil it; it is finite, also in float32, for
    equal rewards, at another step of the run and on a part of the rollouts; it is blind to a
    constant added to all logits, and the same when asked twice; an empty batch is a zero.
    What stands beside the student has such gradients too, and continues where it was saved.
    """
    made = as_method(method)
    case = fabricate(made.objective, seed, actions=made.actions)
    subject = Subject(made, case, case.run(made.objective))
    passed: list[str] = []
    failed: list[str] = []
    for name, keeps in RULES.items():
        try:
            kept = keeps(subject)
            if kept is not None:
                (passed if kept else failed).append(name)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    agreed = fabricate(made.objective, seed, True, made.actions).run(made.objective)
    notes = (
        f"teacher == student: gradient norm {agreed.grad.norm().item():.3g}",
        f"reads {made.needs}",
    )
    report = Report(made, tuple(passed), tuple(failed), notes)
    if failed:
        raise CheckFailed(str(report))
    return report


# ------------------------------------------------------------------------------ one function a rule


def slopes(out: Evaluation) -> list[Tensor]:
    """The gradients [...] of the parameters that stand beside the student."""
    return [p.grad for p in out.companions.parameters if p.grad is not None]


def _finite(out: Evaluation) -> bool:
    return all(bool(x.isfinite().all()) for x in (out.loss, out.grad, *slopes(out)))


def _chunks(of: Subject) -> bool:
    return all(of.same(of.run(chunk=c)) for c in (1, 5, 10_000))


def _order(of: Subject) -> bool:
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    moved = _changed(of.case, lambda x: x[order])
    columns = {k: torch.as_tensor(v)[order] for k, v in of.case.columns.items()}
    out = of.run(replace(moved, columns=columns, settings={**moved.settings, "keys": KEYS[order]}))
    back = torch.empty_like(out.grad)
    back[order] = out.grad
    return of.same(replace(out, grad=back))


def _padding(of: Subject) -> bool:
    def wider(x: Tensor) -> Tensor:  # [B, T, ...] to [B, T + 3, ...]
        return torch.cat([x, x[:, :3]], 1)  # real values where the mask says nothing is

    padded = _changed(of.case, wider, ends=lambda x: torch.nn.functional.pad(x, (0, 3), value=-1))
    width = of.case.tokens.shape[1]
    mask = _mask(padded).clone()
    mask[:, width:] = False
    out = of.run(replace(padded, mask=mask))
    inside = replace(out, grad=out.grad[:, :width])
    return of.same(inside) and bool((out.grad[:, width:] == 0).all())


def _padded_vocabulary(of: Subject) -> bool:
    """Two entries more on every model but the student: they only pad the matrix, and are cut."""
    if not of.case.models:
        return True
    models = {k: torch.nn.functional.pad(v, (0, 2), value=0.0) for k, v in of.case.models.items()}
    return of.same(of.run(replace(of.case, models=models)))


def _untrained(of: Subject) -> bool:
    return bool((of.out.grad[~_mask(of.case)] == 0).all())


def _not_a_number(of: Subject) -> bool:
    """NaN logits at untrained tokens, and at another tokenizer's that stand for no text."""
    outside = ~_mask(of.case)[..., None]

    def spoil(x: Tensor) -> Tensor:  # [B, T, V]
        return torch.where(outside, torch.tensor(float("nan"), dtype=x.dtype), x)

    spoilt = _changed(of.case, lambda x: x, spoil)
    aligned = {
        k: spoilt.models[k].masked_fill((a.ends == OUT)[..., None], float("nan"))
        for k, a in of.case.alignments.items()
    }
    return of.same(of.run(replace(spoilt, models={**spoilt.models, **aligned})))


def _constant(of: Subject) -> bool | None:
    if of.method.needs.hidden:  # hidden states, which here are the logits, may be moved so
        return None
    return bool(of.out.grad.sum(-1).abs().max() < TOLERANCE)


def _nothing(of: Subject) -> bool:
    out = of.run(replace(of.case, mask=torch.zeros_like(_mask(of.case))))
    return out.loss.item() == 0 and bool((out.grad == 0).all())


def _empty_response(of: Subject) -> bool:
    written = (torch.arange(len(of.case.tokens)) != 2)[:, None]
    return _finite(of.run(replace(of.case, mask=_mask(of.case) & written)))


def _micro_batches(of: Subject) -> bool:
    """Along the two groups, across them, and row by row."""
    cuts = ([[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]], [[i] for i in range(6)])
    return all(of.same(of.run(parts=parts)) for parts in cuts)


def _minibatches(of: Subject) -> bool:
    """An optimiser step on one group: nothing is learnt from the other, in whatever order and parts
    its rollouts come.
    """
    out = of.run(rows=[3, 4, 5])
    again = Subject(of.method, of.case, out).same(of.run(rows=[5, 3, 4], parts=[[4], [5, 3]]))
    return again and _finite(out) and bool((out.grad[:3] == 0).all())


def _first_update(of: Subject) -> bool:
    """Rollouts that the student has just written: before any update nothing has drifted."""
    fresh = replace(of.case, before=None, sampler=None)
    out = of.run(fresh)
    return _finite(out) and Subject(of.method, fresh, out).same(
        of.run(fresh, parts=[[0, 4], [1, 2, 3, 5]])
    )


def _other_steps(of: Subject) -> bool:
    """What is read from some step on was found and gathered as well."""
    every = ({"step": 0}, {"step": 9}, {"step": 5_000, "total_steps": 10_000})
    cases = [replace(of.case, settings={**of.case.settings, **at}) for at in every]
    return all(_finite(of.run(case)) for case in cases)


def _equal_rewards(of: Subject) -> bool:
    rewards = {k: torch.full((6,), 0.7).double() for k in of.case.columns if k == "reward"}
    return _finite(of.run(replace(of.case, columns={**of.case.columns, **rewards})))


def _float32(of: Subject) -> bool:
    """The same to the digits that float32 holds, as far as no choice between tokens turns on
    them.
    """

    def narrow(x: Tensor) -> Tensor:
        return x.float()

    case = of.case
    case = replace(
        case,
        student=narrow(case.student),
        models={k: narrow(v) for k, v in case.models.items()},
        before=None if case.before is None else narrow(case.before),
        sampler=None if case.sampler is None else narrow(case.sampler),
    )
    beside = of.run(case).companions
    beside.load_state_dict(of.out.companions.state_dict())
    out = of.run(case, companions=beside)
    return _finite(out) and of.same(replace(out, grad=out.grad.double()), FLOAT32)


def _written_by_others(of: Subject) -> bool:
    """Tokens that others wrote are as if they were not trained, unless a term asks for them."""
    asked = {author for term in of.objective.terms for author in term.whose}
    third = (torch.arange(of.case.tokens.shape[1]) % 3 == 1).expand(of.case.tokens.shape)
    for author, mark in MARK_OF.items():
        if author in asked or mark in of.case.marks:
            continue
        marked = of.run(replace(of.case, marks={**of.case.marks, mark: third}))
        without = of.run(replace(of.case, mask=_mask(of.case) & ~third))
        if not Subject(of.method, of.case, without).same(marked, 0.0):
            return False
    return True


def _continues(of: Subject) -> bool:
    """Two optimiser steps, with what stands beside the student saved and loaded between them."""
    if not of.method.needs.companions:
        return True

    def stepped(companions: Companions, updates: int) -> Companions:
        out = of.run(companions=companions)
        mask = _mask(of.case)
        companions.after_step(Stepped(of.case.batch(of.objective), mask, (), updates))
        return out.companions

    unbroken = stepped(of.run().companions, 1)
    saved = io.BytesIO()
    torch.save(unbroken.state_dict(), saved)
    saved.seek(0)
    resumed = of.run().companions
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    states = [stepped(companions, 2).state_dict() for companions in (unbroken, resumed)]
    return _equal(*states)


def _equal(a: Any, b: Any) -> bool:
    """Whether nested states are the same, to the bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return [*a] == [*b] and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _value_like(of: Subject) -> bool:
    method = of.method
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


# None: the rule says nothing of such a method
RULES: dict[str, Callable[[Subject], bool | None]] = {
    "loss and gradient are finite": lambda of: _finite(of.out),
    "some gradient reaches the student": lambda of: bool(of.out.grad.abs().sum() > 0),
    "asked twice, the answer is the same": lambda of: of.same(of.run(), 0.0),
    "micro-batches do not change it": _micro_batches,
    "an optimiser step on some rollouts learns from these": _minibatches,
    "rollouts just written are learnt from": _first_update,
    "other steps of the run read nothing else": _other_steps,
    "equal rewards are no trouble": _equal_rewards,
    "float32 gives the same in its digits": _float32,
    "tokens that others wrote are passed over": _written_by_others,
    "chunks do not change it": _chunks,
    "row order does not change it": _order,
    "padding does not change it": _padding,
    "padded vocabulary does not change it": _padded_vocabulary,
    "untrained tokens have no gradient": _untrained,
    "infinite or NaN scores of untrained tokens stay there": _not_a_number,
    "a constant added to all logits changes nothing": _constant,
    "nothing trained is a loss of zero": _nothing,
    "an empty response is passed over": _empty_response,
    "state beside the student continues where it was saved": _continues,
    "hashable, comparable, copied and pickled": _value_like,
}


# ----------------------------------------------------------------------------------- other rollouts


def _mask(case: Case) -> Tensor:
    """[B, T] bool: the trained tokens."""
    return torch.ones_like(case.tokens, dtype=torch.bool) if case.mask is None else case.mask


def _changed(
    case: Case, change: Change, logits: Change | None = None, ends: Change | None = None
) -> Case:
    """The case with every tensor of its rollouts changed; logits over the student's tokens, and
    ends of tokens, by their own functions.
    """
    wide, end = logits or change, ends or change
    settings = dict(case.settings)
    if case.settings.get("uniform") is not None:
        settings["uniform"] = change(case.settings["uniform"])
    return replace(
        case,
        tokens=change(case.tokens),
        student=wide(case.student),
        mask=change(_mask(case)),
        models={k: change(v) if k in case.alignments else wide(v) for k, v in case.models.items()},
        before=None if case.before is None else wide(case.before),
        sampler=None if case.sampler is None else wide(case.sampler),
        marks={k: change(torch.as_tensor(v)) for k, v in case.marks.items()},
        settings=settings,
        alignments={
            k: Alignment(change(a.tokens), end(a.student_ends), end(a.ends), a.same)
            for k, a in case.alignments.items()
        },
    )
