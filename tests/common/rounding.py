"""How far rounding may move a number: derived from the arithmetic, so that it holds in whatever
order a processor's kernels add up.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

# nats, and units of logits and last hidden states: `forward_rounding` of the tiny models of tests
# is below it
FORWARD = 2e-4


def rounding(dtype: torch.dtype, size: float, count: float = 1) -> float:
    """The most by which `count` roundings to `dtype`, of numbers of this size, move a result: 4 eps
    size sqrt(count).

    One rounding is off by at most eps / 2 of the number. Many are off in both directions and add up
    like a random walk, whose chance to be beyond 8 times sqrt(count) of its largest steps is 2
    exp(-8^2 / 2), under 1e-13 (Higham and Mary 2019, SIAM J. Sci. Comput.).
    """
    return 4 * torch.finfo(dtype).eps * size * math.sqrt(count)


@torch.no_grad()
def forward_rounding(model: nn.Module, ids: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """The most by which roundings to `dtype` move a last hidden state, logit or log-prob of a
    forward pass, found by drawing them.

    A copy in float64 runs with and without errors in each of its products, as large as the
    roundings there: a sum of K products x w that wanders up to sqrt(sum x^2 w^2) is rounded K
    times, so it errs by eps / 2 * sqrt(K) times that; 16-bit models sum in float32 and round the
    result. The largest move in 8 draws of all numbers is near 4 standard deviations of the worst;
    two passes that are compared both err, so 4 times it is allowed. It also says how well
    conditioned a tiny model is: where it nears what a test looks for, the model should be another.
    """
    exact: Any = copy.deepcopy(model).double().eval()

    def numbers() -> Tensor:
        out = exact(ids, output_hidden_states=True)
        return torch.cat([out.hidden_states[-1], out.logits, out.logits.log_softmax(-1)], -1)

    plain = numbers()
    generator = torch.Generator().manual_seed(0)
    step = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2

    def err(layer: nn.Linear, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        wander = (inputs[0].square() @ layer.weight.square().T).sqrt()
        size = step * math.sqrt(layer.in_features) * wander + torch.finfo(dtype).eps / 2 * out.abs()
        return out + size * torch.randn(out.shape, generator=generator, dtype=out.dtype)

    for module in exact.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(err)  # type: ignore[arg-type]
    return 4 * max((numbers() - plain).abs().max().item() for _ in range(8))
