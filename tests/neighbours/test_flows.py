"""The flow that two experiments start from."""

from __future__ import annotations

import pytest
import torch

from opdkit.neighbours.flows import Net, around, fitted, flow_loss, noised, ring


def test_levels_join_data_and_noise() -> None:
    x, noise = torch.tensor([[1.0, 2.0]] * 3), torch.tensor([[5.0, -2.0]] * 3)
    got = noised(x, torch.tensor([0.0, 0.25, 1.0]), noise)
    assert got.tolist() == [[1, 2], [2, 1], [5, -2]]


def test_a_ring_and_points_around_it() -> None:
    centres = ring(8)
    assert centres.norm(dim=1).tolist() == pytest.approx([1.0] * 8)
    which = torch.arange(8).repeat(200)
    x = around(centres, which, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cdist(x, centres).argmin(1), which)


def test_a_flow_is_learnt() -> None:
    """The loss of data that is one point falls to about nothing: the velocity is known there."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)

    def some(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((n, 2), 0.5), torch.zeros(n, dtype=torch.long)

    net = Net(2, 2, 1, 32)
    before = flow_loss(net, *some(512), draw).item()
    after = flow_loss(fitted(net, some, 150, draw), *some(512), draw).item()
    assert after < before / 3
