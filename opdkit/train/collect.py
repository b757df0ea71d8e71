"""A step's rollouts: planned by the curriculum, written by the student or read, scored, and replaced where they teach nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from opdkit.curricula.dapo import informative, shape_overlong
from opdkit.errors import UserError
from opdkit.rewards import score
from opdkit.train.checkpoint import State
from opdkit.train.job import Clock, Job
from opdkit.types import Prompt, Rollout

ROUNDS = 16  # of dynamic sampling, before it gives up


def collect(job: Job, state: State, clock: Clock) -> list[Rollout]:
    """The step's rollouts with their rewards and marks; counts the tokens that the student writes, also of rollouts it drops."""
    wanted, total_steps = min(job.prompts_per_step, len(job.prompts)), job.expected_steps(state)
    rollouts = _scored(job, state, clock, total_steps, wanted)
    if job.dynamic_sampling:
        rollouts = informative(rollouts)
        rounds = 1
        while (found := len({r.group for r in rollouts})) < wanted:
            if rounds == ROUNDS:
                raise UserError(
                    f"dynamic sampling found {found} prompts of {wanted} with both right and wrong responses in {rounds * wanted}: the "
                    "data is too easy or too hard for this student, or num_generations too small. Change one of them, or dynamic_sampling=false"
                )
            known = {r.group for r in rollouts}
            rollouts += [r for r in informative(_scored(job, state, clock, total_steps, wanted)) if r.group not in known]
            rounds += 1
        keep = list(dict.fromkeys(r.group for r in rollouts))[:wanted]
        rollouts = [r for r in rollouts if r.group in keep]
    if job.overlong_margin is not None:
        rollouts = shape_overlong(rollouts, job.sampling.max_completion_length, job.overlong_margin)
    if job.newlines:
        rollouts = [replace(r, marks={**r.marks, "newline": [t in job.newlines for t in r.tokens]}) for r in rollouts]
    return rollouts


def _scored(job: Job, state: State, clock: Clock, total_steps: int, count: int) -> list[Rollout]:
    """Rollouts of the next prompts, with rewards."""
    prompts = {job.prompts[i].id: i for i in job.stream.take(count)}
    with clock("sample"), job.student.autocast():
        rollouts = _written(job, state, total_steps, prompts)
    with clock("reward"):
        return rollouts if job.reward is None else score(rollouts, job.reward)


def _written(job: Job, state: State, total_steps: int, prompts: Mapping[str, int]) -> list[Rollout]:
    """The responses: the student's, guided by the curriculum, its earlier ones, stored ones, or those of the data."""
    step, batch = state.step, [job.prompts[i] for i in prompts.values()]
    source = job.curriculum.source(step, total_steps, job.seed, state.memory)
    if source == "data":
        return [given(job, prompt, prompts[prompt.id], f"{step}/{prompt.id}/given") for prompt in batch]
    if source == "cache":
        assert job.stored is not None
        return [rollout for prompt in batch for rollout in job.stored.rollouts(prompt)]
    if source == "replay":
        return job.curriculum.replay(len(batch) * job.sampling.num_generations, step, job.seed, state.memory)

    def reference(prompt: Prompt) -> list[int] | None:
        return job.prompts.response_tokens(prompts[prompt.id])

    asks = job.curriculum.plan(batch, job.sampling, reference, step, total_steps, state.memory)
    version = job.student.updates
    rollouts = [
        rollout
        for ask in asks
        for rollout in job.sampler.sample(ask.prompts, ask.sampling, seed=job.seed, step=step, policy_version=version)
    ]
    state.tokens += sum(len(r.tokens) - sum(r.marks.get("guided", ())) for r in rollouts)
    return rollouts


def given(job: Job, prompt: Prompt, index: int, id: str) -> Rollout:
    """A response read from the data."""
    tokens = job.prompts.response_tokens(index)
    if not tokens:
        raise UserError(
            f"row {prompt.id} has no reference response, and the method reads a share of its responses from the data: "
            "add a column `response` (or `completion`, `solution`, assistant `messages`), or let the student write them all (lmbda=1)"
        )
    tokens = tokens[: job.sampling.max_completion_length]
    trained = [True] * len(tokens)
    text = str(prompt.row.get("response") or "")
    return Rollout(id, prompt.tokens, tokens, trained, [], [], prompt.id, finish="given", text=text, row=prompt.row)
