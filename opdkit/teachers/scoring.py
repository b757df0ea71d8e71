"""What `opdkit serve-teacher` and its client say to each other: tensors and settings in one safetensors body."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.forward import Layout
from opdkit.head import Head
from opdkit.types import EntropyFact, Fact, LogpAtFact, LogpFact, Rollout, TopFact

FINGERPRINT = "X-Opdkit-Model"  # header of every answer: which weights gave it
FACTS = {cls.__name__: cls for cls in (LogpFact, EntropyFact, TopFact, LogpAtFact)}


def pack(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"settings": json.dumps(settings)})


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings; a ValueError where the body is cut short or is something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(body)
        (size,) = struct.unpack("<Q", body[:8])
        return tensors, json.loads(json.loads(body[8 : 8 + size]).get("__metadata__", {}).get("settings", "{}"))
    except (SafetensorError, struct.error) as error:
        raise ValueError(f"not a safetensors body of {len(body)} bytes: {error}") from error


# --------------------------------------------------------------------------------------------------------------- requests


def pack_request(
    layout: Layout, positions: Tensor, wanted: Collection[Fact], ids: Mapping[TopFact, Tensor], vocab: int | None
) -> bytes:
    """Rollouts that have some of the flat positions [N], and what is asked of these: facts, or hidden states where none is wanted."""
    used = (positions // layout.width).unique().tolist()
    last = {b: int(positions[positions // layout.width == b].max()) % layout.width for b in used}
    rollouts = [layout.rollouts[b] for b in used]
    responses = [r.tokens[: last[b] + 1] for b, r in zip(used, rollouts)]
    number = torch.full((len(layout.rollouts),), -1, dtype=torch.int64)
    number[used] = torch.arange(len(used))
    width = max(map(len, responses), default=1)
    positions = positions.cpu()
    tensors = {
        "tokens": torch.tensor(
            [t for r, response in zip(rollouts, responses) for t in (*r.prompt, *response)], dtype=torch.int64
        ),
        "prompts": torch.tensor([len(r.prompt) for r in rollouts], dtype=torch.int64),
        "responses": torch.tensor([len(response) for response in responses], dtype=torch.int64),
        "positions": number[positions // layout.width] * width + positions % layout.width,
    }
    at = [f for f in ids if any(isinstance(w, LogpAtFact) and (w.owner, w.k) == (f.model, f.k) for w in wanted)]
    tensors |= {f"ids {i}": ids[f].to(torch.int64) for i, f in enumerate(at)}
    settings = {
        "rollouts": [r.id for r in rollouts],
        "facts": [as_dict(f) for f in sorted(wanted, key=repr)],
        "ids": [as_dict(f) for f in at],
        "vocab": vocab,
    }
    return pack(tensors, settings)


def unpack_request(body: bytes) -> tuple[Layout, Tensor, list[Fact], dict[TopFact, Tensor], int | None]:
    """Layout, flat positions, wanted facts, other models' ids and the rows of the head to keep."""
    tensors, settings = unpack(body)
    prompts, responses = tensors["prompts"].tolist(), tensors["responses"].tolist()
    rollouts, at, tokens = [], 0, tensors["tokens"].tolist()
    for id, p, r in zip(settings["rollouts"], prompts, responses, strict=True):
        rollouts.append(Rollout(id, tokens[at : at + p], tokens[at + p : at + p + r], [True] * r, [], [], ""))
        at += p + r
    layout = Layout(rollouts, max(responses, default=1))
    wanted = [as_fact(d) for d in settings["facts"]]
    ids: dict[Any, Tensor] = {as_fact(d): tensors[f"ids {i}"] for i, d in enumerate(settings["ids"])}
    return layout, tensors["positions"], wanted, ids, settings["vocab"]


def as_dict(fact: Fact) -> dict[str, Any]:
    return {"fact": type(fact).__name__, **asdict(fact)}


def as_fact(given: Mapping[str, Any]) -> Fact:
    values = dict(given)
    name = values.pop("fact", None)
    if name not in FACTS:
        raise ValueError(f"{name!r} is not a fact that a server can say")
    return FACTS[name](**values)


# ------------------------------------------------------------------------------------------------------------ model, head


def pack_head(head: Head) -> bytes:
    assert head.weight is not None
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    return pack(tensors, {"scale": head.scale, "softcap": head.softcap})


def unpack_head(body: bytes) -> Head:
    tensors, settings = unpack(body)
    if "weight" not in tensors:
        raise ValueError("no weight in it")
    return Head(tensors["weight"], tensors.get("bias"), settings["scale"], settings["softcap"])


def head_on(head: Head, device: torch.device) -> Head:
    assert head.weight is not None
    return replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))


def tokenizer_digest(vocab: Mapping[str, int]) -> str:
    """The same for tokenizers that give every token the same id."""
    return hashlib.sha256(json.dumps(sorted(vocab.items())).encode()).hexdigest()[:16]


def model_digest(model: Any) -> str:
    """Differs for other weights: names, shapes and 64 values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].float().cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
