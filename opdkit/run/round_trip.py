"""Two processes that tell each other a number by gloo, as those of a run do, and how long it takes.

python -m opdkit.run.round_trip RANK FILE
"""

from __future__ import annotations

import statistics
import sys
import time
from datetime import timedelta
from typing import Any

WAIT, TIMES, LARGE = 20, 20, 2**22  # seconds; tellings; bytes of a large one


def main(rank: int, file: str) -> None:
    """Of two processes one; the first prints milliseconds of a number, and of 4 MiB."""
    import torch
    import torch.distributed as dist

    wait = timedelta(seconds=WAIT)
    store = dist.FileStore(file, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
    spent = [_took(torch.ones(size)) for size in (1, LARGE // 4)]
    if rank == 0:
        print(*(1e3 * seconds for seconds in spent))
    dist.destroy_process_group()


def _took(values: Any) -> float:
    """Seconds in which both have the sum of their values, the median of some tries."""
    import torch.distributed as dist

    tries = []
    for _ in range(TIMES):
        start = time.perf_counter()
        dist.all_reduce(values)
        tries.append(time.perf_counter() - start)
    return statistics.median(tries)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
