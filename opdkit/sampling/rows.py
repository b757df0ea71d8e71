"""The batch that the sampler in this process decodes: rollouts that wait, rows that run, and what
was noted of their tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from opdkit.sampling.kv_cache import join, pad_left, select, shrink, taken
from opdkit.types import Notes, Prompt

if TYPE_CHECKING:
    from transformers import DynamicCache

# of the columns have to be padding for all rows before they are cut off, which copies the cache
TRIM_SHARE = 0.125
OF_ROWS = ("row", "count", "begun", "token", "tail")  # what a row has besides its columns


@dataclass(frozen=True)
class Unit:
    """Completions of one prompt that are prefilled once."""

    prompt: Prompt
    rows: range  # rollouts


@dataclass
class Rows:
    """The running batch: row b is rollout `row[b]`; its columns end with the last token fed."""

    caches: list[DynamicCache]  # the student's, and the guide's where there is one
    mask: Tensor  # [B, C] bool: the columns that hold a token, aligned on the right
    padded: bool  # whether any does not
    row: Tensor  # [B]
    length: Tensor  # [B] tokens in the cache
    count: Tensor  # [B] response tokens drawn or given
    begun: Tensor  # [B] of them those before the row's turn
    token: Tensor  # [B] the last one, not yet in the cache
    tail: Tensor  # [B, K] the last tokens drawn, -1 before the first; K = 0 without stop strings

    def keep(self, kept: Tensor) -> None:
        """Lets the rows [B] that are not kept leave: rows from behind move into their places.

        Columns that are padding for all rows by then go with them, once they are worth the copy.
        """
        rows = int(kept.sum())
        index = torch.arange(rows, device=kept.device)
        holes, moved = (~kept[:rows]).nonzero()[:, 0], rows + kept[rows:].nonzero()[:, 0]
        index[holes] = moved
        self.length = self.length[index]
        columns = self.mask.shape[1]
        trim = columns - int(self.length.max())
        trim = trim if trim > TRIM_SHARE * columns else 0
        for cache in self.caches:
            if trim:
                select(cache, index, trim)
            else:
                shrink(cache, holes, moved, rows)
        self.mask = self.mask[index, trim:]
        self.padded = not bool(self.mask.all())
        for name in OF_ROWS:
            setattr(self, name, getattr(self, name)[index])

    def copied(self, index: Tensor) -> Rows:
        """Rows `index` [b] with caches of their own, without columns that are padding for all of
        them.
        """
        trim = self.mask.shape[1] - int(self.length[index].max())
        mask = self.mask[index, trim:]
        own = {name: getattr(self, name)[index] for name in ("length", *OF_ROWS)}
        caches = [taken(cache, index, trim) for cache in self.caches]
        return Rows(caches=caches, mask=mask, padded=not bool(mask.all()), **own)

    def join(self, *others: Rows) -> None:
        """Appends the rows of other batches; the narrower ones are padded on the left."""
        every = [self, *others]
        columns = max(rows.mask.shape[1] for rows in every)
        self.padded = any(rows.padded or rows.mask.shape[1] < columns for rows in every)
        for cache, *more in zip(*(rows.caches for rows in every)):
            join(cache, *more)
        self.mask = torch.cat([pad_left(rows.mask, columns, 1) for rows in every])
        for name in ("length", *OF_ROWS):
            setattr(self, name, torch.cat([getattr(rows, name) for rows in every]))


class Record(NamedTuple):
    """Tokens that were drawn or given, and what was noted of each."""

    row: Tensor  # [n] int64: the rollout that it belongs to
    token: Tensor  # [n] int64
    logp: Tensor  # [n] under the student's plain softmax
    drawn_logp: Tensor  # [n] under what it was drawn from
    # of the student's plain softmax, None where they are not watched
    entropy: Tensor | None  # [n]
    top: Tensor | None  # [n, k] int64
    top_logp: Tensor | None  # [n, k]

    @staticmethod
    def joined(parts: Sequence[Record]) -> Record:
        """All tokens of the parts, one part after another."""
        if len(parts) == 1:
            return parts[0]
        return _record(None if column[0] is None else torch.cat(column) for column in zip(*parts))

    def at(self, index: Tensor | slice) -> Record:
        """Some of the tokens: a slice, or an index [m]."""
        return _record(None if column is None else column[index] for column in self)

    def notes(self) -> Notes | None:
        """What was watched; None where nothing was."""
        if self.entropy is None and self.top is None:
            return None
        return Notes(self.entropy, self.top, self.top_logp)


def _record(columns: Iterable[Any]) -> Record:
    return Record(*columns)
