"""From a `Run` to a `Job`: what can be refused without a model is refused before one is loaded; then everything is loaded once."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from opdkit import compose
from opdkit.config import plain
from opdkit.curricula import Cached, reads_cache
from opdkit.data import Prompts, PromptStream, load_rows
from opdkit.data.cache import Cache, CachedPrompts, is_cache, open_cache, student_notes
from opdkit.engines import INTERNAL, Given, Models, shared_vocabulary
from opdkit.errors import UserError, nearest
from opdkit.facts import describe, watched
from opdkit.forward import batch_tokens
from opdkit.identity import identify
from opdkit.method import Method
from opdkit.models import head_of, load_tokenizer, real_vocabulary
from opdkit.rewards import Reward, load_reward
from opdkit.run import Data, Run
from opdkit.sampling import Guide, HFSampler
from opdkit.sampling.draws import check_sampling
from opdkit.sampling.spec import HfSettings
from opdkit.show import Evaluator, Screen, Validator
from opdkit.teachers import LocalModel, Remote, Routed, Scorer, route
from opdkit.teachers.base import cut, heads_of
from opdkit.teachers.spec import Cached as CachedSpec
from opdkit.teachers.spec import Local, Routes, specs
from opdkit.teachers.spec import refuse as refuse_teacher
from opdkit.teachers.translated import spoken
from opdkit.track import BACKENDS, open_trackers, truncate_metrics
from opdkit.train import checkpoint as checkpoints
from opdkit.train.checkpoint import State
from opdkit.train.loop import Job
from opdkit.train.record import Recorder
from opdkit.train.student import Student
from opdkit.types import LogpFact, Row, Sampling


def prepare(run: Run, given: Given = Given(), *, resume: bool = False, overwrite: bool = False) -> tuple[Job, State]:
    """Check and build everything. What can be refused without a model is refused before one is loaded."""
    method = from_cache(given.method or run.method_spec.load(), run)
    needs = method.needs
    reward = given.reward or load_reward(run.reward)
    refuse(run, method, reward)
    if reward is not None and hasattr(reward, "check"):  # a judge that is not there, a machine that cannot confine programs
        reward.check()
    stored = stored_rollouts(run, method)
    rows = read_rows(run.prompts, given.rows, run.seed)
    eval_rows = None if run.evaluate is None else read_rows(run.evaluate.prompts, given.eval_rows, run.seed)
    several = run.teachers.teachers if isinstance(run.teachers, Routes) and "teacher" in needs.models else {}
    for row in rows if several else ():
        route(row["teacher"], several, f"row {row['id']}")
    if stored is not None:
        stored.refuse_unknown([row["id"] for row in rows])
    checkpoint = checkpoints.newest(run.folder) if resume else None

    start = str(checkpoint) if checkpoint is not None else run.student
    tokenizer = (
        given.tokenizer if given.tokenizer is not None else load_tokenizer(run.student, trust_remote_code=run.trust_remote_code)
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
    scorers: dict[str, Scorer | Remote] = {"student": LocalModel(base, student.head), "live": LocalModel(base, student.head)}
    scorers |= {name: cut(scorer, vocab) for name, scorer in others.items()}
    sampler = HFSampler(base, tokenizer, head=student.head)  # of evaluations
    mix = guide(scorers, method.teacher_mix) if method.teacher_mix else None
    prompts = make_prompts(run.prompts, rows, tokenizer)
    longest = refuse_long(prompts, base, run.sampling if stored is None else stored.origin.sampling)
    writer = models.sampler(student, watched(needs), mix, longest) if stored is None else sampler  # which then writes nothing
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
        (lambda rollout: route(rollout.row.get("teacher"), several, rollout.id)) if several else None,
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
            job, make_prompts(run.evaluate.prompts, eval_rows, tokenizer) if run.evaluate and eval_rows else prompts
        )
    if run.evaluate is not None and eval_rows is not None:
        held_out = make_prompts(run.evaluate.prompts, eval_rows, tokenizer)
        evaluator = Evaluator(run, sampler, held_out, reward, student)
        job.evaluate, job.evaluate_every = evaluator.student_score, run.evaluate.every
        if run.evaluate.teacher and state.evaluated < 0:
            for name, teacher in teachers(scorers["teacher"]).items():
                local, theirs = spoken(teacher)
                asked = held_out if theirs is None else make_prompts(run.evaluate.prompts, eval_rows, theirs)
                with local.around():
                    own = HFSampler(local.model, tokenizer if theirs is None else theirs, head=local.head)
                    replace(evaluator, prompts=asked).score(own, name, 0)
    return job, state


def refuse(run: Run, method: Method, reward: Reward | None) -> None:
    """What cannot work, before any model is loaded."""
    needs = method.needs
    for tracker in run.trackers:
        if tracker not in BACKENDS:
            raise UserError(f"there is no tracker {tracker!r}{nearest(tracker, list(BACKENDS))}")
    if reward is None and needs.columns & {"reward", "correct"}:
        raise UserError(
            f"method {method.name or 'own'!r} reads whether a response is right, and the run has no reward: "
            "set reward to math, code, exact, reasoning_gym, regex:PATTERN, judge:URL or file.py:function"
        )
    if reward is None and run.evaluate is not None:
        raise UserError("the run evaluates on held-out problems and has no reward to score them with: set reward")
    missing = needs.models - INTERNAL - {"teacher", "reference"} - set(run.models)
    if missing:
        name = sorted(missing)[0]
        raise UserError(f"method {method.name or 'own'!r} reads a model called {name!r}: say which with models.{name}=MODEL")
    unknown = needs.of("sampler") - {LogpFact("sampler")}
    if unknown:
        raise UserError(
            f"method {method.name or 'own'!r} reads {', '.join(sorted(map(describe, unknown)))}: of the sampler only the log-probs of its own "
            "tokens are recorded. Read the student instead"
        )
    refuse_teacher(method.name or "own", run.teachers, needs)
    local = all(isinstance(spec, Local) for spec in specs(run.teachers).values())
    if run.evaluate is not None and run.evaluate.teacher and not local:
        raise UserError(
            "evaluate.teacher=true samples from the teacher, which must run in this process for that: set it to false, "
            "and evaluate the teacher where it runs"
        )
    if method.teacher_mix and not local:
        raise UserError(
            f"method {method.name or 'own'!r} draws tokens from a mixture of teacher and student: the teacher must run in this process "
            "(teacher=MODEL)"
        )
    if method.teacher_mix and not isinstance(run.sampler_spec, HfSettings):
        raise UserError(
            f"method {method.name or 'own'!r} draws tokens from a mixture of teacher and student, token by token: set sampler=hf"
        )
    check_sampling(run.sampling)
    stored = stored_rollouts(run, method)
    sampling = run.sampling if stored is None else stored.origin.sampling
    if not sampling.plain and not run.correct_sampling and "sampler" in needs.models:
        print(
            "opdkit: tokens are not drawn from the plain softmax (temperature, top_p, top_k or min_p), so sampled-token estimators are "
            "biased by log(drawn/plain), logged as sampling/log_ratio. correct_sampling=true takes ratios to what was drawn from.",
            file=sys.stderr,
        )


def from_cache(method: Method, run: Run) -> Method:
    """The method, with its rollouts taken from a cache where the run says so."""
    if run.rollouts == "student":
        return method
    names = method.name or "own", "rollouts=cache"
    return replace(method, curriculum=compose.join(method.curriculum, Cached(), names))


def stored_rollouts(run: Run, method: Method) -> Cache | None:
    """The cache that a method's rollouts are read from: the teacher's, or with a live teacher the data's."""
    if not reads_cache(method.curriculum):
        return None
    source = run.teachers.folder if isinstance(run.teachers, CachedSpec) else run.prompts.source
    if not isinstance(run.teachers, CachedSpec) and not is_cache(source):
        raise UserError(
            f"method {method.name or 'own'!r} takes its rollouts from a folder that `opdkit cache-teacher` wrote, and the data {source} are "
            "none: write one, then set teacher=cached:FOLDER and leave data out (or data=FOLDER, with a live teacher)"
        )
    return open_cache(source)


