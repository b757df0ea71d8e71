"""Dichotomy of Control: the contrastive bound, whose gradient goes where, and acting by draws."""

from __future__ import annotations

import math

import pytest
import torch

from opdkit.neighbours.doc import (
    Doc,
    Futures,
    Settings,
    bandit,
    chosen,
    contrast,
    imitated,
    learnt,
    prior_kl,
)

F64 = torch.float64


def test_the_number_of_a_batch_of_two() -> None:
    """-2 + log(e^2 + e^0), the own next among the candidates."""
    energies = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=F64)
    got = contrast(energies.diagonal(), energies, torch.zeros(2, dtype=F64))
    assert got.mean().item() == pytest.approx(0.126928, abs=1e-6)


def test_a_constant_energy() -> None:
    """log of how many candidates; 0 where they weigh 1 / n each; its gradient is 0."""
    w = torch.full((5, 7), 0.3, dtype=F64, requires_grad=True)
    plain = contrast(w[:, 0], w, torch.zeros(7))
    assert plain.tolist() == pytest.approx([math.log(7)] * 5)
    assert contrast(
        w[:, 0], w, torch.full((7,), -math.log(7), dtype=F64)
    ).tolist() == pytest.approx([0] * 5)
    level = torch.tensor(0.3, dtype=F64, requires_grad=True)
    same = level.expand(7)
    (slope,) = torch.autograd.grad(contrast(same[0], same, torch.zeros(7)), level)
    assert slope.item() == pytest.approx(0, abs=1e-15)


def test_candidates_that_agree_count_together() -> None:
    """Rows of next 0, 2, 2, 1, 2: five energies in the sum are three with counts 1, 1, 3."""
    w, rows = torch.tensor([0.2, -1.0, 0.7], dtype=F64), torch.tensor([0, 2, 2, 1, 2])
    counts = torch.tensor([1.0, 1.0, 3.0], dtype=F64)
    each = contrast(w[rows], w[rows].expand(5, 5), torch.zeros(5, dtype=F64))
    assert torch.allclose(contrast(w[rows], w.expand(5, 3), counts.log()), each)


def test_the_best_bound_is_the_information() -> None:
    """log N - E[L_E] at w = log p(x | c) / p(x) and N large is the mutual information."""
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=F64)  # of next given context, evenly
    marginal = p.mean(0)
    w = (p / marginal).log()
    bound = -contrast(w, w[:, None].expand(2, 3, 3), marginal.log())
    assert (p * bound).sum().item() / 2 == pytest.approx((p * w).sum().item() / 2)
    worse = 0.5 * w
    lower = -contrast(worse, worse[:, None].expand(2, 3, 3), marginal.log())
    assert (p * lower).sum() < (p * bound).sum()


@pytest.mark.parametrize("energy", [True, False])
def test_the_prior_learns_from_the_kl_only_without_the_energy(energy: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    q, p = (torch.randn(3, 4, generator=draw, dtype=F64, requires_grad=True) for _ in range(2))
    kl = prior_kl(q.log_softmax(-1), p.log_softmax(-1), energy)
    slopes = torch.autograd.grad(kl.sum(), (q, p), allow_unused=True)
    assert (slopes[1] is None) == energy and slopes[0].abs().max() > 0
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=q), torch.distributions.Categorical(logits=p)
    )
    assert torch.allclose(kl, exact)


def test_draws_of_the_prior() -> None:
    """One draw: the prior. Two of (.5, .3, .2) with values (2, 1, 3): .2 is in a pair with 1 -
    .8^2, .3 is the best only of itself, .3^2. Many: the best code that has any chance.
    """
    prior, value = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([2.0, 1.0, 3.0])
    assert torch.allclose(chosen(prior, value, 1), prior)
    assert chosen(prior, value, 2).tolist() == pytest.approx([0.64 - 0.09, 0.09, 0.36])
    assert chosen(prior, value, 1000).tolist() == pytest.approx([0, 0, 1])
    no_best = torch.tensor([0.6, 0.4, 0.0], dtype=F64)
    assert chosen(no_best, value, 1000).tolist() == pytest.approx([1, 0, 0])
    drawn = torch.multinomial(prior, 20000, True, generator=torch.Generator().manual_seed(0))
    best = value[drawn.view(-1, 2)].max(1).values
    assert (best == 3).float().mean().item() == pytest.approx(0.36, abs=0.02)


def futures(window: int = 2) -> Futures:
    draw = torch.Generator().manual_seed(0)
    shape = (2, 6, window)
    states, actions, after = (torch.randint(k, shape, generator=draw) for k in (3, 2, 4))
    real = torch.ones(shape, dtype=torch.long)
    real[:, 0, 1:] = 0
    return Futures((3, 2, 4), states, actions, after, real, torch.rand(2, 6, generator=draw))


