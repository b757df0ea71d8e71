"""Attention of one token to its cache is the stock kernel's, for shared heads and masks, and is
gone after sampling.
"""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opdkit.sampling.attention import decode_attention, decoding
from tests.common.tiny import tiny_model

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0] * 6 + [1]], dtype=torch.bool)[
    :, None, None
]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "mask",
    [None, MASK, torch.zeros(MASK.shape, dtype=torch.float64).masked_fill(~MASK, -torch.inf)],
)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query_gives_what_sdpa_gives(
    key_heads: int, mask: torch.Tensor | None, scaling: float | None
) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 4, 1, 8, dtype=torch.float64)
    # a buffer with room behind
    key, value = (torch.randn(3, key_heads, 9, 8, dtype=torch.float64)[:, :, :7] for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads  # type: ignore[assignment]
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    got, _ = decode_attention(module, query, key, value, mask, scaling=scaling)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_several_queries_go_to_sdpa() -> None:
    """The prefill: causal."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8) for _ in range(3))
    module = torch.nn.Module()
    assert torch.equal(
        decode_attention(module, query, key, value, None)[0],
        sdpa_attention_forward(module, query, key, value, None)[0],
    )


def test_the_model_has_its_own_attention_again_whatever_happens() -> None:
    model = tiny_model("qwen3")
    with pytest.raises(RuntimeError), decoding(model):
        assert model.config._attn_implementation == "opdkit_decode"
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_another_attention_keeps_it() -> None:
    model = tiny_model("qwen3")
    model.config._attn_implementation = "eager"
    with decoding(model):
        assert model.config._attn_implementation == "eager"
