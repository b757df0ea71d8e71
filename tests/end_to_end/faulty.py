"""A method whose file, where a run loads it, has one of several processes fail at a named moment.

FAULT is JSON: {"at": a name in `MOMENTS`, "rank": whose, "how": "kill" or "error", "note": a file
in which the moment is noted, "time": the how-manieth, if not that of `MOMENTS`}. Without it the
method is plain OPD.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opdkit.methods.method import Method, load

# what of the program is about to be done, and from which time on: the first step goes well
MOMENTS = {
    "load": ("opdkit.run.build", "open_models", 1),
    "sample": ("opdkit.sampling.hf", "HFSampler.sample", 2),
    "reward": ("opdkit.train.collect.collect", "score", 2),
    "score": ("opdkit.teachers.local", "LocalModel.source", 2),
    "learn": ("opdkit.train.loop", "learn", 2),
    "optimiser step": ("opdkit.train.student", "Student.step", 2),
    "save": ("opdkit.train.loop", "_save", 1),
    "evaluate": ("opdkit.run.evaluation", "Measurer.__call__", 2),
    "export": ("opdkit.run.launch", "train", 1),
}


def before(call: Callable[..., Any], number: int, fail: Callable[[], None]) -> Callable[..., Any]:
    """A call that fails first, the `number`-th time."""
    times = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal times
        times += 1
        if times == number:
            fail()
        return call(*arguments, **named)

    return wrapped


def after(call: Callable[..., Any], fail: Callable[[], None]) -> Callable[..., Any]:
    """A call that fails once it is done."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        made = call(*arguments, **named)
        fail()
        return made

    return wrapped


def place(fault: dict[str, Any]) -> None:
    """Puts the fault where it belongs, in the process that is to fail."""
    if int(os.environ.get("RANK", "0")) != fault["rank"]:
        return

    def fail() -> None:
        Path(fault["note"]).write_text(repr(time.time()))
        if fault["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the disk fell asleep")

    module, name, number = MOMENTS[fault["at"]]
    number = fault.get("time", number)
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    if fault["at"] == "export":  # all is learnt, and what is left is to write the model
        holder.train = after(holder.train, fail)
    else:
        setattr(holder, last, before(getattr(holder, last), number, fail))


if "FAULT" in os.environ:
    place(json.loads(os.environ["FAULT"]))


def opd() -> Method:
    return load("opd")
