"""splitmix64: the published sequence, and the same numbers for tensors and for arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opdkit.base import splitmix

# the first outputs of the reference implementation (Vigna, splitmix64.c) from state 1234567
REFERENCE = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
EDGES = [0, 1, -1, (1 << 63) - 1, -(1 << 63), 0x0123456789ABCDEF]


def plain(x: int) -> int:
    """The finaliser in Python's integers, modulo 2^64."""
    whole = (1 << 64) - 1
    x &= whole
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
    return splitmix.wrapped(x ^ (x >> 31))


def test_it_is_the_published_generator() -> None:
    states = torch.arange(1, 5) * splitmix.STEP + 1234567
    assert [x % (1 << 64) for x in splitmix.mix(states).tolist()] == REFERENCE


@pytest.mark.filterwarnings("error")
def test_tensors_arrays_and_integers_agree() -> None:
    expected = [plain(x) for x in EDGES]
    assert splitmix.mix(torch.tensor(EDGES)).tolist() == expected
    assert splitmix.mix(np.array(EDGES, dtype=np.int64)).tolist() == expected
    assert splitmix.shifted(torch.tensor([-1]), 60).tolist() == [15]
    assert splitmix.wrapped(1 << 63) == -(1 << 63) and splitmix.wrapped(-1) == -1
