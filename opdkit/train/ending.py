"""How several processes end together: each hears that another has failed, also while it waits for
something else, and none outlasts it for long.
"""

from __future__ import annotations

import faulthandler
import os
import threading
from typing import Any

from opdkit.base.launched import CLAIM, GRACE, claims

FAILED = "opdkit/failed"  # in the store that the processes share: how many have failed
EVERY = 1.0  # seconds between two looks
# in the words of gloo, NCCL and the store: the process at the other end has ended
GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process"),
    *("Connection was likely closed", "Connection refused", "failed to recv", "failed to send"),
)


class Watch(threading.Thread):
    """Looks every second whether another process has failed, and then ends this one within
    `GRACE`: it may wait for that one, inside a library that hears of nothing.
    """

    def __init__(self, store: Any):
        super().__init__(daemon=True, name="opdkit-watch")
        # by a connection of its own: the other may be taken by a call that waits
        self.store, self.over = store.clone(), threading.Event()
        # whoever started them with a file to claim is there until all have ended
        self.parent = os.getppid() if CLAIM in os.environ else None

    def run(self) -> None:
        while not self.over.wait(EVERY):
            if self._failed() and not self.over.is_set():
                end_within(GRACE)
                return

    def _failed(self) -> bool:
        try:
            orphan = self.parent is not None and os.getppid() != self.parent
            return orphan or bool(self.store.check([FAILED]))
        except Exception:  # the process that holds the store is gone
            return True

    def stop(self) -> None:
        """Before this process ends: Python would end a thread in the midst of a call of the store,
        and with it the process.
        """
        self.over.set()
        self.join(EVERY)

    def fail(self) -> bool:
        """Tells the others that this process has failed; whether it is the first, and so the one
        that says why.
        """
        try:
            first = int(self.store.add(FAILED, 1)) == 1
        except Exception:  # as above
            first = False
        claimed = claims()
        return first if claimed is None else claimed


def end_within(seconds: float) -> None:
    """This process ends by then with status 1, whatever it waits for."""
    # not a thread of Python's, which could not stop what holds the interpreter
    faulthandler.dump_traceback_later(seconds, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115


def lost(error: BaseException) -> bool:
    """Whether an error, or what it came from, says no more than that another process is gone."""
    import torch.distributed as dist

    seen: BaseException | None = error
    while seen is not None:
        said = str(seen)
        if isinstance(seen, (dist.DistError, RuntimeError)) and any(w in said for w in GONE):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
