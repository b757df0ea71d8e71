"""Whether this process is one of several that do the same work, as whoever started them says
(torchrun, `opdkit train --nproc`).
"""

from __future__ import annotations

import os


def processes() -> int:
    """How many there are."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0) if processes() > 1 else 0


_told = False  # whether this process is the one that says why all of them end


def speaks() -> bool:
    """Whether this process says on the screen what there is to say: the first does, and of a
    failure the one that met it.
    """
    return _told or rank() == 0


def tell() -> None:
    """From now on this process speaks."""
    global _told
    _told = True


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else usual
