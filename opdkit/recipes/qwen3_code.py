"""Short Python programs: Qwen3-1.7B learns from Qwen3-8B on MBPP, watched on HumanEval."""

from __future__ import annotations

from typing import Any

MBPP = (
    "{prompt}\nAnswer with the whole program in one ```python block. It must pass tests such as\n"
    "```python\n{test_list[0]}\n```"
)
HUMAN_EVAL = (
    "Complete this function. Answer with the whole function in one ```python block.\n```python\n"
    "{prompt}```"
)


def qwen3_code() -> dict[str, Any]:
    """Settings for one GPU with 80 GB; every one can be overridden.

    The prompt shows the first of MBPP's tests, since a program must know the function's name; the
    reward runs all of them. Programs of these sets take tens of lines, so 1024 tokens are enough
    without thinking. Learning rates are the usual ones, 1e-6 for all weights and 1e-4 with LoRA;
    temperature 1 and nothing cut while training; HumanEval greedily, one answer each. Rows in
    HumanEval's format instead: data=FILE data.split=null data.columns={} and data.template as that
    of evaluate.data.
    """
    reading = {"enable_thinking": False}
    return {
        "student": "Qwen/Qwen3-1.7B",
        "teacher": "Qwen/Qwen3-8B",
        "data": {
            "source": "google-research-datasets/mbpp:full",
            "split": "train",
            "columns": {"prompt": "text"},
            "template": MBPP,
            "max_prompt_length": 1024,
            **reading,
        },
        "method": "opd",
        "output": "runs/qwen3_code",
        "reward": "code",
        "steps": 100,
        "prompts_per_step": 32,
        "sampling": {"num_generations": 4, "max_completion_length": 1024},
        "optim": {"warmup_steps": 5},
        "evaluate": {
            "data": {
                "source": "openai/openai_humaneval",
                "split": "test",
                "limit": 164,
                "template": HUMAN_EVAL,
                **reading,
            },
            "every": 25,
            "sampling": {"temperature": 0.0, "max_completion_length": 1024},
        },
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
