"""An evaluation's numbers from a sampler whose answers are known."""

import json
from dataclasses import replace

import pytest

from opdkit.base.errors import UserError
from opdkit.eval import EvalResult, evaluate_model
from opdkit.types import Prompt, Rollout, Sampling

PROMPTS = [
    Prompt("a", [1], {"prompt": "2 + 2?", "answer": "4"}),
    Prompt(
        "b",
        [2],
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "3 + 3?"},
            ],
            "answer": "6",
        },
    ),
]
ANSWERS = {"a": ["4", "5", "5", "5"], "b": ["6", "6", "6 \ud83d", "cut"]}


class Scripted:
    """Writes `ANSWERS`, problems interleaved; notes what it was asked."""

    def __init__(self):
        self.asked = []

    def sample(self, prompts, sampling, *, seed, step, progress):
        self.asked.append((len(prompts), sampling.num_generations, seed, step))
        return [
            Rollout(
                id=f"{p.id}/{i}",
                prompt=p.tokens,
                tokens=list(range(i + 1)),
                trained=[True] * (i + 1),
                logp=[-1.0] * (i + 1),
                drawn_logp=[-1.0] * (i + 1),
                group=p.id,
                finish="length" if ANSWERS[p.id][i] == "cut" else "stop",
                text=ANSWERS[p.id][i],
                row=p.row,
            )
            for i in range(sampling.num_generations)
            for p in prompts
        ]


def reward(rollout):
    return float(rollout.text.startswith(rollout.row["answer"]))


def run(sampler=None, prompts=PROMPTS, **settings):
    return evaluate_model(
        sampler or Scripted(), prompts, reward, Sampling(num_generations=4), **settings
    )


def test_numbers_of_an_evaluation():
    sampler = Scripted()
    result = run(sampler, ks=(1, 2), seed=7, name="student", step=30)
    assert sampler.asked == [(2, 4, 7, 30)]
    assert result.per_problem == {"a": 0.25, "b": 0.75}
    assert result.avg_at_k.value == result.pass_at_k[1].value == result.reward_mean == 0.5
    # (1/2 + 1) / 2: one right of four, then three right of four
    assert result.pass_at_k[2].value == 0.75
    # two problems: either may come twice
    assert (result.avg_at_k.interval.low, result.avg_at_k.interval.high) == (0.25, 0.75)
    assert (result.n_problems, result.samples_per_problem, result.step, result.name) == (
        2,
        4,
        30,
        "student",
    )
    assert result.tokens == 2 * (1 + 2 + 3 + 4)
    assert result.mean_length == 2.5
    assert result.truncated_share == 1 / 8
    assert result.seconds > 0


def test_a_result_survives_json():
    result = run(ks=(1, 4))
    assert EvalResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_samples_are_kept_for_people(tmp_path):
    path = tmp_path / "evals" / "step_000030.jsonl"
    run(keep=path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {
        "id": "a/0",
        "prompt": "2 + 2?",
        "text": "4",
        "answer": "4",
        "reward": 1.0,
        "correct": True,
        "finish": "stop",
        "n_tokens": 1,
    }
    assert lines[1]["prompt"] == "system: Be brief.\n\nuser: 3 + 3?"
    # half a character, as a byte-level tokenizer may leave it
    assert lines[5]["text"] == "6 \ud83d"
    assert lines[7]["finish"] == "length"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no partial file left


def test_impossible_requests_are_refused_before_sampling():
    sampler = Scripted()
    for prompts, ks, message in [
        (PROMPTS, (8,), "Set num_generations to 8"),
        ([], (1,), "no prompts"),
        ([PROMPTS[0], PROMPTS[0]], (1,), "same id"),
    ]:
        with pytest.raises(UserError, match=message):
            run(sampler, prompts, ks=ks)
    assert sampler.asked == []


def test_lost_and_foreign_samples_stop_the_evaluation():
    class Losing(Scripted):
        def sample(self, *args, **settings):
            return super().sample(*args, **settings)[:-1]

    class Foreign(Scripted):
        def sample(self, *args, **settings):
            return [replace(r, question="elsewhere") for r in super().sample(*args, **settings)]

    with pytest.raises(RuntimeError, match="3 instead of 4 samples of problem 'b'"):
        run(Losing())
    with pytest.raises(RuntimeError, match="which was not asked"):
        run(Foreign())
