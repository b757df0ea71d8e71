"""Competition mathematics: Qwen3-1.7B learns from Qwen3-8B on DAPO-Math-17k, watched on
AIME 2024.
"""

from __future__ import annotations

from typing import Any

# as the Qwen3 model cards ask
BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
# how these cards sample without thinking
NO_THINKING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def qwen3_math() -> dict[str, Any]:
    """Settings for one GPU with 80 GB; every one can be overridden.

    Plain sampling (temperature 1, nothing cut), responses of 4096 tokens and 128 rollouts per step
    as in EOPD (arXiv 2603.07079, table of settings); groups of 4 prompts' answers as in Tinker's
    recipe, so that methods that compare them work too; about 150 steps as in the blog "On-Policy
    Distillation" (Thinking Machines Lab, 2025). Learning rates are the usual ones, 1e-6 for all
    weights (verl, TIP) and 1e-4 with LoRA (Tinker, TRL). AIME is scored by the mean over 8 answers,
    as in EOPD. Both models run without thinking: data.enable_thinking=true and
    evaluate.data.enable_thinking=true, with a max_completion_length of 16384 or more, let them
    think.
    """
    reading = {"template": BOXED, "enable_thinking": False}
    return {
        "student": "Qwen/Qwen3-1.7B",
        "teacher": "Qwen/Qwen3-8B",
        "data": {
            "source": "open-r1/DAPO-Math-17k-Processed:en",
            "split": "train",
            "max_prompt_length": 1024,
            **reading,
        },
        "method": "opd",
        "output": "runs/qwen3_math",
        "reward": "math",
        "steps": 150,
        "prompts_per_step": 32,
        "sampling": {"num_generations": 4, "max_completion_length": 4096},
        "optim": {"warmup_steps": 5},
        "evaluate": {
            "data": {"source": "HuggingFaceH4/aime_2024", "split": "train", "limit": 30, **reading},
            "every": 50,
            "num_generations": 8,
            "ks": [1, 8],
            "sampling": {**NO_THINKING, "max_completion_length": 4096},
        },
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
