"""One layer's keys and values in a buffer with room to spare: a new token is written in place,
where the stock layer copies all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 16  # free columns behind the last one of a fresh buffer


class GrowingLayer(DynamicLayer):
    """Full attention.

    `keys` and `values` [B, heads, C, width] are the filled columns of their buffers.
    """

    keys: Tensor
    values: Tensor
    buffers: tuple[Tensor, Tensor]

    def __init__(self, kept: torch.dtype | None = None):
        super().__init__()
        # a type of 16 bits, to which attention rounds keys and values anyway; None: as they come
        self.kept = kept

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends columns [B, heads, c, width]; returns all of them."""
        if self.kept is not None:
            key_states, value_states = key_states.to(self.kept), value_states.to(self.kept)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.hold(key_states, value_states)
            return key_states, value_states
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        if stop > self.buffers[0].shape[2]:
            rows = torch.arange(len(self.keys), device=self.device)
            self.take(rows, start, max(stop - start, ROOM))
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Takes these tensors [B, heads, C, width] as they are; the next update moves them to
        buffers with room.
        """
        self.keys, self.values = self.buffers = (keys, values)

    def join(self, others: Sequence[GrowingLayer]) -> None:
        """Appends the rows of others; the narrower ones are padded on the left."""
        every = [self, *others]
        columns = max(layer.keys.shape[2] for layer in every)
        self.buffers = (
            _stacked([layer.keys for layer in every], columns),
            _stacked([layer.values for layer in every], columns),
        )
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)

    def shift(self, right: Sequence[int]) -> None:
        """Moves the columns of each row to the right by so many; what is behind the end is dropped,
        and zeros come first.
        """
        columns = self.keys.shape[2]
        moved = (_moved(self.keys, right), _moved(self.values, right))
        self.buffers = moved
        self.keys, self.values = (buffer[:, :, :columns] for buffer in moved)

    def narrow(self, rows: int) -> None:
        """Keeps the first rows; nothing is copied."""
        self.keys, self.values = self.keys[:rows], self.values[:rows]
        self.buffers = (self.buffers[0][:rows], self.buffers[1][:rows])

    def take(self, index: Tensor, columns: int, room: int = ROOM) -> None:
        """Keeps (or repeats) rows `index` [b] and the last `columns` columns, in fresh buffers."""
        self.buffers = (
            _gather(self.keys, index, columns, room),
            _gather(self.values, index, columns, room),
        )
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)


def _gather(states: Tensor, index: Tensor, columns: int, room: int) -> Tensor:
    buffer = states.new_empty(len(index), states.shape[1], columns + room, states.shape[3])
    torch.index_select(
        states[:, :, states.shape[2] - columns :], 0, index, out=buffer[:, :, :columns]
    )
    return buffer


def _stacked(parts: Sequence[Tensor], columns: int) -> Tensor:
    """[rows of all, heads, columns + ROOM, width]: states [b, heads, c, width] one below another,
    aligned on the right of the columns.
    """
    rows, first = sum(len(part) for part in parts), parts[0]
    buffer = first.new_empty(rows, first.shape[1], columns + ROOM, first.shape[3])
    start = 0
    for part in parts:
        mine, padding = buffer[start : start + len(part)], columns - part.shape[2]
        mine[:, :, :padding] = 0  # what is masked is read all the same, and must be numbers
        mine[:, :, padding:columns] = part
        start += len(part)
    return buffer


def _moved(states: Tensor, right: Sequence[int]) -> Tensor:
    """[B, heads, C + ROOM, width]: states [B, heads, C, width], each row moved to the right."""
    rows, heads, columns, width = states.shape
    buffer = states.new_empty(rows, heads, columns + ROOM, width)
    for row, by in enumerate(right):
        buffer[row, :, :by] = 0
        buffer[row, :, by:columns] = states[row, :, : columns - by]
    return buffer
