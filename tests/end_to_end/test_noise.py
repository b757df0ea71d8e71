"""Whole steps with noise on the layers of the student that learns, and with adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.run.build import prepare
from opdkit.train import loop
from tests.end_to_end.conftest import Shop


def weights(shop: Shop, folder: Path, **settings: Any) -> tuple[list[Tensor], Any]:
    """The student's weights after two steps of two updates each, and the job."""
    run = shop.run(
        folder,
        reward=shop.reward,
        sampling={"num_generations": 4},
        dtype="float64",
        **{"optim": {"learning_rate": 1e-3, "passes": 2}, **settings},
    )
    job, state = prepare(run)
    with job.recorder.trackers:
        for _ in range(2):
            loop.train_step(job, state)
    return [p.detach().double() for p in job.student.parameters], job


def named(**arguments: Any) -> dict[str, Any]:
    return {"method": {"name": "alp", **arguments}}


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    apart = sum((x - y).square().sum() for x, y in zip(a, b, strict=True)).sqrt()
    return bool(apart <= tolerance * sum(x.square().sum() for x in a).sqrt())


@pytest.mark.parametrize("mode", ["sequence", "cumulative"])
def test_noise_changes_what_is_learnt_but_not_as_the_step_is_cut(
    shop: Shop, tmp_path: Path, mode: str
) -> None:
    """The sums over a rollout are read under the very noise that the tokens are learnt under: cut
    into other micro-batches, and with layers computed twice, every step is the same.
    """
    bypass, _ = weights(shop, tmp_path / "0", **named(mode=mode, sigma=0.0))
    none, _ = weights(shop, tmp_path / "1", **named(mode=mode, sigma=1e-100))
    assert close(bypass, none, 1e-9)
    whole, job = weights(
        shop, tmp_path / "2", **named(mode=mode, sigma=0.2), micro_batch_tokens=999
    )
    cut, other = weights(
        shop,
        tmp_path / "3",
        **named(mode=mode, sigma=0.2),
        micro_batch_tokens=16,
        gradient_checkpointing=True,
    )
    assert close(whole, cut, 1e-7) and not close(whole, bypass, 1e-5)
    (a,), (b,) = job.companions.parameters, other.companions.parameters
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert (a != math.log(0.2)).all()


def test_adapters_learn_under_it_too(shop: Shop, tmp_path: Path) -> None:
    lora = {"lora": {"r": 4, "targets": ["q_proj"]}}
    bypass, _ = weights(shop, tmp_path / "0", **named(sigma=0.0), **lora)
    noisy, job = weights(shop, tmp_path / "1", **named(sigma=0.2), **lora)
    assert not close(noisy, bypass, 1e-5)
    assert (job.companions.parameters[0] != math.log(0.2)).all()
