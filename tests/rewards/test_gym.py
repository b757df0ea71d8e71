"""reasoning-gym's scorers as a reward."""

import json

import pytest

from opdkit.base.errors import UserError
from opdkit.data import load_rows
from opdkit.rewards import load_reward, score
from opdkit.rewards.gym import ReasoningGym, answer_in
from opdkit.types import Rollout

pytest.importorskip("reasoning_gym")


def rollout(text: str, row: dict) -> Rollout:
    return Rollout("r", [1], [2], [True], [0.0], [0.0], "p", text=text, row=row)


def test_a_task_scores_its_own_answers():
    rows = load_rows("reasoning_gym:chain_sum?size=5&seed=3")
    right = [rollout(f"Let me see. <answer>{row['answer']}</answer>", row) for row in rows]
    assert [(r.reward, r.correct) for r in score(right, load_reward("reasoning_gym"))] == [
        (1.0, True)
    ] * 5


def test_another_solution_than_the_stored_one_is_right():
    """countdown has many; a comparison with row["answer"] would call them wrong."""
    [row] = load_rows("reasoning_gym:countdown?size=1&seed=1")
    assert row["answer"] == "94*4 - 61 - 6"
    assert ReasoningGym()(rollout("The answer is 4*94 - 6 - 61", row)) == 1.0


def test_credit_for_form_alone_is_not_correct():
    [row] = load_rows("reasoning_gym:countdown?size=1&seed=1")
    near = [rollout("<answer>94 + 4</answer>", row)]
    [r] = score(near, ReasoningGym())
    assert r.reward == 0 and r.correct is False
    [r] = score(near, ReasoningGym(partial=True))
    assert r.reward == 0.05 and r.correct is False


def test_nonsense_is_wrong_and_stops_nothing():
    for task in (
        "countdown",
        "chain_sum",
        "binary_matrix",
        "string_insertion",
        "spiral_matrix",
        "graph_color",
        "power_function",
    ):
        [row] = load_rows(f"reasoning_gym:{task}?size=1&seed=1")
        for text in ("", "[[[", "{}", "9**9**9**9**9 ((", "None", "\x00"):
            assert ReasoningGym()(rollout(text, row)) < 0.5


def test_the_tasks_settings_reach_the_scorer_and_entries_of_files_work(tmp_path):
    [row] = load_rows("reasoning_gym:decimal_arithmetic?size=1&seed=2&max_num_decimal_places=4")
    assert row["reasoning_gym"]["config"] == {"size": 1, "seed": 2, "max_num_decimal_places": 4}
    file = tmp_path / "entries.jsonl"
    [entry] = load_rows("reasoning_gym:chain_sum?size=1&seed=3")
    file.write_text(json.dumps(entry["reasoning_gym"]["entry"]) + "\n")
    [read] = load_rows(file)
    assert ReasoningGym()(rollout(read["answer"], read)) == 1.0


def test_where_the_answer_stands():
    assert answer_in("<think>x</think>so <answer> 1 2\n3 4 </answer>") == "1 2\n3 4"
    assert answer_in(r"it is \boxed{7}") == "7"
    assert answer_in("The answer is 7.") == "7"
    assert answer_in(" 1 2\n3 4 ") == "1 2\n3 4"


def test_rows_without_an_entry():
    with pytest.raises(UserError, match=r"which the row does not have \(columns: prompt\)"):
        ReasoningGym()(rollout("7", {"prompt": "?"}))


def test_a_row_that_the_scorer_cannot_read_is_not_called_wrong():
    [row] = load_rows("reasoning_gym:chain_sum?size=1&seed=1")
    broken = {**row["reasoning_gym"], "entry": {"question": "?", "answer": 5, "metadata": {}}}
    with pytest.raises(UserError, match="cannot read the row"):
        ReasoningGym()(rollout("<answer>4</answer>", {**row, "reasoning_gym": broken}))
