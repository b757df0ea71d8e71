"""Prompts at the frontier: their weights, how they are drawn, and what moves a pass rate."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import permutations
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.curricula import Frontier, Mixed, PassRates, Plain, together
from opdkit.curricula.writer import Memory
from opdkit.types import Rollout

RATES = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
SIX = "abcdef"


def known(rates: dict[str, float]) -> Memory:
    return {"smoothed_pass_rate": rates}


def rollouts(question: str, results: list[bool | None], **more: Any) -> list[Rollout]:
    return [
        Rollout(f"{question}/{i}", [1], [2], [True], [0.0], [0.0], question, correct=r, **more)
        for i, r in enumerate(results)
    ]


def test_gaussian_weights_and_probabilities_of_the_card() -> None:
    weights = Frontier().log_weights(RATES).exp()
    told = [0.360448, 0.520450, 0.774837, 1.0, 0.774837, 0.360448]
    assert weights.tolist() == pytest.approx(told, abs=5e-7)
    shares = [0.095079, 0.137285, 0.204388, 0.263781, 0.204388, 0.095079]
    assert (weights / weights.sum()).tolist() == pytest.approx(shares, abs=5e-7)


@pytest.mark.parametrize("frontier", [Frontier(), Frontier("beta"), Frontier("beta", a=2, b=2)])
def test_weights_are_symmetric(frontier: Frontier) -> None:
    rates = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here, there = frontier.log_weights(rates), frontier.log_weights(1 - rates)
    torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


def test_a_wide_gaussian_is_uniform_and_a_narrow_one_takes_the_nearest() -> None:
    wide = Frontier(sigma=1e9).log_weights(RATES).exp()
    assert wide.tolist() == pytest.approx([1.0] * 6, abs=1e-12)
    rates = dict(zip(SIX, (0.9, 0.45, 0.1, 0.6, 0.5001, 1.0)))
    nearest = [4, 1, 3]  # 0.5001, 0.45, 0.6
    for step in range(20):
        assert Frontier(sigma=1e-3).choose(SIX, 3, step, 0, known(rates)) == nearest
    assert Frontier(sigma=1e-200).choose(SIX, 1, 0, 0, known({**rates, "c": 0.5})) == [2]


@pytest.mark.parametrize(
    ("a", "b", "peak", "value"),
    [(1, 1, 0.5, 0.25), (2, 1, 2 / 3, 0.148148), (1, 2, 1 / 3, 0.148148), (2, 2, 0.5, 0.0625)],
)
def test_beta_weights_are_those_of_paced(a: float, b: float, peak: float, value: float) -> None:
    grid = torch.linspace(0, 1, 3001, dtype=torch.float64)
    weights = Frontier("beta", a=a, b=b).log_weights(grid).exp()
    torch.testing.assert_close(weights, grid**a * (1 - grid) ** b, rtol=1e-12, atol=1e-15)
    assert grid[weights.argmax()].item() == pytest.approx(peak, abs=1e-9)
    assert weights.max().item() == pytest.approx(value, abs=5e-7)


def test_beta_weights_of_the_card_and_none_at_the_ends() -> None:
    rates = torch.tensor([0, 1, 2, 4, 6, 8], dtype=torch.float64) / 8
    weights = Frontier("beta").log_weights(rates).exp()
    assert weights.tolist() == pytest.approx([0, 0.109375, 0.1875, 0.25, 0.1875, 0], abs=1e-12)
    flat = Frontier("beta", a=0, b=0).log_weights(rates)  # 0^0 = 1
    assert flat.tolist() == [0.0] * 6


def test_the_first_step_is_uniform() -> None:
    """Nothing is known: every pair of three comes as often as any; 2,000 draws, deviation 0.008."""
    pairs = Counter(tuple(Frontier().choose("abc", 2, step, 0, {})) for step in range(2000))
    for pair in permutations(range(3), 2):
        assert pairs[pair] / 2000 == pytest.approx(1 / 6, abs=0.034)


@pytest.mark.parametrize("kernel", ["gaussian", "beta"])
def test_draws_are_one_after_the_other_without_replacement(kernel: str) -> None:
    """P[i, then j] = w_i / W * w_j / (W - w_i); 2,500 draws, deviation at most 0.009."""
    frontier, rates = Frontier(kernel), (0.1, 0.5, 0.9, 0.3)
    weights = frontier.log_weights(torch.tensor(rates, dtype=torch.float64)).exp().tolist()
    memory = known(dict(zip("abcd", rates)))
    pairs = Counter(tuple(frontier.choose("abcd", 2, step, 3, memory)) for step in range(2500))
    whole = sum(weights)
    for i, j in permutations(range(4), 2):
        share = weights[i] / whole * weights[j] / (whole - weights[i])
        assert pairs[i, j] / 2500 == pytest.approx(share, abs=0.036)
    assert all(len(set(pair)) == 2 for pair in pairs)


def test_a_draw_is_of_seed_step_and_question_alone() -> None:
    """What is left of a step's questions is drawn on as if the step had asked for more at once, in
    whatever order the data has them.
    """
    frontier, questions = Frontier(), [f"q{i}" for i in range(40)]
    memory = known({f"q{i}": i / 40 for i in range(0, 40, 3)})
    at_once = [questions[i] for i in frontier.choose(questions, 12, 5, 1, memory)]
    first = frontier.choose(questions, 8, 5, 1, json.loads(json.dumps(memory)))
    left = [q for i, q in enumerate(questions) if i not in first]
    more = [left[i] for i in frontier.choose(left, 4, 5, 1, memory)]
    assert [questions[i] for i in first] + more == at_once
    turned = questions[::-1]
    assert [turned[i] for i in frontier.choose(turned, 12, 5, 1, memory)] == at_once
    others = [frontier.choose(questions, 12, *key, memory) for key in ((6, 1), (5, 2))]
    assert first not in (others[0][:8], others[1][:8])


def test_prompts_of_no_weight_come_last() -> None:
    frontier = Frontier("beta", smoothing=0.0)
    memory = known({"a": 0.0, "b": 1.0, "c": 0.99})
    for step in range(30):
        chosen = frontier.choose("abcd", 4, step, 0, memory)
        assert set(chosen[:2]) == {2, 3} and set(chosen[2:]) == {0, 1}
    assert {tuple(frontier.choose("ab", 1, step, 0, memory)) for step in range(30)} == {(0,), (1,)}
    assert frontier.choose("ab", 5, 0, 0, memory).__len__() == 2  # no more than there are


def test_pass_rates_move_slowly_and_only_of_prompts_that_were_asked() -> None:
    memory = Frontier().observe(rollouts("a", [True] * 8), {"other": 1})
    assert memory == {"other": 1, "smoothed_pass_rate": {"a": pytest.approx(0.55, abs=1e-12)}}
    after = Frontier().observe(rollouts("b", [True, False, False, False]), memory)
    assert after["smoothed_pass_rate"] == {
        "a": memory["smoothed_pass_rate"]["a"],
        "b": pytest.approx(0.9 * 0.5 + 0.1 * 0.25, abs=1e-12),
    }
    assert Frontier().observe(rollouts("a", [None]), memory) == memory  # nobody scored it
    aided = rollouts("a", [True], marks={"guided": [True]})
    assert Frontier().observe(aided, memory) == memory
    rewards = Frontier(smoothing=0.0, start=1.0).observe(
        rollouts("c", [None, None], reward=0.0), {}
    )
    assert rewards["smoothed_pass_rate"] == {"c": 0.0}


def test_with_whom_it_goes_together() -> None:
    names = ("a", "b")
    both = together.join(PassRates(), Frontier(), names)
    assert both.choose(SIX, 2, 0, 0, {}) == Frontier().choose(SIX, 2, 0, 0, {})
    memory = both.observe(rollouts("a", [True, False]), {})
    assert memory["pass_rate"] == {"a": 0.5} == memory["smoothed_pass_rate"]
    told = both.metrics(rollouts("b", [True]), 1, 9, memory)
    assert told["mean_pass_rate"] == 0.5 and told["prompts_ever_asked"] == 2
    assert Plain().choose(SIX, 2, 0, 0, {}) is None
    with pytest.raises(UserError, match="not every response is the student's own"):
        together.join(Mixed(0.5), Frontier(), names)
    with pytest.raises(UserError, match="only one can decide"):
        together.join(Frontier(), Frontier("beta"), names)


def test_curves_say_what_is_known_and_what_was_asked() -> None:
    frontier, memory = Frontier(), known({"a": 0.9, "b": 0.1, "c": 0.2})
    asked = rollouts("a", [True]) + rollouts("new", [False])
    assert frontier.metrics(asked, 3, 9, memory) == {
        "prompts_ever_asked": 4.0,
        "mean_smoothed_pass_rate": pytest.approx(0.4),
        "asked_smoothed_pass_rate": pytest.approx(0.7),  # 0.9 and 0.5
    }
    assert "mean_smoothed_pass_rate" not in frontier.metrics([], 0, 9, {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel": "normal"},
        {"sigma": 0.0},
        {"sigma": math.inf},
        {"a": -1.0},
        {"b": -0.1},
        {"smoothing": 1.0},
        {"start": 1.5},
    ],
)
def test_wrong_settings_are_explained(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be"):
        Frontier(**wrong)
