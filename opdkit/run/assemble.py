"""Puts a run's job together from what it asks for and the models that are open."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from opdkit.base.config import plain
from opdkit.base.errors import UserError
from opdkit.base.files import truncate_metrics, write_whole
from opdkit.curricula import writer_of
from opdkit.data import PromptStream
from opdkit.data.cache import student_notes
from opdkit.data.views import seen
from opdkit.environments import EpisodeSampler
from opdkit.models.identity import identify
from opdkit.models.layout import batch_tokens
from opdkit.objective.needs import watched
from opdkit.rewards.against import opposed
from opdkit.run.annotate import open_annotators
from opdkit.run.ask import Asked, domains
from opdkit.run.episodes import episodic, openings
from opdkit.run.evaluation import Evaluator, Heard, Measurer, Validator, score_teachers
from opdkit.run.open import Given
from opdkit.run.opened import Opened
from opdkit.run.prompts import make_prompts, sampled_as
from opdkit.run.refuse import refuse_long
from opdkit.run.resume import run_yaml
from opdkit.run.screen import Screen
from opdkit.run.settings import Run
from opdkit.sampling import Guide
from opdkit.sampling.kv_cache import odd_layers
from opdkit.teachers import LocalModel, Remote, Scorer, route
from opdkit.teachers.early import BEGUN
from opdkit.train import checkpoint as checkpoints
from opdkit.train.checkpoint import State
from opdkit.train.collect.ahead import Queue
from opdkit.train.collect.collector import Collector
from opdkit.train.collect.early import Early
from opdkit.train.collect.filters import (
    DynamicSampling,
    Filter,
    MarkTokens,
    OverlongPenalty,
    TokenBudget,
    newlines,
)
from opdkit.train.divided import divided, undivided
from opdkit.train.idle import Idle
from opdkit.train.job import HeldOut, Job, Length, Scoring
from opdkit.train.mesh import ALONE, Mesh
from opdkit.train.record import TIMELINE, Recorder
from opdkit.train.track import open_trackers
from opdkit.types import Sampler, Watch


def assemble(
    run: Run,
    given: Given,
    asked: Asked,
    opened: Opened,
    checkpoint: Path | None,
    record: dict[str, Any],
    mesh: Mesh = ALONE,
) -> tuple[Job, State]:
    """The job, and the state in which it starts: that of the checkpoint, where there is one.

    `record`: what run it is, for its own checkpoints (see `run.resume`). `mesh`: the processes that
    share it, of which the first writes its files.
    """
    method, student = asked.method, opened.student
    beside = writes_beside(run, asked)
    # of several processes the first lets rollouts be written while the others learn with it
    collector = make_collector(run, asked, opened, ALONE if beside else mesh)
    if asked.stored is not None and given.student is None:
        for note in student_notes(asked.stored, identify(run.student)):
            print(f"opdkit: {note}", file=sys.stderr)
    state = State() if checkpoint is None else continued(run, checkpoint, opened, record)
    state.record = record
    run = replace(run, output=str(mesh.folder(run.folder)))
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(run.folder / "run.yaml", run_yaml(run, record["changes"]))  # first of its files
    truncate_metrics(run.folder / "metrics.jsonl", state.step)
    truncate_metrics(run.folder / TIMELINE, state.step)
    truncate_metrics(run.folder / "evals.jsonl", state.evaluated)
    recorder = make_recorder(run, given, asked, opened, state)
    evaluator = make_evaluator(run, asked, opened, collector.sampler, mesh)
    job = Job(
        objective=method.objective,
        queue=Queue(collector, run.ahead, beside, mesh),
        student=student,
        scorers=opened.scorers,
        recorder=recorder,
        folder=run.folder,
        tokenizer=opened.tokenizer,
        length=Length(run.steps, run.max_tokens),
        checkpoint=run.checkpoint,
        micro_batch_tokens=run.micro_batch_tokens or batch_tokens(student.device),
        companions=opened.companions,
        scoring=Scoring(run.recomputes_student, run.correct_sampling),
        held_out=make_held_out(run, asked, opened, evaluator),
        seed=run.seed,
        mesh=mesh,
    )
    begun = opened.models.context.opened.get(BEGUN)
    if begun is not None and getattr(undivided(collector.sampler), "gives_each", False):
        collector.early = Early(begun, opened.scorers, job.needs_at, mesh)
    if evaluator is not None and state.evaluated < 0:
        score_teachers(evaluator, opened.scorers, asked.eval_rows or [])
    return job, state


def writes_beside(run: Run, asked: Asked) -> bool:
    """Whether rollouts are written while the trainer learns. A copy of the student that writes too
    would move meanwhile, and an annotator may let the student write with other weights.
    """
    players = writer_of(asked.method.curriculum).players
    return run.ahead > 0 and run.writes_elsewhere and not players and not asked.annotated


def continued(run: Run, checkpoint: Path, opened: Opened, record: dict[str, Any]) -> State:
    """The state of a checkpoint, for a run that `record` may have changed since."""
    state = checkpoints.restore(checkpoint, opened.student, opened.companions)
    checkpoints.prune(run.folder, run.checkpoint.keep, state.best_step)
    if state.step > run.steps:
        raise UserError(
            f"{checkpoint} has done {state.step} steps, and steps={run.steps} asks for fewer: a "
            f"run does not go back. Set steps to {state.step} or more, or start a new run with "
            "output=DIR"
        )
    new = record["changes"][len(state.record.get("changes", ())) :]
    if new and Length(run.steps, run.max_tokens).ended(state):
        raise UserError(
            f"{checkpoint} is the end of its run, so that no step would be done with the changed "
            f"{new[0]['setting']}: set steps to more than {state.step} too"
        )
    if any(change["setting"].partition(".")[0] in ("data", "seed") for change in new):
        # of other questions, or in another order: from the first one on
        state.stream, state.queue = {}, []
    return state


def make_collector(run: Run, asked: Asked, opened: Opened, mesh: Mesh = ALONE) -> Collector:
    """Where rollouts come from: the method's curriculum, the run's prompts and sampler."""
    method, stored, student = asked.method, asked.stored, opened.student
    mix = guide(opened.scorers, method.teacher_mix) if method.teacher_mix else None
    prompts = make_prompts(run.prompts, asked.rows, opened.tokenizer)
    writer, players = writer_of(method.curriculum), writer_of(method.curriculum).players
    if writer.asks_turns and (note := prompts.drop_unanswered()):
        print(f"opdkit: {note}", file=sys.stderr)
    prompts.refuse_unknown(opened.vocabulary)
    plain = episodic(run.world, opened.sampler(), prompts, student.model)
    first = openings(plain, prompts, run.seed)
    longest = refuse_long(first, student.model, sampled_as(run, method), opened.scorers)
    sampler: Sampler = opened.sampler()  # of evaluations: for runs that write nothing
    if stored is None:
        sampler = opened.models.sampler(student, watched(method.needs), mix, longest)
    return Collector(
        curriculum=method.curriculum,
        sampler=divided(episodic(run.world, sampler, prompts, student.model), mesh, student.model),
        prompts=prompts,
        stream=PromptStream(len(prompts), seed=run.seed),
        sampling=run.sampling,
        prompts_per_step=run.prompts_per_step,
        seed=run.seed,
        reward=opposed(asked.reward, bool(players)),
        players={name: opened.player(name, mesh) for name in players},
        filters=make_filters(run, asked, opened.tokenizer, len(prompts)),
        annotators=open_annotators(
            run, method, asked.annotated, opened, divided(sampler, mesh, student.model)
        ),
        stored=stored,
        mesh=mesh,
        viewed=partial(seen, prompts),
    )


def make_filters(run: Run, asked: Asked, tokenizer: Any, prompts: int) -> tuple[Filter, ...]:
    """What becomes of rollouts once they have their rewards, in this order."""
    filters, needs = list[Filter](), asked.method.needs
    if run.dynamic_sampling:
        filters.append(DynamicSampling(min(run.prompts_per_step, prompts)))
    if run.overlong_margin is not None:
        filters.append(OverlongPenalty(run.sampling.max_completion_length, run.overlong_margin))
    if "mark:newline" in needs.columns:
        filters.append(MarkTokens("newline", newlines(tokenizer)))
    if run.token_budget:
        domain, together = domains(run.domain, asked.routes), "group" in needs.columns
        filters.append(TokenBudget(run.token_budget, domain, together, run.seed))
    return tuple(filters)


def make_recorder(run: Run, given: Given, asked: Asked, opened: Opened, state: State) -> Recorder:
    """Writes metrics and samples into the run folder, and a line on the screen."""
    routes = asked.routes
    return Recorder(
        run.folder,
        open_trackers(run.folder, run.trackers, plain(run)),
        lambda token: str(opened.tokenizer.decode([token])),
        run.keep_samples,
        run.sample_every,
        run.term_gradients_every,
        given.show or Screen(run.steps, state.step, run.max_tokens, state.tokens),
        (lambda rollout: route(rollout.row.get("teacher"), routes, rollout.id)) if routes else None,
        Idle(bool(asked.method.needs.columns & {"reward", "correct"})),
        others=given.others,
    )


def make_evaluator(
    run: Run,
    asked: Asked,
    opened: Opened,
    writer: Sampler | None = None,
    mesh: Mesh = ALONE,
) -> Evaluator | None:
    """Scores models on the run's held-out problems, in this process, or with the sampler that
    writes (`writer`) where this process cannot sample the student; None where there are none.
    """
    if run.evaluate is None or asked.eval_rows is None:
        return None
    prompts = make_prompts(run.evaluate.prompts, asked.eval_rows, opened.tokenizer)
    sampler: Sampler = opened.sampler(Watch("entropy" in asked.method.curriculum.measures))
    if writer is not None and odd_layers(opened.student.model):
        sampler = writer
    world = run.held_out_world
    sampler = undivided(sampler)
    if world is not None and isinstance(sampler, EpisodeSampler):
        sampler = sampler.inner
    model = opened.student.model
    sampler = divided(episodic(world, sampler, prompts, model), mesh, model)
    return Evaluator(run, sampler, prompts, asked.reward, opened.tokenizer)


def make_held_out(run: Run, asked: Asked, opened: Opened, evaluator: Evaluator | None) -> HeldOut:
    """What is measured during training: the score on held-out problems, and what the curriculum
    adapts to.
    """
    if run.evaluate is None or evaluator is None:
        return HeldOut()
    measures, validator = asked.method.curriculum.measures, None
    if "loss" in measures:
        longest = run.sampling.max_completion_length
        validator = Validator(opened.student, opened.scorers["student"], evaluator.prompts, longest)
    heard = Heard(evaluator.sampler) if "entropy" in measures else None
    by_writer = bool(odd_layers(opened.student.model))
    return HeldOut(run.evaluate.every, Measurer(evaluator, heard, validator), by_writer)


def guide(scorers: Mapping[str, Scorer | Remote], share: float) -> Guide:
    """The teacher as a second model in decoding."""
    teacher = scorers["teacher"]
    if not isinstance(teacher, LocalModel):
        raise UserError(
            "teacher_mix lets the teacher take part in decoding: it needs one teacher in this "
            "process, not several by route"
        )
    return Guide(teacher.model, teacher.head, share)
