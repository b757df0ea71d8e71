"""A sample of the inputs as processes, with their memory bounded: what a shell sees of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.conftest import Ground
from tests.hostile.judge import EITHER, WORKS, Attack, run_process

pytestmark = pytest.mark.hostile


def test_a_sample_as_processes(ground: Ground, judged) -> None:
    def attacks() -> Iterator[Attack]:
        yield ground.train("nothing wrong", end=WORKS)
        yield ground.train("a number of text", "steps=many")
        yield ground.train("a template that pads", 'data.template="{prompt:>3000000000}"')
        leaves = ground.file("process/leaves.py", "import sys\nsys.exit(0)\n")
        yield ground.train("a method that leaves", method=f"{leaves}:mine")
        takes = ground.file(
            "process/takes.py", "def mine(rollout):\n    return len(bytearray(10**12))\n"
        )
        yield ground.train("a reward that takes a TiB", f"reward={takes}:mine", end=EITHER)
        ends = ground.file("process/ends.py", "import os\ndef mine(rollout):\n    os._exit(0)\n")
        yield ground.train("a reward that ends its process", f"reward={ends}:mine")
        raw = ground.file("process/latin.jsonl", '{"prompt": "caf\u00e9"}\n'.encode("latin-1"))
        yield ground.train("Latin-1", data=raw)
        yield Attack("a command that is none", ("dance",))

    judged("processes of their own", attacks(), run_process)
