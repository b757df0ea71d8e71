"""Several rewards by name: each where it applies, their weighted sum, and what counts as right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.objective import Batch, ColumnFact, Likelihood, Objective, Reward
from opdkit.objective.needs import Needs, needs
from opdkit.rewards import load_reward, score
from opdkit.rewards.against import Beats
from opdkit.rewards.named import refuse_idle
from opdkit.rewards.rows import check_rows
from opdkit.testing import evaluate
from opdkit.train.gather import gather
from opdkit.types import Rollout, reward_means


def rollout(text: str = "abc", **row: Any) -> Rollout:
    return Rollout("r", [1], [2], [True], [-1.0], [-1.0], "q", text=text, row=row)


def length(r: Rollout) -> float:
    return float(len(r.text))


def shortness(r: Rollout) -> Any:
    """None where the row asks for nothing."""
    most = r.row.get("most")
    return None if most is None else (float(len(r.text) <= most), f"at most {most}")


NAMED = {"short": shortness, "length": length}


def test_each_counts_where_it_applies_and_the_first_that_does_says_what_is_right() -> None:
    """0.5 * 0 + 2 * 3, and 2 * 3 alone; of the second the length says so."""
    reward = load_reward(NAMED, {"short": 0.5, "length": 2.0})
    long, free, short = score([rollout(most=2), rollout(), rollout(most=5)], reward)
    assert (long.rewards, long.reward, long.correct) == ({"short": 0.0, "length": 3.0}, 6.0, False)
    assert (free.rewards, free.reward, free.correct) == ({"length": 3.0}, 6.0, True)
    assert (short.reward, short.correct, short.feedback) == (6.5, True, "at most 5")
    assert score([rollout(most=2)], load_reward(NAMED))[0].reward == 3.0
    assert reward_means([long, free, short]) == {"length": 3.0, "short": 0.5}


def test_a_reward_with_partial_credit_keeps_its_own_bound() -> None:
    class Half:
        correct_from = 0.5

        def score_many(self, rollouts: Any) -> list[float]:
            return [0.4] * len(rollouts)

    (scored,) = score([rollout()], load_reward({"half": Half(), "length": length}))
    assert (scored.correct, scored.reward) == (False, 3.4)


def test_one_that_needs_a_column_is_asked_of_rows_that_have_it() -> None:
    reward = load_reward({"exact": "exact", "length": length})
    right, other = score([rollout("7", answer="7"), rollout("7")], reward)
    assert right.rewards == {"exact": 1.0, "length": 1.0} and other.rewards == {"length": 1.0}


def test_rows_that_none_can_score_and_rewards_that_score_no_row_are_refused() -> None:
    exact = load_reward({"exact": "exact"})
    check_rows(exact, [{"id": "a", "answer": "7"}])
    with pytest.raises(UserError, match=r"row 'b': none of the rewards exact can score it"):
        check_rows(exact, [{"id": "a", "answer": "7"}, {"id": "b"}])
    both = load_reward({"exact": "exact", "length": length})
    check_rows(both, [{"id": "b"}])
    with pytest.raises(UserError, match=r"'exact' applies to no row .* row 'b': .*answer"):
        refuse_idle(both, [{"id": "b"}])
    with pytest.raises(UserError, match="none of the rewards short gave rollout 'r' a number"):
        score([rollout()], load_reward({"short": shortness}))


def test_their_sum_decides_which_of_two_responses_is_better() -> None:
    other = {"tokens": [2], "text": "abcd", "finish": "stop"}
    (scored,) = score([rollout("abc", opponent=other, most=3)], Beats(load_reward(NAMED)))
    assert (scored.reward, scored.correct) == (0.5, False)  # 1 + 3 and 0 + 4


def test_alone_a_reward_may_not_be_silent() -> None:
    with pytest.raises(UserError, match=r"shortness returned None \(NoneType\).*finite float"):
        score([rollout()], shortness)


def test_one_of_ones_own_file_may_be_silent_in_its_own_process(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def even(r):\n    return None if r.text == 'x' else len(r.text) % 2 == 0\n")
    reward = load_reward({"even": f"{file}:even", "length": length})
    silent, said = score([rollout("x"), rollout("xy")], reward)
    assert silent.rewards == {"length": 1.0} and said.rewards == {"even": 1.0, "length": 2.0}


@pytest.mark.parametrize(
    ("spec", "weights", "said"),
    [
        (NAMED, {"shrot": 1.0}, r"reward_weights.shrot weighs no reward.*did you mean 'short'"),
        (NAMED, {"short": float("nan")}, "must be a finite number"),
        ("exact", {"exact": 1.0}, "weighs rewards by name .* has none with names"),
        ({"a": "exact", "b": "maths"}, {}, "reward.b: there is no reward 'maths'; did you mean"),
        ({}, {}, "must each say what they are"),
        ({"a": None}, {}, "must each say what they are"),
        ({"a": "mth"}, {}, "no reward 'mth'.*did you mean 'math'"),
    ],
)
def test_what_cannot_be_meant_is_refused(spec: Any, weights: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_reward(spec, weights)


# ------------------------------------------------------------------------------------ what reads it


def test_a_signal_reads_one_by_its_name() -> None:
    rows = score([rollout(most=2), rollout()], load_reward(NAMED))
    rows = [replace(r, id=str(i)) for i, r in enumerate(rows)]
    batch = gather(rows, Needs(frozenset({ColumnFact("reward:short")})), {})
    assert Reward("length")(batch).tolist() == [[3.0], [3.0]]
    short = Reward("short")(batch)[:, 0]
    assert short[0] == 0.0 and short[1].isnan()
    assert list(batch.rewards) == ["length", "short"] and Reward()(batch).tolist() == [[3.0], [3.0]]
    assert str(Reward()) == "Reward()" and str(Reward("short")) == "Reward(name=short)"
    assert needs(Objective(Likelihood() * Reward("short"))).columns == {"reward:short"}


def test_one_that_is_not_there_is_named() -> None:
    z, ids = torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)
    assert Batch(ids, ids.bool()).rewards == {}
    with pytest.raises(LookupError, match=r"'reward:style'.*reward: \{NAME: math\}.*rewards="):
        evaluate(Likelihood() * Reward("style"), z, ids, reward=[1.0])
    out = evaluate(Likelihood() * Reward("style"), z, ids, rewards={"style": [3.0]})
    assert out.terms[0].weight.tolist() == [[3.0]]


def test_rollouts_are_stored_with_them() -> None:
    (scored,) = score([rollout(most=2)], load_reward(NAMED))
    fields = json.loads(json.dumps(vars(scored)))
    assert Rollout(**fields) == scored
