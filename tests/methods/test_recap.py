"""RECAP: the weights of rewards from how they went, by both formulas, and GRPO on their sum."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opdkit.base import exact
from opdkit.curricula import Plain
from opdkit.methods.method import load
from opdkit.methods.recap import Balance, code_score, paper_score
from opdkit.objective import Advantage, Reward, credit_of
from opdkit.testing import check, evaluate
from opdkit.testing.check import RULES, Subject
from opdkit.testing.fabricate import fabricate
from opdkit.types import Rollout
from tests.methods.steps import GROUPS, advantages, agrees, at, ppo, step

HISTORY = {
    "accuracy": [0.2, 0.3, 0.25, 0.35, 0.3, 0.4, 0.35, 0.45],
    "format": [0.95, 0.96, 0.97, 0.98, 0.98, 0.99, 0.99, 0.99],
    "iou": [0.5, 0.5, 0.52, 0.5, 0.51, 0.5, 0.52, 0.51],
}
MEMORY = {"reward_means": HISTORY}
KNOWN = {  # an objective that does not apply is None
    "accuracy": [1.0, 0.0, None, 0.5, 0.25, 1.0],
    "format": [1.0, 1.0, 0.5, None, 0.0, 1.0],
    "iou": [None, 0.3, 0.2, 0.1, 0.9, None],
}


def weights(memory: dict[str, Any] = MEMORY, at: int = 0, **settings: Any) -> list[float]:
    balance = Balance(**{"window": 4, **settings})
    return list(balance.weights(list(memory["reward_means"]), at, 100, memory).values())


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values).double()


# --------------------------------------------------------------------------------------- the card


def test_the_form_of_the_code() -> None:
    scores = [code_score(doubles(h)) for h in HISTORY.values()]
    progress, volatility = zip(*scores)
    assert progress == pytest.approx((0.733333, 0.977215, 0.990196), abs=5e-7)
    assert volatility == pytest.approx((0.230769, 0.014429, 0.016338), abs=5e-7)
    assert weights() == pytest.approx([0.997910, 1.000291, 1.001799], abs=5e-7)
    assert weights(temperature=0.1) == pytest.approx([1.276257, 0.813819, 0.909924], abs=5e-7)


def test_the_form_of_the_paper() -> None:
    scores = [paper_score(1 - doubles(h)) for h in HISTORY.values()]
    progress, volatility = zip(*scores)
    assert progress == pytest.approx((0.862069, 0.357143, 0.989899), abs=5e-7)
    assert volatility == pytest.approx((0.041409, 0.091161, 0.007179), abs=5e-7)
    assert weights(form="paper") == pytest.approx([1.023233, 0.934198, 1.042569], abs=5e-7)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_limits_of_the_temperature(form: str) -> None:
    assert weights(form=form, temperature=1e9) == pytest.approx([1, 1, 1], abs=1e-8)
    cold = weights(form=form, temperature=1e-4)
    # the code's two softmaxes may choose two rewards, the paper's one chooses one
    assert sorted(cold) == pytest.approx([0, 0, 3] if form == "paper" else [0, 1.5, 1.5], abs=1e-9)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.1}, {"form": "paper"}, {"mix": -1.0}])
def test_their_mean_is_one_and_like_histories_weigh_alike(settings: dict[str, Any]) -> None:
    assert sum(weights(**settings)) == pytest.approx(3, abs=1e-12)
    scale = 1.0 if settings.get("form") == "paper" else 3.0
    same = {"reward_means": {"a": HISTORY["iou"], "b": [scale * x for x in HISTORY["iou"]]}}
    assert weights(same, **settings) == pytest.approx([1, 1], abs=1e-12)


def test_a_reward_in_other_units_weighs_the_same_and_a_shifted_one_does_not() -> None:
    plain = weights(temperature=0.1)
    for change, moves in ((lambda x: 7 * x, False), (lambda x: x + 0.5, True)):
        changed = {"reward_means": HISTORY | {"iou": [change(x) for x in HISTORY["iou"]]}}
        assert (weights(changed, temperature=0.1) != pytest.approx(plain, rel=1e-9)) == moves


def test_short_histories_and_none() -> None:
    """One number, or none: c = 1, i = 0; of three the halves are the first and the last."""
    for score in (code_score, paper_score):
        assert score(doubles([])) == score(doubles([0.4])) == (1.0, 0.0)
    assert code_score(doubles([0.2, 0.9, 0.4]))[0] == pytest.approx(0.5, rel=1e-9)
    assert weights({"reward_means": {"a": [], "b": [0.3]}}) == [1.0, 1.0]
    assert all(map(math.isfinite, weights({"reward_means": {"a": [0.5, 0.0], "b": [0.0, 0.0]}})))


def test_the_mix_may_fall_over_the_run() -> None:
    for done, mix in ((0, 1.0), (25, 0.75), (100, 0.0)):
        assert weights(mix=-1.0, at=done, temperature=0.1) == weights(mix=mix, temperature=0.1)


# ------------------------------------------------------------------------------- what is remembered


def scored(**rewards: float) -> Rollout:
    return Rollout("a", [1], [2], [True], [0.0], [0.0], "q", reward=1.0, rewards=rewards)


def test_a_step_adds_the_mean_of_each_reward_over_what_it_applies_to() -> None:
    """The last 2 W of them; what a step says nothing of stays. As JSON it is the same."""
    balance = Balance(window=1)
    memory = balance.observe([scored(a=1.0, b=0.5), scored(a=0.0)], {"other": 3})
    assert memory == {"other": 3, "reward_means": {"a": [0.5], "b": [0.5]}}
    for _ in range(2):
        memory = balance.observe([scored(a=0.25)], exact.loads(exact.dumps(memory)))
    assert memory["reward_means"] == {"a": [0.25, 0.25], "b": [0.5]}
    assert balance.observe([], memory) == memory
    told = balance.metrics([], 0, 10, memory)
    assert list(told) == ["weight_a", "weight_b"] and sum(told.values()) == pytest.approx(2)


# ---------------------------------------------------------------------------------- as an objective


@pytest.mark.parametrize("fresh", [True, False], ids=["on policy", "off policy"])
@pytest.mark.parametrize("arguments", [{"temperature": 0.1}, {"form": "paper", "temperature": 0.2}])
def test_equal_to_a_dense_reference(arguments: dict[str, Any], fresh: bool) -> None:
    case = step(5, fresh)
    mask, w = case.mask, weights(window=10, **arguments)
    assert mask is not None
    r = [sum(w[k] * (x[b] or 0.0) for k, x in enumerate(KNOWN.values())) for b in range(6)]
    a = advantages(doubles(r), GROUPS, std=True)[:, None]

    def reference(student: Tensor, others: dict[str, Tensor]) -> Tensor:
        logp, before, sampler = (
            at(x, case.tokens) for x in (student, others["before"], others["sampler"])
        )
        loss = (before - sampler).exp() * ppo((logp - before).exp(), a)
        return (torch.where(mask, loss, 0.0).sum(1) / mask.sum(1)).mean()

    named = {
        f"reward:{name}": [math.nan if x is None else x for x in values]
        for name, values in KNOWN.items()
    }
    case = replace(case, columns=case.columns | named, settings={"memory": MEMORY})
    assert agrees(load("recap", **arguments), case, reference)


def test_rewards_by_name_in_evaluate() -> None:
    """The credit of a group of one is its reward: 0.5 w_1, and 0.5 w_1 + 0.2 w_2."""
    z, ids = torch.zeros(2, 1, 3).double(), torch.zeros(2, 1, dtype=torch.int64)
    two = {"accuracy": HISTORY["accuracy"], "format": HISTORY["format"]}
    given: dict[str, Any] = {
        "rewards": {"accuracy": [0.5, 0.5], "format": [None, 0.2]},
        "memory": {"reward_means": two},
        "group": [0, 1],
    }
    out = evaluate(load("recap", temperature=0.1), z, ids, **given)
    w = weights({"reward_means": two}, window=10, temperature=0.1)
    (credit,) = (term.credit for term in out.terms)
    assert credit is not None
    assert credit[:, 0].tolist() == pytest.approx([0.5 * w[0], 0.5 * w[0] + 0.2 * w[1]], rel=1e-12)
    same = evaluate(load("grpo"), z, ids, reward=[0.5, 0.7], group=[0, 1])
    given["memory"] = {}
    assert torch.equal(evaluate(load("recap"), z, ids, **given).grad, same.grad)


def test_one_reward_without_a_name_is_grpo_to_the_bit() -> None:
    case = step(6, fresh=False)
    a, b = (case.run(load(name).objective) for name in ("recap", "grpo"))
    assert torch.equal(a.grad, b.grad) and a.loss == b.loss


@pytest.mark.parametrize("arguments", [{}, {"form": "paper"}, {"mix": -1.0}, {"clip": None}])
def test_check(arguments: dict[str, Any]) -> None:
    check(load("recap", **arguments))


def test_every_rule_holds_with_rewards_by_name() -> None:
    method = load("recap", temperature=0.1)
    case = fabricate(method.objective)
    named = {
        f"reward:{name}": doubles([math.nan if x is None else x for x in values])
        for name, values in KNOWN.items()
    }
    settings = {**case.settings, "memory": MEMORY}
    case = replace(case, columns={**case.columns, **named}, settings=settings)
    subject = Subject(method, case, case.run(method.objective))
    assert not [name for name, keeps in RULES.items() if keeps(subject) is False]


def test_what_it_says() -> None:
    made = load("recap")
    assert made.curriculum == Balance() and made.needs.columns == {"reward", "group"}
    credit = credit_of(made.objective.terms[0].loss)
    assert credit != Advantage() and Advantage(of=Reward("accuracy")) != Advantage()
    assert (load("grpo") + made).curriculum == Balance() != Plain()
    for wrong, said in (
        ({"form": "both"}, "form='both' must be one of code, paper"),
        ({"window": 0}, "window=0 must be positive"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"mix": 1.5}, r"mix=1.5 must lie in \[0, 1\], or be -1"),
    ):
        with pytest.raises(Exception, match=said):
            load("recap", **wrong)
