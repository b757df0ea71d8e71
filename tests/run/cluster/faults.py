"""A method file for tests: the method it stands for, and faults that a folder of files asks for,
in the processes of a run that have a name.

die-NAME-N: the process of that name ends at its N-th call, once. slow-NAME: it sleeps before each
for the seconds in the file. Calls are those that write (samplers), score (teachers) or step
(trainers).
"""

FILE = """
import os
import sys
import time
from pathlib import Path

from opdkit.methods.method import load
from opdkit.sampling import HFSampler
from opdkit.teachers import LocalModel
from opdkit.train.student import Student

HERE = Path(__file__).parent
CALLS = 0


def name():
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    return ray.get_runtime_context().get_actor_name() or ""


def hook(kind, method, who):
    plain = getattr(kind, method)

    def hooked(self, *arguments, **settings):
        global CALLS
        if name().startswith(who):
            CALLS += 1
            die, slow = HERE / f"die-{name()}-{CALLS}", HERE / f"slow-{name()}"
            if die.exists():
                die.unlink()
                os._exit(1)
            if slow.exists():
                time.sleep(float(slow.read_text()))
        return plain(self, *arguments, **settings)

    setattr(kind, method, hooked)


hook(HFSampler, "sample", "sampler")
hook(LocalModel, "source", "teacher")
hook(Student, "step", "trainer")


def tip():
    return load("tip")
"""
