"""A clip compares the student with itself before the step: nothing of fresh rollouts is beyond it
at the first optimiser step, whatever drew them and in whatever numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.methods import grpo
from opdkit.objective import losses
from opdkit.run.launch import execute
from opdkit.run.settings import make_run
from tests.end_to_end.conftest import Shop

# every form of ratio, with a range that the rounding of one product would leave
CLIPPED = (
    "opd(clip=1e-12) + grpo(clip=1e-12) + grpo(loss='gspo', clip=1e-12) + "
    "grpo(loss='cispo', clip=1e-12) + minillm(clip=1e-12) + kdrl(clip=1e-12)"
)


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every ratio that a clip is asked about."""
    seen: list[torch.Tensor] = []
    bound, ratio = losses.clipped, grpo.ratio

    def clipped(r: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append(r.detach())
        return bound(r, *more)

    def watched(*how: Any) -> torch.Tensor:
        seen.append(ratio(*how).detach())
        return ratio(*how)

    monkeypatch.setattr(losses, "clipped", clipped)
    monkeypatch.setattr(grpo, "ratio", watched)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "bfloat16"},
        {"sampling.temperature": 0.6, "correct_sampling": True},
        {"sampling.temperature": 0.6, "dtype": "bfloat16", "correct_sampling": True},
        {"recompute_student": True, "sampling.temperature": 1.3},
    ],
    ids=str,
)
def test_no_fresh_token_is_clipped_at_the_first_optimiser_step(
    shop: Shop, tmp_path: Path, ratios: list[torch.Tensor], settings: dict[str, Any]
) -> None:
    values = shop.values(tmp_path / "run", method=CLIPPED, steps=2, reward=shop.reward)
    for name, value in settings.items():
        group, _, key = name.rpartition(".")
        (values.setdefault(group, {}) if group else values)[key] = value
    values.setdefault("sampling", {})["num_generations"] = 2
    execute(make_run(values))
    # the probe of what the formula reads makes its own numbers up, of a few tokens
    live = [r for r in ratios if len(r) > 8]
    assert len(live) >= 10 and all(bool((r == 1).all()) for r in live)
