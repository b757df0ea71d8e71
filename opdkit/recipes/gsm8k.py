"""Grade-school mathematics: Qwen3-0.6B learns from Qwen3-4B on GSM8K."""

from __future__ import annotations

from typing import Any


def gsm8k() -> dict[str, Any]:
    """Settings for one GPU with 80 GiB; every one can be overridden. The test split is evaluated before, during and after."""
    template = "{prompt}\nReason step by step, and put your final answer within \\boxed{{}}."
    reading = {"columns": {"prompt": "question"}, "template": template, "enable_thinking": False}
    return {
        "student": "Qwen/Qwen3-0.6B",
        "teacher": "Qwen/Qwen3-4B",
        "data": {"source": "openai/gsm8k:main", "split": "train", **reading},
        "method": "opd",
        "output": "runs/gsm8k",
        "reward": "math",
        "steps": 100,
        "prompts_per_step": 64,
        "sampling": {"num_generations": 4, "max_completion_length": 512},
        "optim": {"learning_rate": 1e-5, "warmup_steps": 5},
        "evaluate": {
            "data": {"source": "openai/gsm8k:main", "split": "test", "limit": 256, **reading},
            "every": 25,
            "teacher": True,
        },
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
