"""The math reward on the ways in which models and data sets write answers."""

import json
import threading
from fractions import Fraction
from pathlib import Path

import pytest

from opdkit.base.errors import UserError
from opdkit.rewards.extract import after_thinking, boxed, hashed, stated
from opdkit.rewards.guard import Failed
from opdkit.rewards.math import GUARD, Math, right
from opdkit.rewards.quantity import quantity
from opdkit.rewards.spoken import claimed
from opdkit.types import Rollout

DATA = Path(__file__).parents[2] / "../shared/data"

RIGHT = [
    # the forms in which a final answer is given
    (r"So \boxed{72}.", "72"),
    ("48 + 24 = 72\n#### 72", "72"),
    ("... #### 72", "72"),
    ("#### 72\n\nQuestion: what next? There are 5", "72"),
    ("The answer is 72.", "72"),
    ("The answer is 72. It took me 3 tries", "72"),
    ("**Final Answer:** 72", "72"),
    ("Final answer:\n\n72", "72"),
    (r"The final answer is $72$. I hope it is correct.", "72"),
    ("The answer is 72 dollars for 3 friends.", "72"),
    ("The answer is that she has 5 apples.", "5"),
    ("The answer is 3 + 4 = 7.", "7"),
    ("She sold 48 + 24 = 72 clips", "72"),
    ("He has 5 apples", "5"),
    (r"First \boxed{5}, no: \boxed{7}", "7"),
    (r"\boxed{7} and then \boxed{5", "7"),
    (r"<think>\boxed{3}, or 4?</think>It is \boxed{5}", "5"),
    # numbers
    (r"\boxed{72.0}", "72"),
    (r"\boxed{72}", "72.0"),
    (r"\boxed{072}", "72"),
    (r"\boxed{33}", "033"),
    (r"\boxed{1,000}", "1000"),
    ("#### 1000", "1,000"),
    (r"\boxed{1{,}000{,}000}", "1000000"),
    (r"\boxed{10\,000}", "10000"),
    (r"\boxed{-5}", "-5"),
    (r"The temperature is −5", "-5"),
    (r"\boxed{+5}", "5"),
    (r"\boxed{.5}", "0.5"),
    (r"\boxed{0.333333}", r"\frac{1}{3}"),
    # fractions, percentages
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"\boxed{\dfrac12}", "1/2"),
    (r"\boxed{-\frac{3}{4}}", "-0.75"),
    (r"\boxed{3\frac{1}{2}}", "3.5"),
    (r"\boxed{3 1/2}", "7/2"),
    (r"The answer is $\frac{1}{2}$", "0.5"),
    (r"so we get $x = \frac{6}{4}$.", "1.5"),
    (r"\boxed{25\%}", "25"),
    (r"\boxed{25\%}", "0.25"),
    ("The answer is 25 percent", "25%"),
    # units, money, text around
    (r"\boxed{\$18}", "18"),
    ("The answer is $18", "18"),
    ("She makes $18 every day.", "18"),
    ("#### $1,250.50", "1250.5"),
    (r"\boxed{5 \text{ apples}}", "5"),
    (r"\boxed{5\text{ cm}^2}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{7 dozen}", "7"),
    (r"\boxed{2 dozen}", "24"),
    (r"\boxed{3 million}", "3000000"),
    (r"\boxed{x = 72}", "72"),
    # choices and words
    (r"\boxed{\text{(B)}}", "B"),
    (r"\boxed{B}", "(B)"),
    (r"\boxed{\textbf{(073)}}", "73"),
    (r"\boxed{\textbf{(B)}\ 12}", "B"),
    ("The answer is (B).", "B"),
    ("The answer is B) 12 apples.", "B"),
    (r"\boxed{\text{Evelyn}}", "Evelyn"),
    # mathematics
    (r"\boxed{\frac{3}{\sqrt{2}}}", r"\frac{3\sqrt{2}}{2}"),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{(x-1)(x+1)}", "x^2-1"),
    (r"\boxed{2,1}", "1,2"),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}"),
    (r"\boxed{2^{10}}", "1024"),
    (r"The answer is $2\pi$", r"$2\pi$"),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\boxed{5}", r"Thus we have 2 + 3, that is \boxed{5}"),
]

WRONG = [
    (r"\boxed{71}", "72"),
    ("", "72"),
    ("I do not know", "72"),
    (r"\boxed{}", "72"),
    (r"\boxed{72} or rather \boxed{73}", "72"),
    ("72 is too large, so it is 71", "72"),
    ("#### 71\nThe number 72 was wrong", "72"),
    (r"\boxed{-72}", "72"),
    (r"\boxed{7.2}", "72"),
    (r"\boxed{72, 73}", "72"),
    (r"\boxed{72 or 73}", "72"),
    (r"\boxed{1000001}", "1000000"),
    (r"\boxed{0.33}", r"\frac{1}{3}"),
    (r"\boxed{50}", "0.5"),
    (r"\boxed{5000\%}", "50%"),
    (r"\boxed{5x}", "5"),
    (r"\boxed{2 \pi}", "2"),
    (r"\boxed{2*3}", "23"),
    (r"\boxed{5 \text{ m}}", r"5 \text{ cm}"),
    (r"\boxed{\text{(C)}}", "B"),
    (r"\boxed{\text{(B) or (C)}}", "C"),
    (r"\boxed{(2, 1)}", "(1, 2)"),
    (r"\boxed{x^2+1}", "x^2-1"),
    (r"\boxed{\frac{1}{0}}", "1"),
    (r"\boxed{\text{no solution}}", "5"),
    (r"\boxed{5 apples and 6 oranges}", "5"),
    ("The answer is 4 + 3", "4"),
    ("#### Step 72\nand so on to 80", "72"),
]


