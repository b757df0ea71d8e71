"""What `opdkit serve-teacher` and its client say to each other: tensors and settings in one
safetensors body.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from opdkit.models.layout import Layout
from opdkit.objective.facts import EntropyFact, Fact, LogpAtFact, LogpFact, TopFact
from opdkit.objective.head import Head
from opdkit.types import Rollout

MOST_TOKENS = 1 << 22  # of one request
FINGERPRINT = "X-Opdkit-Model"  # header of every answer: which weights gave it
# by the names under which they are sent
FACTS: dict[str, type[Fact]] = {
    "LogpFact": LogpFact,
    "EntropyFact": EntropyFact,
    "TopFact": TopFact,
    "LogpAtFact": LogpAtFact,
}


def pack(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bytes:
    """A body: tensors [...] of any shape by name, and settings as JSON, in safetensors' format."""
    from safetensors.torch import save

    return save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        {"settings": json.dumps(settings)},
    )


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:  # tensors of any shape [...]
    """Tensors of the shapes that `pack` was given, and settings.

    A ValueError where the body is cut short or is something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(body)
        (size,) = struct.unpack("<Q", body[:8])
        return tensors, json.loads(
            json.loads(body[8 : 8 + size]).get("__metadata__", {}).get("settings", "{}")
        )
    # KeyError: a number format that torch does not have
    except (SafetensorError, struct.error, KeyError) as error:
        raise ValueError(f"not a safetensors body of {len(body)} bytes: {error}") from error


# ------------------------------------------------------------------------------------------ answers

Expected = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # tensors by name
AROUND = 1 << 16  # bytes of an answer that are no tensor's


def seal(request: bytes, tensors: Mapping[str, Tensor]) -> str:
    """What ties an answer's tensors [...] to the request: another request's, and one in which
    anything was changed, have another.
    """
    digest = hashlib.sha256(hashlib.sha256(request).digest())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack_answer(tensors: Mapping[str, Tensor], request: bytes) -> bytes:
    """Tensors of any shape [...] by name, for this request."""
    return pack(tensors, {"answers": seal(request, tensors)})


def size(expected: Expected) -> int:
    """Bytes that an answer with these tensors has at most."""
    return AROUND + sum(dtype.itemsize * math.prod(shape) for dtype, shape in expected.values())


def unpack_answer(body: bytes, request: bytes, expected: Expected) -> dict[str, Tensor]:
    """The tensors [...] that were asked for, of the shapes that were asked for.

    A ValueError where the body is not the answer to this request.
    """
    tensors, settings = unpack(body)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    if found != dict(expected):
        raise ValueError(f"{_words(expected)} were asked for, and {_words(found)} came back")
    if not isinstance(settings, dict) or settings.get("answers") != seal(request, tensors):
        raise ValueError(
            "the answer is another request's, or was changed on its way: its digest is not that "
            "of this request and these numbers"
        )
    return tensors


def _words(expected: Expected) -> str:
    return shown({name: (str(t), list(shape)) for name, (t, shape) in sorted(expected.items())})


# ----------------------------------------------------------------------------------------- requests


def pack_request(
    layout: Layout,
    positions: Tensor,
    wanted: Collection[Fact],
    ids: Mapping[TopFact, Tensor],
    vocab: int | None,
) -> bytes:
    """Rollouts that have some of the flat positions [N], and what is asked of these: facts, or
    hidden states where none is wanted.
    """
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
            [t for r, response in zip(rollouts, responses) for t in (*r.prompt, *response)],
            dtype=torch.int64,
        ),
        "prompts": torch.tensor([len(r.prompt) for r in rollouts], dtype=torch.int64),
        "responses": torch.tensor([len(response) for response in responses], dtype=torch.int64),
        "positions": number[positions // layout.width] * width + positions % layout.width,
    }
    named = {top for fact in wanted for top in fact.needs_first}
    at = [top for top in ids if top in named]
    tensors |= {f"ids {i}": ids[f].to(torch.int64) for i, f in enumerate(at)}
    settings = {
        "rollouts": [r.id for r in rollouts],
        "facts": [as_dict(f) for f in sorted(wanted, key=repr)],
        "ids": [as_dict(f) for f in at],
        "vocab": vocab,
    }
    return pack(tensors, settings)


def unpack_request(
    body: bytes, rows: int
) -> tuple[Layout, Tensor, list[Fact], dict[TopFact, Tensor], int | None]:
    """Layout, flat positions [N], wanted facts, other models' ids [N, k] and the rows of the head
    to keep, of a server whose head has `rows`.

    A ValueError where what a request says does not agree with what it carries. Until that is known,
    nothing is made that is larger than the body: a length of 10^9 beside three tokens would else be
    a table of 10^9 columns.
    """
    tensors, settings = unpack(body)
    if not isinstance(settings, dict):
        raise ValueError(f"its settings are no mapping: {shown(settings)}")
    layout, vocab = _layout(tensors, settings), settings.get("vocab")
    if vocab is not None and not (type(vocab) is int and 1 <= vocab <= rows):
        raise ValueError(
            f"vocab={shown(vocab)} must be null or a whole number from 1 to {rows}, the rows of "
            "this model's head"
        )
    kept = rows if vocab is None else vocab
    positions = _positions(layout, _integers(tensors, "positions"))
    wanted = [as_fact(d, kept) for d in _entries(settings, "facts", dict)]
    if len(models := {fact.models[0] for fact in wanted}) > 1:
        raise ValueError(f"facts of {len(models)} models are asked for, and there is one here")
    if wanted and (beyond := [t for r in layout.rollouts for t in r.tokens if t >= kept]):
        raise ValueError(
            f"Token id {beyond[0]} is out of vocabulary: the log-probs asked for are those of ids "
            f"0 to {kept - 1}"
        )
    ids: dict[TopFact, Tensor] = {}
    for i, fact in enumerate(as_fact(d, kept) for d in _entries(settings, "ids", dict)):
        top = TopFact(fact.models[0], fact.numbers)
        if fact != top or top.model in models:
            raise ValueError(f"{fact} is given: only the top ids of other models can be")
        ids[top] = _integers(tensors, f"ids {i}", (len(positions), top.k))
        if ids[top].numel() and not (ids[top].min() >= 0 and ids[top].max() < kept):
            raise ValueError(f"'ids {i}' holds ids that are not from 0 to {kept - 1}")
    for fact in wanted:
        for top in fact.others_first:
            if top not in ids:
                raise ValueError(
                    f"{fact} is asked for, and the top {top.k} ids of {top.model!r} are not given"
                )
    return layout, positions, wanted, ids, vocab


def _layout(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Layout:
    """The rollouts: [n] tokens, cut into prompts and responses by their lengths."""
    if _integers(tensors, "tokens").numel() > MOST_TOKENS:
        raise ValueError(f"it holds more than {MOST_TOKENS} tokens")
    tokens, prompts, responses = (
        _integers(tensors, name).tolist() for name in ("tokens", "prompts", "responses")
    )
    names = _entries(settings, "rollouts", str)
    if not len(names) == len(prompts) == len(responses):
        raise ValueError(
            f"{len(names)} rollouts, {len(prompts)} lengths of prompts and {len(responses)} of "
            "responses are given"
        )
    if least := [n for n in (*prompts, *responses) if n < 1]:
        raise ValueError(
            f"a length is {least[0]}: prompts and responses have at least one token each"
        )
    if (told := sum(prompts) + sum(responses)) != len(tokens):
        raise ValueError(
            f"the lengths of prompts and responses add up to {told}, and {len(tokens)} tokens are "
            "given"
        )
    rollouts, at = [], 0
    for id, p, r in zip(names, prompts, responses):
        rollouts.append(
            Rollout(id, tokens[at : at + p], tokens[at + p : at + p + r], [True] * r, [], [], "")
        )
        at += p + r
    return Layout(rollouts, max(responses, default=1))


def shown(value: Any) -> str:
    """A value of the other side's in a message, not all of a long one."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."


