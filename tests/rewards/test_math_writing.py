"""The many ways in which answers are written, and those in which they are not: each line is a
response, the truth, and whether it is right.
"""

import json
import time
from pathlib import Path

import pytest

from opdkit.rewards.extract import after_thinking, before_next, listed
from opdkit.rewards.forms import stands_in
from opdkit.rewards.interval import interval
from opdkit.rewards.latex import spelt
from opdkit.rewards.math import Math, question, right
from opdkit.rewards.units import unit
from opdkit.types import Rollout

DATA = Path(__file__).parents[2] / "../shared/data"

# fmt: off
RIGHT = [
    (r"\boxed{m+n = 204}", "204"),
    (r"\boxed{m^2 + n^2 = 204}", "204"),
    (r"\boxed{a - b_1 = 204}", "204"),
    (r"\boxed{\textbf{(B)}\ 105}", "105"),
    (r"\boxed{B. 105}", "105"),
    ("<think>3 + 4</think><answer>She makes $18 every day.</answer>", "18"),
    (r"First \boxed{1}, so $\boxed{40,000}$", "40,000"),
    ("The answer is as follows:\n\n72", "72"),
    ("Now the answer is clear. She sells 72 clips.", "72"),
    ("½", "1/2"),
    (r"\boxed{3 \over 2}", "1.5"),
    (r"\boxed{{3 \over 2}}", r"\frac32"),
    (r"\boxed{72 \text{ (total)}}", "72"),
    (r"\boxed{\underline{72}}", "72"),
    (r"\boxed{\color{blue}{72}}", "72"),
    (r"\boxed{\large 72}", "72"),
    (r"\boxed{C\$5}", "5"),
    (r"\boxed{₩5000}", "5000"),
    (r"\boxed{NOK 50}", "50"),
    (r"\boxed{50¢}", "50 cents"),
    ("Option D is correct.", "D"),
    ("Therefore A is the answer.", "A"),
    (r"\boxed{x>1 \text{ and } x<3}", "(1,3)"),
    (r"\boxed{x<3 \text{ and } x \ge 1}", "[1,3)"),
    (r"\boxed{\{x \mid 1<x<3\}}", "(1,3)"),
    (r"\boxed{\{x \in \mathbb{R} : x > 3\}}", r"(3,\infty)"),
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33"),
    (r"\boxed{4.5 \times 10^{33}}", "4.5e+33"),
    (r"\boxed{0.00001}", "1e-05"),
    (r"\boxed{10^{-5}}", "1e-05"),
    (r"\boxed{1 \times 10^{-5}}", "0.00001"),
    (r"\boxed{2}", '["2"]'),
    (r"\boxed{2}", "['2']"),
    (r"\boxed{2}", "[2]"),
    (r"\boxed{\frac12}", '["\\\\frac{1}{2}"]'),
    (r"\boxed{\approx 3.14}", "3.14"),
    (r"\boxed{≈3.14}", "3.14"),
    (r"\boxed{x \approx 3.14}", "3.14"),
    (r"\boxed{\pi \approx 3.14}", "3.14"),
    (r"\boxed{\frac{1}{3} \approx 0.333}", "1/3"),
    (r"\boxed{1<x<3}", "(1,3)"),
    (r"\boxed{1 \le x < 3}", "[1,3)"),
    (r"\boxed{x \ge 2}", r"[2,\infty)"),
    (r"\boxed{x≥2}", r"[2, \infty)"),
    (r"\boxed{[2,\infty)}", r"x \ge 2"),
    (r"\boxed{x < -1 \text{ or } x > 3}", r"(-\infty,-1)\cup(3,\infty)"),
    (r"\boxed{3 > x > 1}", "(1,3)"),
    (r"\boxed{x \leq 5}", r"(-\infty, 5]"),
    (r"\boxed{x > \frac{1}{2}}", r"\left(\frac12, \infty\right)"),
    (r"\boxed{x²+1}", "x^2+1"),
    (r"\boxed{√2}", r"\sqrt{2}"),
    (r"\boxed{3√2}", r"3\sqrt{2}"),
    (r"\boxed{√(x+1)}", r"\sqrt{x+1}"),
    (r"\boxed{½}", "0.5"),
    (r"\boxed{3½}", "3.5"),
    (r"\boxed{¾}", r"\frac34"),
    (r"\boxed{0.\overline{3}}", "1/3"),
    (r"\boxed{0.\overline{3}}", r"\frac{1}{3}"),
    (r"\boxed{\frac13}", r"0.\overline{3}"),
    (r"\boxed{0.1\overline{6}}", "1/6"),
    (r"\boxed{0.333...}", "1/3"),
    (r"\boxed{0.\bar{3}}", "1/3"),
    (r"\boxed{0.3}", "0.3"),
    ("<answer>72</answer>", "72"),
    ("so <answer> $72$ </answer>", "72"),
    ("<think>x</think><answer>The answer is 72</answer>", "72"),
    (r"<answer>\boxed{72}</answer>", "72"),
    (r"<answer>\frac{1}{2}</answer>", "0.5"),
    ("<answer>(B)</answer>", "B"),
    ("<answer>B</answer>", "B"),
    ("I think B.", "B"),
    ("I think it is B", "B"),
    ("I choose (C).", "C"),
    ("It must be **D**", "D"),
    ("Option B", "B"),
    ("The correct option is B.", "B"),
    (r"\boxed{USD 500}", "500"),
    (r"\boxed{Rs. 500}", "500"),
    (r"\boxed{\text{Rs. } 500}", "500"),
    ("The answer is € 5.", "5"),
    (r"\boxed{€5}", "5"),
    (r"\boxed{US\$5}", "5"),
    (r"\boxed{₹500}", "500"),
    (r"\boxed{EUR 20}", "20"),
    (r"\boxed{5€}", "5"),
    (r"\boxed{\pounds 5}", "5"),
    ("She pays USD 500.", "500"),
    (r"\boxed{CHF 20}", "20"),
    (r"\boxed{-\$5}", "-5"),
    ("\\boxed{72}\n\nQuestion: What is 1+2?\n\\boxed{3}", "72"),
    ("#### 72\n\nQuestion: 1+2?\nAnswer: 3\n#### 3", "72"),
    ("The answer is 72.\n\nQ: What is 1+2?\nA: The answer is 3.", "72"),
    ("\\boxed{72}\n\nProblem 2. Compute 1+2.\n\\boxed{3}", "72"),
    ("\\boxed{72}\n\nNext question: 1+2\n\\boxed{3}", "72"),
    ("\\boxed{72}<|im_end|>\n<|im_start|>user\nwhat?\\boxed{3}", "72"),
    ("\\boxed{72}\n\nHow many apples does she have?\n\\boxed{3}", "72"),
    ("\\boxed{72}\nHuman: and?\n\\boxed{3}", "72"),
    ("\\boxed{72}.\n\n### Question\n... \\boxed{3}", "72"),
    ("\\boxed{72}\n\n**Problem 3:** x\n\\boxed{3}", "72"),
    ("\\boxed{72}\n\nExercise 2:\n\\boxed{3}", "72"),
    ("Question: What is 70+2?\nAnswer: \\boxed{72}", "72"),
    ("Problem: two\n\nSo \\boxed{72}", "72"),
    (r"\boxed{71}. Wait, that is wrong. \boxed{72}", "72"),
    ("5 hours", "5 hours"),
    (r"\boxed{300 \text{ minutes}}", "5 hours"),
    (r"\boxed{1 kg}", "1000 g"),
    (r"\boxed{5 hours}", "5"),
    (r"\boxed{5}", "5 hours"),
    (r"\boxed{20^\circ C}", "20"),
    (r"\boxed{20°C}", "20"),
    (r"\boxed{150\%}", "1.5"),
    (r"\boxed{100\%}", "1"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{2^{100}}", "1267650600228229401496703205376"),
    (r"\boxed{2^{-80}}", "2^{-80}"),
    (r"\boxed{\frac{1}{2^{80}}}", "2^{-80}"),
    (r"\boxed{\frac{1}{1001!}}", r"\frac{1}{1001!}"),
    (r"\boxed{101_2}", "101_2"),
    (r"\boxed{101_{2}}", "101_2"),
    (r"\boxed{101}", "101_2"),
    (r"The final answer is: $\boxed{\text{72}}$", "72"),
    (r"\boxed{72 \text{ km/h}}", "72"),
    (r"\boxed{72\text{ square units}}", "72"),
    (r"\boxed{4.5 × 10³³}", "4.5e33"),
    ("So it is 4.5 × 10^33.", "4.5e33"),
    ("So it is 4.5e33.", "4.5e33"),
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{f(2) = 7}", "7"),
    (r"\boxed{AB = 5}", "5"),
    (r"\boxed{\frac{a}{b} = 5}", "5"),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
    (r"\boxed{\frac{\sqrt3}{2}}", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{\tan x}", r"\frac{\sin x}{\cos x}"),
    (r"\boxed{\log_2 3}", r"\frac{\ln 3}{\ln 2}"),
    (r"\boxed{e^{2}}", "e^2"),
    ("The answer is not 5, it is 72.", "72"),
    ("It isn't 5. It is 72.", "72"),
    ("There are 5 more than 67, so 72", "72"),
    ("in 3 or 4 steps we get 72", "72"),
    ("We do not count him, so there are 72 people.", "72"),
    ("The answer is approximately 72.", "72"),
    ("The answer is 72 (seventy-two).", "72"),
]
WRONG = [
    (r"\boxed{2m = 204}", "204"),
    (r"\boxed{(A) 105 (B) 106}", "106"),
    ("<answer>71 72</answer>", "72"),
    ("<answer>She makes not $18.</answer>", "18"),
    ("The answer is unclear.", "72"),
    ("I doubt it is 72.", "72"),
    ("The answer is between 71 and 73.", "73"),
    ("The answer is 70-80.", "80"),
    ("5 is too small", "5"),
    (r"\boxed{5 \text{ (wrong)}}", "5"),
    (r"\boxed{2 pm}", "2 am"),
    ("Option D is wrong.", "D"),
    ("Option C is correct, or option D.", "D"),
    (r"\boxed{x>1 \text{ and } y<3}", "(1,3)"),
    ("The answer is not 72.", "72"),
    ("The answer is less than 72.", "72"),
    ("It is less than 72", "72"),
    ("more than 72", "72"),
    ("at least 72", "72"),
    ("The answer is at most 72", "72"),
    ("The answer isn't 72.", "72"),
    ("The answer cannot be 72", "72"),
    ("The answer is 5 (or maybe 6)", "5"),
    ("The answer is 5 or 6", "6"),
    ("The answer is 5 or 6", "5"),
    ("The answer is either 5 or 6.", "6"),
    ("5 (or maybe 6)", "5"),
    ("5 (or maybe 6)", "6"),
    ("It is 5, or 6", "6"),
    (r"\boxed{72 wrong}", "72"),
    (r"\boxed{72 \text{ is wrong}}", "72"),
    (r"\boxed{\text{not } 72}", "72"),
    (r"\boxed{<72}", "72"),
    (r"\boxed{x < 72}", "72"),
    (r"\boxed{\ne 72}", "72"),
    (r"\boxed{72?}", "72"),
    (r"\boxed{72 \text{ or } 73}", "72"),
    (r"\boxed{72 maybe}", "72"),
    (r"\boxed{at least 72}", "72"),
    (r"\boxed{72 or more}", "72"),
    (r"\boxed{7200\%}", "72"),
    (r"\boxed{7200 %}", "72"),
    (r"\boxed{72}", "7200%"),
    (r"\boxed{\frac{1}{1003!}}", r"\frac{1}{1001!}"),
    (r"\boxed{1/1001!}", "1/1003!"),
    (r"\boxed{2^{-80}}", "2^{-81}"),
    (r"\boxed{2^{-81}}", r"\frac{1}{2^{80}}"),
    (r"\boxed{101_3}", "101_2"),
    (r"\boxed{5}", "101_2"),
    (r"\boxed{5 minutes}", "5 hours"),
    (r"\boxed{5 \text{ grams}}", r"5 \text{ kg}"),
    (r"\boxed{5 cents}", "5 dollars"),
    (r"\boxed{5 \text{ cm}}", r"5\text{ cm}^2"),
    (r"\boxed{5 euros}", "$5"),
    (r"\boxed{123*456}", "56088"),
    (r"\boxed{123 \cdot 456}", "56088"),
    (r"\boxed{123\times456}", "56088"),
    (r"\boxed{\int_0^1 2x dx}", "1"),
    (r"\boxed{\int_0^1 2x \, dx}", "1"),
    (r"\boxed{\sum_{i=1}^{3} i}", "6"),
    (r"\boxed{\lim_{x \to 0} \frac{\sin x}{x}}", "1"),
    (r"\boxed{\gcd(12,18)}", "6"),
    ("gcd(12,18)", "6"),
    (r"\boxed{70+2}", "72"),
    (r"\boxed{\sqrt{144}}", "12"),
    (r"\boxed{\sqrt4}", "2"),
    (r"\boxed{84/7}", "12"),
    (r"\boxed{\frac{84}{7}}", "12"),
    (r"\boxed{\log_2 8}", "3"),
    (r"\boxed{\sin 90^\circ}", "1"),
    (r"\boxed{|-5|}", "5"),
    (r"\boxed{\lfloor 5.5 \rfloor}", "5"),
    (r"\boxed{17 \bmod 5}", "2"),
    (r"\boxed{\prod_{i=1}^3 i}", "6"),
    (r"\boxed{3+4=3+4}", "7"),
    (r"\boxed{(2)(3)}", "6"),
    (r"\boxed{2(3)}", "6"),
    (r"\boxed{\max(3,5)}", "5"),
    (r"\boxed{\begin{vmatrix}1&2\\3&4\end{vmatrix}}", "-2"),
    (r"\boxed{\sin 60^\circ}", r"\frac{\sqrt3}{2}"),
    (r"\boxed{\int x dx}", r"\frac{x^2}{2}"),
    (r"\boxed{\int_0^{\pi} \sin x dx}", "2"),
    ("The answer is 123*456", "56088"),
    ("#### 123*456", "56088"),
    (r"<think>so \boxed{5} hmm", "5"),
    ("<think> maybe 5, or 7", "5"),
    (r"\boxed{5} hmm</think>", "5"),
    (r"<think>\boxed{5}</think>I do not know", "5"),
    (r"[THINK]\boxed{5}[/THINK] no", "5"),
    (r"a<think>\boxed{5}", "5"),
    ("<answer></answer> 5", "5"),
    ("not B", "B"),
    ("I think B or C.", "C"),
    ("I think B or C.", "B"),
    ("It is not B.", "B"),
    ("B or C", "B"),
    (r"\boxed{1<x<4}", "(1,3)"),
    (r"\boxed{1 \le x<3}", "(1,3)"),
    (r"\boxed{x > 2}", r"[2,\infty)"),
    ("\\boxed{3}\n\nQuestion: 2?\n\\boxed{72}", "72"),
    (r"\boxed{9^{9^{9^{9}}}}", "72"),
    (r"\boxed{x + 9^{9^{9^{9}}}}", "x+1"),
    (r"\boxed{9^{99999999}}", "72"),
    (r"\boxed{99999999!}", "72"),
    (r"\boxed{72 minus 1}", "72"),
    (r"\boxed{72 tenths}", "72"),
    ("0.34", r"\frac13"),
    (r"\boxed{x+5=72}", "72"),
    (r"\boxed{2b = 72}", "72"),
    (r"\boxed{0.333}", "1/3"),
]
ASKED = [  # the response, the truth, the question
    (r"\boxed{2^{10}}", "1024", "Compute $2^{10}$.", False),
    (r"\boxed{\frac{6}{4}}", r"\frac{3}{2}", r"Simplify $\frac{6}{4}$", False),
    ("#### 6/4", "3/2", "Simplify 6/4.", False),
    (r"\boxed{5!}", "120", "What is 5!?", False),
    (r"\boxed{5!}", "120", "How many ways to order 5 books?", True),
    (r"\boxed{\binom{5}{2}}", "10", r"Compute $\binom52$ or $\binom{5}{2}$.", False),
    (r"\boxed{\binom{5}{2}}", "10", "choose 2 of 5", True),
    (r"\boxed{(x-1)(x+1)}", "x^2-1", "Expand $(x-1)(x+1)$.", False),
    (r"\boxed{(x-1)(x+1)}", "(x+1)(x-1)", "Factor $x^2-1$.", True),
    (r"\boxed{x^2-1}", "(x-1)(x+1)", "Factor $x^2-1$.", False),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", r"Simplify $\sqrt{8}$.", False),
    (r"\boxed{72}", "72", "Is 72 even? What is 72?", True),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", r"Given $\frac{1}{2}$", True),
    (r"\boxed{3\sqrt{2}}", r"\sqrt{18}", r"with side $3\sqrt{2}+1$", True),
    (r"\boxed{25\%}", "0.25", "25% as a decimal", False),
    (r"\boxed{0.375}", r"\frac38", "Write 0.375 as a fraction", False),
    (r"\boxed{5}", "5.00", "5 apples", True),
    (r"\boxed{3/8}", "0.375", "Write 3/8 as a decimal", False),
    (r"\boxed{-5}", "-5", "What is 2 - 5 - 2?", True),
    (r"\boxed{1/2}", r"\frac12", "1/2 of", True),
]
# fmt: on


@pytest.mark.parametrize(("text", "answer"), RIGHT)
def test_right(text, answer):
    assert right(text, answer)


@pytest.mark.parametrize(("text", "answer"), WRONG)
def test_wrong(text, answer):
    assert not right(text, answer)


@pytest.mark.parametrize(("text", "answer", "asked", "good"), ASKED)
def test_what_is_copied_from_the_question_is_no_answer(text, answer, asked, good):
    assert right(text, answer, question=asked) is good
    messages = [{"role": "user", "content": asked}]
    for prompt in (asked, messages):
        row = {"answer": answer, "prompt": prompt}
        rollout = Rollout("r", [1], [2], [True], [0.0], [0.0], "p", text=text, row=row)
        assert Math()(rollout) == good


STYLES = [
    r"\boxed{%s}", r"So $\boxed{%s}$.", "#### %s", "The answer is %s.", "**Answer:** %s",
    "Final answer: $%s$", r"The final answer is \(%s\).", "<answer>%s</answer>",
    "<think>It may be 17.</think>The answer is %s", r"\[ \boxed{%s} \]",
    "\\boxed{%s}\n\nQuestion: What is 1 + 2?\n\\boxed{3}", "I think %s.",
    "<answer>The answer is %s</answer>", "#### %s\n\nProblem 2: 5 + 5\n#### 10",
]  # fmt: skip


@pytest.mark.parametrize("name", ["gsm8k_test", "aime24", "amc23"])
def test_truths_are_right_in_every_style(name):
    """And the truth plus one is not."""
    file = DATA / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"the data set {name} is not here")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][:150]
    for row in rows:
        answer = str(row["answer"]).rpartition("#### ")[2]
        asked = str(row.get("question") or row.get("problem"))
        other = str(float(answer.replace(",", "")) + 1)
        for style in STYLES:
            assert right(style % answer, answer, question=asked), (style, answer)
            assert not right(style % other, answer, question=asked), (style, answer)


