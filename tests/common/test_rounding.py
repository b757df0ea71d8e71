"""What tests allow for rounding is more than rounding takes, on any processor, and far less than a
fault would.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from opdkit.train.settings import Lora
from opdkit.train.student import with_adapters
from tests.common.rounding import FORWARD, forward_rounding
from tests.common.tiny import tiny_model

IDS = torch.randint(3, 320, (3, 60), generator=torch.Generator().manual_seed(0))
KINDS = ("qwen3", "llama", "gemma2", "granite", "cohere")
MODELS = [
    *({"kind": kind, "seed": seed} for kind in KINDS for seed in range(4)),
    {"kind": "llama", "hidden": 48, "seed": 2},
    {"hidden": 64, "seed": 1, "spread": 0.1},
    {"layers": 1},
    {
        "vocab_size": 352,
        "hidden": 256,
        "spread": 0.06,
        "tie_word_embeddings": True,
    },  # of tests/vllm
]


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double().log_softmax(-1)


@pytest.mark.parametrize("config", MODELS, ids=str)
def test_a_forward_pass_is_off_by_less_than_is_allowed(config: dict[str, Any]) -> None:
    model = tiny_model(**config)
    for dtype in (torch.float32, torch.bfloat16):
        allowed = forward_rounding(model, IDS, dtype)
        exact = tiny_model(**config).to(dtype).double()
        assert (log_probs(tiny_model(**config).to(dtype)) - log_probs(exact)).abs().max() < allowed
    assert forward_rounding(model, IDS) < FORWARD


def test_errors_are_proportional_to_the_precision() -> None:
    assert forward_rounding(tiny_model(), IDS, torch.float64) == pytest.approx(
        forward_rounding(tiny_model(), IDS) / 2**29, rel=0.1
    )


def test_a_model_that_amplifies_rounding_is_told() -> None:
    """Adapters of ones swamp the weights they stand beside: all outputs of a layer are nearly one
    number, and differ by little.
    """
    pytest.importorskip("peft")
    model = with_adapters(tiny_model(hidden=64, seed=1, spread=0.1), Lora(r=4))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(p)
    assert forward_rounding(model, IDS) > 3 * FORWARD
