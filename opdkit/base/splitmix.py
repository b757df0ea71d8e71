"""splitmix64: an integer hash on which every keyed draw and every order of prompts rests.

Works on int64 tensors and int64 arrays alike: only operators are used, products wrap, and a right
shift fills with zeros.
"""

from __future__ import annotations

from typing import Any


def wrapped(x: int) -> int:
    """A Python integer as int64 arithmetic would have it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


STEP = wrapped(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: from one state to the next
FIRST, SECOND = wrapped(0xBF58476D1CE4E5B9), wrapped(0x94D049BB133111EB)  # factors of `mix`


def shifted(x: Any, bits: int) -> Any:
    """int64 of any shape, shifted to the right as if it had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Any) -> Any:
    """The finaliser, on int64 of any shape: a bijection, so that no two numbers become one."""
    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    return x ^ shifted(x, 31)
