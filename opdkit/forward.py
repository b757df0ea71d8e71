"""From ragged rollouts to hidden states at chosen positions: the only place where token sequences are padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opdkit.models import hidden_states
from opdkit.types import Rollout


def batch_tokens(device: torch.device) -> int:
    """Padded tokens of one forward pass: enough to fill a GPU; on a CPU few, for rows of like length and products that stay in its cache."""
    return 16384 if device.type == "cuda" else 1024


@dataclass(frozen=True)
class Layout:
    """Where the positions of a step lie: flat index b * width + t for response token t of rollout b."""

    rollouts: Sequence[Rollout]
    width: int  # T

    def lengths(self, positions: Tensor) -> Tensor:
        """[B]: input tokens that each rollout's positions need; 0 where it has none. What follows the last one is not computed."""
        last = torch.full((len(self.rollouts),), -1, dtype=torch.int64, device=positions.device)
        last = last.scatter_reduce(0, positions // self.width, positions % self.width, "amax")
        prompts = torch.tensor([len(r.prompt) for r in self.rollouts], device=positions.device)
        return torch.where(last >= 0, prompts + last, 0)

    def micro_batches(self, positions: Tensor, budget: int) -> list[Tensor]:
        """Flat positions, split so that each part's rollouts fill at most `budget` padded tokens; rollouts of like length together."""
        lengths = self.lengths(positions).tolist()
        order = sorted((b for b, n in enumerate(lengths) if n), key=lambda b: -lengths[b])
        groups: list[list[int]] = []
        for b in order:  # longest first: the first of a group sets its width
            if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
                groups[-1].append(b)
            else:
                groups.append([b])
        rows = positions // self.width
        part = torch.zeros(len(self.rollouts), dtype=torch.int64, device=positions.device)
        for i, group in enumerate(groups):
            part[torch.tensor(group, device=part.device)] = i
        return [positions[part[rows] == i] for i in range(len(groups))]

    def states(self, model: torch.nn.Module, positions: Tensor) -> Tensor:
        """[N, H]: the model's last hidden states that predict the tokens at flat positions [N], in one forward pass.

        Rows are padded on the right and attention is causal, so padding cannot reach a real token and needs no mask.
        """
        device = next(model.parameters()).device
        lengths = self.lengths(positions)
        rows = lengths.nonzero()[:, 0]
        inputs = []
        for b in rows.tolist():
            rollout = self.rollouts[b]
            inputs.append(torch.tensor((rollout.prompt + rollout.tokens)[: int(lengths[b])]))
        hidden = hidden_states(model, pad_sequence(inputs, batch_first=True).to(device), None)
        place = torch.zeros(len(self.rollouts), dtype=torch.int64, device=positions.device)
        place[rows] = torch.arange(len(rows), device=positions.device)
        prompts = torch.tensor([len(r.prompt) for r in self.rollouts], device=positions.device)
        b, t = positions // self.width, positions % self.width
        return hidden[place[b].to(device), (prompts[b] - 1 + t).to(device)]