def _integers(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None = None
) -> Tensor:
    """A tensor of whole numbers: of this shape, or [n]."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"it holds no tensor {name!r}")
    if tensor.dtype != torch.int64 or (
        tensor.dim() != 1 if shape is None else tensor.shape != shape
    ):
        expected = "one row" if shape is None else list(shape)
        raise ValueError(
            f"{name!r} is {tensor.dtype} {list(tensor.shape)}, where int64, {expected} is expected"
        )
    return tensor


def _entries(settings: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """A list of a request's settings."""
    values = settings.get(name)
    if not isinstance(values, list) or not all(isinstance(v, kind) for v in values):
        raise ValueError(
            f"{name!r} is {shown(values)}, where a list of {kind.__name__} is expected"
        )
    return values


def _positions(layout: Layout, positions: Tensor) -> Tensor:
    """Flat positions [N], once each, all of them inside a response."""
    cells = len(layout.rollouts) * layout.width
    outside = (positions < 0) | (positions >= cells)
    if not bool(outside.any()):
        lengths = torch.tensor([len(r.tokens) for r in layout.rollouts], dtype=torch.int64)
        outside = positions % layout.width >= lengths[positions // layout.width]
    if bool(outside.any()):
        raise ValueError(
            f"position {int(positions[outside][0])} is in no response: there are {cells} in "
            f"{layout.width} columns"
        )
    if len(positions.unique()) < len(positions):
        raise ValueError("a position is asked about more than once")
    return positions


def known(fact: Fact) -> bool:
    """Whether a server can say a kind of fact by name."""
    return as_dict(fact)["fact"] in FACTS


def as_dict(fact: Fact) -> dict[str, Any]:
    """A fact as it is sent: the name of its kind and its fields."""
    return {"fact": type(fact).__name__, **asdict(fact)}


def as_fact(given: Mapping[str, Any], rows: int) -> Fact:
    """A fact as `as_dict` wrote it; its k at most `rows`."""
    values = dict(given)
    name = values.pop("fact", None)
    if not isinstance(name, str) or name not in FACTS:
        raise ValueError(f"{shown(name)} is not a fact that a server can say")
    if set(values) != (known := {f.name for f in fields(FACTS[name])}):
        raise ValueError(
            f"{name} is given by {', '.join(sorted(known))}, not by {shown(sorted(values))}"
        )
    for key, value in values.items():
        if key == "k" and not (type(value) is int and 1 <= value <= rows):
            raise ValueError(
                f"{name} has k={shown(value)}, which must be a whole number from 1 to {rows}, the "
                "vocabulary"
            )
        if key != "k" and not isinstance(value, str):
            raise ValueError(f"{name} has {key}={shown(value)}, which must be a name")
    return FACTS[name](**values)


# -------------------------------------------------------------------------------------- model, head


def pack_head(head: Head) -> bytes:
    assert head.weight is not None
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    return pack(tensors, {"scale": head.scale, "softcap": head.softcap})


def unpack_head(body: bytes, rows: int, columns: int) -> Head:
    """A head with a weight [rows, columns] of finite numbers; else a ValueError."""
    tensors, settings = unpack(body)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.shape != (rows, columns):
        raise ValueError(f"no weight of {rows} rows and {columns} columns in it")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"its bias is not of {rows} numbers")
    for tensor in (weight, *([] if bias is None else [bias])):
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError("its numbers are not all finite")
    scale, softcap = settings["scale"], settings["softcap"]
    for number in (scale, *([] if softcap is None else [softcap])):
        if not isinstance(number, int | float) or not 0 < abs(number) < math.inf:
            raise ValueError(f"a scale or cap of {shown(number)} in it")
    return Head(weight, bias, float(scale), softcap)


def head_on(head: Head, device: torch.device) -> Head:
    assert head.weight is not None
    return replace(
        head,
        weight=head.weight.to(device),
        bias=None if head.bias is None else head.bias.to(device),
    )


def model_digest(model: Any) -> str:
    """Differs for other weights: names, shapes and 64 values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].float().cpu().contiguous()
        digest.update(
            f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.numpy().tobytes()
        )
    return digest.hexdigest()[:16]
