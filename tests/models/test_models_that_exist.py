"""What real models do that a plain decoder does not: caps on attention, stretched contexts, heads
shorter than their tokenizer, tokenizers that differ in added tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.models.body import head_of, kept_rows, shared_vocabulary
from opdkit.models.limits import context_limit
from opdkit.models.load import load_model, take_loaded
from opdkit.models.quantize import left_whole
from opdkit.models.tokenizers import refuse_other_tokenizer, shared_ids, usable
from tests.common.tiny import VOCAB, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 60)[None]

# ------------------------------------------------------------------------------------ capped scores


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Gemma 2 whose attention scores are large enough for their cap to matter."""
    folder = tmp_path_factory.mktemp("gemma2")
    save_tiny(folder, "gemma2", attn_logit_softcapping=2.0, sliding_window=16, spread=0.5)
    return str(folder)


@torch.no_grad()
def test_gemma_2_computes_with_its_cap_on_attention_scores(capped: str) -> None:
    import transformers as hf

    def logits(attention: str) -> torch.Tensor:
        load = hf.AutoModelForCausalLM.from_pretrained
        return load(capped, attn_implementation=attention).eval()(IDS).logits.log_softmax(-1)

    right, without = logits("eager"), logits("sdpa")
    assert float((right.exp() * (right - without)).sum(-1).mean()) > 0.01  # nats: it matters
    assert torch.equal(load_model(capped)(IDS).logits.log_softmax(-1), right)
    with pytest.raises(UserError, match="sdpa leaves out the cap"):
        load_model(capped, attn_implementation="sdpa")
    given = hf.AutoModelForCausalLM.from_pretrained(capped, attn_implementation="sdpa").eval()
    assert torch.equal(take_loaded(given, "cpu")(IDS).logits.log_softmax(-1), right)


def test_other_models_keep_the_usual_attention(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    assert load_model(folder).config._attn_implementation == "sdpa"
    asked = load_model(folder, attn_implementation="eager")
    assert asked.config._attn_implementation == "eager"


# ----------------------------------------------------------------------------------------- contexts


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
        # the number is the stretched one already
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            4096,
        ),
        ({"rope_type": "linear", "factor": 2.0}, 8192),
    ],
)
def test_a_context_is_as_long_as_its_positions_are_stretched(
    rope: dict[str, Any] | None, limit: int
) -> None:
    given = {} if rope is None else {"rope_parameters": rope | {"rope_theta": 10000.0}}
    assert context_limit(tiny_model("llama", layers=1, **given).config) == limit


def test_a_model_that_states_no_context_has_none() -> None:
    from transformers import MambaConfig

    assert context_limit(MambaConfig()) is None


# ------------------------------------------------------------------------------ ids beyond the head


def with_added(*tokens: str) -> Any:
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(tokens)})
    return made


def test_added_tokens_beyond_a_head_are_not_written() -> None:
    assert usable(with_added("<picture>"), VOCAB) == VOCAB
    assert usable(with_added("<picture>"), VOCAB + 64) == VOCAB + 1
    with pytest.raises(UserError, match=r"300 rows, fewer than the tokenizer's 321 tokens"):
        usable(with_added("<picture>"), 300)  # ordinary words are missing: another model's


def test_heads_are_cut_to_what_all_can_write() -> None:
    tokenizer = with_added("<picture>")
    short, long = head_of(tiny_model(layers=1)), head_of(tiny_model(layers=1, vocab_size=384))
    assert shared_vocabulary([short, long], tokenizer) == VOCAB
    assert kept_rows([short, long], VOCAB) == VOCAB and kept_rows([short], VOCAB) is None
    assert shared_vocabulary([long], tokenizer) == VOCAB + 1


def test_tokenizers_that_differ_in_added_tokens_share_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, thinks, pads = tiny_tokenizer(), with_added("<think>", "</think>"), with_added("[PAD]")
    assert shared_ids(plain, tiny_tokenizer()) == VOCAB
    assert {shared_ids(a, b) for a in (plain, thinks) for b in (thinks, pads)} == {VOCAB, VOCAB + 2}
    assert shared_ids(thinks, with_added("<think>", "other")) == VOCAB + 1
    refuse_other_tokenizer("T", plain, thinks)
    assert "the run uses the 320 ids that both have" in capsys.readouterr().err
    other = tiny_tokenizer(["abcabc dada"])
    assert shared_ids(plain, other) is None
    with pytest.raises(UserError, match="the tokenizer of T is not the student's"):
        refuse_other_tokenizer("T", plain, other)


# ------------------------------------------------------------------------------------------ experts


def test_experts_that_are_no_linear_layers_are_told_of() -> None:
    import transformers as hf

    config = hf.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        decoder_sparse_step=1,
    )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # 4 experts, each of 3 matrices of 32 x 16
    assert str(left_whole(model)).startswith("6,144 weights of its experts are no linear layers")
    assert "stay in float32" in str(left_whole(model))
    assert left_whole(tiny_model(layers=1)) is None
