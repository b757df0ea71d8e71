"""A policy over the last ids alone: equal to a dense graph whose other logits are ruled out, in
value, gradient and what is drawn.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from opdkit.models.body import act_in, check_head, head_of
from opdkit.objective import (
    Actions,
    Batch,
    Divergence,
    LogpFact,
    LogRatio,
    PolicyGradient,
)
from opdkit.objective.head import Head, Source, flat_positions, learn
from opdkit.sampling import HFSampler
from opdkit.types import Prompt, Sampling
from tests.common.tiny import VOCAB, tiny_model, tiny_tokenizer

B, T, H, ROWS, V, BINS, HOT = 3, 4, 8, 13, 11, 5, 1.6  # 11 of 13 rows stand for tokens
OBJECTIVE = (
    PolicyGradient(LogRatio("teacher", "student"))
    + Divergence("forward_kl")
    + 0.5 * Divergence("jsd")
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def bins_of(z: Tensor) -> Tensor:
    """[..., V]: logits of the last bins over the temperature, all others ruled out."""
    out = torch.full_like(z, -torch.inf)
    out[..., -BINS:] = z[..., -BINS:] / HOT
    return out


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_equal_to_a_dense_graph(chunk: int | None, cap: float | None) -> None:
    hidden, weight, bias = random(B * T, H), random(ROWS, H, seed=1), random(ROWS, seed=2)
    actions, cells = Actions(BINS, HOT), torch.arange(B * T)
    other = Head(random(ROWS, H, seed=3), vocab=V, actions=actions)
    tokens = torch.randint(V - BINS, V, (B, T), generator=torch.Generator().manual_seed(4))
    batch = Batch(tokens, torch.ones(B, T, dtype=torch.bool), dtype=torch.float64)
    batch.sources["teacher"] = Source(random(B * T, H, seed=5), cells, other)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    z = (leaves[0] @ leaves[1].T + leaves[2])[:, :V]
    z = z if cap is None else cap * torch.tanh(z / cap)
    ls = bins_of(z)[:, -BINS:].log_softmax(-1)
    lt = (batch.sources["teacher"].hidden @ other.weight.T)[:, :V]  # type: ignore[union-attr]
    lt = (lt[:, -BINS:] / HOT).log_softmax(-1)
    at = (tokens.flatten() - (V - BINS))[:, None]
    mine, theirs = ls.gather(-1, at)[:, 0], lt.gather(-1, at)[:, 0]
    mix = torch.logaddexp(ls, lt) - torch.tensor(2.0).double().log()
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    sampled = -(mine - mine.detach()).exp() * (theirs - mine.detach())
    dense = (sampled + kl(lt, ls) + 0.25 * (kl(ls, mix) + kl(lt, mix))).mean()
    expected = torch.autograd.grad(dense, leaves)
    for model, x in (("student", mine), ("sampler", mine), ("teacher", theirs)):
        batch.facts[LogpFact(model)] = x.detach().view(B, T)
    head = Head(leaves[1], leaves[2], softcap=cap, vocab=V, actions=actions)
    plan = OBJECTIVE.plan(batch)
    out = learn(plan, flat_positions(plan.selected), leaves[0], head, chunk)
    assert abs(out.loss - dense) < 1e-12
    for ours, theirs in zip(torch.autograd.grad(out.loss, leaves), expected, strict=True):
        assert (ours - theirs).norm() < 1e-12 * max(theirs.norm(), 1)
    text = torch.ones(ROWS, dtype=torch.bool)
    text[V - BINS : V] = False
    again = learn(plan, cells, leaves[0], head, chunk).loss
    assert (torch.autograd.grad(again, leaves[1])[0][text] == 0).all()


def test_text_has_probability_exactly_zero() -> None:
    """Logits (2, 1 | 0.5, 1, 0) of which the last three are bins."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 1.0, 0.0]]).double()
    for temperature, probabilities in (
        (1.6, [0, 0, 0.322742, 0.441136, 0.236123]),
        (1.0, [0, 0, 0.307196, 0.506480, 0.186324]),
    ):
        head = Head(vocab=5, actions=Actions(3, temperature))
        p = head.logits(logits).softmax(-1)[0]
        assert torch.allclose(p, torch.tensor(probabilities).double(), rtol=0, atol=5.1e-7)
        assert (p[:2] == 0).all()


def test_bad_bins_are_explained() -> None:
    for arguments, message in (((1,), "bins=1"), ((5, 0.0), "temperature=0")):
        with pytest.raises(ValueError, match=message):
            Actions(*arguments)
    with pytest.raises(ValueError, match="more ids than the vocabulary"):
        Head(torch.zeros(4, 2), actions=Actions(5)).logits(torch.zeros(1, 2))


def test_a_restricted_model_draws_bins_from_their_softmax_and_so_does_a_copy() -> None:
    """The log-probs of what is drawn are those of a plain forward pass over the bins; without the
    restriction the same model writes text again.
    """
    model, tokenizer = tiny_model(), tiny_tokenizer()
    act_in(model, Actions(40, HOT))
    check_head(model)  # it is about the whole matrix, whatever is kept of it
    prompts = [Prompt(str(i), tokenizer(f"{i} plus {i}")["input_ids"]) for i in range(3)]
    asked = Sampling(max_completion_length=6, num_generations=4)
    for of in (model, copy.deepcopy(model)):
        rollouts = HFSampler(of, tokenizer).sample(prompts, asked, seed=1)
        assert len(rollouts) == 12 and all(min(r.tokens) >= VOCAB - 40 for r in rollouts)
        assert len({t for r in rollouts for t in r.tokens}) > 10
        for r in rollouts:
            with torch.no_grad():
                z = of(torch.tensor([r.prompt + r.tokens])).logits[0, len(r.prompt) - 1 : -1]
            logp = (z[:, -40:] / HOT).log_softmax(-1)
            at = torch.tensor(r.tokens)[:, None] - (VOCAB - 40)
            assert torch.allclose(logp.gather(-1, at)[:, 0], torch.tensor(r.logp), atol=1e-4)
    act_in(model, None)
    free = HFSampler(model, tokenizer).sample(prompts, asked, seed=1)
    assert head_of(model).actions is None and any(min(r.tokens) < VOCAB - 40 for r in free)
