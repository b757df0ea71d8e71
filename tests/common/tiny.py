"""Tiny models and tokenizers for tests: seconds on a CPU, no network, the same code paths as the
real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

VOCAB = 320  # 3 special tokens, 256 bytes, 61 merges
# ids 0, 1, 2; END is the end-of-sequence token
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
TEXTS = (
    "What is 12 plus 30? The answer is 42.",
    "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?",
    "Let us think step by step. First, 3 + 4 = 7. So the answer is \\boxed{7}.",
    "user assistant system",
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
    "}}{% endif %}"
)


def tiny_tokenizer(
    texts: Sequence[str] | None = None, vocab_size: int = VOCAB, chat_template: bool = True
) -> Any:
    """A byte-level BPE tokenizer trained on `texts`: at most `vocab_size` entries, every text
    decodes back exactly.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts or TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    if chat_template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(
    kind: str = "qwen3",
    vocab_size: int = VOCAB,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    spread: float = 0.2,
    **config: Any,
) -> Any:
    """A random causal LM in float32 and eval mode: kind is qwen3, qwen3_moe, llama,
    mixtral, gemma2, granite or cohere.

    `spread` is the standard deviation of its weights: at the usual 0.02 a tiny model is almost
    uniform and tests would see nothing.
    """
    import transformers as hf

    kinds = {
        "qwen3": hf.Qwen3Config,
        "llama": hf.LlamaConfig,
        "gemma2": hf.Gemma2Config,
        "granite": hf.GraniteConfig,
    }
    kinds |= {"cohere": hf.CohereConfig, "mixtral": hf.MixtralConfig}
    kinds["qwen3_moe"] = hf.Qwen3MoeConfig
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 4096,
        "initializer_range": spread,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "gemma2":
        settings["query_pre_attn_scalar"] = hidden // 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(
            kinds[kind](**(settings | config)), dtype=torch.float32
        )
    return model.eval()


def save_tiny(
    path: str | Path,
    kind: str = "qwen3",
    texts: Sequence[str] | None = None,
    vocab_size: int = VOCAB,
    **model: Any,
) -> str:
    """Write a tiny model and its tokenizer as a Hugging Face checkpoint; returns the path as a
    string.
    """
    tiny_tokenizer(texts, vocab_size).save_pretrained(path)
    tiny_model(kind, vocab_size, **model).save_pretrained(path)
    return str(path)
