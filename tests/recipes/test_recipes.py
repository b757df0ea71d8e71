"""The recipes for real models: what a run of them asks, rewards and trains with; one is run on tiny
models.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from opdkit.cli import main
from opdkit.data import Prompts, load_rows
from opdkit.models.tokenizers import stop_ids
from opdkit.recipes import RECIPES, recipe
from opdkit.rewards import load_reward
from opdkit.run.settings import Data, Run, make_run
from opdkit.types import Rollout
from tests.common.tiny import save_tiny, tiny_model, tiny_tokenizer

SHARED = Path(__file__).parents[2] / "../shared/data"
LARGE = ("gsm8k", "qwen3_code", "qwen3_math")
QWEN3 = (  # the part of Qwen3's chat template that a question without tools takes
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' "
    "}}{%- if enable_thinking is defined and enable_thinking is false %}{{- "
    "'<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def made(name: str, *overrides: str) -> Run:
    return make_run(recipe(name), overrides)


def asked(data: Data, rows: list[dict[str, Any]]) -> list[str]:
    """The texts that a Qwen3 model reads."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = QWEN3
    columns = data.columns or None
    prompts = Prompts(
        load_rows(rows, columns=columns),
        tokenizer,
        template=data.template,
        enable_thinking=data.enable_thinking,
    )
    return [tokenizer.decode(p.tokens) for p in prompts]


@pytest.mark.parametrize("name", LARGE)
def test_learning_rates_follow_what_is_trained_and_sampling_is_plain(name: str) -> None:
    run = made(name)
    assert (run.learning_rate, made(name, "lora.r=32").learning_rate) == (1e-6, 1e-4)
    assert run.sampling.plain and run.sampling.num_generations == 4
    assert run.dtype == "bfloat16" and run.gradient_checkpointing
    assert run.evaluate is not None and run.evaluate.prompts.limit
    assert run.evaluate.prompts.enable_thinking is run.prompts.enable_thinking is False
    assert made(name, "evaluate=null").evaluate is None


