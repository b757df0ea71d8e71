"""The shape of a decoder: what its memory and its work depend on.

Read from a configuration, never from weights.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from opdkit.models.load import load_config, parameter_count

# Qwen3's dense models as published: hidden size, layers, heads, intermediate size, whether the head
# is the embedding
QWEN3 = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "32B": (5120, 64, 64, 25600, False),
}
NAMED = re.compile(r"Qwen/Qwen3-(0\.6B|1\.7B|4B|8B|14B|32B)(-Base|-Instruct-2507|-Thinking-2507)?")


class Adapters(Protocol):
    """The low-rank adapters of a run (see `train.settings.Lora`)."""

    @property
    def r(self) -> int:
        """Their rank."""
        ...

    @property
    def targets(self) -> str | tuple[str, ...]:
        """Which layers get them, by peft's rules."""
        ...


@dataclass(frozen=True)
class LinearShape:
    """A linear layer, weight [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward layers, as its configuration describes it."""

    origin: str  # where it was read
    parameters: int  # all of them; a head that is the embedding once
    # entries of the matrices that one token is multiplied with, the head apart; of experts only the
    # chosen ones
    active: int
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the feed-forward layers that one token passes, all experts together
    qk_norm: bool  # whether queries and keys are normalised
    linears: tuple[LinearShape, ...]  # every linear layer but the head
    layer: int  # parameters of the largest layer
    tied: bool  # whether the head is the embedding

    @property
    def head(self) -> int:
        """Entries of the head."""
        return self.vocab * self.hidden

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    def adapted(self, lora: Adapters) -> list[LinearShape]:
        """The layers that get adapters, by peft's rules."""
        targets = lora.targets
        if targets == "all-linear":
            return list(self.linears)
        if isinstance(targets, str):
            return [x for x in self.linears if re.fullmatch(targets, x.name)]
        return [
            x for x in self.linears if any(x.name == t or x.name.endswith(f".{t}") for t in targets)
        ]

    def adapters(self, lora: Adapters) -> int:
        """Parameters of the adapters."""
        return sum(lora.r * (x.inputs + x.outputs) for x in self.adapted(lora))


@cache
def shape_of(name: str, trust_remote_code: bool = False) -> Shape:
    """The shape of a model by folder or hub name: its configuration where that is on this machine,
    else the table, else the hub's.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import Qwen3Config

    known = NAMED.fullmatch(name)
    here = Path(name).expanduser().is_dir()
    if known and not here and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        hidden, layers, heads, intermediate, tied = QWEN3[known[1]]
        config = Qwen3Config(
            vocab_size=151936,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=intermediate,
            tie_word_embeddings=tied,
        )
        return read_shape(config, "table of published shapes")
    parameter_count(name, trust_remote_code)  # says what is wrong with a name that cannot be read
    config = load_config(name, trust_remote_code)
    return read_shape(config, "its configuration", trust_remote_code)


def read_shape(config: Any, origin: str, trust_remote_code: bool = False) -> Shape:
    """The shape that a configuration describes, from a model without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    outside = {id(head.weight), id(embedding.weight)}
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    chosen = getattr(text, "num_experts_per_tok", None) or experts

    def active(parameter: torch.nn.Parameter) -> int:
        if parameter.dim() < 2 or id(parameter) in outside:
            return 0
        stacked = parameter.dim() == 3 and experts and len(parameter) == experts
        return parameter.numel() * chosen // experts if stacked else parameter.numel()

    heads = text.num_attention_heads
    inner = (
        chosen * text.moe_intermediate_size
        if experts and getattr(text, "moe_intermediate_size", None)
        else None
    )
    return Shape(
        origin=origin,
        parameters=sum(p.numel() for p in model.parameters()),
        active=sum(map(active, model.parameters())),
        vocab=head.weight.shape[0],
        hidden=head.weight.shape[1],
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=inner or getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        linears=tuple(
            LinearShape(name, module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        ),
        layer=_largest_layer(model),
        tied=head.weight is embedding.weight,
    )


def _largest_layer(model: Any) -> int:
    """Parameters of the largest of the modules that are numbered in a list."""
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if found := re.match(r"\D*?\.\d+(?=\.)", name):
            sizes[found[0]] += parameter.numel()
    return max(sizes.values(), default=0)
