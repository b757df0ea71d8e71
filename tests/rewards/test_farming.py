"""No answer that is the same for every question, and no question itself, earns more on a task of
reasoning-gym than chance.
"""

import logging
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from opdkit.data import load_rows
from opdkit.rewards import score, workers
from opdkit.rewards.gym import ReasoningGym
from opdkit.types import Rollout

sys.path.append(str(Path(workers.__file__).with_name("jail")))  # as where it is run by path

import checks

reasoning_gym = pytest.importorskip("reasoning_gym")
from reasoning_gym.factory import DATASETS  # noqa: E402

ROWS = 8
CONSTANTS = [
    *["", "0", "1", "-1", "2", "24", "0.5", "1/2", "True", "False", "yes", "No", "A", "banana"],
    *["[]", "{}", "None", "nan", "nanj", "[NaN, NaN, NaN]", "inf", "x", "C", "[0]", "[[0]]", "()"],
    *["infeasible", "Monday", "0 0", "True False", "(1+2+3)*4", "6*4", "(P ∧ Q)", "P ∨ ¬P", "\n"],
]
INTEGRALS = ("simple_integration", "intermediate_integration")  # sympy reads each answer
SLOW = (*INTEGRALS, "knight_swap", "sokoban", "zebra_puzzles", "futoshiki")  # their rows take long


class Late(BaseException):
    """Not an Exception: scorers catch those."""


def late(*_: object) -> None:
    raise Late


def worth(task: str, said: str, entry: dict, scorer: object) -> bool:
    """Whether an answer is right: of ours, so read in this process, and for a second at most."""
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        return checks.scored(task, said, entry, scorer) >= ReasoningGym().correct_from
    except (Exception, Late):
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture(autouse=True)
def quiet():
    before = signal.signal(signal.SIGALRM, late)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("task", sorted(set(DATASETS) - {"composite"}))
def test_nothing_is_paid_for_nothing(task):
    """Chance is the share of the most frequent truth; tasks without a truth have one row's."""
    scorer = reasoning_gym.create_dataset(task, size=ROWS, seed=11)
    entries = [scorer[i] for i in range(2 if task in SLOW else ROWS)]
    truths = Counter(str(e["answer"]) for e in entries if e["answer"] is not None)
    chance = max([1, *truths.values()])
    for said in CONSTANTS[:24] if task in INTEGRALS else CONSTANTS:
        assert sum(worth(task, said, e, scorer) for e in entries) <= chance, said
    assert sum(worth(task, e["question"], e, scorer) for e in entries) == 0
    assert all(worth(task, str(e["answer"]), e, scorer) for e in entries if e["answer"] is not None)


def rollout(text: str, row: dict) -> Rollout:
    return Rollout("r", [1], [2], [True], [0.0], [0.0], "p", text=text, row=row)


def rewards(task: str, *texts: str, **settings) -> list[float]:
    [row] = load_rows(f"reasoning_gym:{task}?size=1&seed=1")
    said = [rollout(f"<answer>{text}</answer>", row) for text in texts]
    return [r.reward for r in score(said, ReasoningGym(**settings))]


def test_numbers_of_puzzles_are_the_questions():
    """8, 5, 10 and 6, each once, to 24 exactly."""
    texts = [
        "10*(8 - 5) - 6",
        "10×(8 − 5) − 6 = 24",
        "6*4",
        "6*4*1*1",
        "8+5+10+6-5",
        "10*(8-5)-6+0",
    ]
    assert rewards("puzzle24", *texts) == [1, 1, 0, 0, 0, 0]
    assert rewards("puzzle24", "(8*5+10)/6*3", "24", "8*5*10*6") == [0, 0, 0]
    nested = "(" * 250 + "1" + ")" * 250
    assert checks.arithmetic(nested) is None and checks.arithmetic("2**3") is None
    assert checks.arithmetic("-(1/3) + 2*3") == (checks.Fraction(17, 3), [2, 3, 1, 3])


def test_the_integrand_under_an_integral_is_no_integral():
    [row] = load_rows("reasoning_gym:simple_integration?size=1&seed=1")
    inner = row["reasoning_gym"]["entry"]["metadata"]["integrand"]
    texts = [row["answer"], f"Integral({inner}, x)", f"integrate({inner}, x)", inner]
    assert rewards("simple_integration", *texts) == [1, 0, 0, 0]


def test_scorers_that_pay_for_a_part():
    """coin_flip's takes "0" for the first digits of 0.3125, game_of_life_halting's any text for
    True, complex_arithmetic's NaN for no distance, gsm_symbolic's the first of several numbers.
    """
    assert rewards("coin_flip", "0.3125", "5/16", "0", "0.3", "nan") == [1, 1, 0, 0, 0]
    assert rewards("game_of_life_halting", "False", "false", "True", "banana") == [1, 1, 0, 0]
    assert rewards("complex_arithmetic", "-15+3i", "nan", "nani", "infj") == [1, 0, 0, 0]
    assert rewards("gsm_symbolic", "288", "288.0", "288 or 289", "-288") == [1, 1, 0, 0]
    [row] = load_rows("reasoning_gym:spell_backward?size=1&seed=1")
    assert rewards("spell_backward", row["answer"], row["answer"] + "a") == [1, 0]


def test_credit_for_a_part_is_asked_for():
    [row] = load_rows("reasoning_gym:game_of_life?size=1&seed=1")
    zeros = str([[0] * 10] * 10)
    assert rewards("game_of_life", zeros) == [0.0]
    assert rewards("game_of_life", zeros, partial=True)[0] > 0.5
    assert rewards("game_of_life", row["answer"]) == [1.0]


def test_an_empty_answer_is_one_where_it_is_marked():
    """Of `ab`, whose truth may be empty."""
    rows = load_rows("reasoning_gym:ab?size=200&seed=1")
    row = next((row for row in rows if row["answer"] == ""), None)
    assert row is not None
    assert ReasoningGym()(rollout("<answer></answer>", row)) == 1.0
    assert ReasoningGym()(rollout("", row)) == ReasoningGym()(rollout("<think>x", row)) == 0.0
