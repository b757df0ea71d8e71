"""How one token is drawn from logits: temperature, cuts, keyed randomness, and the two log-probs
that are recorded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdkit.base import splitmix
from opdkit.base.errors import UserError
from opdkit.base.rules import Rules, at_least, follow
from opdkit.types import Sampling

BLOCK = 512  # ids summed in float32 before the first float64
NUCLEUS = 1024  # tokens among which the edge of top_p is first looked for


SAMPLING: Rules = {
    "temperature": (
        lambda t: 0 <= t < math.inf,
        "0 (greedy) or more, and finite",
        "logits are divided by it",
    ),
    "top_p": (
        lambda p: 0 < p <= 1,
        "above 0 and at most 1",
        "it is the mass of the tokens that are kept; 1 keeps all",
    ),
    "top_k": at_least(0, "it is the number of tokens that are kept; 0 keeps all"),
    "min_p": (
        lambda p: 0 <= p <= 1,
        "between 0 and 1",
        "tokens below this share of the most probable one are dropped; 0 keeps all",
    ),
    "max_completion_length": at_least(1, "it is the tokens after which a response is cut"),
    "num_generations": at_least(1, "it is the number of responses to each prompt"),
    "stop": (
        all,
        "texts that are not empty",
        "a response ends where one of them is written, and the empty one always is",
    ),
}


def check_sampling(sampling: Sampling, where: str = "sampling") -> None:
    """Refuses settings that describe no distribution."""
    try:
        follow(SAMPLING, sampling)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [n], their log-probs under the plain softmax [n], and under the distribution they are
    drawn from [n] (0 where greedy).

    logits [n, V]; uniform [n] float64 in [0, 1), one per row: token ids are walked in order until
    their probabilities exceed it. A row whose logits are not numbers gives a log-prob that is not
    finite.

    Tokens are dropped by top_k, then top_p, then min_p, after the temperature: the order of
    transformers. vLLM applies min_p first, which can move the edge of top_p and nothing else.
    Tokens that tie with the last one kept are kept, so no float noise decides.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        logp = _logp(logits, token)
        return token[:, 0], logp, torch.zeros_like(logp)
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    probs = scaled.softmax(-1)
    floor = _floor(scaled, sampling)
    if floor is not None:
        probs.masked_fill_(scaled < floor, 0.0)
        probs /= probs.sum(-1, keepdim=True)
    token = _invert(probs, uniform)
    drawn_logp = probs.gather(-1, token).log()[:, 0]
    return token[:, 0], drawn_logp if sampling.plain else _logp(logits, token), drawn_logp


def _logp(logits: Tensor, token: Tensor) -> Tensor:
    return (logits.gather(-1, token) - logits.logsumexp(-1, keepdim=True))[:, 0]


def _floor(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """[n, 1]: the lowest logit that is kept; None where nothing is cut."""
    floors = []
    if sampling.top_p < 1:
        floors.append(_nucleus(logits, sampling))
    elif sampling.top_k:
        floors.append(logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:])
    if sampling.min_p > 0:
        floors.append(logits.amax(-1, keepdim=True) + math.log(sampling.min_p))
    return torch.stack(floors).amax(0) if floors else None


def _nucleus(logits: Tensor, sampling: Sampling) -> Tensor:
    """[n, 1]: the lowest of the highest logits whose mass, of the top_k or of all, reaches
    top_p.
    """
    limit = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    whole = logits.topk(limit).values if sampling.top_k else logits
    normaliser = whole.logsumexp(-1, keepdim=True)
    size = min(NUCLEUS, limit)
    while True:  # most nuclei are small, and sorting a whole vocabulary is what costs
        highest = logits.topk(size).values
        probs = (highest - normaliser).exp()
        before = probs.cumsum(-1) - probs
        if size == limit or bool((before[:, -1] >= sampling.top_p).all()):
            break
        size = min(8 * size, limit)
    inside = before < sampling.top_p
    inside[:, 0] = True
    return highest.masked_fill(~inside, math.inf).amin(-1, keepdim=True)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """[n, 1]: the first id at which the summed probabilities exceed the uniform; never one of
    probability 0.

    First a block of ids is found, then the id in it: sums in float64 over a whole vocabulary would
    cost more than all the rest.
    """
    size = probs.shape[-1]
    if size <= BLOCK:
        return _walk(probs, uniform[:, None])[0]
    whole = size // BLOCK * BLOCK
    blocks = probs[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    blocks = torch.cat([blocks, probs[:, whole:].sum(-1, keepdim=True)], -1)
    block, rest = _walk(blocks, uniform[:, None])  # `rest` is the uniform of the second draw
    ids = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    inside = torch.where(ids < size, probs.gather(-1, ids.clamp_max(size - 1)), 0.0)
    # the clamp is for probabilities that are nan
    return (block * BLOCK + _walk(inside, rest)[0]).clamp_max(size - 1)


def _walk(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 1] index drawn in proportion to the weights [n, k], and where in it the uniform [n, 1]
    falls, in [0, 1).
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    # below the total: a float64 under 1 is at most 1 - 2^-53, times it no product rounds up
    point = uniform * sums[:, -1:]
    index = torch.searchsorted(sums, point, right=True).clamp_max(weights.shape[-1] - 1)
    width = weights.gather(-1, index).to(torch.float64)
    return index, ((point - sums.gather(-1, index) + width) / width).clamp(0.0, 1 - 2.0**-53)


def row_uniform(keys: Tensor, seed: int, position: Tensor) -> Tensor:
    """[B] float64 uniforms in [0, 1): a function of the rollout's key [B], the seed and the
    position in the response [B], of nothing else.
    """
    start = splitmix.wrapped(seed * splitmix.FIRST + 1)
    state = splitmix.mix(splitmix.mix(keys + start) + position * splitmix.STEP)
    return splitmix.shifted(state, 11).to(torch.float64) * 2.0**-53
