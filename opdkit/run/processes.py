"""Several processes of this machine that do one run: started, watched, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from opdkit.base.errors import UserError
from opdkit.base.interrupt import SIGNALS
from opdkit.base.launched import CLAIM, GRACE, processes

EVERY = 0.1  # seconds between two looks
Running = Sequence[subprocess.Popen[bytes]]


def on_several(count: int, arguments: Sequence[str]) -> int:
    """`python -m opdkit` with these arguments in `count` processes, each told its rank as torchrun
    does; the exit status of the run.

    A signal goes to all of them, which then stop together at the end of a step; one that is ignored
    stays so (SIGHUP under `nohup`). Where one fails, those that do not end by themselves are ended:
    they wait for it, and nothing can be saved without it.
    """
    if processes() > 1:
        raise UserError(
            f"this is one of {processes()} processes already (torchrun), and --nproc {count} "
            "starts its own: leave --nproc out"
        )
    if count < 1:
        raise UserError(
            f"--nproc {count}: it is the number of processes, one per device, 1 or more"
        )
    port = _free_port()
    with TemporaryDirectory(prefix="opdkit-") as folder:
        claim = Path(folder) / "failed"
        running = [_start(rank, count, port, claim, arguments) for rank in range(count)]
        handed: list[int] = []  # signals that went to all of them
        hand_on = _handed_on(running, handed)
        heard = (n for n in (*SIGNALS, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN)
        before = {number: signal.signal(number, hand_on) for number in heard}
        try:
            return _watched(running, claim, handed)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in _alive(running):
                process.kill()
                process.wait()


def _start(
    rank: int, count: int, port: int, claim: Path, arguments: Sequence[str]
) -> subprocess.Popen[bytes]:
    told = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        CLAIM: str(claim),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return subprocess.Popen(
        [sys.executable, "-m", "opdkit", *arguments],
        env={**threads, **os.environ, **told},
        process_group=0,  # a Ctrl-C of the terminal reaches them through this process alone
    )


def _alive(running: Running) -> list[subprocess.Popen[bytes]]:
    return [process for process in running if process.poll() is None]


def _handed_on(running: Running, handed: list[int]) -> Callable[[int, Any], None]:
    """The handler that gives a signal to all processes, and remembers it."""

    def hand_on(number: int, frame: Any) -> None:
        handed.append(number)
        for process in _alive(running):
            process.send_signal(number)

    return hand_on


def _watched(running: Running, claim: Path, handed: Sequence[int]) -> int:
    """The exit status once all have ended: that of the process on account of which they did."""
    since: float | None = None  # when the first that failed was seen
    ended: set[int] = set()  # by this process, on account of another
    while alive := _alive(running):
        bad = [p for p in running if p.returncode]
        if bad and since is None:
            since = time.monotonic()
            if killed := [p for p in bad if p.returncode < 0]:
                _tell(claim, _killed(running.index(killed[0]), -killed[0].returncode))
        if since is not None and time.monotonic() - since > GRACE:
            for process in alive:
                process.kill()
                ended.add(process.pid)
        time.sleep(EVERY)
    # one that was ended by a signal or says why it failed, before those that only lost it
    codes = sorted(
        ((p.returncode, rank) for rank, p in enumerate(running) if p.pid not in ended),
        key=lambda c: (c[0] >= 0, -c[0]),
    )
    code, rank = codes[0]
    if code < 0:
        _tell(claim, _killed(rank, -code))
    elif code > 0 and not handed:
        _tell(claim, f"process {rank} of the run ended with status {code} and said nothing of it")
    return code if code >= 0 else 128 - code


def _killed(rank: int, number: int) -> str:
    name = signal.Signals(number).name if number in list(signal.Signals) else str(number)
    why = " (the kernel does that where memory runs out)" if name == "SIGKILL" else ""
    return (
        f"process {rank} of the run was ended by {name}{why}, and the others cannot go on without "
        "it. What was learnt up to the newest checkpoint is kept: continue with --resume"
    )


def _tell(claim: Path, message: str) -> None:
    """Says why the run ends, if nobody has."""
    if not claim.exists():
        claim.touch()
        print(f"opdkit: error: {message}", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
