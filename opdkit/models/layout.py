"""From ragged rollouts to hidden states at chosen positions: the only place where token sequences
are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from opdkit.models.body import hidden_states
from opdkit.types import Rollout

# input tokens whose hidden states are held at once where only numbers are read off them
HELD = 1 << 17


def batch_tokens(device: torch.device) -> int:
    """Padded tokens of one forward pass: enough to fill a GPU; on a CPU few, for rows of like
    length and products that stay in its cache.
    """
    return 16384 if device.type == "cuda" else 1024


def pass_tokens(device: torch.device) -> int:
    """Tokens whose processing takes as long as starting one more forward pass."""
    return 256 if device.type == "cuda" else 64


def grouped(lengths: Sequence[int], budget: int, each: int) -> list[slice]:
    """The cheapest groups of rows, sorted longest first: a group is padded to its first, up to
    `budget` tokens, and costs `each` more.

    best[i] = min over the end j of a group that starts at i: (j - i) lengths[i] + each + best[j].
    """
    n, width = len(lengths), np.asarray(lengths, dtype=np.float64)
    best, end = np.zeros(n + 1), [0] * n
    for i in range(n - 1, -1, -1):
        ends = np.arange(i + 1, min(n, i + max(1, budget // lengths[i])) + 1)
        cost = (ends - i) * width[i] + best[ends]
        least = int(cost.argmin())
        best[i], end[i] = cost[least] + each, ends[least]
    groups, start = [], 0
    while start < n:
        groups.append(slice(start, end[start]))
        start = end[start]
    return groups


def held_at_once(lengths: Sequence[int], tokens: int) -> list[slice]:
    """Rows in their order, in groups of at most `tokens` tokens, or of one row; groups of a group
    are itself.
    """
    cuts, total = [0], 0
    for row, length in enumerate(lengths):
        if total + length > tokens and row > cuts[-1]:
            cuts.append(row)
            total = 0
        total += length
    return [slice(a, b) for a, b in pairwise([*cuts, len(lengths)]) if b > a]


@dataclass(frozen=True)
class Layout:
    """Where the positions of a step lie: flat index b * width + t for response token t of rollout
    b.
    """

    rollouts: Sequence[Rollout]
    width: int  # T
    # is called with the rollouts of a pass before it, in the order of its rows
    hear: Callable[[Sequence[Rollout]], object] | None = None

    def lengths(self, positions: Tensor) -> Tensor:
        """[B]: input tokens that each rollout's positions need; 0 where it has none.

        What follows the last one is not computed.
        """
        last = torch.full((len(self.rollouts),), -1, dtype=torch.int64, device=positions.device)
        last = last.scatter_reduce(0, positions // self.width, positions % self.width, "amax")
        prompts = torch.tensor([len(r.prompt) for r in self.rollouts], device=positions.device)
        return torch.where(last >= 0, prompts + last, 0)

    def micro_batches(self, positions: Tensor, budget: int) -> list[Tensor]:
        """Flat positions [N], split so that each part's rollouts fill at most `budget` padded
        tokens; rollouts of like length together.
        """
        return [part for part, _ in self.passes(positions, budget, positions)]

    def passes(self, positions: Tensor, budget: int, among: Tensor) -> list[tuple[Tensor, int]]:
        """Flat positions [N] by forward pass, with the tokens that each row is padded to there.

        Which rows go together, and how wide they are, follows from the flat positions `among` [M],
        of which [N] are some: what is read of a row later is computed as what was read before, to
        the bit where a product's rows do not depend on their number.
        """
        order, lengths = self._longest_first(among)
        each = pass_tokens(positions.device)
        groups = [
            slice(some.start + group.start, some.start + group.stop)
            for some in held_at_once(lengths, HELD)
            for group in grouped(lengths[some], budget, each)
        ]
        parts = self._split(positions, order, groups)
        return [(part, lengths[group.start]) for part, group in zip(parts, groups) if len(part)]

    def portions(self, positions: Tensor, tokens: int) -> list[Tensor]:
        """Flat positions [N], split so that each part's rollouts have at most `tokens` tokens,
        padding not counted, or are one.
        """
        order, lengths = self._longest_first(positions)
        return self._split(positions, order, held_at_once(lengths, tokens))

    def _longest_first(self, positions: Tensor) -> tuple[list[int], list[int]]:
        """Rollouts that have positions, and their lengths."""
        lengths = self.lengths(positions).tolist()
        order = sorted((b for b, n in enumerate(lengths) if n), key=lambda b: -lengths[b])
        return order, [lengths[b] for b in order]

    def _split(self, positions: Tensor, order: list[int], groups: Sequence[slice]) -> list[Tensor]:
        """The positions of each group of rollouts."""
        part = torch.zeros(len(self.rollouts), dtype=torch.int64, device=positions.device)
        for i, group in enumerate(groups):
            part[torch.tensor(order[group], device=part.device)] = i
        mine = part[positions // self.width]
        return [positions[mine == i] for i in range(len(groups))]

    def states(
        self, model: torch.nn.Module, positions: Tensor, padded: int | None = None
    ) -> Tensor:
        """[N, H]: the model's last hidden states that predict the tokens at flat positions [N], in
        one forward pass of rows of `padded` tokens; None: of as many as the longest needs.

        Rows are padded on the right and attention is causal, so padding cannot reach a real token
        and needs no mask.
        """
        device = next(model.parameters()).device
        lengths = self.lengths(positions)
        rows = lengths.nonzero()[:, 0]
        inputs = []
        for b in rows.tolist():
            rollout = self.rollouts[b]
            inputs.append(torch.tensor((rollout.prompt + rollout.tokens)[: int(lengths[b])]))
        heard = [self.rollouts[b] for b in rows.tolist()]
        if not inputs:  # a pass that others make, and in which this process has nothing to read
            inputs, padded, heard = [torch.zeros(1, dtype=torch.int64)], None, [*self.rollouts[:1]]
        ids = pad_sequence(inputs, batch_first=True)
        spare = 0 if padded is None else padded - ids.shape[1]
        if self.hear is not None:
            self.hear(heard)
        hidden = hidden_states(model, pad(ids, (0, spare)).to(device), None)
        place = torch.zeros(len(self.rollouts), dtype=torch.int64, device=positions.device)
        place[rows] = torch.arange(len(rows), device=positions.device)
        prompts = torch.tensor([len(r.prompt) for r in self.rollouts], device=positions.device)
        b, t = positions // self.width, positions % self.width
        return hidden[place[b].to(device), (prompts[b] - 1 + t).to(device)]
