"""python -m opdkit."""

from opdkit.base.launched import end_at_once, processes
from opdkit.cli import main

status = main()
if status and processes() > 1:  # the others wait for this one
    end_at_once(status)
raise SystemExit(status)
