"""Methods that are about several updates on one batch, in whole runs of two passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Shop
from tests.end_to_end.test_training import GSM8K, check_trained, metrics, needs_gsm8k

METHODS = (
    "clip_cov(lb=0.1, ratio=0.2)",
    "kl_cov(ratio=0.2)",
    "mdpo",
    "mdpo(credit=teacher, kind=k2)",
    "f_dpg",
    "opd(kind=jsd, as_credit=true)",
    "grpo(divergence_mask=0.02, mask_kind=full_kl)",
    "grpo(smooth=0.1)",
)
SIZES = ("num_generations=4", "optim.passes=2", "optim.minibatches=2")


@pytest.mark.parametrize("lora", [(), ("lora.r=4",)], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_they_train_with_all_weights_and_with_adapters(
    shop: Shop, tmp_path: Path, method: str, lora: tuple[str, ...]
) -> None:
    asked = (f"--method={method}", f"--reward={shop.reward}", *SIZES)
    assert shop.train(tmp_path, *asked, *lora) == 0
    check_trained(tmp_path, shop.student, 2)


@pytest.mark.slow
@needs_gsm8k
@pytest.mark.parametrize("lora", [(), ("lora.r=4",)], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_on_gsm8k(shop: Shop, tmp_path: Path, method: str, lora: tuple[str, ...]) -> None:
    size = ("steps=10", "prompts_per_step=4", "max_completion_length=32", "checkpoint.every=5")
    asked = (f"data={GSM8K}", f"--method={method}", f"--reward={shop.reward}", *SIZES, *size)
    assert shop.train(tmp_path, *asked, *lora) == 0
    check_trained(tmp_path, shop.student, 10)
    assert all(line["entropy/student"] > 0 for line in metrics(tmp_path))
