"""Ranges of a run's own settings."""

from __future__ import annotations

from opdkit.base.rules import Rules, at_least, optional

SEEDS = 2**32  # generators of random numbers take seeds below it
DTYPES = ("float32", "bfloat16", "float64")
NAMED = (bool, "a name that is not empty", "it says what is read")


def _writable(name: str) -> bool:
    """Whether a text can be the name of a folder."""
    return bool(name.strip()) and "\0" not in name


RUN: Rules = {
    "student": NAMED,
    "output": (_writable, "the name of a folder", "the run is written into it"),
    "steps": (at_least(1), "at least 1", "a run without a step trains nothing"),
    "max_tokens": (
        optional(at_least(1)),
        "at least 1, or null for no limit",
        "the run ends with the step by which the student has written so many",
    ),
    "prompts_per_step": (at_least(1), "at least 1", "a step without a prompt trains nothing"),
    "rollouts": (
        lambda who: who in ("student", "cache"),
        "student or cache",
        "it says who has written them",
    ),
    "overlong_margin": (
        optional(at_least(1)),
        "at least 1, or null for no penalty",
        "it is the number of tokens before the limit over which the reward falls by 1",
    ),
    "dtype": (
        lambda dtype: dtype in DTYPES,
        "float32, bfloat16 or float64",
        "the student computes in it, and in others its gradients vanish or overflow",
    ),
    "teacher_dtype": (
        lambda dtype: dtype is None or dtype in DTYPES,
        "float32, bfloat16 or float64, or null for the student's",
        "the teacher computes in it",
    ),
    "device": (
        lambda device: bool(device) and device.partition(":")[0] != "meta",
        "auto, cpu, cuda or cuda:N",
        "models are kept and computed there",
    ),
    "micro_batch_tokens": (
        optional(at_least(1)),
        "at least 1, or null for what suits the device",
        "it is the size of one forward pass",
    ),
    "keep_samples": (at_least(0), "at least 0", "it is a number of rollouts"),
    "sample_every": (at_least(0), "at least 0 (0: never)", "it is a number of steps"),
    "term_gradients_every": (at_least(0), "at least 0 (0: never)", "it is a number of steps"),
    "seed": (
        lambda seed: 0 <= seed < SEEDS,
        "between 0 and 2^32 - 1",
        "generators of random numbers take no other",
    ),
}
DATA: Rules = {
    "source": NAMED,
    "limit": (
        optional(at_least(1)),
        "at least 1, or null for all rows",
        "without a row there is nothing to learn from",
    ),
    "max_prompt_length": (
        optional(at_least(1)),
        "at least 1, or null for no limit",
        "every prompt would be dropped",
    ),
}
EVALUATE: Rules = {
    "every": (at_least(0), "at least 0 (0: only before and after)", "it is a number of steps"),
    "num_generations": (at_least(1), "at least 1", "it is the number of answers to each problem"),
    "ks": (
        lambda ks: len(ks) > 0 and min(ks) >= 1,
        "at least one number, none below 1",
        "each is the k of a Pass@k",
    ),
}
