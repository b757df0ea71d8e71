"""The quickstart's world: written addition, two small Qwen3 models and the supervised training that
precedes distillation.

A row asks `4738+2965=` and its response adds column by column, units first, with every carry
written, then the sum:

    8+5+0=13
    3+6+1=10
    7+9+1=17
    4+2+1=7
    =7703

The teacher learns from such texts. The student learns briefly from the texts of a careless pupil,
who forgets most carries: it writes the right format with wrong sums, and distillation on its own
rollouts teaches it to carry.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.types import DataRow

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
        Qwen3ForCausalLM,
    )

DIGITS = 4  # of each summand
HELD_OUT = 16  # one pair of summands in this many is never trained on
SPECIALS = ("<pad>", "<bos>", "<eos>")
CHARACTERS = "0123456789+=\n"
IGNORED = -100  # the label that cross_entropy skips


@dataclass(frozen=True)
class Start:
    """A model and the supervised training it gets before distillation begins."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    steps: int
    batch_size: int
    learning_rate: float
    forget: float = 0.0  # probability that a carry in the training texts is forgotten


TEACHER = Start(128, 384, 4, 4, steps=400, batch_size=32, learning_rate=4e-3)  # 0.86M parameters
# 0.36M parameters
STUDENT = Start(96, 288, 3, 4, steps=200, batch_size=32, learning_rate=6e-3, forget=0.7)
SIZES = {"teacher": TEACHER, "student": STUDENT}


# ----------------------------------------------------------------------------------------- problems


def held_out(a: int, b: int) -> bool:
    """Whether the pair belongs to the evaluation set: decided by a hash of the unordered pair, so
    b+a goes with a+b.
    """
    digest = hashlib.blake2b(f"{min(a, b)}+{max(a, b)}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


def written(a: int, b: int, rng: random.Random, forget: float = 0.0) -> str:
    """The written sum; each carry is dropped with probability `forget`."""
    lines, total, carry = [], "", 0
    for place in range(DIGITS):
        x, y = a // 10**place % 10, b // 10**place % 10
        column = x + y + carry
        lines.append(f"{x}+{y}+{carry}={column}\n")
        last = place == DIGITS - 1
        total = (str(column) if last else str(column % 10)) + total
        carry = 0 if rng.random() < forget else column // 10
    return "".join(lines) + "=" + total


def problem(rng: random.Random, held: bool = False, forget: float = 0.0) -> DataRow:
    """One row: `prompt`, `response` (with carries forgotten at the rate `forget`) and `answer`,
    which is always right.
    """
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    while True:
        a, b = rng.randrange(low, high), rng.randrange(low, high)
        if held_out(a, b) == held:
            return {
                "prompt": f"{a}+{b}=",
                "response": written(a, b, rng, forget),
                "answer": str(a + b),
            }


def problems(n: int, seed: int, held: bool = False, forget: float = 0.0) -> list[DataRow]:
    """n rows, the same for the same seed; `held` chooses the evaluation set, disjoint from training
    for any two seeds.
    """
    rng = random.Random(f"{seed}/{held}/{forget}")
    return [problem(rng, held, forget) for _ in range(n)]


# ----------------------------------------------------------------------------- tokenizer and models


def tokenizer(
    words: Sequence[str] = CHARACTERS, pattern: str | None = None
) -> PreTrainedTokenizerFast:
    """One token per word, or per match of `pattern`, which matches words only; other characters are
    dropped.

    Of words that begin alike the longest is taken. Nothing is added before or after a text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIALS, *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=None))
    if pattern is None:
        pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    core.decoder = decoders.Fuse()
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )


def model(size: str, vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of `size` "teacher" or "student"."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if size not in SIZES:
        raise UserError(
            f"no model size {size!r}: the recipe trains one teacher and one smaller student; use "
            "'teacher' or 'student'"
        )
    shape = SIZES[size]
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_attention_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # texts of 60 characters and narrow layers: with the defaults of large models (10000 and
        # 0.02) learning takes 3x the steps
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.08,
        pad_token_id=SPECIALS.index("<pad>"),
        bos_token_id=SPECIALS.index("<bos>"),
        eos_token_id=SPECIALS.index("<eos>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


# ------------------------------------------------------------------------------ supervised training


def collate(rows: Sequence[DataRow], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids [n, T], padded on the right, and labels [n, T]: `IGNORED` on prompts and padding,
    the response ends with eos.
    """
    prompts = tokenizer([row["prompt"] for row in rows]).input_ids
    responses = tokenizer([row["response"] for row in rows]).input_ids
    width = 1 + max(len(p) + len(r) for p, r in zip(prompts, responses))
    ids, labels = [], []
    for p, r in zip(prompts, responses):
        padding = width - len(p) - len(r) - 1
        ids.append([*p, *r, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding)
        labels.append([IGNORED] * len(p) + [*r, tokenizer.eos_token_id] + [IGNORED] * padding)
    return torch.tensor(ids), torch.tensor(labels)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[DataRow],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Supervised training on the rows' responses, in place; returns the loss of each step in nats
    per token.

    AdamW, linear warm-up over the first 20 steps, then a cosine to a twentieth. The result depends
    on the seed and, through floating-point sums, on the thread count alone. `progress(steps done,
    loss)` is called after every step.
    """
    ids, labels = collate(rows, tokenizer)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, total_iters=20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, max(1, steps - 20), eta_min=learning_rate / 20
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [20])
    losses: list[float] = []
    left = torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(1, steps + 1):
        if len(left) < batch_size:
            left = torch.randperm(len(ids), generator=order)
        batch, left = left[:batch_size], left[batch_size:]
        # padding is on the right: causal attention keeps it away from the text, so no mask is
        # needed
        logits = model(input_ids=ids[batch, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[batch, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress:
            progress(step, losses[-1])
    model.eval()
    return losses


def start(
    size: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> Qwen3ForCausalLM:
    """The trained teacher, or the student as it is before distillation."""
    plan = SIZES[size]
    network = model(size, len(tokenizer), seed)
    rows = problems(plan.steps * plan.batch_size, seed, forget=plan.forget)
    pretrain(
        network, tokenizer, rows, plan.steps, plan.batch_size, plan.learning_rate, seed, progress
    )
    return network
