"""What a run refuses: before any model is loaded what cannot work, and then prompts that its
context does not hold.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from opdkit.base.errors import UserError, nearest
from opdkit.data import Prompts
from opdkit.methods.method import Method
from opdkit.objective.facts import LogpFact
from opdkit.rewards import Reward
from opdkit.run.open import INTERNAL
from opdkit.run.prompts import stored_rollouts
from opdkit.run.settings import Run
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
    _refuse_without_reward(run, reward)
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
    stored = stored_rollouts(run, method)
    sampling = run.sampling if stored is None else stored.origin.sampling
    if not sampling.plain and not run.correct_sampling and "sampler" in needs.models:
        print(
            "opdkit: tokens are not drawn from the plain softmax (temperature, top_p, top_k or "
            "min_p), so sampled-token estimators are biased by log(drawn/plain), logged as "
            "sampling/log_ratio. correct_sampling=true takes ratios to what was drawn from.",
            file=sys.stderr,
        )


def _refuse_without_reward(run: Run, reward: Reward | None) -> None:
    """What changes rewards or chooses by them needs some."""
    if run.overlong_margin is not None:
        if reward is None:
            raise UserError(
                f"overlong_margin={run.overlong_margin} lowers the rewards of long responses, and "
                "the run has no reward: set reward, or leave overlong_margin out"
            )
        if run.overlong_margin > run.sampling.max_completion_length:
            raise UserError(
                f"overlong_margin={run.overlong_margin} is more than max_completion_length="
                f"{run.sampling.max_completion_length}, so that even an empty response would lose "
                "reward: lower it (DAPO has a margin of a fifth of the limit)"
            )
    if run.dynamic_sampling and reward is None:
        raise UserError(
            "dynamic_sampling=true replaces prompts whose responses are all right or all wrong, "
            "and the run has no reward that says so: set reward, or dynamic_sampling=false"
        )
    drawn = run.evaluate and (run.evaluate.sampling or run.sampling)
    if run.evaluate and drawn and drawn.temperature == 0 and run.evaluate.num_generations > 1:
        raise UserError(
            f"the evaluation asks for num_generations={run.evaluate.num_generations} answers at "
            "temperature 0, which are all the same answer, so Pass@k would say nothing: set "
            "evaluate.num_generations=1, or evaluate.sampling.temperature above 0"
        )


def refuse_long(prompts: Prompts, model: Any, sampling: Sampling) -> int:
    """Tokens of the longest rollout there can be.

    It must fit the model's context: a longer prompt would be cut or answered blindly.
    """
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    room = limit - sampling.max_completion_length
    longest = max(prompts, key=lambda p: len(p.tokens))
    if len(longest.tokens) > room:
        raise UserError(
            f"prompt {longest.id} has {len(longest.tokens)} tokens; with "
            f"max_completion_length={sampling.max_completion_length} only {room} fit the model's "
            f"context of {limit}. Set data.max_prompt_length={max(room, 0)} to drop longer "
            "prompts, or lower max_completion_length"
        )
    return len(longest.tokens) + sampling.max_completion_length


def refuse_short(name: str, scorer: Any, longest: int) -> None:
    """A model in this process that scores rollouts of `longest` tokens must hold them."""
    for part in getattr(scorer, "teachers", {"": scorer}).values():
        config = getattr(getattr(part, "model", None), "config", None)
        limit = getattr(config, "max_position_embeddings", None) or math.inf
        if longest > limit:
            raise UserError(
                f"the {name}'s context of {limit} tokens does not hold the longest rollout, prompt "
                f"and response of {longest} tokens: its log-probs behind that would be of "
                f"positions it was never trained on. Lower max_completion_length by "
                f"{longest - limit}, set data.max_prompt_length, or use another {name}"
            )
