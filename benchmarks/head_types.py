"""The number types of a head: time and error of one learning pass, side by side.

Reverse KL over the whole vocabulary between a student and a teacher that is near it, on a head with
a few large logits per position. All sides start from the same bfloat16 weights and hidden states,
and errors are against float64 with these:

    rounded     bfloat16 products as PyTorch makes them: the results are bfloat16 too
    bfloat16    bfloat16 operands, float32 results and gradients (`dtype=bfloat16`)
    head        float32 products on bfloat16 weights (`head_dtype=float32`)
    float32     float32 weights and products (`dtype=float32`)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import alternate, begin, parser, ratios, save, spread, synchronize, table, text
from torch import Tensor

from opdkit.objective.batch import Batch
from opdkit.objective.grammar import Objective
from opdkit.objective.head import Head, Source, learn
from opdkit.objective.losses import Divergence

LARGE, SIZE = 8, 12.0  # large logits per position, and how large they are; the rest deviate by 1
TOP = 64
ERROR_ROWS = 64  # positions whose errors are measured


class Rounded(Head):
    """The products in bfloat16 whose results are bfloat16 as well."""

    def product(self, hidden: Tensor) -> Tensor:
        """[n, V] bfloat16."""
        return hidden @ self.weight.T  # type: ignore[union-attr]

    def slope_to_hidden(self, slope: Tensor, width: int) -> Tensor:
        """[n, H] bfloat16."""
        return slope @ self.weight  # type: ignore[operator]

    def add_slope_to_weight(self, total: Tensor, slope: Tensor, hidden: Tensor) -> None:
        """Adds a slope [n, V], transposed, times hidden states [n, H] to a total [V, H]."""
        total.addmm_(slope.T.float(), hidden.float())


@dataclass(frozen=True)
class Inputs:
    """Hidden states [N, H] of student and teacher, and the head [V, H] of both, bfloat16."""

    student: Tensor
    teacher: Tensor
    weight: Tensor

    def top(self, n: int) -> Inputs:
        return Inputs(self.student[:n], self.teacher[:n], self.weight)


def inputs(v: int, n: int, h: int, near: float, device: str) -> Inputs:
    """Random ones; each position has `LARGE` rows of the head that point its way."""
    student, noise = (torch.randn(n, h, device=device) for _ in range(2))
    weight = torch.randn(v, h, device=device) / math.sqrt(h)
    way = student / student.square().sum(-1, keepdim=True)
    for rank in range(LARGE):
        rows = (torch.arange(n, device=device) * LARGE + rank) % v
        weight[rows] += SIZE * 0.8**rank * way
    student, weight = student.bfloat16(), weight.bfloat16()
    return Inputs(student, (student.float() + near * noise).bfloat16(), weight)


def head_of(side: str, weight: Tensor) -> tuple[Head, torch.dtype]:
    """A side's head, and the type of its hidden states."""
    if side == "rounded":
        return Rounded(weight), torch.bfloat16
    if side == "bfloat16":
        return Head(weight), torch.bfloat16
    if side == "head":
        return Head(weight, operands=torch.float32), torch.float32
    wide = {"float32": torch.float32, "float64": torch.float64}[side]
    return Head(weight.to(wide)), wide


def passed(side: str, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [] and its gradients in hidden states [N, H] and head [V, H]."""
    head, wide = head_of(side, x.weight.detach())
    leaves = x.student.detach().to(wide).requires_grad_(), head.weight.requires_grad_()  # type: ignore[union-attr]
    positions = torch.arange(len(x.student), device=x.student.device)
    tokens = torch.zeros(1, len(positions), dtype=torch.int64, device=positions.device)
    batch = Batch(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        sources={"teacher": Source(x.teacher.to(wide), positions, head)},
        dtype=torch.promote_types(wide, torch.float32),
    )
    loss = learn(Objective(Divergence("reverse_kl")).plan(batch), positions, leaves[0], head).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)


SIDES = ("rounded", "bfloat16", "head", "float32")


@torch.no_grad()
def of_logits(side: str, x: Inputs) -> dict[str, float]:
    """Errors of the log-probs: mean, KL(float64 || side), and ties among the largest logits."""
    head, wide = head_of(side, x.weight)
    logits = head.logits(x.student.to(wide))
    truth = (x.student.double() @ x.weight.double().T).log_softmax(-1)
    ours = logits.double().log_softmax(-1)
    different = [len(row.topk(TOP).values.unique()) for row in logits]
    return {
        "logp": float((ours - truth).abs().mean()),
        "kl": float((truth.exp() * (truth - ours)).sum(-1).mean()),
        "ties": TOP - sum(different) / len(different),
    }


def measure(args: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Times of all sides in turn, and their errors."""
    x = inputs(*shape, args.near, args.device)

    def timed(side: str) -> float:
        synchronize(args.device)
        start = time.perf_counter()
        passed(side, x)
        synchronize(args.device)
        return time.perf_counter() - start

    runs: dict[str, Callable[[], float]] = {s: lambda s=s: timed(s) for s in SIDES}  # type: ignore[misc]
    seconds = alternate(runs, args.pairs)
    few = x.top(ERROR_ROWS)
    truth = passed("float64", few)
    out: dict[str, Any] = {"V": shape[0], "N": shape[1], "H": shape[2], "loss": float(truth[0])}
    for side in SIDES:
        wrong = [
            float((a.double() - b).norm() / b.norm()) for a, b in zip(passed(side, few), truth)
        ]
        out[side] = {
            "seconds": spread(seconds[side]),
            "of_rounded": ratios(seconds[side], seconds["rounded"]),
            **of_logits(side, few),
            "loss_error": wrong[0],
            "hidden_gradient": wrong[1],
            "head_gradient": wrong[2],
        }
    return out


def main(argv: list[str] | None = None) -> Any:
    options = parser(__doc__)
    options.add_argument(
        "--shape", type=int, nargs=3, default=(32768, 512, 576), metavar=("V", "N", "H")
    )
    options.add_argument("--near", type=float, default=0.02, help="teacher's distance from student")
    options.add_argument("--pairs", type=int, default=3)
    args = options.parse_args(argv)
    begin(args)
    point = measure(args, tuple(args.shape))
    columns = ["side", "seconds", "x rounded", "log-prob error", "KL", f"ties of {TOP}"]
    columns += ["loss error", "hidden gradient", "head gradient"]
    rows = []
    for side in SIDES:
        of = point[side]
        errors = [of[k] for k in ("loss_error", "hidden_gradient", "head_gradient")]
        rows.append(
            [
                side,
                f"{of['seconds']['median']:.3f}",
                text(of["of_rounded"], 3),
                f"{of['logp']:.1e}",
                f"{of['kl']:.1e}",
                f"{of['ties']:.1f}",
                *(f"{error:.1e}" for error in errors),
            ]
        )
    table(columns, rows)
    return save("head_types", args, {"point": point})


if __name__ == "__main__":
    main()
