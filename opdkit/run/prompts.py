"""A run's questions: rows that are read, rows as prompts, and rollouts that a cache holds
already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opdkit.base.errors import UserError
from opdkit.curricula import Cached, Curriculum, curriculum_of, reads_cache, together
from opdkit.data import Prompts, load_rows
from opdkit.data.cache import Cache, CachedPrompts, is_cache, open_cache
from opdkit.environments import EnvironmentSettings
from opdkit.methods.method import Method
from opdkit.objective import algebra
from opdkit.run.episodes import asked, tasks
from opdkit.run.setting_rules import OWN_TASKS
from opdkit.run.settings import Data, Evaluate, Run
from opdkit.types import DataRow, Sampling


def as_run(method: Method, run: Run) -> Method:
    """The method, with its rollouts taken from a cache where the run says so, and with the run's
    own curriculum beside the method's.
    """
    if run.rollouts == "cache":
        method = _beside(method, Cached(), "rollouts=cache")
    if run.curriculum is None:
        return method
    chosen = curriculum_of(run.curriculum)
    return _beside(method, chosen, f"curriculum={chosen.kind}")


def _beside(method: Method, other: Curriculum, said: str) -> Method:
    """Another curriculum joined with the method's. Whose tokens its terms are about is said anew
    only where the other brings text that the method did not have.
    """
    joined = together.join(method.curriculum, other, (method.name or "own", said))
    new = set(other.authors) - set(method.curriculum.authors)
    return replace(method, curriculum=joined, settled=not new)


def stored_rollouts(run: Run, method: Method) -> Cache | None:
    """The cache that a method's rollouts are read from: the teacher's, or with a live teacher the
    data's.
    """
    if not reads_cache(method.curriculum):
        return None
    own = run.teachers.own_data
    source = run.prompts.source if own is None else own
    if own is None and not is_cache(source):
        raise UserError(
            f"method {method.name or 'own'!r} takes its rollouts from a folder that `opdkit "
            f"cache-teacher` wrote, and the data {source} are none: write one, then set "
            "teacher=cached:FOLDER and leave data out (or data=FOLDER, with a live teacher)"
        )
    return open_cache(source)


def sampled_as(run: Run, method: Method) -> Sampling:
    """How the rollouts that are learnt from are drawn, or were when they were stored."""
    stored = stored_rollouts(run, method)
    return run.sampling if stored is None else stored.origin.sampling


def evaluated_as(run: Run, evaluate: Evaluate) -> Sampling:
    """How answers to held-out problems are drawn."""
    return replace(evaluate.sampling or run.sampling, num_generations=evaluate.num_generations)


def within(run: Run, method: Method) -> Method:
    """The method with the run's own limit where it divides by one, which is told, and where its
    curriculum cuts responses.
    """
    limit = sampled_as(run, method).max_completion_length
    objective = algebra.within(method.objective, limit)
    if objective != method.objective:
        print(f"opdkit: what is minimised, with the run's limit: {objective}", file=sys.stderr)
    return replace(method, objective=objective, curriculum=method.curriculum.within(limit))


def read_rows(
    data: Data,
    rows: Sequence[DataRow] | None,
    seed: int,
    environment: EnvironmentSettings | None = None,
) -> list[DataRow]:
    """The rows of a data set, or those handed over; of an environment its own tasks, where the data
    say so.
    """
    if rows is None and data.source == OWN_TASKS:
        rows = tasks(environment)
    if environment is not None and rows is not None:
        rows = asked(rows)
    if rows is None and is_cache(data.source):
        return open_cache(data.source).rows[: data.limit]
    return load_rows(
        data.source if rows is None else rows,
        split=data.split,
        limit=data.limit,
        seed=seed,
        columns=data.columns or None,
    )


def make_prompts(data: Data, rows: list[DataRow], tokenizer: Any) -> Prompts:
    written: dict[str, Any] = {
        name: getattr(data, name) for name in ("template", "system", "chat", "enable_thinking")
    }
    if is_cache(data.source):
        prompts: Prompts = CachedPrompts(
            open_cache(data.source), rows, tokenizer, data.max_prompt_length, **written
        )
    else:
        prompts = Prompts(rows, tokenizer, max_prompt_length=data.max_prompt_length, **written)
    for note in prompts.notes:
        print(f"opdkit: {note}", file=sys.stderr)
    return prompts
