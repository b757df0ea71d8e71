"""What a checkpoint of several processes costs: put together whole on every process and written by
the first while all wait, against each process's own parts, written while the run goes on.

    python benchmarks/checkpoints.py --processes 2 --hidden 512 --layers 8

Of the process with rank 1: the bytes that it holds for the save, and the seconds for which its loop
stands still; of both ways in turn, with the ratio of each pair.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    ROOT,
    alternate,
    begin,
    parser,
    qwen3,
    ratios,
    save,
    spread,
    table,
    text,
)
from common import tokenizer as made_tokenizer
from torch import Tensor

from opdkit.objective.companion import Companions
from opdkit.objective.parts import whole
from opdkit.train import checkpoint as checkpoints
from opdkit.train import shards
from opdkit.train.checkpoint import State
from opdkit.train.mesh import Mesh, joined
from opdkit.train.saver import Saver
from opdkit.train.settings import Checkpoint, Optim
from opdkit.train.student import Student

MEASURED = ("held", "stopped")  # bytes, seconds
SIDES = ("whole", "parts")


def student(args: Namespace, devices: Any) -> Student:
    """A spread student that has taken a step."""
    with torch.device("cpu"):
        model = qwen3(args.hidden, args.layers, args.vocab)
    made = Student(model, Optim(), 1e-3, 10)
    made.spread(devices)
    for parameter in made.parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return made


def in_whole(made: Student, folder: Path, tokenizer: Any, mesh: Mesh) -> int:
    """Everything on every process, the first writes, all wait; the bytes that this one held."""
    weights = shards.whole_weights(made.model)
    moments = {name: whole(values).cpu() for name, values in shards.moments_of(made).items()}

    def write(part: Path) -> None:
        checkpoints.write_model(part, made.model, tokenizer, weights)
        torch.save(moments, part / checkpoints.OPTIMISER)
        checkpoints._finish(part)

    if mesh.rank == 0:
        checkpoints.put(folder, write)
    mesh.every(None)
    return size([*weights.values(), *moments.values()])


def size(tensors: Sequence[Tensor]) -> int:
    """Bytes that this process holds of tensors [...]."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.nbytes for t in local)


def measured(work: Callable[[], int]) -> dict[str, float]:
    """What a save held, and how long it took."""
    begun = time.perf_counter()
    held = work()
    return {"held": held, "stopped": time.perf_counter() - begun}


def process(args: Namespace) -> None:
    """One of the processes; that of rank 1 leaves what it measured."""
    begin(args)
    tokenizer = made_tokenizer(args.vocab)
    folder = Path(args.worker)
    with joined(args.device) as mesh:
        made = student(args, mesh.devices)
        saver = Saver(folder, made, tokenizer, Companions(), Checkpoint(keep=1), mesh)
        step = 0

        def parts() -> dict[str, float]:
            nonlocal step
            step += 1
            noted: list[int] = []
            staged = shards.staged

            def noting(*arguments: Any) -> dict[str, Tensor]:
                tensors = staged(*arguments)
                noted.append(size(list(tensors.values())))
                return tensors

            shards.staged = noting
            try:
                found = measured(lambda: [saver.save(State(step=step)), noted[0]][1])
            finally:
                shards.staged = staged
            begun = time.perf_counter()
            saver.finish()
            return {**found, "behind": time.perf_counter() - begun}

        sides = {
            "whole": lambda: measured(lambda: in_whole(made, folder / "whole", tokenizer, mesh)),
            "parts": parts,
        }
        found = alternate(sides, args.pairs)
        if mesh.rank == 1:
            (folder / "found.json").write_text(json.dumps(found))
        mesh.every(None)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--vocab", type=int, default=8192)
    options.add_argument("--pairs", type=int, default=5, help="saves of either kind, in turn")
    options.add_argument("--worker", help="internal: the folder of one of the processes")
    args = options.parse_args(argv)
    if args.worker:
        process(args)
        return {}
    folder = Path(tempfile.mkdtemp(prefix="opdkit-checkpoints-"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    given = [x for name in ("hidden", "layers", "vocab", "pairs", "device", "seed")
             for x in (f"--{name}", str(getattr(args, name)))]  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        subprocess.run(
            [*launch, f"--nproc-per-node={args.processes}", __file__, *given, "--worker", folder],
            check=True, env=threads, cwd=ROOT, timeout=1200,
        )  # fmt: skip
        found = json.loads((folder / "found.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return save("checkpoints", args, report(found))


def report(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Both sides and their ratios, printed and as they are kept."""
    sides = {side: {m: [one[m] for one in found[side]] for m in MEASURED} for side in SIDES}
    over = {m: ratios(sides["whole"][m], sides["parts"][m]) for m in MEASURED}
    behind = spread([one["behind"] for one in found["parts"]])
    rows = [[m, *(spread(sides[s][m])["median"] for s in SIDES), text(over[m])] for m in MEASURED]
    table(("of rank 1", *SIDES, "whole / parts"), rows)
    print(f"written behind the loop in {text(behind)} s")
    return {"sides": sides, "whole_over_parts": over, "behind": behind}


if __name__ == "__main__":
    main()
