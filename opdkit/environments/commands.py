"""What a turn of the student's commands, for worlds that are told one thing at a time; and whether
the package of such a world is there.
"""

from __future__ import annotations

import importlib.util

from opdkit.base.errors import UserError

LONGEST = 200  # signs of a command; no world has one as long


def command_of(action: str) -> str:
    """The last line of a turn that is not blank, without a "> " before it, its white space single:
    what stands before it may be what the student made of the scene.
    """
    lines = [line for line in action.splitlines() if line.strip()]
    return " ".join((lines[-1] if lines else "").strip().lstrip(">").split())[:LONGEST]


def needs_package(world: str, package: str) -> None:
    """Refuses a machine without the package that holds a world."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"the environment {world!r} is played in the package {package}, which is not "
            "installed: pip install 'opdkit[agents]'"
        )