@pytest.mark.parametrize(("text", "answer"), RIGHT)
def test_right(text, answer):
    assert right(text, answer)


@pytest.mark.parametrize(("text", "answer"), WRONG)
def test_wrong(text, answer):
    assert not right(text, answer)


def test_pathological_answers_end_and_are_wrong():
    """Expressions that sympy would never finish, and texts on which a careless pattern or a
    recursion would not.
    """
    limit = GUARD("72", "9^{9^{9^{9}}}", seconds=0.3)
    assert isinstance(limit, Failed) and "0.3 s" in limit.why
    assert GUARD("72", "70+2") is True
    for text in [
        r"\boxed{" * 5000,
        r"\boxed{" + "{" * 5000,
        "answer is " * 20_000,
        "$" * 20_000,
        "1," * 20_000,
        "9" * 20_000,
    ]:
        assert not right(text, "72")
        assert not right(text, r"\frac{\sqrt{3}}{2}")


def test_a_long_expression_is_wrong_without_being_read():
    assert not right(r"\boxed{1" + "+1" * 1000 + "}", "1001")


def test_threads_agree_with_the_main_thread():
    """math-verify's own limits are signals, which raise outside the main thread."""
    cases = [(rf"\boxed{{\sqrt{{{n}}} + x + 1 - \sqrt{{2}}}}", "x+1") for n in (3, 2)]
    out: dict[int, bool] = {}
    threads = [
        threading.Thread(target=lambda i=i, c=c: out.update({i: right(*c)}))
        for i, c in enumerate(cases)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [out[i] for i in range(2)] == [False, True]


def test_extraction():
    assert boxed(r"\boxed{a} \boxed{\frac{1}{2}} b") == r"\frac{1}{2}"
    assert boxed(r"\boxed{\{1, \text{x}\}}") == r"\{1, \text{x}\}"
    assert boxed(r"\fbox{3}") == "3"
    assert boxed(r"\boxed{3") is None
    assert hashed("#### 7\n") == "7"
    assert hashed("#### Plan\nThen 7") is None
    assert stated("The answer is 5. No, the answer is 6.") == "6"
    assert stated("An answer was given") is None
    assert claimed("from $1,250.50, not 3rd", leads=False) == "$1,250.50"
    assert claimed("x2 and 5y", leads=False) is None
    assert after_thinking("<think>a</think> b") == "b"


@pytest.mark.parametrize(
    ("text", "amount", "scale", "unit"),
    [
        ("1,234.5", Fraction(2469, 2), 1, ""),
        (r"-\frac{3}{4}", Fraction(-3, 4), 1, ""),
        ("3 1/2 km", Fraction(7, 2), 1, "km"),
        (r"12.5\%", Fraction(25, 2), Fraction(1, 100), ""),
        ("2 dozen eggs", Fraction(2), 12, "eggs"),
        ("60 km/h", Fraction(60), 1, "km/h"),
    ],
)
def test_quantities(text, amount, scale, unit):
    q = quantity(text)
    assert q is not None and (q.amount, q.scale, q.unit) == (amount, scale, unit)


@pytest.mark.parametrize(
    "text",
    ["", "x", "5x", "2 pi", "1, 2", "1.5 1/2", "1/0", "2*3", "5 or 6", ".", "12am", "1" * 3000],
)
def test_what_is_no_quantity(text):
    assert quantity(text) is None


def rollout(text: str, **row) -> Rollout:
    return Rollout("r", [1], [2], [True], [0.0], [0.0], "p", text=text, row=row)


def test_the_reward_reads_the_row():
    assert Math()(rollout(r"\boxed{72.0}", answer="72")) == 1.0
    assert Math()(rollout(r"\boxed{73}", answer=72)) == 0.0
    with pytest.raises(UserError, match=r"row\['answer'\], which is absent \(columns: question\)"):
        Math()(rollout("72", question="?"))


@pytest.mark.skipif(
    not (DATA / "gsm8k_train.jsonl").is_file(), reason="the shared data sets are not here"
)
def test_gsm8k_references_are_right_by_their_own_solutions():
    """And wrong by the next problem's, where the two answers differ."""
    lines = (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[::37][:200]
    solutions = [json.loads(line)["answer"] for line in lines]
    answers = [solution.split("#### ")[1] for solution in solutions]
    assert len(answers) == 200 and all(right(s, a) for s, a in zip(solutions, answers, strict=True))
    spoken_only = [
        s.split("####")[0] + f"The answer is {a}." for s, a in zip(solutions, answers, strict=True)
    ]
    assert all(right(s, a) for s, a in zip(spoken_only, answers, strict=True))
    shifted = answers[1:] + answers[:1]
    different = [
        (s, b)
        for s, a, b in zip(solutions, answers, shifted, strict=True)
        if float(a.replace(",", "")) != float(b.replace(",", ""))
    ]
    assert len(different) > 180 and not any(right(s, b) for s, b in different)
