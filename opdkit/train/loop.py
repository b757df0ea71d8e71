"""The loop: plan, sample, reward, gather facts, weigh, learn per micro-batch, step, sync, observe, record. It knows no method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from opdkit.curricula import Ask, Curriculum, Plain
from opdkit.errors import UserError
from opdkit.facts import Needs
from opdkit.forward import Layout
from opdkit.head import flat_positions, learn
from opdkit.maths import keyed_uniform
from opdkit.objective import Objective, Plan
from opdkit.rewards import Reward, score
from opdkit.teachers import Scorer
from opdkit.train import checkpoint as checkpoints
from opdkit.train.checkpoint import State
from opdkit.train.gather import gather, refresh
from opdkit.train.record import Recorder, StepRecord
from opdkit.train.settings import Checkpoint, Optim
from opdkit.train.student import Student
from opdkit.types import Batch, Prompt, Rollout, Sampling


class Sampler(Protocol):
    """Who writes the responses."""

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int, policy_version: int
    ) -> list[Rollout]: ...

    def sync(self, model: Any, version: int) -> None:
        """Take over the student's weights after an optimiser step."""
        ...


class Questions(Protocol):
    """The prompts of a data set (see `data.Prompts`)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Prompt: ...
    def response_tokens(self, index: int) -> list[int] | None: ...


@dataclass
class Job:
    """A run with everything built: what `run.prepare` hands to `train`."""

    objective: Objective
    needs: Needs
    student: Student
    sampler: Sampler
    scorers: Mapping[str, Scorer]  # "student" as it is now, and every model the objective reads
    prompts: Questions
    stream: Any  # data.PromptStream
    sampling: Sampling
    folder: Path
    tokenizer: Any
    recorder: Recorder
    steps: int
    prompts_per_step: int
    optim: Optim
    checkpoint: Checkpoint
    micro_batch_tokens: int
    seed: int = 0
    reward: Reward | None = None
    curriculum: Curriculum | None = None
    student_share: float = 1.0
    recompute_student: bool = False
    correct_sampling: bool = False
    newlines: frozenset[int] = frozenset()  # tokens whose text ends a line, where the objective reads their mark
    evaluate: Callable[[int], float] | None = None  # step -> score
    evaluate_every: int = 0


def train(job: Job, state: State) -> State:
    """From `state` to the last step. An error leaves the last complete step saved: nothing is lost but the step it happened in."""
    job.stream.load(state.stream or job.stream.state())
    if job.evaluate is not None and state.step == 0:
        _evaluate(job, state)
    while state.step < job.steps:
        before = replace(state, stream=job.stream.state())
        moved = job.student.updates
        try:
            _step(job, state)
        except (Exception, KeyboardInterrupt):
            if job.student.updates == moved and before.step > 0:  # the weights are still those of the step before
                job.student.optimiser.zero_grad(set_to_none=True)
                checkpoints.save(job.folder, before, job.student, job.tokenizer)
            raise
        last = state.step == job.steps
        if job.evaluate is not None and (last or (job.evaluate_every and state.step % job.evaluate_every == 0)):
            _evaluate(job, state)
        if last or (job.checkpoint.every and state.step % job.checkpoint.every == 0):
            checkpoints.save(job.folder, state, job.student, job.tokenizer)
            checkpoints.prune(job.folder, job.checkpoint.keep, state.best_step)
    return state


def _step(job: Job, state: State) -> None:
    """One step: a batch of rollouts, and every optimiser step on it."""
    clock = Clock(job.student.device)
    student, step = job.student, state.step

    chosen = job.stream.take(min(job.prompts_per_step, len(job.prompts)))  # plan
    prompts = {job.prompts[i].id: i for i in chosen}
    with clock("sample"), student.autocast():  # sample
        rollouts = _rollouts(job, state, prompts)
    if job.newlines:
        rollouts = [replace(r, marks={**r.marks, "newline": [t in job.newlines for t in r.tokens]}) for r in rollouts]
    with clock("reward"):  # reward
        if job.reward is not None:
            rollouts = score(rollouts, job.reward)
    with clock("score"), student.autocast():  # gather facts
        batch = gather(
            rollouts,
            job.needs,
            job.scorers,
            step=step,
            total_steps=job.steps,
            seed=job.seed,
            memory=state.memory,
            recompute_student=job.recompute_student,
            correct_sampling=job.correct_sampling,
            device=student.device,
            dtype=torch.promote_types(torch.float32, student.parameters[0].dtype),
        )
    record = StepRecord(job.objective.names)
    with clock("learn"):
        for number, rows in enumerate(_optimiser_steps(job, rollouts, step)):
            if number and job.needs.of("live"):
                refresh(batch, job.needs, job.scorers, rollouts)
            plan = job.objective.plan(batch, rows)  # weigh
            _learn(job, plan, rollouts, record)  # learn per micro-batch, step
    job.sampler.sync(student.model, student.updates)  # sync

    if job.curriculum is not None:  # observe
        state.memory = job.curriculum.observe(rollouts, state.memory)
    state.step += 1
    state.stream = job.stream.state()
    state.tokens += sum(len(r.tokens) for r in rollouts)
    job.recorder.step(state.step, state.tokens, rollouts, batch, record, clock.seconds, student)  # record


def _rollouts(job: Job, state: State, prompts: Mapping[str, int]) -> list[Rollout]:
    """The step's responses: the student's, guided by the curriculum, or read from the data."""
    step, batch = state.step, [job.prompts[i] for i in prompts.values()]
    coin = keyed_uniform(job.seed, step, "who writes", torch.zeros(1, dtype=torch.int64), 1, torch.float64).item()
    if coin >= job.student_share:
        return [_given(job, prompt, prompts[prompt.id], step) for prompt in batch]

    def reference(prompt: Prompt) -> list[int] | None:
        return job.prompts.response_tokens(prompts[prompt.id])

    curriculum = job.curriculum or Plain()
    asks: list[Ask] = curriculum.plan(batch, job.sampling, reference, step, job.steps, state.memory)
    version = job.student.updates
    return [
        rollout
        for ask in asks
        for rollout in job.sampler.sample(ask.prompts, ask.sampling, seed=job.seed, step=step, policy_version=version)
    ]


def _given(job: Job, prompt: Prompt, index: int, step: int) -> Rollout:
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
    return Rollout(
        f"{step}/{prompt.id}/given", prompt.tokens, tokens, trained, [], [], prompt.id, finish="given", text=text, row=prompt.row
    )


def _optimiser_steps(job: Job, rollouts: Sequence[Rollout], step: int) -> Iterator[Tensor | None]:
    """Rows of each optimiser step: `passes` times through the rollouts in `minibatches` parts; a prompt's rollouts stay together."""
    if job.optim.minibatches == 1:
        yield from [None] * job.optim.passes
        return
    groups = list(dict.fromkeys(r.group for r in rollouts))
    for number in range(job.optim.passes):
        keys = torch.arange(len(groups))
        order = keyed_uniform(job.seed, step, f"pass {number}", keys, 1, torch.float64)[:, 0].argsort()
        for part in order.tensor_split(min(job.optim.minibatches, len(groups))):
            mine = {groups[i] for i in part.tolist()}
            yield torch.tensor([b for b, r in enumerate(rollouts) if r.group in mine], device=job.student.device)


