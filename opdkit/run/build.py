"""From a `Run` to a `Job`: what can be refused without a model is refused before one is loaded;
then everything is loaded once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from opdkit.base.config import plain
from opdkit.base.errors import UserError
from opdkit.base.files import truncate_metrics, write_whole
from opdkit.data import PromptStream
from opdkit.data.cache import student_notes
from opdkit.models.body import head_of
from opdkit.models.device import device_of
from opdkit.models.identity import identify
from opdkit.models.layout import batch_tokens
from opdkit.models.load import load_tokenizer
from opdkit.models.tokenizers import real_vocabulary
from opdkit.objective.needs import watched
from opdkit.rewards import load_reward
from opdkit.run.evaluation import Evaluator, Validator
from opdkit.run.open import Given, Models, shared_vocabulary
from opdkit.run.prompts import from_cache, make_prompts, read_rows, stored_rollouts
from opdkit.run.refuse import refuse, refuse_long
from opdkit.run.screen import Screen
from opdkit.run.settings import Run
from opdkit.sampling import Guide, HFSampler
from opdkit.teachers import LocalModel, Remote, Routed, Scorer, route
from opdkit.teachers.base import cut, heads_of
from opdkit.teachers.kinds import Routes
from opdkit.teachers.views.translated import spoken
from opdkit.train import checkpoint as checkpoints
from opdkit.train.checkpoint import State
from opdkit.train.collect.filters import newlines
from opdkit.train.loop import Job
from opdkit.train.record import Recorder
from opdkit.train.student import Student
from opdkit.train.track import open_trackers


def prepare(
    run: Run, given: Given = Given(), *, resume: bool = False, overwrite: bool = False
) -> tuple[Job, State]:
    """Check and build everything.

    What can be refused without a model is refused before one is loaded.
    """
    method = from_cache(given.method or run.method_spec.load(), run)
    needs = method.needs
    reward = given.reward or load_reward(run.reward)
    refuse(run, method, reward)
    # a judge that is not there, a machine that cannot confine programs
    if reward is not None and hasattr(reward, "check"):
        reward.check()
    stored = stored_rollouts(run, method)
    rows = read_rows(run.prompts, given.rows, run.seed)
    eval_rows = (
        None if run.evaluate is None else read_rows(run.evaluate.prompts, given.eval_rows, run.seed)
    )
    several = (
        run.teachers.teachers
        if isinstance(run.teachers, Routes) and "teacher" in needs.models
        else {}
    )
    for row in rows if several else ():
        route(row["teacher"], several, f"row {row['id']}")
    if stored is not None:
        stored.refuse_unknown([row["id"] for row in rows])
    checkpoint = checkpoints.newest(run.folder) if resume else None

    start = str(checkpoint) if checkpoint is not None else run.student
    tokenizer = (
        given.tokenizer
        if given.tokenizer is not None
        else load_tokenizer(run.student, trust_remote_code=run.trust_remote_code)
    )
    device = device_of(run.device)
    models = Models(run, device, given, tokenizer)
    models.reach(method)
    base = models.student(start, checkpoint is not None)
    others = models.others(method, base)
    heads = [head_of(base), *(head for scorer in others.values() for head in heads_of(scorer))]
    vocab = shared_vocabulary(heads, real_vocabulary(tokenizer))
    student = Student(
        base,
        run.optim,
        run.learning_rate,
        run.steps * run.optim.passes * run.optim.minibatches,
        run.dtype == "bfloat16",
        vocab,
    )
    scorers: dict[str, Scorer | Remote] = {
        "student": LocalModel(base, student.head),
        "live": LocalModel(base, student.head),
    }
    scorers |= {name: cut(scorer, vocab) for name, scorer in others.items()}
    sampler = HFSampler(base, tokenizer, head=student.head)  # of evaluations
    mix = guide(scorers, method.teacher_mix) if method.teacher_mix else None
    prompts = make_prompts(run.prompts, rows, tokenizer)
    longest = refuse_long(prompts, base, run.sampling if stored is None else stored.origin.sampling)
    # which then writes nothing
    writer = models.sampler(student, watched(needs), mix, longest) if stored is None else sampler
    if stored is not None and given.student is None:
        for note in student_notes(stored, identify(run.student)):
            print(f"opdkit: {note}", file=sys.stderr)
    state = State() if checkpoint is None else checkpoints.restore(checkpoint, student)
    if overwrite:  # now that everything is known to load
        checkpoints.clear(run.folder)
    truncate_metrics(run.folder / "metrics.jsonl", state.step)
    truncate_metrics(run.folder / "evals.jsonl", state.evaluated)
    recorder = Recorder(
        run.folder,
        open_trackers(run.folder, run.trackers, plain(run)),
        lambda token: str(tokenizer.decode([token])),
        run.keep_samples,
        run.sample_every,
        given.show or Screen(run.steps, state.step, run.max_tokens, state.tokens),
        (lambda rollout: route(rollout.row.get("teacher"), several, rollout.id))
        if several
        else None,
    )
    write_run(run)
    job = Job(
        objective=method.objective,
        needs=needs,
        student=student,
        sampler=writer,
        scorers=scorers,
        prompts=prompts,
        stream=PromptStream(len(prompts), seed=run.seed),
        sampling=run.sampling,
        folder=run.folder,
        tokenizer=tokenizer,
        recorder=recorder,
        steps=run.steps,
        prompts_per_step=run.prompts_per_step,
        optim=run.optim,
        checkpoint=run.checkpoint,
        micro_batch_tokens=run.micro_batch_tokens or batch_tokens(student.device),
        max_tokens=run.max_tokens,
        seed=run.seed,
        reward=reward,
        curriculum=method.curriculum,
        stored=stored,
        recompute_student=run.recomputes_student,
        correct_sampling=run.correct_sampling,
        dynamic_sampling=run.dynamic_sampling,
        overlong_margin=run.overlong_margin,
        term_gradients_every=run.term_gradients_every,
        newlines=newlines(tokenizer) if "mark:newline" in needs.columns else frozenset(),
    )
    if method.curriculum.validates:
        job.validate = Validator(
            job,
            make_prompts(run.evaluate.prompts, eval_rows, tokenizer)
            if run.evaluate and eval_rows
            else prompts,
        )
    if run.evaluate is not None and eval_rows is not None:
        held_out = make_prompts(run.evaluate.prompts, eval_rows, tokenizer)
        evaluator = Evaluator(run, sampler, held_out, reward, student)
        job.evaluate, job.evaluate_every = evaluator.student_score, run.evaluate.every
        if run.evaluate.teacher and state.evaluated < 0:
            for name, teacher in teachers(scorers["teacher"]).items():
                local, theirs = spoken(teacher)
                asked = (
                    held_out
                    if theirs is None
                    else make_prompts(run.evaluate.prompts, eval_rows, theirs)
                )
                with local.around():
                    own = HFSampler(
                        local.model, tokenizer if theirs is None else theirs, head=local.head
                    )
                    replace(evaluator, prompts=asked).score(own, name, 0)
    return job, state


def teachers(scorer: Any) -> dict[str, Any]:
    """The teachers in this process by the name they are evaluated under."""
    if isinstance(scorer, Routed):
        return {f"teacher {k}": m for k, m in scorer.teachers.items()}
    return {"teacher": scorer}


def guide(scorers: Mapping[str, Scorer | Remote], share: float) -> Guide:
    """The teacher as a second model in decoding."""
    teacher = scorers["teacher"]
    if not isinstance(teacher, LocalModel):
        raise UserError(
            "teacher_mix lets the teacher take part in decoding: it needs one teacher in this "
            "process, not several by route"
        )
    return Guide(teacher.model, teacher.head, share)


def write_run(run: Run) -> None:
    """The resolved run: `opdkit train run.yaml` does the same again."""
    write_whole(run.folder / "run.yaml", run.yaml())
