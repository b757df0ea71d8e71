"""Models that mix attention with layers that keep a state per row, and models whose attention looks
at chunks: sampled from their caches, rows joining and leaving, as a plain forward pass reads them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.models.body import check_head, hidden_states
from opdkit.sampling import HFSampler
from opdkit.sampling.kv_cache import odd_layers, refuse_odd
from opdkit.types import Prompt, Rollout, Sampling
from tests.common.rounding import FORWARD
from tests.common.tiny import VOCAB, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
STATES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        STATES
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_5": ("Qwen3_5TextConfig", STATES),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "llama4": (
        "Llama4TextConfig",
        {
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 16,
        },
    ),
}
# prompts shorter and longer than a chunk, and more of them than the batch has rows
LENGTHS = (5, 33, 20, 1)
PROMPTS = [
    Prompt(str(n), torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in LENGTHS
]
ASKED = Sampling(max_completion_length=16, num_generations=2)


def hybrid(kind: str) -> Any:
    import transformers as hf

    name, extra = KINDS[kind]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(hf, name)(**settings | extra)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = list(range(2, 24))  # rows end at all lengths
    return model


@torch.no_grad()
def gap(model: Any, rollout: Rollout) -> float:
    """The largest difference of recorded log-probs to those of a plain forward pass."""
    logits = model(torch.tensor([rollout.prompt + rollout.tokens])).logits
    logps = logits[0, len(rollout.prompt) - 1 : -1].log_softmax(-1)
    own = logps.gather(-1, torch.tensor(rollout.tokens)[:, None])[:, 0]
    return float((own - torch.tensor(rollout.logp)).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_states_or_chunks_is_sampled_as_it_computes(kind: str) -> None:
    model = hybrid(kind)
    check_head(model)
    longest = max(LENGTHS) + ASKED.max_completion_length
    together = HFSampler(model, TOKENIZER).sample(PROMPTS, ASKED)
    few = HFSampler(model, TOKENIZER, max_batch_tokens=3 * longest).sample(PROMPTS, ASKED)
    assert {r.finish for r in together} == {"stop", "length"}
    for rollouts in (together, few):
        assert max(gap(model, r) for r in rollouts) < FORWARD
    # a rollout does not depend on the batch that it was sampled in
    assert [r.tokens for r in few] == [r.tokens for r in together]


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_row_reaches_none_of_its_tokens(kind: str) -> None:
    """Training pads on the right and masks nothing."""
    model = hybrid(kind)
    ids = torch.tensor([PROMPTS[2].tokens + [0] * 13, PROMPTS[1].tokens])
    hidden = hidden_states(model, ids, None)
    alone = hidden_states(model, ids[:1, :20], None)
    assert torch.allclose(hidden[0, :20], alone[0], atol=FORWARD)
    hidden[0, :20].sum().backward()
    parameters = dict(model.model.named_parameters())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters.values())


def test_a_cache_of_another_kind_is_refused_before_the_first_step() -> None:
    import transformers as hf

    config = hf.FalconH1Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
    )
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    assert odd_layers(model) == ["LinearAttentionAndFullAttentionLayer"]
    with pytest.raises(UserError, match=r"keeps LinearAttentionAnd.*sampler=vllm"):
        refuse_odd(model)