def _learn(job: Job, plan: Plan, rollouts: Sequence[Rollout], record: StepRecord) -> None:
    """One optimiser step: gradients of every micro-batch, then AdamW, if they are finite."""
    student = job.student
    student.model.train()
    layout = Layout(rollouts, plan.batch.shape[1])
    for positions in layout.micro_batches(flat_positions(plan.selected), job.micro_batch_tokens):
        with student.autocast():
            learned = learn(plan, positions, layout.states(student.model, positions), student.head)
        if not bool(learned.loss.isfinite()):
            raise UserError(_not_finite(plan, positions, rollouts, learned.parts))
        learned.loss.backward()
        record.add(learned)
    norm = student.gradient_norm()
    if not bool(norm.isfinite()):
        raise UserError(
            f"the gradient is not finite (norm {norm.item()}) though the loss is: the optimiser was not moved. Lower the learning rate, "
            "or train in float32"
        )
    record.close(plan, norm, student.rate(student.updates))
    student.step()


def _not_finite(plan: Plan, positions: Tensor, rollouts: Sequence[Rollout], parts: Tensor) -> str:
    """Which term and which rollout made a loss infinite, and what to do."""
    part = next((p for p, value in zip(plan.parts, parts) if not bool(value.isfinite())), plan.parts[0])
    rows = (positions // plan.batch.shape[1]).unique().tolist()
    suspects = [b for b in rows if not bool(_inputs_finite(plan.batch, b))] or rows[:1]
    return (
        f"the loss of term {part.name} is not finite at rollout {rollouts[suspects[0]].id}: a model gave a token probability zero, or its "
        f"output is broken. The optimiser was not moved. If the teacher rules tokens out, use a method that masks them (tropd, or a floor)"
    )


def _inputs_finite(batch: Batch, row: int) -> Tensor:
    mask = batch.mask[row]
    numbers = [v[row][mask] for v in batch.facts.values() if v.is_floating_point() and v.dim() == 2 and v.shape == batch.shape]
    return torch.stack([n.isfinite().all() for n in numbers]).all() if numbers else torch.ones(())


def _evaluate(job: Job, state: State) -> None:
    """Score the student; remember the best."""
    if job.evaluate is None:
        return
    value = job.evaluate(state.step)
    if state.step and (state.best is None or value > state.best):
        state.best, state.best_step = value, state.step
        if not (job.checkpoint.every and state.step % job.checkpoint.every == 0) and state.step != job.steps:
            checkpoints.save(job.folder, state, job.student, job.tokenizer)
            checkpoints.prune(job.folder, job.checkpoint.keep, state.best_step)


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self.device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
