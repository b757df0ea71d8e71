"""Tokens by domain: at most so many, whole rollouts or groups, in an order that knows no length."""

from __future__ import annotations

from collections import Counter
from statistics import mean
from typing import Any

import pytest

from opdkit.base.errors import UserError
from opdkit.run.ask import domains
from opdkit.train.collect.filters import DynamicSampling, TokenBudget, refuse_domains
from opdkit.types import Rollout


def rollout(step: int, domain: str, group: int, number: int, length: int) -> Rollout:
    return Rollout(
        f"{step}/{domain}{group}/{number}",
        [],
        [0] * length,
        [True] * length,
        [],
        [],
        f"{domain}{group}",
        row={"subject": domain},
        correct=number == 0,
    )


def step(number: int = 0, groups: int = 8, each: int = 4) -> list[Rollout]:
    """Of two domains; responses of 10 to 40 tokens, one group of each kind: 100 tokens."""
    return [
        rollout(number, domain, g, n, 10 * (n + 1))
        for g in range(groups)
        for domain in ("math", "code")
        for n in range(each)
    ]


def budget(most: dict[str, int], **settings: Any) -> TokenBudget:
    return TokenBudget(most, lambda row: str(row["subject"]), **settings)


def nothing() -> list[Rollout]:
    raise AssertionError("no further rollouts are needed")


def tokens(rollouts: list[Rollout], domain: str) -> int:
    return sum(len(r.tokens) for r in rollouts if r.row["subject"] == domain)


def test_a_domain_has_at_most_its_tokens_and_others_have_all() -> None:
    """Eight groups of 100: of math at most 250 tokens; less than the longest, 40, are unused."""
    keep = budget({"math": 250})
    kept = keep(step(), nothing)
    assert 210 < tokens(kept, "math") <= 250 and tokens(kept, "code") == 800
    assert [r for r in step() if r in kept] == kept  # in their order
    assert keep.counts == {
        "tokens_by_domain/math": float(tokens(kept, "math")),
        "tokens_by_domain/code": 800.0,
        "dropped_by_domain/math": 64.0 - len(kept),
        "dropped_by_domain/code": 0.0,
    }
    assert budget({"math": 800})(step(), nothing) == step()


def test_groups_stay_whole_where_they_are_compared() -> None:
    keep = budget({"math": 250, "code": 799}, together=True)
    kept = keep(step(), nothing)
    sizes = Counter(r.group for r in kept)
    assert set(sizes.values()) == {4}
    assert tokens(kept, "math") == 200 and tokens(kept, "code") == 700


def test_the_order_is_of_seed_and_step_and_not_of_the_batch() -> None:
    def ids(rollouts: list[Rollout], seed: int = 0) -> set[str]:
        return {r.id for r in budget({"math": 250}, seed=seed)(rollouts, nothing)}

    assert ids(step()) == ids(step()[::-1])
    assert ids(step()) != ids(step(), seed=1)
    assert {i.partition("/")[2] for i in ids(step())} != {i.partition("/")[2] for i in ids(step(1))}


def test_long_ones_are_kept_as_often_as_short_ones_but_at_the_border() -> None:
    """Over 300 steps with room for about 20 of 32 responses: lengths differ by 1 token in the mean
    at most. Where what does not fit is skipped, the gap would be filled with short ones.
    """
    kept = [r for s in range(300) for r in budget({"math": 500})(step(s), nothing)]
    lengths = [len(r.tokens) for r in kept if r.row["subject"] == "math"]
    assert 18 < len(lengths) / 300 < 21
    assert 24.0 < mean(lengths) <= 25.0  # of all: 25


def test_what_dynamic_sampling_left_is_what_is_counted() -> None:
    rows = [r for r in step() if r.group != "math3" or r.correct]  # all right: dropped
    keep = budget({"math": 300})
    kept = keep(DynamicSampling(15)(rows, nothing), nothing)
    dropped = keep.counts["dropped_by_domain/math"]
    assert dropped + sum(r.row["subject"] == "math" for r in kept) == 28


def test_a_budget_that_leaves_nothing_is_an_error_and_one_domain_may_have_none() -> None:
    assert tokens(budget({"math": 5})(step(), nothing), "math") == 0
    with pytest.raises(UserError, match=r"leaves nothing of a step: its responses have 10 to 40"):
        budget({"math": 5, "code": 5})(step(), nothing)
    with pytest.raises(UserError, match=r"its groups of responses have 100 to 100 tokens"):
        budget({"math": 99, "code": 99}, together=True)(step(), nothing)
    assert budget({"math": 5})([], nothing) == []


def test_domains_are_columns_or_routes() -> None:
    rows: list[dict[str, Any]] = [{"id": 0, "teacher": "math"}, {"id": 1, "teacher": "geo"}]
    routes: Any = {"math": 1, "default": 2}
    assert [domains("teacher", routes)(row) for row in rows] == ["math", "default"]
    assert [domains("teacher", {})(row) for row in [*rows, {}]] == ["math", "geo", "default"]
    assert domains("level", routes)({"level": 3}) == "3"
    refuse_domains({"math": 1}, {"math", "code"}, "teacher")
    with pytest.raises(UserError, match=r"token_budget\.maths is for no row.*data has code, math"):
        refuse_domains({"math": 1, "maths": 1}, {"math", "code"}, "teacher")
