"""Errors that a person can act on."""

from __future__ import annotations

import reprlib
from typing import Any


class UserError(Exception):
    """Bad input: the message says what is wrong, why it matters and what to do.

    The command line prints it and exits with 2.
    """


def nearest(name: str, known: list[str]) -> str:
    """A hint `; did you mean 'x'?` for a misspelt name, or the known names where none is near."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return (
        f"; did you mean {close[0]!r}?"
        if close
        else f"; known: {', '.join(sorted(known)) or 'none'}"
    )


class _Short(reprlib.Repr):
    """Values in a few words."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 240
        self.maxdict = self.maxlist = self.maxtuple = 4
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an integer of more than some thousand digits
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 400 else repr(x)


_short = _Short()


def shown(value: Any) -> str:
    """A value as a message shows it: short, whatever its size, and even if it cannot be written."""
    try:
        return _short.repr(value)
    except Exception:  # its own __repr__ fails
        return f"a {type(value).__name__}"
