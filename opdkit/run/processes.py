"""Several processes of this machine that do one run: started, watched, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from opdkit.base.errors import UserError

GRACE = 4.0  # seconds in which the others end by themselves, once one has failed
EVERY = 0.1  # seconds between two looks


def on_several(count: int, arguments: Sequence[str]) -> int:
    """`python -m opdkit` with these arguments in `count` processes, each told its rank as torchrun
    does; the exit status of the run.

    A signal goes to all of them, which then stop together at the end of a step. Where one fails,
    those that do not end by themselves are ended: they wait for it, and nothing can be saved
    without it.
    """
    if count < 1:
        raise UserError(
            f"--nproc {count}: it is the number of processes, one per device, 1 or more"
        )
    port = _free_port()
    running = [_start(rank, count, port, arguments) for rank in range(count)]
    before = {n: signal.signal(n, _handed_on(running)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _watched(running)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def _start(rank: int, count: int, port: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    told = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return subprocess.Popen(
        [sys.executable, "-m", "opdkit", *arguments],
        env={**threads, **os.environ, **told},
        process_group=0,  # a Ctrl-C of the terminal reaches them through this process alone
    )


def _handed_on(running: Sequence[subprocess.Popen[bytes]]) -> Any:
    """The handler that gives a signal to all processes."""

    def hand_on(number: int, frame: Any) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    return hand_on


def _watched(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit status once all have ended: that of the first that failed."""
    failed: subprocess.Popen[bytes] | None = None
    since = 0.0
    while any(process.poll() is None for process in running):
        bad = [process for process in running if process.poll()]
        if bad and failed is None:
            failed, since = bad[0], time.monotonic()
            if failed.returncode < 0:
                _tell(running.index(failed), -failed.returncode)
        if failed is not None and time.monotonic() - since > GRACE:
            for process in running:
                if process.poll() is None:
                    process.kill()
        time.sleep(EVERY)
    # one that was ended by a signal or says why it failed, before those that only lost it
    codes = sorted((process.returncode for process in running), key=lambda c: (c >= 0, -c))
    return codes[0] if codes[0] >= 0 else 128 - codes[0]


def _tell(rank: int, number: int) -> None:
    name = signal.Signals(number).name if number in list(signal.Signals) else str(number)
    why = " (the kernel does that where memory runs out)" if name == "SIGKILL" else ""
    print(
        f"opdkit: error: process {rank} of the run was ended by {name}{why}, and the others cannot "
        "go on without it. What was learnt up to the newest checkpoint is kept: continue with "
        "--resume",
        file=sys.stderr,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
