"""From a `Run` to a `Job`: what can be refused without a model is refused before one is loaded; then everything is loaded once."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdkit.config import plain
from opdkit.data import Prompts, PromptStream, load_rows
from opdkit.errors import UserError, nearest
from opdkit.facts import Needs, describe
from opdkit.forward import batch_tokens
from opdkit.head import Head
from opdkit.method import Method
from opdkit.models import check_head, head_of, load_model, load_tokenizer, real_vocabulary, same_tokenizer
from opdkit.rewards import Reward, load_reward
from opdkit.run import Data, Run
from opdkit.sampling import Guide, HFSampler
from opdkit.sampling.draws import check_sampling
from opdkit.show import Evaluator, Screen, Validator
from opdkit.teachers import LocalModel, Routed, Scorer, route
from opdkit.track import BACKENDS, open_trackers, truncate_metrics
from opdkit.train import checkpoint as checkpoints
from opdkit.train.checkpoint import State
from opdkit.train.loop import Job
from opdkit.train.record import Recorder
from opdkit.train.student import Student, with_adapters
from opdkit.types import LogpFact, Row

INTERNAL = frozenset({"student", "sampler", "live"})  # models that are the run itself


@dataclass(frozen=True)
class Given:
    """What a caller hands over as objects instead of names: loaded models, a tokenizer, rows, a method, a reward."""

    student: Any = None
    teacher: Any = None
    tokenizer: Any = None
    rows: Sequence[Row] | None = None
    eval_rows: Sequence[Row] | None = None
    method: Method | None = None
    reward: Reward | None = None
    show: Callable[[int, Mapping[str, float]], None] | None = None  # is told of each step, instead of a line on the screen


def prepare(run: Run, given: Given = Given(), *, resume: bool = False, overwrite: bool = False) -> tuple[Job, State]:
    """Check and build everything. What can be refused without a model is refused before one is loaded."""
    method = given.method or run.method_spec.load()
    needs = method.needs
    reward = given.reward or load_reward(run.reward)
    refuse(run, method, reward)
    rows = read_rows(run.prompts, given.rows, run.seed)
    eval_rows = None if run.evaluate is None else read_rows(run.evaluate.prompts, given.eval_rows, run.seed)
    several = run.teacher if isinstance(run.teacher, dict) and "teacher" in needs.models else {}
    for row in rows if several else ():
        route(row["teacher"], several, f"row {row['id']}")
    checkpoint = checkpoints.newest(run.folder) if resume else None

    start = str(checkpoint) if checkpoint is not None else run.student
    tokenizer = (
        given.tokenizer if given.tokenizer is not None else load_tokenizer(run.student, trust_remote_code=run.trust_remote_code)
    )
    device = _device(run.device)
    models = Models(run, device, given)
    base = models.student(start, checkpoint is not None)
    others = models.others(needs, tokenizer, base)
    heads = [head_of(base), *(m.head for m in others.values() if isinstance(m, LocalModel))]
    for routed in (m for m in others.values() if isinstance(m, Routed)):
        heads += [m.head for m in routed.teachers.values()]
    vocab = shared_vocabulary(heads, real_vocabulary(tokenizer))
    student = Student(
        base,
        run.optim,
        run.learning_rate,
        run.steps * run.optim.passes * run.optim.minibatches,
        run.dtype == "bfloat16",
        vocab,
    )
    scorers: dict[str, Scorer] = {"student": LocalModel(base, student.head), "live": LocalModel(base, student.head)}
    scorers |= {name: _cut(scorer, vocab) for name, scorer in others.items()}
    sampler = HFSampler(base, tokenizer, head=student.head)
    writer = (
        sampler
        if not method.teacher_mix
        else HFSampler(base, tokenizer, head=student.head, guide=guide(scorers, method.teacher_mix))
    )
    prompts = make_prompts(run.prompts, rows, tokenizer)
    _fits(prompts, base, run)
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
        recompute_student=run.recompute_student,
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
                evaluator.score(HFSampler(teacher.model, tokenizer, head=teacher.head), name, 0)
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
            "set reward to math, exact, reasoning_gym, regex:PATTERN or file.py:function"
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
    check_sampling(run.sampling)
    if not run.sampling.plain and not run.correct_sampling and "sampler" in needs.models:
        print(
            "opdkit: tokens are not drawn from the plain softmax (temperature, top_p, top_k or min_p), so sampled-token estimators are "
            "biased by log(drawn/plain), logged as sampling/log_ratio. correct_sampling=true takes ratios to what was drawn from.",
            file=sys.stderr,
        )


class Models:
    """Loads each checkpoint once."""

    def __init__(self, run: Run, device: str, given: Given):
        self.run, self.device, self.given = run, device, given
        self.loaded: dict[str, LocalModel] = {}

    def load(self, name: str, dtype: str) -> Any:
        return load_model(name, dtype=dtype, device=self.device, trust_remote_code=self.run.trust_remote_code)

    def student(self, start: str, resumed: bool) -> Any:
        """The model that learns, with adapters where the run has them."""
        run = self.run
        weights = "float32" if run.dtype == "bfloat16" and run.lora is None else run.dtype
        if run.lora is not None:
            model = self.given.student.to(self.device) if self.given.student is not None else self.load(run.student, weights)
            if resumed:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, start, is_trainable=True)
            else:
                model = with_adapters(model, run.lora)
        elif self.given.student is not None and not resumed:
            model = self.given.student.to(self.device)
        else:
            model = self.load(start, weights)
        if run.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if run.lora is not None:
                model.enable_input_require_grads()
        check_head(model)
        return model

    def others(self, needs: Needs, tokenizer: Any, student: Any) -> dict[str, Scorer]:
        """Every other model the objective reads."""
        run, out = self.run, {}
        wanted = needs.models - INTERNAL
        if run.evaluate is not None and run.evaluate.teacher:
            wanted |= {"teacher"}
        for name in sorted(wanted):
            if name == "teacher":
                out[name] = self.teacher(tokenizer)
            elif name == "reference" and run.reference is None:
                out[name] = self.start_of(student)
            else:
                out[name] = self.frozen(run.reference if name == "reference" else run.models[name], tokenizer)
        return out

    def teacher(self, tokenizer: Any) -> Scorer:
        given = self.given.teacher
        if isinstance(self.run.teacher, str):
            return self.frozen(self.run.teacher, tokenizer, given)
        return Routed({k: self.frozen(v, tokenizer, (given or {}).get(k)) for k, v in self.run.teacher.items()})

    def frozen(self, name: str | None, tokenizer: Any, given: Any = None) -> LocalModel:
        """A frozen model, loaded once however many names it has."""
        loaded = given is not None and not isinstance(given, str)  # of several teachers some may be given, others named
        key = f"given {id(given)}" if loaded else str(name)
        if key not in self.loaded:
            if loaded:
                model = copy.deepcopy(given) if given is self.given.student else given.to(self.device)
            else:
                _same_tokenizer(str(name), tokenizer, self.run.trust_remote_code)
                model = self.load(str(name), self.run.teacher_dtype or self.run.dtype)
            model = model.eval().requires_grad_(False)
            check_head(model)
            self.loaded[key] = LocalModel(model, head_of(model))
        return self.loaded[key]

    def start_of(self, student: Any) -> LocalModel:
        """The student's initial weights: adapters switched off, or a frozen copy."""
        if self.run.lora is not None:
            return LocalModel(student, head_of(student), around=student.disable_adapter)
        if self.given.student is not None:
            model = copy.deepcopy(self.given.student)
        else:
            model = self.load(self.run.student, self.run.teacher_dtype or self.run.dtype)
        return LocalModel(model.eval().requires_grad_(False), head_of(model))