def test_the_math_prompt() -> None:
    row = {
        "prompt": "What is $1+1$?",
        "solution": "2",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "data_source": "math_dapo",
    }
    (text,) = asked(made("qwen3_math").prompts, [row])
    question = (
        "What is $1+1$?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    start = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert text == start + "<think>\n\n</think>\n\n"
    assert asked(made("qwen3_math", "data.enable_thinking=true").prompts, [row]) == [start]


def test_the_code_prompts() -> None:
    row = {
        "task_id": 602,
        "text": "Write a python function to find the first repeated character in a given string.",
        "code": "def first_repeated_char(s):\n  for i, c in enumerate(s):\n    if c in "
        "s[:i]:\n      return c",
        "test_list": [
            'assert first_repeated_char("abcabc") == "a"',
            'assert first_repeated_char("abc") == None',
        ],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    (text,) = asked(made("qwen3_code").prompts, [row])
    assert "the first repeated character" in text and 'assert first_repeated_char("abcabc")' in text
    assert '("abc")' not in text  # what is not shown cannot be learnt by heart
    held_out = made("qwen3_code").evaluate
    assert held_out is not None
    (text,) = asked(
        held_out.prompts,
        [{"task_id": "HumanEval/0", "prompt": "def f(x):\n", "test": "", "entry_point": "f"}],
    )
    assert "```python\ndef f(x):\n```<|im_end|>" in text


def test_a_response_ends_at_either_of_qwen3s_ends() -> None:
    """The generation settings name two tokens: the end of a turn, and the end of a text."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [2, 5]
    assert stop_ids(model, tokenizer) == {tokenizer.eos_token_id, 5}


@pytest.mark.parametrize(
    ("name", "file", "answer"),
    [
        ("qwen3_math", "aime24.jsonl", "204"),
        ("qwen3_math", "amc23.jsonl", "27"),
        ("gsm8k", "gsm8k_test.jsonl", "18"),
    ],
)
def test_problems_are_read_and_rewarded(name: str, file: str, answer: str) -> None:
    if not (SHARED / file).exists():
        pytest.skip(f"{file} is not here")
    run = made(name, f"evaluate.data.source={SHARED / file}", "evaluate.data.split=null")
    assert run.evaluate is not None
    data, reward = run.evaluate.prompts, load_reward(run.reward)
    rows = load_rows(data.source, columns=data.columns)
    assert (
        reward is not None
        and rows[0]["answer"] == answer
        and (file != "aime24.jsonl" or len(rows) == data.limit)
    )
    assert "put your final answer within \\boxed{}" in asked(data, rows[:1])[0]

    def score(text: str) -> float:
        return reward(Rollout("r", [], [], [], [], [], "g", text=text, row=rows[0]))

    assert (
        score(f"So it is $\\boxed{{{answer}}}$.") == 1.0 and score("So it is $\\boxed{1}$.") == 0.0
    )


def test_human_eval_is_read_and_rewarded() -> None:
    file = SHARED / "HumanEval.jsonl.gz"
    if not file.exists():
        pytest.skip("HumanEval is not here")
    run = made("qwen3_code", f"evaluate.data.source={file}", "evaluate.data.split=null")
    assert run.evaluate is not None
    rows = load_rows(run.evaluate.prompts.source)
    assert len(rows) == run.evaluate.prompts.limit == 164
    first = json.loads(gzip.decompress(file.read_bytes()).splitlines()[0])
    assert first["prompt"].rstrip() in asked(run.evaluate.prompts, rows[:1])[0]
    reward = load_reward(run.reward)
    assert reward is not None
    right = f"Here it is:\n```python\n{first['prompt']}{first['canonical_solution']}```"
    wrong = right.replace("return True", "return False")
    scores = [
        reward(Rollout(f"r/{i}", [], [], [], [], [], "g", text=t, row=rows[0]))
        for i, t in enumerate((right, wrong))
    ]
    assert scores == [1.0, 0.0]


def test_every_recipe_resolves_and_says_the_same_again() -> None:
    for name in RECIPES:
        run = made(name)
        assert make_run(json.loads(json.dumps(recipe(name)))) == run
        if name in LARGE:
            assert run.folder == Path("runs") / name


def test_a_recipe_runs_on_tiny_models_with_adapters(tmp_path: Path) -> None:
    """Two steps of gsm8k: its prompts, its reward, its evaluation, bfloat16 and checkpointed
    layers, on models of two layers.
    """
    models = [
        save_tiny(tmp_path / name, seed=seed) for seed, name in enumerate(("student", "teacher"))
    ]
    rows = [
        {"question": f"What is {i} plus 30?", "answer": f"It is {i} + 30.\n#### {i + 30}"}
        for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = [
        "sampling.max_completion_length=6",
        "evaluate.sampling.max_completion_length=6",
        "num_generations=2",
        "prompts_per_step=2",
    ]
    local = [
        f"data={tmp_path / 'rows.jsonl'}",
        "data.split=null",
        f"evaluate.data.source={tmp_path / 'rows.jsonl'}",
    ]
    flags = [
        f"--student={models[0]}",
        f"--teacher={models[1]}",
        "--lora=4",
        f"--output={tmp_path / 'run'}",
        "steps=2",
    ]
    assert (
        main(["train", "--recipe=gsm8k", *flags, *local, "evaluate.data.split=null", *short]) == 0
    )
    metrics = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [m["step"] for m in metrics] == [1, 2] and all(m["learning_rate"] > 0 for m in metrics)
    evaluations = [
        json.loads(line) for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()
    ]
    assert [(e["step"], e["n_problems"]) for e in evaluations] == [(0, 4), (2, 4)]
    from transformers import AutoModelForCausalLM

    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").num_parameters()
        == tiny_model().num_parameters()
    )
