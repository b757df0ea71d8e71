"""python -m opdkit.cli."""

from opdkit.cli import main

raise SystemExit(main())
