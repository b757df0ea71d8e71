"""A model in this process. It hands over hidden states, never logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.models.layout import Layout, batch_tokens
from opdkit.models.load import evaluating
from opdkit.models.offload import STUDENT_ADVICE, TEACHER_ADVICE, enough_memory
from opdkit.objective.head import Head, Source


@dataclass(frozen=True)
class LocalModel:
    """A frozen Hugging Face model: a teacher, a reference, or the student as it is now.

    `around` is a context for its passes, such as one that switches the student's adapters off, or
    `offload.Offloaded`.
    """

    model: Any
    head: Head
    # padded tokens of one pass; None: `models.layout.batch_tokens`
    micro_batch_tokens: int | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def heads(self) -> list[Head]:
        return [self.head]

    def cut(self, vocab: int | None) -> LocalModel:
        """The same model, its head kept to the first rows."""
        return replace(self, head=replace(self.head, vocab=vocab))

    def source(self, layout: Layout, positions: Tensor) -> Source:
        """Hidden states at flat positions [N]; the model's mode, gradients and random state are
        left as they were.
        """
        parts = layout.micro_batches(
            positions, self.micro_batch_tokens or batch_tokens(positions.device)
        )
        advice = (
            STUDENT_ADVICE
            if any(p.requires_grad for p in self.model.parameters())
            else TEACHER_ADVICE
        )
        memory = enough_memory(
            f"{self.model.config._name_or_path or type(self.model).__name__} scored rollouts",
            advice,
        )
        with memory, evaluating(self.model), torch.no_grad(), self.around():
            hidden = [layout.states(self.model, part) for part in parts]
        for part, states in zip(parts, hidden):
            self._refuse_broken(layout, part, states)
        index = torch.full(
            (len(layout.rollouts) * layout.width,), -1, dtype=torch.int64, device=positions.device
        )
        if not parts:
            weight = self.head.weight
            return Source(
                torch.zeros(0, 0 if weight is None else weight.shape[1], device=positions.device),
                index,
                self.head,
            )
        index[torch.cat(parts)] = torch.arange(len(positions), device=positions.device)
        return Source(torch.cat(hidden), index, self.head)

    def _refuse_broken(self, layout: Layout, positions: Tensor, states: Tensor) -> None:
        """Hidden states that are not numbers would spread into every weight of the student."""
        bad = ~states.isfinite().all(-1)
        if bool(bad.any()):
            # attention spreads it over the whole row
            row = int(positions[bad.to(positions.device)].min()) // layout.width
            raise UserError(
                f"{self.model.config._name_or_path or type(self.model).__name__} gives hidden "
                f"states that are not finite for rollout {layout.rollouts[row].id}: its files are "
                "damaged, or its dtype is too narrow. Nothing was learnt from this step; check the "
                "model, or load it in float32"
            )
