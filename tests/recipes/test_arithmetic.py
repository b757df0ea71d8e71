"""The quickstart's recipe: the written sums are right, the evaluation set is kept apart, and
training starts as it should.
"""

import random
import re
from itertools import pairwise

import pytest
import torch

from opdkit.base.errors import UserError
from opdkit.recipes import arithmetic, quickstart
from opdkit.rewards import load_reward
from opdkit.types import Rollout

COLUMN = re.compile(r"(\d)\+(\d)\+([01])=(\d+)")


def check_sum(row):
    """Every column adds up and starts with the carry of the one before; returns whether the written
    result is the sum.
    """
    a, b = re.fullmatch(r"(\d+)\+(\d+)=", row["prompt"]).groups()
    *lines, result = row["response"].split("\n")
    carry, digits = 0, ""
    for place, line in enumerate(lines, 1):
        x, y, c, total = map(int, COLUMN.fullmatch(line).groups())
        assert (str(x), str(y), c) == (a[-place], b[-place], carry)
        assert x + y + c == total
        carry = total // 10
        digits = (str(total) if place == len(lines) else str(total % 10)) + digits
    assert len(lines) == len(a) == len(b) == arithmetic.DIGITS
    assert result == "=" + digits
    assert row["answer"] == str(int(a) + int(b))
    return digits == row["answer"]


def rollout(text, answer):
    return Rollout("r", [], [], [], [], [], group="g", text=text, row={"answer": answer})


@pytest.mark.parametrize("held", [False, True])
def test_every_written_sum_is_right(held):
    rows = arithmetic.problems(1000, seed=3, held=held)
    assert all(check_sum(row) for row in rows)
    assert {len(row["answer"]) for row in rows} == {4, 5}
    assert {len(row["response"]) for row in rows} <= set(range(36, 46))


def test_a_worked_example():
    assert (
        arithmetic.written(4738, 2965, random.Random(0))
        == "8+5+0=13\n3+6+1=10\n7+9+1=17\n4+2+1=7\n=7703"
    )
    # all carries forgotten: 8+5, 3+6, 7+9 and 4+2 stand alone
    assert (
        arithmetic.written(4738, 2965, random.Random(0), forget=1.0)
        == "8+5+0=13\n3+6+0=9\n7+9+0=16\n4+2+0=6\n=6693"
    )


def test_a_careless_pupil_forgets_at_its_rate():
    rows = arithmetic.problems(2000, seed=1, forget=0.7)
    due = kept = 0
    for row in rows:
        columns = [list(map(int, c)) for c in COLUMN.findall(row["response"])]
        for before, after in pairwise(columns):
            due += before[3] > 9
            kept += after[2]
        assert all(x + y + c == total for x, y, c, total in columns)
    assert due > 2000
    # 3 standard deviations of a mean over 2000 draws
    assert kept / due == pytest.approx(0.3, abs=0.03)


def test_held_out_problems_are_never_trained_on():
    train = {
        frozenset(row["prompt"][:-1].split("+"))
        for seed in range(4)
        for row in arithmetic.problems(2000, seed)
    }
    held = {
        frozenset(row["prompt"][:-1].split("+"))
        for seed in range(4)
        for row in arithmetic.problems(2000, seed, held=True)
    }
    assert not train & held
    assert all(
        arithmetic.held_out(a, b) == arithmetic.held_out(b, a)
        for a, b in [(1234, 5678), (9999, 1000)]
    )
    share = (
        sum(arithmetic.held_out(a, b) for a in range(1000, 1100) for b in range(5000, 5100))
        / 10_000
    )
    assert share == pytest.approx(1 / arithmetic.HELD_OUT, abs=0.01)


def test_problems_follow_their_seed():
    assert arithmetic.problems(50, 7) == arithmetic.problems(50, 7)
    assert arithmetic.problems(50, 7) != arithmetic.problems(50, 8)
    assert arithmetic.problems(50, 7) == arithmetic.problems(80, 7)[:50]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8+5+0=13\n3+6+1=10\n7+9+1=17\n4+2+1=7\n=7703", 1.0),
        ("=7703\n", 1.0),
        ("8+5+0=13\n=7704", 0.0),
        ("=7703\n=7704", 0.0),
        ("=77030", 0.0),
        ("=770", 0.0),
        ("7703", 0.0),
        ("=", 0.0),
        ("", 0.0),
    ],
)
def test_reward_reads_what_follows_the_last_equals_sign(text, expected):
    reward = load_reward(quickstart.REWARD)
    assert reward is not None and reward(rollout(text, "7703")) == expected


def test_tokenizer_round_trips_and_survives_a_save(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = arithmetic.tokenizer()
    row = arithmetic.problems(1, 0)[0]
    text = row["prompt"] + row["response"]
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == ids
    assert again.decode(ids) == text
    assert again.eos_token == "<eos>"


def test_a_token_is_the_longest_word_that_matches_and_what_is_no_word_is_dropped():
    plain = arithmetic.tokenizer()
    assert plain.decode(plain("1 + a2=\n").input_ids) == "1+2=\n"
    assert plain("?").input_ids == []
    words = arithmetic.tokenizer(["it", "item", ".", "+"])
    assert words.tokenize("item, it. items+") == ["item", "it", ".", "item", "+"]


def test_labels_are_the_response_and_its_end():
    tokenizer = arithmetic.tokenizer()
    rows = [{"prompt": "1+2=", "response": "=3"}, {"prompt": "8+5=", "response": "=13"}]
    ids, labels = arithmetic.collate(rows, tokenizer)
    assert tokenizer.batch_decode(ids) == ["1+2==3<eos><pad>", "8+5==13<eos>"]
    kept = [[i for i in row if i != arithmetic.IGNORED] for row in labels.tolist()]
    assert tokenizer.batch_decode(kept) == ["=3<eos>", "=13<eos>"]
    assert torch.equal(ids[labels != arithmetic.IGNORED], labels[labels != arithmetic.IGNORED])


def test_models_follow_their_seed_and_the_student_is_smaller():
    teacher, student = (arithmetic.model(size, 16, seed=0) for size in ("teacher", "student"))
    assert teacher.num_parameters() == 855_424
    assert student.num_parameters() < teacher.num_parameters() / 2
    before = torch.random.get_rng_state()
    again, other = arithmetic.model("student", 16, seed=0), arithmetic.model("student", 16, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(again.lm_head.weight, student.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, student.lm_head.weight)
    with pytest.raises(UserError, match="'teacher' or 'student'"):
        arithmetic.model("large", 16, seed=0)


def test_pretraining_lowers_the_loss_and_repeats_exactly():
    tokenizer = arithmetic.tokenizer()
    rows = arithmetic.problems(96, 0)
    runs, seen = [], []
    for _ in range(2):
        model = arithmetic.model("student", len(tokenizer), seed=0)
        losses = arithmetic.pretrain(
            model,
            tokenizer,
            rows,
            steps=12,
            batch_size=16,
            learning_rate=6e-3,
            progress=lambda *tick: seen.append(tick),
        )
        runs.append((losses, model.lm_head.weight.detach().clone()))
    (losses, weight), (repeated, same_weight) = runs
    assert losses == repeated
    assert torch.equal(weight, same_weight)
    assert seen == 2 * [(step, loss) for step, loss in enumerate(losses, 1)]
    assert losses[-1] < 0.7 * losses[0]
    assert not model.training
