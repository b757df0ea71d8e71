"""Grade-school mathematics: Qwen3-0.6B learns from Qwen3-4B on GSM8K."""

from __future__ import annotations

from typing import Any

from opdkit.recipes.qwen3_math import BOXED


def gsm8k() -> dict[str, Any]:
    """Settings for one GPU with 40 GB, or 24 GB with micro_batch_tokens=4096 or LoRA; every one can
    be overridden.

    Part of the test split is evaluated before, during and after, greedily. While training,
    temperature 1 and nothing cut, groups of 4 responses; learning rates are the usual ones, 1e-6
    for all weights and 1e-4 with LoRA. Both models run without thinking.
    """
    reading = {
        "columns": {"prompt": "question"},
        "template": BOXED,
        "enable_thinking": False,
        "max_prompt_length": 512,
    }
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
        "optim": {"warmup_steps": 5},
        "evaluate": {
            "data": {"source": "openai/gsm8k:main", "split": "test", "limit": 256, **reading},
            "every": 25,
            "sampling": {"temperature": 0.0, "max_completion_length": 512},
        },
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
