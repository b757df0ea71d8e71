"""How one token is drawn from logits: temperature, cuts, keyed randomness, and the two log-probs that are recorded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdkit.errors import UserError
from opdkit.types import Sampling

_GAMMA, _MIX1, _MIX2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # splitmix64


def check_sampling(sampling: Sampling) -> None:
    """Refuses settings that describe no distribution."""
    rules = {
        "temperature": (sampling.temperature >= 0, "0 (greedy) or more"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1 (1 keeps every token)"),
        "top_k": (sampling.top_k >= 0, "0 (keeps every token) or more"),
        "min_p": (0 <= sampling.min_p <= 1, "between 0 (keeps every token) and 1"),
        "max_completion_length": (sampling.max_completion_length >= 1, "at least 1"),
        "num_generations": (sampling.num_generations >= 1, "at least 1"),
        "stop": (all(sampling.stop), "strings that are not empty: the empty one would end every response"),
    }
    for name, (good, rule) in rules.items():
        if not good:
            raise UserError(f"sampling: {name}={getattr(sampling, name)!r} is not possible; it must be {rule}")


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [n], their log-probs under the plain softmax [n], and under the distribution they are drawn from [n] (0 where greedy).

    logits [n, V]; uniform [n] float64 in [0, 1), one per row: token ids are walked in order until their probabilities exceed it.
    A row whose logits are not numbers gives a log-prob that is not finite.
    """
    total = logits.logsumexp(-1, keepdim=True)
    if sampling.temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        logp = (logits.gather(-1, token) - total)[:, 0]
        return token[:, 0], logp, torch.zeros_like(logp)
    if sampling.plain:
        token = _invert((logits - total).exp_(), uniform)
        logp = (logits.gather(-1, token) - total)[:, 0]
        return token[:, 0], logp, logp
    kept = cut(logits / sampling.temperature, sampling)
    normaliser = kept.logsumexp(-1, keepdim=True)
    token = _invert((kept - normaliser).exp_(), uniform)
    return token[:, 0], (logits.gather(-1, token) - total)[:, 0], (kept.gather(-1, token) - normaliser)[:, 0]


def cut(logits: Tensor, sampling: Sampling) -> Tensor:
    """[n, V] with -inf at the tokens that top_k, then top_p, then min_p drop; `logits` are already divided by the temperature.

    This is the order of transformers; vLLM applies min_p first, which can move the edge of top_p and nothing else. top_p keeps the
    most probable tokens until their mass reaches it. Tokens that tie with the last one kept are kept, so that float noise decides nothing.
    """
    floor = logits.new_full((len(logits), 1), -math.inf)
    size = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if sampling.top_p < 1:
        highest = logits.topk(size).values
        probs = highest.softmax(-1)
        inside = probs.cumsum(-1) - probs < sampling.top_p
        inside[:, 0] = True
        floor = highest.masked_fill(~inside, math.inf).amin(-1, keepdim=True)
    elif sampling.top_k:
        floor = logits.topk(size).values[:, -1:]
    if sampling.min_p > 0:
        floor = torch.maximum(floor, logits.amax(-1, keepdim=True) + math.log(sampling.min_p))
    return logits.masked_fill(logits < floor, -math.inf)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """[n, 1]: the first id at which the summed probabilities exceed the uniform; never one of probability 0."""
    sums = probs.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # the product with the uniform may round up to the total
    point = torch.minimum(uniform[:, None] * total, below)
    return torch.searchsorted(sums, point, right=True).clamp_max(probs.shape[-1] - 1)  # the clamp is for sums that are nan


def row_uniform(keys: Tensor, seed: int, position: Tensor) -> Tensor:
    """[B] float64 uniforms in [0, 1): a function of the rollout's key [B], the seed and the position in the response [B], of nothing else."""
    state = _mix(_mix(keys + _wrap(seed * _MIX1 + 1)) + position * _GAMMA)
    return _shift(state, 11).to(torch.float64) * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 products wrap."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift of signed integers


def _wrap(x: int) -> int:
    """A Python integer as int64 arithmetic would have it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
