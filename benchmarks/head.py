"""The chunked pass over the vocabulary against a dense one, TRL's chunked divergence and
liger-kernel's fused linear JSD.

One learning pass at N positions: reverse KL over the whole vocabulary, mean over positions, and its
gradients with respect to the student's hidden states and head. The floor is the four matrix
products that any such pass needs: both heads forward, and the student's two backward. Errors are
against float64, at ERROR_ROWS positions; memory is the extra peak of a process of its own, with
what the sides share left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    alternate,
    apart,
    begin,
    parser,
    peak_memory,
    ratios,
    save,
    spread,
    synchronize,
    table,
    text,
)
from torch import Tensor

from opdkit.objective.batch import Batch
from opdkit.objective.grammar import Objective
from opdkit.objective.head import Head, Source, chunk_rows, learn, slices
from opdkit.objective.losses import Divergence

ERROR_ROWS = 128
BLOCK = 1 << 14  # vocabulary rows in float64 at a time
DENSE_TENSORS = 5  # [N, V] float32 tensors that the dense pass holds at its peak
DEFAULT = ((32768, 2048, 1024), (151936, 2048, 1024))  # V, N, H on the CPU
GRID = tuple(itertools.product((32768, 151936), (2048, 8192, 32768), (1024, 2048, 4096)))


@dataclass(frozen=True)
class Inputs:
    """Hidden states [N, H] and heads [V, H] of student and teacher."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    teacher_weight: Tensor

    def fresh(self) -> Inputs:
        """The same, with leaves that have no gradient yet."""
        leaves = self.student.detach().requires_grad_(), self.weight.detach().requires_grad_()
        return Inputs(leaves[0], self.teacher, leaves[1], self.teacher_weight)

    def top(self, n: int) -> Inputs:
        return Inputs(
            self.student[:n].clone(), self.teacher[:n].clone(), self.weight, self.teacher_weight
        )


def inputs(v: int, n: int, h: int, device: str, dtype: torch.dtype) -> Inputs:
    """Random ones whose logits have a deviation of 2 on both sides."""
    make = {"device": device, "dtype": dtype}
    weights = [torch.randn(v, h, **make).mul_(2 / math.sqrt(h)) for _ in range(2)]  # type: ignore[call-overload]
    return Inputs(torch.randn(n, h, **make), torch.randn(n, h, **make), *weights)  # type: ignore[call-overload]


# -------------------------------------------------------------------------------------------- sides


def ours(x: Inputs) -> Tensor:
    n, device = len(x.student), x.student.device
    positions = torch.arange(n, device=device)
    tokens = torch.zeros(1, n, dtype=torch.int64, device=device)
    source = Source(x.teacher, positions, Head(x.teacher_weight))
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), sources={"teacher": source})
    return learn(
        Objective(Divergence("reverse_kl")).plan(batch), positions, x.student, Head(x.weight)
    ).loss


def dense(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher = (x.teacher @ x.teacher_weight.T).float().log_softmax(-1)
    student = (x.student @ x.weight.T).float().log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1).mean()


def trl(x: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    value, _ = ChunkedDivergenceFunction.apply(
        x.student, x.weight, None, x.teacher, x.teacher_weight, None, 1.0
    )
    return value.mean()


def liger(x: Inputs) -> Tensor:
    """The Triton kernel on a GPU, the chunked loss in plain PyTorch elsewhere."""
    if x.student.is_cuda:
        from liger_kernel.transformers import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=1.0)(
            x.student, x.weight, x.teacher, x.teacher_weight, None
        )
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(len(x.student), dtype=torch.int64)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False
    )
    return loss(x.student, x.weight, x.teacher, x.teacher_weight, labels)


SIDES: dict[str, Callable[[Inputs], Tensor]] = {
    "opdkit": ours,
    "dense": dense,
    "trl": trl,
    "liger": liger,
}
NEEDS = {"trl": "trl", "liger": "liger_kernel"}


