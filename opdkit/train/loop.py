"""The loop: sample, reward, gather facts, weigh, learn per micro-batch, step, sync, observe,
record. It knows no method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from opdkit.annotators import AnnotateContext
from opdkit.base.clock import Clock
from opdkit.base.errors import UserError
from opdkit.base.interrupt import held, stop, waiting
from opdkit.models.layout import Layout
from opdkit.models.sharding import is_spread
from opdkit.objective.batch import Batch
from opdkit.objective.companion import Stepped
from opdkit.objective.head import flat_positions, learn
from opdkit.objective.maths import keyed_uniform
from opdkit.objective.plan import StepPlan
from opdkit.train.checkpoint import State
from opdkit.train.collect.ahead import Written
from opdkit.train.collect.collect import annotate
from opdkit.train.gather import gather, refresh
from opdkit.train.job import Job
from opdkit.train.record import StepRecord
from opdkit.types import Rollout


def train(job: Job, state: State) -> State:
    """From `state` to the last step.

    An error before the weights move leaves the step before it saved: only its own step is lost. Of
    several processes one cannot save without the others: they are where the last checkpoint is. A
    signal ends them together, at the end of a step.
    """
    with held() if job.mesh.size > 1 else nullcontext(), job.saver:
        return _train(job, state)


def _train(job: Job, state: State) -> State:
    stream = job.collector.stream
    stream.load(state.stream or stream.state())
    job.queue.load(state.queue)
    state.queue = []
    # as it was loaded: a new run has nothing to save yet, a resumed one only what it adds
    saved = replace(state)
    _prepare(job, state)
    while True:
        with _kept(job, state):
            _evaluate(job, state)
        last = job.length.ended(state)
        due = (
            last
            or state.step == state.best_step
            or (job.checkpoint.every and state.step % job.checkpoint.every == 0)
        )
        if due and state.step and state != saved:
            with held():
                _save(job, state)
        if last:
            return state
        if job.mesh.size > 1 and (number := job.mesh.most(waiting())):
            if state.step and state != saved and not due:
                _save(job, state)
            raise stop(number)
        with _kept(job, state):
            train_step(job, state)


def _prepare(job: Job, state: State) -> None:
    """What the curriculum has to know before the first step, found once: saved with the student as
    it is, so that a run which ends before its next checkpoint has it still.
    """
    memory = job.queue.prepared(job.student, state.memory)
    if memory is state.memory:
        return
    with held():
        state.memory = memory
        _save(job, state)
        job.begun()


@contextmanager
def _kept(job: Job, state: State) -> Iterator[None]:
    """Work that may fail: if the weights have not moved by then, they are saved with the state from
    before; if the step was done when a signal that waited for it came through, with the state now.
    """
    before, updates = replace(state), job.student.updates
    try:
        yield
    except (Exception, KeyboardInterrupt):
        good = state if state.step > before.step else before
        there = (job.folder / f"checkpoint-{good.step}").exists()
        unmoved = job.student.updates == updates
        # what several processes have learnt, one of them cannot save
        if (unmoved or good is state) and good.step > 0 and not there and job.mesh.size == 1:
            job.student.optimiser.zero_grad(set_to_none=True)
            with held():
                _save(job, good)
        raise


def _save(job: Job, state: State) -> None:
    """With the rollouts that were asked for ahead, and the place in the data behind them."""
    state.updates, queue = job.student.updates, job.queue.state(state.step)
    stream = queue[-1]["stream"] if queue else state.stream
    job.saver.save(replace(state, queue=queue, stream=stream))


def train_step(job: Job, state: State) -> None:
    """One step: a batch of rollouts, and every optimiser step on it.

    A signal that comes once the weights move waits for its end: half a step cannot be saved.
    """
    with ExitStack() as moving:
        _step(job, state, moving)


def _step(job: Job, state: State, moving: ExitStack) -> None:
    """moving: is entered before the weights move."""
    clock = Clock(job.student.device)
    student, step = job.student, state.step

    total = job.length.expected_steps(state)
    written, rollouts = _collected(job, state, clock, total)  # sample, reward
    collected = written.collected
    needs = job.needs_at(step, total)
    with clock("score"):  # gather facts
        if job.collector.early is not None:
            with clock.waiting("score"):
                job.collector.early.settle(step, rollouts)
        batch = gather(
            rollouts,
            needs,
            job.scorers,
            step=step,
            total_steps=total,
            seed=job.seed,
            memory=state.memory,
            companions=job.companions,
            policy_version=student.updates,
            recompute_student=job.scoring.recompute_student,
            correct_sampling=job.scoring.correct_sampling,
            device=student.device,
            mesh=job.mesh,
            clock=clock,
            dtype=torch.promote_types(torch.float32, student.parameters[0].dtype),
        )
    ahead = job.length.expected_steps(replace(state, step=step + 1))
    parts = _optimiser_steps(job, rollouts, step, job.passes(step, ahead))
    if len(parts) > 1:  # hidden states stay as they were found, and so must what they meet
        batch.still([*student.parameters, *job.companions.tensors])
    student.expect(len(parts), step, ahead, lambda step: job.passes(step, ahead))
    record = job.recorder.start(step, job.objective.names, collected.earlier)
    record.lag = step - written.since, student.updates - collected.version
    with clock("learn"):
        for number, rows in enumerate(parts):
            batch.moved = number > 0 or job.companions.disturb
            if batch.moved and needs.of("live"):
                refresh(batch, needs, job.scorers, rollouts, student.updates)
            # on all processes at once: one with nothing to learn has no loss that asks for them
            for signal in needs.signals if job.mesh.size > 1 else ():
                signal(batch)
            plan = job.objective.plan(batch, rows)  # weigh
            _learn(job, plan, rollouts, record, moving)  # learn per micro-batch, step
    job.queue.moved(student)  # sync

    record.curriculum = job.curriculum.metrics(collected.scored, step, total, state.memory)
    record.beside = job.companions.metrics()
    record.collected = {**collected.counts, **job.collector.metrics()}
    record.spans = job.collector.spans(step)
    state.memory = job.curriculum.observe(collected.scored, state.memory)  # observe
    state.stream = collected.stream
    record.join(job.mesh)
    # record
    job.recorder.step(step + 1, state.tokens, rollouts, batch, record, clock, student, written)
    state.step += 1
    job.queue.learnt(step)


def _collected(job: Job, state: State, clock: Clock, total: int) -> tuple[Written, list[Rollout]]:
    """The rollouts of a step of a run of `total` steps, as they were written and as annotators have
    noted on them; those of a later step are asked for.
    """
    written = job.queue.next(
        job.student,
        clock,
        step=state.step,
        steps=job.length.steps,
        total_steps=total,
        memory=state.memory,
    )
    state.tokens += written.collected.tokens
    told = AnnotateContext(state.step, job.seed, job.student.updates, state.memory)
    with clock("annotate") if job.collector.annotators else nullcontext():
        rollouts, added = annotate(job.collector, written.collected.rollouts, told, job.mesh)
    state.memory = {**state.memory, **added}
    return written, rollouts


def _optimiser_steps(
    job: Job, rollouts: Sequence[Rollout], step: int, passes: int
) -> list[Tensor | None]:
    """Rows [R] of each optimiser step, None for all: `passes` times through the rollouts in
    `minibatches` parts, or as many as there are groups; a prompt's rollouts stay together.
    """
    optim, device = job.student.optim, job.student.device
    groups = list(dict.fromkeys(r.group for r in rollouts))
    if min(optim.minibatches, len(groups)) <= 1:
        return [None] * passes
    steps: list[Tensor | None] = []
    for number in range(passes):
        keys = torch.arange(len(groups))
        order = keyed_uniform(job.seed, step, f"pass {number}", keys, 1, torch.float64)[
            :, 0
        ].argsort()
        for part in order.tensor_split(min(optim.minibatches, len(groups))):
            mine = {groups[i] for i in part.tolist()}
            rows = [b for b, r in enumerate(rollouts) if r.group in mine]
            steps.append(torch.tensor(rows, device=device))
    return steps


def _learn(
    job: Job, plan: StepPlan, rollouts: Sequence[Rollout], record: StepRecord, moving: ExitStack
) -> None:
    """One optimiser step: gradients of every micro-batch, then AdamW, if they are finite."""
    student = job.student
    mine = plan.batch.mine
    selected, scored = (
        flat_positions(x if mine is None else x & mine) for x in (plan.selected, plan.mask)
    )
    with (
        student.learning(job.seed, job.mesh.rank),
        job.companions.disturbed(student.updates) as hear,
    ):
        layout = Layout(rollouts, plan.batch.shape[1], hear)
        passes = layout.passes(selected, job.micro_batch_tokens, scored)
        for positions, padded in job.mesh.level(passes, (selected[:0], 1)):
            states = layout.states(student.model, positions, padded)
            learned = learn(
                plan, positions, states, student.head, term_gradients=record.term_gradients
            )
            if not bool(learned.loss.isfinite()):
                raise UserError(_not_finite(plan, positions, rollouts, learned.parts))
            learned.loss.backward()
            record.add(learned, positions)
    apart = [*job.companions.parameters, *([] if is_spread(student.model) else student.parameters)]
    for parameter in apart if job.mesh.size > 1 else ():
        parameter.grad = job.mesh.total(
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        )
    norm = student.gradient_norm()
    if not bool(norm.isfinite()):
        raise UserError(
            f"the gradient is not finite (norm {norm.item()}) though the loss is: the optimiser "
            "was not moved. Lower the learning rate, or train in float32"
        )
    job.companions.refuse_broken()
    record.close(plan, norm, student.rate(student.updates))
    moving.enter_context(held())
    student.step()
    plan.batch.partial = False
    job.companions.after_step(
        Stepped(plan.batch, plan.mask, rollouts, student.updates, student.model)
    )
    if plan.batch.partial and mine is not None:  # it would go apart
        raise plan.batch.joined


def _not_finite(
    plan: StepPlan, positions: Tensor, rollouts: Sequence[Rollout], parts: Tensor
) -> str:
    """Which term and which rollout made a loss infinite, and what to do."""
    part = next(
        (p for p, value in zip(plan.parts, parts) if not bool(value.isfinite())), plan.parts[0]
    )
    rows = (positions // plan.batch.shape[1]).unique().tolist()
    suspects = [b for b in rows if not bool(_inputs_finite(plan.batch, b))] or rows[:1]
    return (
        f"the loss of term {part.name} is not finite at rollout {rollouts[suspects[0]].id}: a "
        "model gave a token probability zero, or its output is broken. The optimiser was not "
        "moved. If the teacher rules tokens out, use a method that masks them, or floors its "
        "credits"
    )


def _inputs_finite(batch: Batch, row: int) -> Tensor:
    mask = batch.trained[row]
    numbers = [
        v[row][mask]
        for v in batch.facts.values()
        if v.is_floating_point() and v.dim() == 2 and v.shape == batch.shape
    ]
    return torch.stack([n.isfinite().all() for n in numbers]).all() if numbers else torch.ones(())


def _evaluate(job: Job, state: State) -> None:
    """Measure the student where it is due: before the first step, every so many, after the last;
    remember the best, and what the curriculum makes of it.
    """
    held_out = job.held_out
    due = (
        state.step == 0
        or job.length.ended(state)
        or (held_out.every and state.step % held_out.every == 0)
    )
    if not due or state.evaluated == state.step:
        return
    if held_out.measure is not None:
        if held_out.by_writer:
            job.queue.rest(job.student)
        measured = job.mesh.same(held_out.measure(state.step))
        state.memory = job.curriculum.validated(measured, state.memory)
        score = measured.get("score")
        if score is not None and state.step and (state.best is None or score > state.best):
            state.best, state.best_step = score, state.step
    state.evaluated = state.step
