"""Tokenizers of other families, really trained: SentencePiece-like with byte fallback, and
byte-level BPE that normalises.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tests.common.tiny import TEMPLATE, TEXTS, VOCAB, tiny_model

OTHER = (
    "Is it 12 plus 30? Then the answer is 42!",
    "Tom buys apples: 3 apples and 4 more apples.",
    "Déjà vu, naïve café, 日本",
)
TURNS = TEMPLATE.replace("<|im_start|>", "<turn>").replace("<|im_end|>", "</s>")


def sentencepiece(
    texts: Sequence[str] = OTHER,
    size: int = 420,
    space: bool = False,
    bos: bool = False,
    chat: bool = False,
) -> Any:
    """Unigram pieces with ▁ for spaces and <0xNN> for what is in no piece; `space`: it puts one
    before every text, as Llama 2's does.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Replace(" ", "▁")
    specials = ["<unk>", "<s>", "</s>", "<turn>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 256, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(list(texts) * 20, trainer)
    state = json.loads(core.to_str())
    pieces = state["model"]["vocab"]
    state["model"] |= {
        "vocab": pieces[:4] + [[b, -20.0] for b in bytes_] + pieces[4:],
        "byte_fallback": True,
        "unk_id": 0,
    }
    state["added_tokens"] = []
    core = Tokenizer.from_str(json.dumps(state))
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if space:
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if space else []),
        ]
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        made.chat_template = TURNS
    return made


def normalising(kind: str = "NFC", size: int = VOCAB) -> Any:
    """Byte-level BPE behind a normaliser: NFC as Qwen's has, or Lowercase."""
    from tokenizers import normalizers

    from tests.common.tiny import tiny_tokenizer

    made = tiny_tokenizer(OTHER, size)
    made.backend_tokenizer.normalizer = getattr(normalizers, kind)()
    return made


def teacher_of(tokenizer: Any, seed: int = 3, **config: Any) -> Any:
    """A tiny random teacher for a tokenizer, in float64."""
    return tiny_model(
        "llama", max(tokenizer.get_vocab().values()) + 1, seed=seed, **config
    ).double()


__all__ = ["OTHER", "TEXTS", "normalising", "sentencepiece", "teacher_of"]
