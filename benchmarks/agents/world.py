"""The world of the comparison: games, a tokenizer of their words, a teacher that has learnt their
walkthroughs, and a student that has seen them less often.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdkit.base.files import write_whole
from opdkit.environments import Dialogue, EnvironmentSettings
from opdkit.types import DataRow

IGNORED = -100  # the label that cross_entropy skips
END = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<pad>", "<|im_start|>", END)


@dataclass(frozen=True)
class Size:
    """A model, and its supervised training: every step sees every walkthrough once."""

    hidden: int
    layers: int
    steps: int
    rate: float = 3e-3


def texts_of(world: EnvironmentSettings, rows: Sequence[DataRow]) -> list[list[str]]:
    """Of each game what is read and done in turn, along its walkthrough."""
    dialogues = []
    for row in rows:
        game = world.make()
        said = [str(game.reset(row, 0))]
        for action in row["actions"]:
            said += [action, str(game.step(action))]
        assert game.done, row["id"]
        game.close()
        dialogues.append(said)
    return dialogues


def tokenizer_of(dialogues: Sequence[Sequence[str]], size: int = 700) -> Any:
    """A byte-level tokenizer that was trained on these texts, with a template as Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text for said in dialogues for text in said], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token=END,
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made


def model_of(size: Size, tokenizer: Any, seed: int) -> Any:
    """An untrained Qwen3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = size.hidden // 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def written(said: Sequence[str], dialogue: Dialogue) -> tuple[list[int], list[bool]]:
    """A walkthrough as an episode writes it: token ids [T], and which of them the student says."""
    asked = dialogue.asked([{"role": "user", "content": said[0]}], ())
    ids = dialogue.opening(asked, "a walkthrough")
    own = [False] * len(ids)
    for action, answer in zip(said[1::2], said[2::2]):
        turn = dialogue.action(action)
        reply = dialogue.reply([{"role": "user", "content": answer}], (), turn, "a walkthrough")
        ids += [*turn, *reply]
        own += [True] * len(turn) + [False] * len(reply)
    return ids, own


def batch_of(dialogues: Sequence[Sequence[str]], dialogue: Dialogue) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and labels [B, T], which skip what the world says."""
    rows = [written(said, dialogue) for said in dialogues]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), dialogue.tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (tokens, own) in enumerate(rows):
        row, mine = torch.tensor(tokens), torch.tensor(own)
        ids[i, : len(row)], labels[i, : len(row)] = row, row.where(mine, IGNORED)
    return ids, labels


def learn(
    model: Any, ids: Tensor, labels: Tensor, size: Size, show: Callable[[int, float], object]
) -> None:
    """Supervised training on ids [B, T] and labels [B, T], in place."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.95))
    model.train()
    for step in range(size.steps):
        for group in optimiser.param_groups:  # a warm-up, then down to a tenth
            done = step / max(size.steps, 1)
            group["lr"] = size.rate * min((step + 1) / 10, 1.0) * (1 - 0.9 * done)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        show(step + 1, float(loss.detach()))
    model.eval()


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """A model that plain from_pretrained loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: Sequence[DataRow]) -> None:
    """Rows as JSONL."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
