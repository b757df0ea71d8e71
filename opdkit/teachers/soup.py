"""Several checkpoints of one shape as one model: the average of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdkit.base.errors import UserError
from opdkit.models.held import Held
from opdkit.models.identity import Identity, identify, identify_together
from opdkit.models.shapes import Shape
from opdkit.models.sharding import shard_frozen
from opdkit.objective.facts import Fact
from opdkit.teachers.base import Scorer
from opdkit.teachers.context import TeacherContext
from opdkit.teachers.local import LocalModel, LocalTeacher
from opdkit.teachers.teacher import Teacher


@dataclass(frozen=True)
class SoupTeacher(Teacher):
    """A model whose every weight is the weighted mean of those of several checkpoints (model
    soup): `soup:A,B`, or {kind: soup, of: [A, B], weights: [0.7, 0.3]}.
    """

    kind = "soup"
    main = "of"
    of: tuple[str, ...]  # folders or hub names, of one architecture and shape
    weights: tuple[float, ...] | None = None  # in their order; null: as `others` says
    # the share of all but the first, in equal parts; null: all have equal ones
    others: float | None = None
    dtype: str | None = None  # null: the run's teacher_dtype

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        return {"of": [name.strip() for name in text.split(",")]}

    def __post_init__(self) -> None:
        if len(set(self.of)) < 2:
            raise ValueError(
                f"of={list(self.of)} must name at least two checkpoints to average: of one the "
                "mean is itself, and that is named without soup"
            )
        if self.weights is not None and (
            len(self.weights) != len(self.of)
            or any(w < 0 for w in self.weights)
            or not 0 < sum(self.weights) < math.inf
        ):
            raise ValueError(
                f"weights={list(self.weights)} must be a number for each of the {len(self.of)} "
                "checkpoints, none negative and not all zero"
            )

        if self.others is not None and not 0 <= self.others <= 1:
            raise ValueError(
                f"others={self.others} must lie in [0, 1]: it is the share of all checkpoints but "
                "the first"
            )

    @property
    def opens_local_model(self) -> bool:
        return True

    @property
    def shares(self) -> tuple[float, ...]:
        """Their weights, summing to 1."""
        if self.weights is None and self.others is not None:
            rest = len(self.of) - 1
            return (1 - self.others, *(self.others / rest,) * rest)
        given = self.weights or (1.0,) * len(self.of)
        return tuple(w / sum(given) for w in given)

    def _member(self, number: int, dtype: str | None = None) -> Any:
        return LocalTeacher(self.of[number], dtype or self.dtype)

    def says(self, fact: Fact, model: str) -> bool:
        return True

    def check(self, context: TeacherContext) -> None:
        for number in range(len(self.of)):
            self._member(number).check(replace(context, given=None, by_ids=True))

    def ends(self, context: TeacherContext) -> frozenset[int]:
        return self._member(0).ends(replace(context, given=None))

    def open(self, context: TeacherContext) -> Scorer:
        return context.once(repr(self), lambda: self._open(replace(context, given=None)))

    @torch.no_grad()
    def _open(self, context: TeacherContext) -> LocalModel:
        """The first checkpoint, in which the weighted mean of all is put, that is taken in float32;
        what is no floating-point number in it stays.
        """
        inside = replace(context, by_ids=True, devices=None)
        total: dict[str, Any] = {}
        for number in range(len(self.of)):
            single = replace(inside, device="cpu", opened={})  # of its own: the next is not beside
            member = self._member(number, "float32").load(single).model
            self._add(total, number, member.state_dict())
        local = self._member(0).load(replace(inside, opened={}))
        for name, weight in local.model.state_dict().items():
            if weight.is_floating_point():
                weight.copy_(total[name])
        shard_frozen(local.model, context.devices)
        return self._member(0).cut_to_student(local, context)

    def _add(self, total: dict[str, Any], number: int, weights: Any) -> None:
        """Adds a checkpoint's share to the weights [...] by name, of which all must have the same,
        in shape too.
        """
        name, share = self.of[number], self.shares[number]
        shapes = {n: tuple(w.shape) for n, w in total.items()}
        theirs = {n: tuple(w.shape) for n, w in weights.items()}
        if total and shapes != theirs:
            other = sorted(
                n for n in shapes.keys() | theirs.keys() if shapes.get(n) != theirs.get(n)
            )
            raise UserError(
                f"{name} is no checkpoint of the same shape as {self.of[0]}: {other[0]} is "
                f"{theirs.get(other[0], 'absent')} there and {shapes.get(other[0], 'absent')} "
                "here. Only weights of one architecture can be averaged"
            )
        for n, weight in weights.items():
            part = share * weight.float()
            total[n] = total[n].add_(part) if n in total else part

    def held(self, role: str, dtype: str, shape_of: Callable[[str], Shape]) -> list[Held]:
        return [
            replace(held, name="average of " + ", ".join(self.of))
            for held in self._member(0).held(role, dtype, shape_of)
        ]

    def identity(self) -> Identity:
        return identify_together({n: identify(n) for n in self.of}, list(self.shares))

    def precision(self, usual: str) -> str:
        return self.dtype or usual