def passed(side: str, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Value [], and its gradients with respect to hidden states [N, H] and head [V, H]."""
    x = x.fresh()
    value = SIDES[side](x)
    value.backward()
    return value.detach(), x.student.grad, x.weight.grad  # type: ignore[return-value]


def products(x: Inputs) -> None:
    """The four matrix products, chunk by chunk as the pass makes them, with nothing in between."""
    v = len(x.weight)
    size = min(chunk_rows(v, x.student.device), len(x.student))
    logits = torch.empty(size, v, device=x.student.device, dtype=x.student.dtype)
    to_weight, to_hidden = torch.zeros_like(x.weight), torch.empty_like(x.student)
    for at in slices(len(x.student), size):
        part = logits[: at.stop - at.start]
        torch.mm(x.teacher[at], x.teacher_weight.T, out=part)
        torch.mm(x.student[at], x.weight.T, out=part)
        torch.mm(part, x.weight, out=to_hidden[at])
        to_weight.addmm_(part.T, x.student[at])


# ------------------------------------------------------------------------------------------- errors


def exact(x: Inputs) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[float, float]]]:
    """In float64: value, gradient of the hidden states, and a function that measures a gradient of
    the head against its own.
    """
    s, t = x.student.double(), x.teacher.double()
    parts = list(slices(len(x.weight), BLOCK))
    ls = torch.cat([s @ x.weight[at].double().T for at in parts], -1).log_softmax(-1)
    lt = torch.cat([t @ x.teacher_weight[at].double().T for at in parts], -1).log_softmax(-1)
    gap = ls - lt
    kl = (ls.exp() * gap).sum(-1, keepdim=True)
    slope = ls.exp() * (gap - kl) / len(s)
    to_hidden = sum(slope[:, at] @ x.weight[at].double() for at in parts)

    def against(gradient: Tensor) -> tuple[float, float]:
        """Squared norms of the difference and of the truth, block by block."""
        wrong = right = 0.0
        for at in parts:
            truth = slope[:, at].T @ s
            wrong += float((gradient[at].double() - truth).square().sum())
            right += float(truth.square().sum())
        return wrong, right

    return kl.mean(), to_hidden, against  # type: ignore[return-value]


def errors(sides: list[str], x: Inputs) -> dict[str, dict[str, float]]:
    """Relative errors of value and gradient (norm of the difference over the norm)."""
    value, to_hidden, against = exact(x)
    out = {}
    for side in sides:
        mine, hidden, weight = passed(side, x)
        wrong, right = against(weight)
        out[side] = {
            "value": abs(float(mine) / float(value) - 1),
            "hidden_gradient": float((hidden.double() - to_hidden).norm() / to_hidden.norm()),
            "head_gradient": math.sqrt(wrong / right),
        }
    return out


# ---------------------------------------------------------------------------------------- measuring


def memory(task: dict[str, Any], device: str) -> int:
    """Bytes of the extra peak of one pass, gradients included."""
    dtype = getattr(torch, task["dtype"])
    # what is loaded once is no part of a pass
    passed(task["side"], inputs(64, 8, 16, device, dtype))
    x = inputs(task["v"], task["n"], task["h"], device, dtype)
    before = peak_memory(device)
    passed(task["side"], x)
    synchronize(device)
    return peak_memory(device) - before


def measure(args: argparse.Namespace, v: int, n: int, h: int) -> dict[str, Any]:
    """One point of the grid."""
    dtype = getattr(torch, args.dtype)
    sides, left_out = ["opdkit"], {}
    for side in args.peers:
        if side in NEEDS and importlib.util.find_spec(NEEDS[side]) is None:
            left_out[side] = "not installed"
        elif side == "dense" and DENSE_TENSORS * 4 * n * v > args.limit * 2**30:
            left_out[side] = f"needs more than {args.limit:g} GiB"
        else:
            sides.append(side)

    def timed(run: Callable[[], object]) -> float:
        synchronize(args.device)
        start = time.perf_counter()
        run()
        synchronize(args.device)
        return time.perf_counter() - start

    extra = {
        side: apart(__file__, {"side": side, "v": v, "n": n, "h": h, "dtype": args.dtype}, args)
        for side in sides
    }
    for side in sides:
        passed(side, inputs(64, 8, 16, args.device, dtype))  # what is compiled or loaded once
    x = inputs(v, n, h, args.device, dtype)
    runs = {side: lambda side=side: timed(lambda: passed(side, x)) for side in sides}
    seconds = alternate(
        {"floor": lambda: timed(lambda: products(x)), **runs},
        args.pairs,
        warmup=int(args.device.startswith("cuda")),
    )
    wrong = errors(sides, x.top(ERROR_ROWS))
    result: dict[str, Any] = {
        "V": v,
        "N": n,
        "H": h,
        "left_out": left_out,
        "floor": {
            "seconds": spread(seconds["floor"]),
            "flops_per_second": 8 * n * v * h / spread(seconds["floor"])["median"],
        },
        "gradient_bytes": x.student.nbytes + x.weight.nbytes,
    }
    for side in sides:
        result[side] = {
            "seconds": spread(seconds[side]),
            "of_floor": ratios(seconds[side], seconds["floor"]),
            "over_opdkit": ratios(seconds[side], seconds["opdkit"]),
            "extra_bytes": extra[side],
            "relative_error": wrong[side],
        }
    return result


def main(argv: list[str] | None = None) -> Any:
    options = parser(__doc__)
    options.add_argument(
        "--full", action="store_true", help="V in 32k, 152k; N in 2k, 8k, 32k; H in 1k, 2k, 4k"
    )
    options.add_argument(
        "--shape",
        type=int,
        nargs=3,
        action="append",
        metavar=("V", "N", "H"),
        help="one point; may be repeated",
    )
    options.add_argument("--peers", nargs="*", choices=list(SIDES)[1:], default=list(SIDES)[1:])
    options.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )
    options.add_argument("--pairs", type=int, default=3)
    options.add_argument(
        "--limit", type=float, default=16.0, help="GiB that the dense pass may take"
    )
    options.add_argument("--worker", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    begin(args)
    if args.worker is not None:
        print(json.dumps(memory(json.loads(args.worker), args.device)))
        return None
    gpu = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    shapes = args.shape or (GRID if args.full or gpu else DEFAULT)
    points = [measure(args, *shape) for shape in shapes]
    report(points)
    return save("head", args, {"points": points})


def report(points: list[dict[str, Any]]) -> None:
    rows = []
    for point in points:
        for side in SIDES:
            if side not in point:
                if side in point["left_out"]:
                    rows.append(
                        [
                            point["V"],
                            point["N"],
                            point["H"],
                            side,
                            point["left_out"][side],
                            *[""] * 6,
                        ]
                    )
                continue
            of, wrong = point[side], point[side]["relative_error"]
            rows.append(
                [
                    point["V"],
                    point["N"],
                    point["H"],
                    side,
                    f"{of['seconds']['median']:.3f}",
                    text(of["of_floor"]),
                    text(of["over_opdkit"]),
                    f"{of['extra_bytes'] / 2**20:.0f}",
                    f"{(of['extra_bytes'] - point['gradient_bytes']) / 2**20:.0f}",
                    f"{wrong['value']:.1e}",
                    f"{max(wrong['hidden_gradient'], wrong['head_gradient']):.1e}",
                ]
            )
    columns = [
        "V",
        "N",
        "H",
        "side",
        "seconds",
        "x floor",
        "x opdkit",
        "extra MiB",
        "less gradients",
        "value error",
        "gradient error",
    ]
    table(columns, rows)


if __name__ == "__main__":
    main()
