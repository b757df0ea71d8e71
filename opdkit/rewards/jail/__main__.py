"""A process that confines others, one per line that it reads, and answers each with a line.

Started by `workers.py`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict

from cell import COMMANDS, confined
from mounts import remove


def main() -> None:
    options = json.loads(sys.argv[1])
    here = os.path.dirname(os.path.abspath(__file__))
    module = importlib.import_module(options["work"])  # programs or scores, of this folder
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here] + options["paths"]
    results = os.fdopen(os.dup(1), "w")
    for fd in (0, 1):
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    base = tempfile.mkdtemp(prefix="opdkit-jail-", dir=options["folder"])
    try:
        jail, held = confined(base, options["without"])
        work = module.Work(jail, *options["for"])
        about = {"held": held, "layers": asdict(jail.layers), "base": base}
        # who asked may have been killed, before the first word too: then there is nobody to tell
        with suppress(BrokenPipeError), os.fdopen(COMMANDS, closefd=False) as commands:
            print(json.dumps(about), file=results, flush=True)
            for line in commands:
                print(json.dumps(work(line)), file=results, flush=True)
    finally:
        remove(base)
        with suppress(BrokenPipeError):
            results.close()


main()
