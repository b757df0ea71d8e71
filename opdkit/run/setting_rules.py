"""What the plain settings of a run must be, and why."""

from __future__ import annotations

from opdkit.base.rules import Rules, at_least
from opdkit.models.load import ATTENTION

NAMED = (lambda name: bool(name.strip()), "a name that is not empty", "it says what is read")
DATA: Rules = {
    "source": NAMED,
    "limit": at_least(1, "it is how many of the first rows are read", null="all"),
    "max_prompt_length": at_least(
        1, "prompts of more tokens are dropped, and a shorter one there is none", null="no limit"
    ),
}
EVALUATE: Rules = {
    "every": at_least(
        0, "it is the number of steps between two evaluations; 0 has them before and after the run"
    ),
    "num_generations": at_least(1, "it is the number of answers to each problem"),
    "ks": (lambda ks: len(ks) > 0, "at least one number", "each is the k of a Pass@k"),
}
AUTO = "auto"  # decided as the run begins
DTYPES = ("float32", "bfloat16", "float64")
WRITERS = ("student", "cache")
OWN_TASKS = "environment"  # the data of a run whose environment makes its own tasks
RUN: Rules = {
    "student": NAMED,
    "output": (
        lambda name: bool(name.strip()) and "\0" not in name,
        "the name of a folder",
        "the run is written into it",
    ),
    "teacher_dtype": (
        lambda dtype: dtype is None or dtype in DTYPES,
        f"one of {', '.join(DTYPES)}, or null for the student's",
        "the teacher computes in it",
    ),
    "device": (
        lambda device: bool(device) and device.partition(":")[0] != "meta",
        "auto, cpu, cuda or cuda:N",
        "models are kept and computed there",
    ),
    "seed": (
        lambda seed: 0 <= seed < 2**32,
        "between 0 and 2^32 - 1",
        "generators of random numbers take no other",
    ),
    "steps": at_least(1, "without a step nothing is learnt"),
    "max_tokens": at_least(1, "the run ends once the student has written so many", null="no limit"),
    "prompts_per_step": at_least(1, "without a prompt nothing is learnt"),
    "ahead": at_least(
        0, "it is the steps by which rollouts are asked for before they are learnt from; 0 for none"
    ),
    "micro_batch_tokens": at_least(
        1, "it is the tokens of one forward pass", null="what the device has room for"
    ),
    "overlong_margin": at_least(
        1, "it is the tokens over which the reward falls by 1", null="no penalty"
    ),
    "token_budget": (
        lambda budget: all(type(n) is int and n >= 1 for n in budget.values()),
        "whole numbers from 1 on by domain",
        "each is the tokens that a step learns from",
    ),
    "domain": NAMED,
    "keep_samples": at_least(0, "it is how many rollouts are kept of a recorded step; 0 for none"),
    "sample_every": at_least(0, "it is the number of steps between recorded rollouts; 0 for none"),
    "term_gradients_every": at_least(
        0, "it is the number of steps between two measurements; 0 for none"
    ),
    "dtype": (
        lambda dtype: dtype in (AUTO, *DTYPES),
        f"one of {AUTO}, {', '.join(DTYPES)}",
        "it is that of the student's matrix products",
    ),
    "head_dtype": (
        lambda dtype: dtype in (None, "float32"),
        "float32, or null for that of the other products",
        "it is that of the heads' products",
    ),
    "attn_implementation": (
        lambda attention: attention in (None, *ATTENTION),
        f"one of {', '.join(ATTENTION)}, or null for the usual one",
        "it is how models in this process compute attention",
    ),
    "rollouts": (
        lambda writer: writer in WRITERS,
        f"one of {', '.join(WRITERS)}",
        "it says who writes the rollouts",
    ),
}
