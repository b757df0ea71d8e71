"""The slope f' of each divergence: the credit of a single sample."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opdkit.objective import JSD, Alpha, ForwardKL, Kind, SkewForward, SkewReverse
from opdkit.objective.divergences import KINDS, divergence

EVERY = (*KINDS.values(), JSD(0.1), JSD(0.3, normalised=True), JSD(0.0), JSD(1.0), Alpha(0.2))


@dataclass(frozen=True)
class Own(Kind):
    """A kind that gives entries alone: JSD(0.5) in the plain way."""

    def entries(self, ls: Tensor, lt: Tensor) -> Tensor:
        mix = ((ls.exp() + lt.exp()) / 2).log()
        return (ls.exp() * (ls - mix) + lt.exp() * (lt - mix)) / 2


@pytest.mark.parametrize("kind", [*EVERY, SkewForward(0.4), SkewReverse(0.4), Own()], ids=str)
def test_the_slope_at_samples_has_the_gradient_of_the_divergence(kind: Kind) -> None:
    """By enumeration: sum_v p_s f'(p_s / p_t) grad log p_s = grad of the sum over the entries."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    ls, lt = logits.log_softmax(-1), other.log_softmax(-1)
    [whole] = torch.autograd.grad(divergence(kind, ls, lt).sum(), logits, retain_graph=True)
    credit = kind.slope((ls - lt).detach())
    [sampled] = torch.autograd.grad((ls.exp().detach() * credit * ls).sum(), logits)
    assert torch.allclose(whole, sampled, atol=1e-12, rtol=0)


def test_slopes_at_the_ends() -> None:
    """What the teacher would never write costs at most this: JS log 2 once doubled, TV 1/2."""
    never = torch.tensor([60.0, 600.0, torch.inf], dtype=torch.float64)
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    assert torch.allclose(2 * KINDS["jsd"].slope(never), log2.expand(3), atol=1e-12)
    assert KINDS["tv"].slope(never).tolist() == [0.5] * 3
    assert ForwardKL().slope(never)[-1] == 0
    # what the student would never write grows like log(1 / u), without a bound
    assert torch.allclose(2 * JSD().slope(-never[:2]), log2 - never[:2], atol=1e-12)


def test_a_slope_of_ones_own_kind_agrees_with_the_formula_far_out() -> None:
    far = torch.tensor([-70.0, -30.0, -1.0, 0.0, 1.0, 30.0, 70.0], dtype=torch.float64)
    assert torch.allclose(Own().slope(far), JSD().slope(far), atol=1e-10)