def teachers(scorer: Any) -> dict[str, Any]:
    """The teachers in this process by the name they are evaluated under."""
    if isinstance(scorer, Routed):
        return {f"teacher {k}": m for k, m in scorer.teachers.items()}
    return {"teacher": scorer}


def read_rows(data: Data, rows: Sequence[Row] | None, seed: int) -> list[Row]:
    if rows is None and is_cache(data.source):
        return open_cache(data.source).rows[: data.limit]
    return load_rows(
        data.source if rows is None else rows, split=data.split, limit=data.limit, seed=seed, columns=data.columns or None
    )


def make_prompts(data: Data, rows: list[Row], tokenizer: Any) -> Prompts:
    written: dict[str, Any] = {name: getattr(data, name) for name in ("template", "system", "chat", "enable_thinking")}
    if is_cache(data.source):
        prompts: Prompts = CachedPrompts(open_cache(data.source), rows, tokenizer, data.max_prompt_length, **written)
    else:
        prompts = Prompts(rows, tokenizer, max_prompt_length=data.max_prompt_length, **written)
    if prompts.dropped:
        print(f"opdkit: {prompts.report()}", file=sys.stderr)
    return prompts


def refuse_long(prompts: Prompts, model: Any, sampling: Sampling) -> int:
    """Tokens of the longest rollout there can be. It must fit the model's context: a longer prompt would be cut or answered blindly."""
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    room = limit - sampling.max_completion_length
    longest = max(prompts, key=lambda p: len(p.tokens))
    if len(longest.tokens) > room:
        raise UserError(
            f"prompt {longest.id} has {len(longest.tokens)} tokens; with max_completion_length={sampling.max_completion_length} only "
            f"{room} fit the model's context of {limit}. Set data.max_prompt_length={max(room, 0)} to drop longer prompts, "
            "or lower max_completion_length"
        )
    return len(longest.tokens) + sampling.max_completion_length


def guide(scorers: Mapping[str, Scorer | Remote], share: float) -> Guide:
    """The teacher as a second model in decoding."""
    teacher = scorers["teacher"]
    if not isinstance(teacher, LocalModel):
        raise UserError(
            "teacher_mix lets the teacher take part in decoding: it needs one teacher in this process, not several by route"
        )
    return Guide(teacher.model, teacher.head, share)


def newlines(tokenizer: Any) -> frozenset[int]:
    """Tokens whose text contains a line end."""
    ids = sorted(tokenizer.get_vocab().values())
    return frozenset(i for i, text in zip(ids, tokenizer.batch_decode([[i] for i in ids])) if "\n" in text)


def device_of(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0]}): auto takes a GPU where there is one"
        ) from error
    return name


def write_run(run: Run) -> None:
    """The resolved run: `opdkit train run.yaml` does the same again."""
    (run.folder / "run.yaml").write_text(run.yaml(), encoding="utf-8")


def as_rows(prompts: Sequence[Any]) -> list[Row]:
    """Texts or rows as rows."""
    return [{"prompt": p} if isinstance(p, str) else dict(p) for p in prompts]