def model() -> Doc:
    torch.manual_seed(0)
    made = Doc(2, 2, (3, 2, 4), 5)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_each_part_has_its_own_loss() -> None:
    """The energy lowers L_E, the encoder raises it: what changes with the constraint's weight has
    opposite signs; policy and value do not feel it.
    """
    made, f = model(), futures()
    slopes = []
    for weight in (1.0, 3.0):
        made.zero_grad()
        made.loss(f, 0.3, weight).backward()
        slopes.append({name: p.grad.clone() for name, p in made.named_parameters()})
    for name in ("policy", "value", "prior"):
        assert torch.allclose(slopes[0][name], slopes[1][name], atol=1e-6), name
    assert torch.allclose(3 * slopes[0]["energy"], slopes[1]["energy"], atol=1e-5)

    def bound(nudged: dict[str, torch.Tensor]) -> float:
        """E_q[L_E] after a small step down the gradient's change."""
        other = model()
        with torch.no_grad():
            for name, step in nudged.items():
                getattr(other, name).sub_(1e-3 * step)
        run = torch.arange(2)[:, None, None]
        w = other.energy[run, f.states, f.actions]
        total = 0.0
        for m in range(2):
            for t in range(2):
                rows = [n for n in range(6) if f.real[m, n, t]]
                for n in rows:  # naive: one candidate for each row
                    sums = torch.stack([w[m, n, t, :, f.after[m, c, t]] for c in rows]).logsumexp(0)
                    l = sums - w[m, n, t, :, f.after[m, n, t]]
                    total += float((other.encode(f)[m, n].exp() * l).sum().detach())
        return total / 6

    change = {name: slopes[1][name] - slopes[0][name] for name in ("inner", "outer", "energy")}
    before = bound({})
    assert bound({"energy": change["energy"]}) < before
    assert bound({name: change[name] for name in ("inner", "outer")}) > before


def test_padding_changes_nothing() -> None:
    made, f = model(), futures()
    before = made.loss(f, 0.3, 1.0)
    hidden = f.real == 0
    states, actions, after = (
        torch.where(hidden, torch.full_like(c, k - 1), c)
        for c, k in zip((f.states, f.actions, f.after), f.sizes)
    )
    other = Futures(f.sizes, states, actions, after, f.real, f.earned)
    assert torch.allclose(made.loss(other, 0.3, 1.0), before)


def test_imitation_of_the_highest_return_credits_luck() -> None:
    """The worse arm pays .1 and is pulled with .9, the better one pays .9 and is pulled with .1:
    of those that paid each is a half.
    """
    task = bandit(Settings(seeds=3, luck=(0.1,), pulls=4000))
    assert imitated(task.futures)[:, 0, 1].tolist() == pytest.approx([0.5] * 3, abs=0.05)
    assert task.best == [0.9] and task.data == pytest.approx([0.18])
    assert task.worth(torch.tensor([[[0.0, 1.0]]] * 3)).tolist() == pytest.approx([0.9] * 3)


def test_the_better_arm_is_found() -> None:
    """A short training: DoC earns more than imitation and the model without the energy."""
    s = Settings(seeds=3, luck=(0.2,), updates=350, batch=128)
    task = bandit(s)
    ours, vae = (
        task.worth(learnt(task.futures, s, weight, lambda: None)).mean().item()
        for weight in (s.energy_weight, 0.0)
    )
    assert ours > 0.7 > 0.6 > task.worth(imitated(task.futures)).mean().item() and ours > vae


@pytest.mark.neighbours
def test_frozen_lake_is_what_gymnasium_plays() -> None:
    """The chance of success, by its table of moves, is the share of episodes that succeed; and a
    small run does both tasks.
    """
    from opdkit.base.progress import progress
    from opdkit.neighbours.doc import Lake, run

    world = Lake()
    best = torch.nn.functional.one_hot(world.optimal(), 4).float()
    share = world.success(best[None]).item()
    played = world.episodes(1.0, 0, 1000)
    assert sum(steps[-1][3] for steps in played) / 1000 == pytest.approx(share, abs=0.05)
    got = world.futures(played[:2], 3)
    steps = played[0]
    assert got.states[0, 1].tolist() == [s for s, *_ in steps[1:4]]
    assert got.after[0, len(steps) - 1].tolist()[1:] == [0, 0]
    assert got.real[0, len(steps) - 1].tolist() == [1, 0, 0]
    outcome = run(Settings(seeds=2, episodes=200, updates=20), progress)
    assert [row["task"] for row in outcome.table] == ["bandit"] * 4 + ["FrozenLake"] * 2
