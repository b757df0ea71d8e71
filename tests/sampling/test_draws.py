"""One draw: the two log-probs, the cuts, and the keyed uniforms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opdkit.base.errors import UserError
from opdkit.sampling.draws import BLOCK, NUCLEUS, check_sampling, choose, row_uniform
from opdkit.types import Sampling, row_keys


def some_logits(rows: int = 16, vocab: int = 50, scale: float = 2.0, seed: int = 0) -> Tensor:
    return (
        torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
    )


def some_uniforms(n: int, seed: int = 1) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(row: list[float], sampling: Sampling) -> list[float]:
    """The drawing distribution of one row, in plain Python: temperature, top_k, top_p, min_p."""
    weights = [math.exp(x / sampling.temperature) for x in row]
    kept = sorted(range(len(row)), key=lambda i: -weights[i])
    kept = kept[: sampling.top_k or len(kept)]
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if mass < sampling.top_p:
            nucleus.append(i)
        mass += weights[i] / total
    nucleus = [i for i in nucleus if weights[i] >= sampling.min_p * weights[nucleus[0]]]
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(row))]


CUTS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(top_k=5),
    Sampling(top_p=0.7),
    Sampling(min_p=0.2),
    Sampling(temperature=1.7, top_k=20, top_p=0.8, min_p=0.1),
    Sampling(top_k=1000, top_p=0.999),
]


@pytest.mark.parametrize("sampling", CUTS, ids=str)
def test_recorded_log_probs_are_those_of_the_naive_distribution(sampling: Sampling) -> None:
    logits = some_logits()
    for seed in range(20):
        token, logp, drawn_logp = choose(logits, sampling, some_uniforms(len(logits), seed))
        expected = [
            math.log(naive(row, sampling)[t]) for row, t in zip(logits.tolist(), token.tolist())
        ]
        assert drawn_logp.tolist() == pytest.approx(expected, abs=1e-9)
        assert torch.allclose(logp, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0])
        assert torch.equal(logp, drawn_logp) == sampling.plain


@pytest.mark.parametrize("sampling", CUTS, ids=str)
def test_a_token_is_drawn_where_the_uniform_falls_in_the_cumulative_distribution(
    sampling: Sampling,
) -> None:
    row = some_logits(1)[0]
    uniforms = torch.linspace(0, 1 - 2**-53, 2001, dtype=torch.float64)
    token, _, _ = choose(row.expand(len(uniforms), -1), sampling, uniforms)
    sums = torch.tensor(naive(row.tolist(), sampling), dtype=torch.float64).cumsum(0)
    expected = torch.searchsorted(sums, uniforms * (1 - 1e-15), right=True)
    edge = (sums[:, None] - uniforms).abs().amin(0) < 1e-9  # there rounding decides
    assert torch.equal(token[~edge], expected[~edge])
    assert (token.diff() >= 0).all()


def test_large_vocabularies_are_walked_block_by_block_to_the_same_token() -> None:
    logits = some_logits(200, 3 * BLOCK + 77).float()
    uniform = some_uniforms(200)
    token, _, _ = choose(logits, Sampling(), uniform)
    sums = logits.double().softmax(-1).cumsum(-1)
    below = (
        sums.gather(-1, token[:, None])[:, 0]
        - logits.double().softmax(-1).gather(-1, token[:, None])[:, 0]
    )
    assert (below - 1e-6 <= uniform).all() and (
        uniform <= sums.gather(-1, token[:, None])[:, 0] + 1e-6
    ).all()
    assert token.max() > 3 * BLOCK  # the incomplete last block is reached


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("vocab", [6, 4 * BLOCK, 4 * BLOCK + 3])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, vocab: int) -> None:
    logits = torch.full((1, vocab), -math.inf)
    logits[0, vocab // 2 : vocab // 2 + 2] = torch.tensor([0.3, 0.1])
    token, logp, _ = choose(logits, Sampling(), torch.tensor([uniform], dtype=torch.float64))
    assert token.item() == vocab // 2 + (uniform > 0.5)
    assert logp.isfinite().all()


def test_rounding_at_the_end_of_the_distribution_draws_no_dropped_token() -> None:
    logits = some_logits(200, 40).float()
    logits[:, 30:] = -math.inf
    token, _, _ = choose(logits, Sampling(), torch.full((200,), 1 - 2**-53, dtype=torch.float64))
    assert (logits.softmax(-1).double().sum(-1) > 1).any()
    assert token.max() < 30


def test_top_p_looks_further_where_the_distribution_is_flat() -> None:
    logits = some_logits(3, 4 * NUCLEUS, scale=0.1)
    # one row's nucleus is a single token, the others' are most of the vocabulary
    logits[0, 7] = 20.0
    _, _, drawn_logp = choose(logits, Sampling(top_p=0.9), some_uniforms(3))
    probs = logits.softmax(-1).sort(-1, descending=True).values
    mass = (probs * (probs.cumsum(-1) - probs < 0.9)).sum(-1)
    token, logp, _ = choose(logits, Sampling(top_p=0.9), some_uniforms(3))
    assert token[0] == 7 and drawn_logp[0] == 0
    assert torch.allclose(drawn_logp, logp - mass.log(), atol=1e-9)


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 0.0]]).expand(400, -1)
    token, _, _ = choose(logits, Sampling(top_k=2), some_uniforms(400))
    assert set(token.tolist()) == {0, 1, 2}


def test_greedy_takes_the_most_probable_token_with_certainty() -> None:
    logits = some_logits()
    token, logp, drawn_logp = choose(logits, Sampling(temperature=0), some_uniforms(16))
    assert torch.equal(token, logits.argmax(-1))
    assert torch.allclose(logp, logits.log_softmax(-1).amax(-1))
    assert drawn_logp.tolist() == [0.0] * 16


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5, top_p=0.9, min_p=0.1), Sampling(temperature=0)],
    ids=str,
)
@pytest.mark.parametrize("vocab", [50, 5000])
def test_broken_logits_show_in_the_log_prob_of_their_row_only(
    value: float, sampling: Sampling, vocab: int
) -> None:
    logits = some_logits(3, vocab).float()
    logits[1, 4] = value
    token, logp, _ = choose(logits, sampling, some_uniforms(3))
    assert logp.isfinite().tolist() == [True, False, True]
    assert ((token >= 0) & (token < vocab)).all()


def test_keyed_uniforms_depend_on_key_seed_and_position_only() -> None:
    keys, position = row_keys(f"0/p/{c}" for c in range(8)), torch.arange(8)
    uniform = row_uniform(keys, 3, position)
    order = torch.tensor([5, 2, 7])
    assert torch.equal(row_uniform(keys[order], 3, position[order]), uniform[order])
    for other in (
        row_uniform(keys, 4, position),
        row_uniform(keys, 3, position + 1),
        row_uniform(keys.flip(0), 3, position),
    ):
        assert (other != uniform).all()


def test_keyed_uniforms_are_uniform_and_uncorrelated_over_positions() -> None:
    keys = row_keys(str(c) for c in range(300))
    uniform = torch.stack([row_uniform(keys, 0, torch.full_like(keys, t)) for t in range(100)], 1)
    assert uniform.min() >= 0 and uniform.max() < 1
    counts = torch.histc(uniform.flatten(), 50, 0, 1)
    chi2 = ((counts - 600) ** 2 / 600).sum()
    assert abs(chi2 - 49) < 4 * math.sqrt(2 * 49)
    for a, b in ((uniform[:, :-1], uniform[:, 1:]), (uniform[:-1], uniform[1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.numel())


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(temperature=-1), "temperature"),
        (Sampling(top_p=0), "top_p"),
        (Sampling(top_p=1.1), "top_p"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(min_p=2), "min_p"),
        (Sampling(max_completion_length=0), "max_completion_length"),
        (Sampling(num_generations=0), "num_generations"),
        (Sampling(stop=("",)), "stop"),
    ],
)
def test_impossible_settings_are_refused_by_name(sampling: Sampling, name: str) -> None:
    with pytest.raises(UserError, match=f"sampling: {name}="):
        check_sampling(sampling)
