"""What a run refuses: before any model is loaded what cannot work, and then prompts that its
context does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from opdkit.base.errors import UserError, nearest
from opdkit.data import Prompts
from opdkit.methods.method import Method
from opdkit.models.limits import context_limit
from opdkit.objective.facts import LogpFact
from opdkit.rewards import Reward
from opdkit.run.open import INTERNAL
from opdkit.run.prompts import stored_rollouts
from opdkit.run.settings import Run
from opdkit.sampling.draws import check_sampling
from opdkit.teachers.base import reads_of
from opdkit.train.track import BACKENDS
from opdkit.types import Sampling


def refuse(run: Run, method: Method, reward: Reward | None) -> None:
    """What cannot work, before any model is loaded."""
    needs = method.needs
    for tracker in run.trackers:
        if tracker not in BACKENDS:
            raise UserError(f"there is no tracker {tracker!r}{nearest(tracker, list(BACKENDS))}")
    if reward is None and needs.columns & {"reward", "correct"}:
        raise UserError(
            f"method {method.name or 'own'!r} reads whether a response is right, and the run has "
            "no reward: set reward to math, code, exact, reasoning_gym, regex:PATTERN, judge:URL "
            "or file.py:function"
        )
    if reward is None and run.evaluate is not None:
        raise UserError(
            "the run evaluates on held-out problems and has no reward to score them with: set "
            "reward"
        )
    missing = needs.models - INTERNAL - {"teacher", "reference"} - set(run.models)
    if missing:
        name = sorted(missing)[0]
        raise UserError(
            f"method {method.name or 'own'!r} reads a model called {name!r}: say which with "
            f"models.{name}=MODEL"
        )
    unknown = needs.of("sampler") - {LogpFact("sampler")}
    if unknown:
        words = ", ".join(sorted(fact.words() for fact in unknown))
        raise UserError(
            f"method {method.name or 'own'!r} reads {words}: of the sampler only the log-probs of "
            "its own tokens are recorded. Read the student instead"
        )
    run.teachers.refuse(method.name or "own", needs)
    local = run.teachers.opens_local_model
    if run.evaluate is not None and run.evaluate.teacher and not local:
        raise UserError(
            "evaluate.teacher=true samples from the teacher, which must run in this process for "
            "that: set it to false, and evaluate the teacher where it runs"
        )
    if method.teacher_mix and not local:
        raise UserError(
            f"method {method.name or 'own'!r} draws tokens from a mixture of teacher and student: "
            "the teacher must run in this process (teacher=MODEL)"
        )
    if method.teacher_mix and not run.sampler_settings.on_student:
        raise UserError(
            f"method {method.name or 'own'!r} draws tokens from a mixture of teacher and student, "
            "token by token: set sampler=hf"
        )
    check_sampling(run.sampling)
    stored = stored_rollouts(run, method)
    sampling = run.sampling if stored is None else stored.origin.sampling
    if not sampling.plain and not run.correct_sampling and "sampler" in needs.models:
        print(
            "opdkit: tokens are not drawn from the plain softmax (temperature, top_p, top_k or "
            "min_p), so sampled-token estimators are biased by log(drawn/plain), logged as "
            "sampling/log_ratio. correct_sampling=true takes ratios to what was drawn from.",
            file=sys.stderr,
        )


def refuse_long(
    prompts: Prompts, model: Any, sampling: Sampling, others: Mapping[str, Any] | None = None
) -> int:
    """Tokens of the longest rollout there can be.

    It must fit the context of the model, and of every other that is to read it (`others`, scorers
    by name): a longer prompt would be cut or answered blindly.
    """
    longest = max(prompts, key=lambda p: len(p.tokens))
    limits = {"model": context_limit(model.config)}
    limits |= {name: reads_of(scorer) for name, scorer in (others or {}).items()}
    for name, limit in limits.items():
        if limit is None or len(longest.tokens) <= (room := limit - sampling.max_completion_length):
            continue
        raise UserError(
            f"prompt {longest.id} has {len(longest.tokens)} tokens; with "
            f"max_completion_length={sampling.max_completion_length} only {room} fit the {name}'s "
            f"context of {limit}. Set data.max_prompt_length={max(room, 0)} to drop longer "
            "prompts, or lower max_completion_length"
        )
    return len(longest.tokens) + sampling.max_completion_length