def _same_tokenizer(name: str, tokenizer: Any, trust_remote_code: bool) -> None:
    difference = same_tokenizer(tokenizer, load_tokenizer(name, trust_remote_code=trust_remote_code))
    if difference:
        raise UserError(
            f"the tokenizer of {name} is not the student's: {difference}. Token-level distillation compares distributions over the same ids; "
            "use a teacher of the student's family"
        )


def teachers(scorer: Any) -> dict[str, LocalModel]:
    """The teachers of a run by the name they are evaluated under."""
    if isinstance(scorer, Routed):
        return {f"teacher {k}": m for k, m in scorer.teachers.items()}
    return {"teacher": scorer}


def shared_vocabulary(heads: Sequence[Head], tokens: int) -> int | None:
    """Rows that every head keeps: those of the tokenizer's `tokens`; None where no head has more. The rest only pad the matrix."""
    sizes = [len(h.weight) for h in heads if h.weight is not None]
    if min(sizes) < tokens:
        raise UserError(
            f"a model's head has {min(sizes)} rows, fewer than the tokenizer's {tokens} tokens: it cannot score every token the student may "
            "write. Use models of one family"
        )
    return tokens if max(sizes) > tokens else None


def _cut(scorer: Any, vocab: int | None) -> Any:
    """A scorer whose heads keep only the shared rows."""
    if isinstance(scorer, Routed):
        return Routed({k: _cut(m, vocab) for k, m in scorer.teachers.items()})
    return replace(scorer, head=replace(scorer.head, vocab=vocab))


def read_rows(data: Data, rows: Sequence[Row] | None, seed: int) -> list[Row]:
    return load_rows(
        data.source if rows is None else rows, split=data.split, limit=data.limit, seed=seed, columns=data.columns or None
    )


def make_prompts(data: Data, rows: list[Row], tokenizer: Any) -> Prompts:
    prompts = Prompts(
        rows,
        tokenizer,
        max_prompt_length=data.max_prompt_length,
        template=data.template,
        system=data.system,
        chat=data.chat,
        enable_thinking=data.enable_thinking,
    )
    if prompts.dropped:
        print(f"opdkit: {prompts.report()}", file=sys.stderr)
    return prompts


def _fits(prompts: Prompts, model: Any, run: Run) -> None:
    """Prompt and response must fit the model's context: a longer prompt would be cut or answered blindly."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    room = limit - run.sampling.max_completion_length
    longest = max(prompts, key=lambda p: len(p.tokens))
    if len(longest.tokens) > room:
        raise UserError(
            f"prompt {longest.id} has {len(longest.tokens)} tokens; with max_completion_length={run.sampling.max_completion_length} only "
            f"{room} fit the model's context of {limit}. Set data.max_prompt_length={max(room, 0)} to drop longer prompts, "
            "or lower max_completion_length"
        )


def guide(scorers: Mapping[str, Scorer], share: float) -> Guide:
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


def _device(name: str) -> str:
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
