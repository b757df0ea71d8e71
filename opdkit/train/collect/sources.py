"""The responses of a step: the student's, its earlier ones, stored ones, or those of the data."""

from __future__ import annotations

from collections.abc import Mapping

from opdkit.base.errors import UserError
from opdkit.train.checkpoint import State
from opdkit.train.job import Job
from opdkit.types import Prompt, Rollout


def written(job: Job, state: State, total_steps: int, prompts: Mapping[str, int]) -> list[Rollout]:
    """The responses: the student's, guided by the curriculum, its earlier ones, stored ones, or
    those of the data.
    """
    step, batch = state.step, [job.prompts[i] for i in prompts.values()]
    source = job.curriculum.source(step, total_steps, job.seed, state.memory)
    if source == "data":
        return [
            given(job, prompt, prompts[prompt.id], f"{step}/{prompt.id}/given") for prompt in batch
        ]
    if source == "cache":
        assert job.stored is not None
        return [rollout for prompt in batch for rollout in job.stored.rollouts(prompt)]
    if source == "replay":
        return job.curriculum.replay(
            len(batch) * job.sampling.num_generations, step, job.seed, state.memory
        )

    def reference(prompt: Prompt) -> list[int] | None:
        return job.prompts.response_tokens(prompts[prompt.id])

    asks = job.curriculum.plan(batch, job.sampling, reference, step, total_steps, state.memory)
    version = job.student.updates
    rollouts = [
        rollout
        for ask in asks
        for rollout in job.sampler.sample(
            ask.prompts, ask.sampling, seed=job.seed, step=step, policy_version=version
        )
    ]
    state.tokens += sum(len(r.tokens) - sum(r.marks.get("guided", ())) for r in rollouts)
    return rollouts


def given(job: Job, prompt: Prompt, index: int, id: str) -> Rollout:
    """A response read from the data."""
    tokens = job.prompts.response_tokens(index)
    if not tokens:
        raise UserError(
            f"row {prompt.id} has no reference response, and the method reads a share of its "
            "responses from the data: add a column `response` (or `completion`, `solution`, "
            "assistant `messages`), or let the student write them all (lmbda=1)"
        )
    tokens = tokens[: job.sampling.max_completion_length]
    trained = [True] * len(tokens)
    text = str(prompt.row.get("response") or "")
    return Rollout(
        id,
        prompt.tokens,
        tokens,
        trained,
        [],
        [],
        prompt.id,
        finish="given",
        text=text,
        row=prompt.row,
    )