def test_hostile_texts_take_no_time():
    """Patterns that go over a text once for each of its places would take minutes here."""
    began = time.process_time()
    for part in ("<answer>", "<think>", "\n ", "5 or ", "answer is 5\nquestion ", "√", "$x$ ",
                 r"\boxed{5}", "#### 5\n", r"\text{", r"\frac", "1,"):  # fmt: skip
        for answer in ("72", "x+1", "(1,3)", "B"):
            right(part * 20_000, answer)
    assert time.process_time() - began < 60
    assert not right(r"\boxed{1}" + "\n" + " " * 40_000, "2")


def test_the_parts():
    assert spelt("3½ + x² ≤ √2·π") == r"3\frac{1}{2} + x^{2} \le  \sqrt{2}\cdot \pi "
    assert interval(r"1 < x \le 3") == "(1,3]"
    assert interval(r"3 \ge x > 1") == "(1,3]"
    assert interval(r"x < -1 \text{ or } x > 3") == r"(-\infty,-1)\cup (3,\infty)"
    assert interval("x + 1") is None
    assert unit("km/h") == unit("kilometers per hour") == unit("kmh") != unit("m/s")
    assert unit("square cm") == unit("cm^2") != unit("cm") and unit("apples") is None
    assert stands_in(r"\dfrac{6}{4}", r"Simplify $\frac{6}{4}$.")
    assert not stands_in("6/4", "16/4 and 6/40")
    assert listed('["2"]') == listed("['2']") == "2" and listed("[1, 2]") == "[1, 2]"
    assert question([{"role": "user", "content": "1?"}]) == "1?" and question(None) == ""


def test_thoughts_and_what_runs_on():
    assert after_thinking("<think>a</think> b <think>c") == "b"
    assert after_thinking("[THINK]a[/THINK]b") == "b" and after_thinking("a</think>b") == "b"
    assert after_thinking("◁think▷a") == after_thinking("<think>a</think>") == ""
    assert before_next("Question: x\nThe answer is 5.\n\nQuestion: y") == (
        "Question: x\nThe answer is 5.\n"
    )
    same = "Problem: x\nThe question asks for two.\nProblem: y \\boxed{2}"
    assert before_next(same) == same
