"""Rollouts asked for ahead by several processes are those that one asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Shop
from tests.end_to_end.test_ranks import compare, data, values

__all__ = ["data"]


@pytest.mark.ranks
def test_ahead_on_two_and_three_processes(shop: Shop, data: str, tmp_path: Path) -> None:
    """Written by the processes in turn with learning, or by a sampler elsewhere that the first of
    them asks while all learn: with the weights that all have put together.
    """
    four = {"steps": 4, "dynamic_sampling": False}
    cases = {
        f"{kind}, ahead {ahead}": values(
            shop, data, tmp_path, "grpo", ahead=ahead, sampler={"kind": kind}, **four
        )
        for kind, ahead in (("hf", 1), ("copy", 0), ("copy", 1), ("copy", 2))
    }
    compare(cases, tmp_path, (2, 3))
