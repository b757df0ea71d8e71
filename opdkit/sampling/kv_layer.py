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

    `keys` and `values` [B, heads, C, width] are the first rows and columns of their buffers. Rows
    that leave stay in the buffers as free places, into which rows that join are written.
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
        rows, start = len(self.keys), self.keys.shape[2]
        stop = start + key_states.shape[2]
        if stop > self.buffers[0].shape[2]:
            room = max(stop - start, ROOM)
            places = len(self.buffers[0])
            self.buffers = (
                _stacked([self.keys], start, room, places),
                _stacked([self.values], start, room, places),
            )
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:rows, :, start:stop] = states
        self._look(rows, stop)
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
        rows = sum(len(layer.keys) for layer in every)
        if columns == self.keys.shape[2] and rows <= len(self.buffers[0]):
            at = len(self.keys)
            for layer in others:
                for buffer, states in zip(self.buffers, (layer.keys, layer.values)):
                    _write(buffer[at : at + len(states)], states, columns)
                at += len(layer.keys)
        else:
            self.buffers = (
                _stacked([layer.keys for layer in every], columns),
                _stacked([layer.values for layer in every], columns),
            )
        self._look(rows, columns)

    def shift(self, right: Sequence[int]) -> None:
        """Moves the columns of each row to the right by so many; what is behind the end is dropped,
        and zeros come first.
        """
        rows, columns = len(self.keys), self.keys.shape[2]
        self.buffers = (_moved(self.keys, right), _moved(self.values, right))
        self._look(rows, columns)

    def narrow(self, rows: int) -> None:
        """Keeps the first rows; nothing is copied."""
        self._look(rows, self.keys.shape[2])

    def take(self, index: Tensor, columns: int) -> None:
        """Keeps (or repeats) rows `index` [b] and the last `columns` columns, in fresh buffers."""
        self.buffers = (
            _gather(self.keys, index, columns),
            _gather(self.values, index, columns),
        )
        self._look(len(index), columns)

    def _look(self, rows: int, columns: int) -> None:
        """Keys and values are these rows and columns of the buffers."""
        self.keys, self.values = (buffer[:rows, :, :columns] for buffer in self.buffers)


def _gather(states: Tensor, index: Tensor, columns: int) -> Tensor:
    """[b, heads, columns + ROOM, width]: rows and last columns of states [B, heads, C, width]."""
    buffer = states.new_empty(len(index), states.shape[1], columns + ROOM, states.shape[3])
    torch.index_select(
        states[:, :, states.shape[2] - columns :], 0, index, out=buffer[:, :, :columns]
    )
    return buffer


def _stacked(parts: Sequence[Tensor], columns: int, room: int = ROOM, places: int = 0) -> Tensor:
    """[rows of all, heads, columns + room, width]: states [b, heads, c, width] one below another,
    aligned on the right of the columns; with `places` at least so many rows, free behind them.
    """
    rows, first = sum(len(part) for part in parts), parts[0]
    buffer = first.new_empty(max(rows, places), first.shape[1], columns + room, first.shape[3])
    start = 0
    for part in parts:
        _write(buffer[start : start + len(part)], part, columns)
        start += len(part)
    return buffer


def _write(buffer: Tensor, states: Tensor, columns: int) -> None:
    """Puts states [b, heads, c, width] on the right of the first `columns` of a buffer [b, heads,
    C, width].
    """
    padding = columns - states.shape[2]
    buffer[:, :, :padding] = 0  # what is masked is read all the same, and must be numbers
    buffer[:, :, padding:columns] = states


def _moved(states: Tensor, right: Sequence[int]) -> Tensor:
    """[B, heads, C + ROOM, width]: states [B, heads, C, width], each row moved to the right."""
    rows, heads, columns, width = states.shape
    buffer = states.new_empty(rows, heads, columns + ROOM, width)
    for row, by in enumerate(right):
        buffer[row, :, :by] = 0
        buffer[row, :, by:columns] = states[row, :, : columns - by]
    return buffer
