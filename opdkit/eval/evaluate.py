"""Evaluate a model: sample answers, score them, and report means with intervals over problems."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdkit.base.errors import UserError
from opdkit.base.files import write_whole
from opdkit.eval.intervals import Interval
from opdkit.eval.stats import Estimate, estimate, pass_at_k, problem_means

if TYPE_CHECKING:
    from opdkit.types import Prompt, Rollout, Sampler, Sampling


@dataclass(frozen=True)
class EvalResult:
    """How a model did on a set of problems.

    Shares and rates lie in [0, 1]; lengths are in tokens.
    """

    name: str
    n_problems: int
    samples_per_problem: int
    avg_at_k: Estimate  # k = samples_per_problem
    pass_at_k: dict[int, Estimate]
    mean_length: float
    truncated_share: float  # of samples cut at max_completion_length
    reward_mean: float
    seconds: float  # sampling and scoring
    step: int  # optimiser steps the model had taken
    tokens: int  # sampled in all
    # share correct by problem id: lets two results be compared problem by problem
    per_problem: dict[str, float]
    # mean of each reward that has a name, over the samples that it applies to
    reward_means: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: an estimate is {"value", "low", "high"}."""
        flat = {f.name: getattr(self, f.name) for f in fields(self)}
        return flat | {
            "avg_at_k": _flat(self.avg_at_k),
            "pass_at_k": {str(k): _flat(value) for k, value in self.pass_at_k.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalResult:
        """The inverse of `to_dict`."""
        passes = {int(k): _estimate(value) for k, value in data["pass_at_k"].items()}
        return cls(**{**data, "avg_at_k": _estimate(data["avg_at_k"]), "pass_at_k": passes})


def _flat(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, **asdict(estimate.interval)}


def _estimate(data: Mapping[str, float]) -> Estimate:
    return Estimate(data["value"], Interval(data["low"], data["high"]))


def evaluate_model(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    reward: Callable[[Rollout], float] | None,
    sampling: Sampling,
    *,
    ks: Sequence[int] = (1,),
    seed: int = 0,
    name: str = "eval",
    step: int = 0,
    keep: Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> EvalResult:
    """Sample `sampling.num_generations` answers per prompt, score them, and give Avg@k and Pass@k
    with 95% intervals. reward: None where the sampler's rollouts come scored, as episodes do.

    `keep` is a JSONL file that gets every sample, readable by people. `progress` is handed to the
    sampler.
    """
    from opdkit.rewards import score
    from opdkit.types import reward_means

    n = sampling.num_generations
    _check(prompts, n, ks)
    if keep is not None:
        need_place(keep)
    start = time.perf_counter()
    rollouts = sampler.sample(prompts, sampling, seed=seed, step=step, progress=progress)
    rollouts = rollouts if reward is None else score(rollouts, reward)
    seconds = time.perf_counter() - start
    if keep is not None:
        write_samples(keep, rollouts)

    problems = _by_problem(prompts, rollouts, n)
    rewards = [r.reward for r in rollouts if r.reward is not None]
    means = problem_means(list(problems.values()))
    lengths = [r.length for r in rollouts]
    return EvalResult(
        name=name,
        n_problems=len(problems),
        samples_per_problem=n,
        avg_at_k=estimate(means, samples=n),
        pass_at_k={k: estimate([pass_at_k(n, sum(c), k) for c in problems.values()]) for k in ks},
        mean_length=sum(lengths) / len(lengths),
        truncated_share=sum(r.finish == "length" for r in rollouts) / len(rollouts),
        reward_mean=sum(rewards) / len(rewards),
        seconds=seconds,
        step=step,
        tokens=sum(lengths),
        per_problem=dict(zip(problems, means, strict=True)),
        reward_means=reward_means(rollouts),
    )


def drawn(sampling: Sampling, n: int) -> Sampling:
    """The settings with n samples per problem, which must be those they ask for, or tell apart."""
    if sampling.num_generations not in (1, n):
        raise UserError(
            f"evaluation: its sampling has num_generations={sampling.num_generations}, and the "
            f"number of samples per problem is given as {n}: leave num_generations out of the "
            "sampling, and set it beside"
        )
    if n > 1 and sampling.temperature == 0:
        raise UserError(
            f"evaluation: temperature=0 draws the same answer {n} times, which tells no more than "
            "one: set num_generations to 1 (and k), or a temperature above 0"
        )
    return replace(sampling, num_generations=n)


def _by_problem(
    prompts: Sequence[Prompt], rollouts: Sequence[Rollout], n: int
) -> dict[str, list[bool]]:
    """By the id of a problem: which of its n samples are correct."""
    problems: dict[str, list[bool]] = {p.question: [] for p in prompts}
    for r in rollouts:
        if r.question not in problems or r.reward is None or r.correct is None:
            raise RuntimeError(
                f"rollout {r.id!r} answers {r.question!r}, which was not asked, or has no reward"
            )
        problems[r.question].append(r.correct)
    short = [problem for problem, samples in problems.items() if len(samples) != n]
    if short:
        raise RuntimeError(
            f"the sampler gave {len(problems[short[0]])} instead of {n} samples of problem "
            f"{short[0]!r}"
        )
    return problems


def _check(prompts: Sequence[Prompt], n: int, ks: Sequence[int]) -> None:
    """Refuse before anything is sampled."""
    if not prompts:
        raise UserError(
            "There is nothing to evaluate: the data set has no prompts. Check its path, split and "
            "filters."
        )
    if len({p.id for p in prompts}) != len(prompts):
        raise UserError(
            "Two evaluation prompts have the same id, so their samples could not be told apart. "
            "Give each row an id of its own."
        )
    check_ks(n, ks)


def check_ks(n: int, ks: Sequence[int]) -> None:
    """Refuses a k of Pass@k that n samples cannot tell."""
    bad = [k for k in ks if not 1 <= k <= n]
    if bad:
        raise UserError(
            f"Pass@{bad[0]} cannot be estimated from {n} samples per problem. "
            f"Set num_generations to {max(max(bad), 1)} or more, or ask for k between 1 and {n}."
        )


def need_place(path: Path) -> None:
    """The folder of a file that is to be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give a file in a folder that can be made"
        ) from None


def write_samples(path: Path, rollouts: Sequence[Rollout]) -> None:
    """One JSON object per sample; the file appears whole or not at all."""
    need_place(path)
    lines = [
        {
            "id": r.id,
            "prompt": _readable(r.row.get("prompt")),
            "text": r.text,
            "answer": r.row.get("answer"),
            "reward": r.reward,
            **({"rewards": r.rewards} if r.rewards else {}),
            "correct": r.correct,
            "finish": r.finish,
            "n_tokens": len(r.tokens),
        }
        for r in rollouts
    ]
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    write_whole(path, text, errors="backslashreplace")


def _readable(prompt: Any) -> Any:
    """A prompt as text; messages as `role: content`, a paragraph each."""
    if isinstance(prompt, list):
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return prompt
