"""Train a run: `distill` from Python, `execute` from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opdkit.base.errors import UserError
from opdkit.base.files import path_text, read_lines, write_json
from opdkit.base.interrupt import stoppable
from opdkit.base.launched import processes
from opdkit.data.memory import as_rows
from opdkit.eval import EvalResult
from opdkit.methods.method import as_method
from opdkit.models.device import device_of
from opdkit.report import write_report
from opdkit.run.build import prepare
from opdkit.run.export import write_final
from opdkit.run.folder import Claim, claimed, refuse_apart
from opdkit.run.open import Given
from opdkit.run.origin import write_origin
from opdkit.run.plan import fitting, use_of
from opdkit.run.resolve import resolve
from opdkit.run.settings import Run, make_run, set_value
from opdkit.train.checkpoint import State
from opdkit.train.job import Job
from opdkit.train.loop import train
from opdkit.train.mesh import joined
from opdkit.types import Rollout

Show = Callable[[int, Mapping[str, float]], None]
Use = Callable[[Sequence[Rollout], int, Mapping[str, float]], dict[str, float]]


@dataclass(frozen=True)
class Result:
    """What a run leaves."""

    model: Path  # loads with plain from_pretrained; adapters are merged in
    folder: Path
    metrics: list[dict[str, Any]]  # one entry per step
    evaluations: list[EvalResult]
    report: Path


def distill(
    student: Any,
    teacher: Any,
    prompts: Any,
    method: Any = "opd",
    *,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    reward: Any = None,
    eval_prompts: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    allow_changes: bool = False,
    **settings: Any,
) -> Result:
    """Distil a teacher into a student; returns the new model's path and the metrics.

    student, teacher: names, paths or loaded models (teacher also {route: model}), with adapters or
    without; of a student with adapters these are trained, and merged in the end. A teacher of None
    is the one that the method brings, such as the student itself. tokenizer,
    teacher_tokenizer: of loaded models; a loaded teacher has the student's unless its own is given.
    prompts: a path, a hub name, a list of texts or of rows, a table (pandas, polars, pyarrow), a
    dictionary of columns. resume: continue from the newest checkpoint, as it records settings and
    data; allow_changes: with others, which run.yaml then tells. method: a name,
    `file.py:function`, a `Method` or an objective. settings: any of `Run`'s, dotted with `__` or by
    their last name where it is unique: steps=50, num_generations=4, sampling__temperature=0.8.

    Called in the main thread, it turns SIGTERM and SIGHUP into an exception that is both
    KeyboardInterrupt and SystemExit, as long as it runs and where the program has not decided on
    that signal: as with Ctrl-C the run is saved, and `resume=True` continues it. A handler of one's
    own, or SIG_IGN, stays: to save the run, let the handler raise KeyboardInterrupt.
    """
    student, teacher = map(path_text, (student, teacher))
    prompts, eval_prompts = map(path_text, (prompts, eval_prompts))
    values: dict[str, Any] = {
        "student": _label(student),
        "teacher": _labels(teacher),
        "data": _source(prompts),
        "method": method if isinstance(method, str) else "own",
    }
    if eval_prompts is not None:
        values["evaluate"] = {"data": {"source": _source(eval_prompts)}}
    texts = reward.values() if isinstance(reward, Mapping) else [reward]
    if plain := reward is not None and all(isinstance(text, str) for text in texts):
        values["reward"] = reward
    for key, value in settings.items():
        set_value(values, key.replace("__", "."), path_text(value))
    given = Given(
        None if isinstance(student, str) else student,
        None if isinstance(teacher, str) else teacher,
        tokenizer,
        None if isinstance(prompts, str) else as_rows(prompts),
        None if eval_prompts is None or isinstance(eval_prompts, str) else as_rows(eval_prompts),
        None if isinstance(method, str) else as_method(method),
        None if plain else reward,
        teacher_tokenizer=teacher_tokenizer,
    )
    return execute(
        make_run(values), given, resume=resume, overwrite=overwrite, allow_changes=allow_changes
    )


def execute(
    run: Run,
    given: Given = Given(),
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
) -> Result:
    """Train a run from its first step, or from its newest checkpoint with `resume`.

    SIGTERM and SIGHUP end it as Ctrl-C does.
    """
    if resume and overwrite:
        raise UserError(
            "resume continues the run in the output folder, overwrite replaces it: choose one of "
            "them"
        )
    if allow_changes and not resume:
        raise UserError(
            "allow_changes is about settings that a resumed run changes: add resume, or leave it "
            "out"
        )
    if run.placement is not None and given.sampler is None and not given.others:
        return _placed(run, given, resume, overwrite, allow_changes)
    with stoppable(), joined(device_of(run.device)) as mesh:
        run = mesh.first(lambda: resolve(run, resume, given.method))
        claim = partial(claimed, run, resume=resume, overwrite=overwrite)
        with claim() if mesh.rank == 0 else nullcontext(Claim(run.folder, True)) as claimed_:
            mesh.every(None)  # the folder is claimed
            refuse_apart(run.folder, mesh)
            job, state = prepare(run, given, resume=resume, allow_changes=allow_changes, mesh=mesh)
            return _execute(run, given, job, state, claimed_)


def _placed(run: Run, given: Given, resume: bool, overwrite: bool, changes: bool) -> Result:
    """A run on a cluster: its processes are given names, and load what these name."""
    if given != Given():
        raise UserError(
            "a run on a cluster loads its models, data and code in other processes, which have "
            "only their names: give names and files instead of loaded objects, or leave cluster "
            "out"
        )
    if processes() > 1:
        raise UserError(
            f"this is one of {processes()} processes already (--nproc, torchrun), and cluster="
            f"{run.cluster} starts its own: choose one of the two"
        )
    assert run.placement is not None
    done = run.placement.train(run, resume=resume, overwrite=overwrite, allow_changes=changes)
    return _left(done.folder)


def _left(folder: Path) -> Result:
    """What a run has left in its folder."""
    evaluations = [EvalResult.from_dict(line) for line in read_lines(folder / "evals.jsonl")]
    metrics = read_lines(folder / "metrics.jsonl")
    return Result(folder / "model", folder, metrics, evaluations, folder / "report.html")


def _execute(run: Run, given: Given, job: Job, state: State, claim: Claim) -> Result:
    job.begun, job.recorder.show = claim.begin, _after(claim.begin, job.recorder.show)
    if given.student is None and given.teacher is None and given.method is None:
        job.recorder.use = _estimated(run)
        job.micro_batch_tokens = fitting(run) or job.micro_batch_tokens
    write_origin(run.folder, state.step, str(job.student.device))
    with job.recorder.trackers:
        state = train(job, state)
    claim.begin()
    final = run.folder / "model"
    write_final(final, job)
    if job.mesh.rank:
        return Result(final, run.folder, [], [], run.folder / "report.html")
    done = {
        "method": str(run.method_spec),
        "objective": str(job.objective),
        "steps": state.step,
        "tokens": state.tokens,
        "best": state.best,
        "best_step": state.best_step,
    }
    write_json(run.folder / "summary.json", done)
    write_report(run.folder)
    return _left(run.folder)


def _after(first: Callable[[], None], show: Show | None) -> Show:
    """What is told of each step, once something else is done."""

    def shown(step: int, metrics: Mapping[str, float]) -> None:
        first()
        if show is not None:
            show(step, metrics)

    return shown


def _estimated(run: Run) -> Use | None:
    """The share of the device's arithmetic that steps use; nothing where it cannot be reckoned: an
    estimate ends no run.
    """

    def unknown(error: Exception) -> dict[str, float]:
        print(f"opdkit: the use of the device is not logged ({error})", file=sys.stderr)
        return {}

    try:
        use = use_of(run)
    except Exception as error:
        unknown(error)
        return None
    if use is None:
        return None

    def used(
        rollouts: Sequence[Rollout], sampled: int, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        try:
            return use(rollouts, sampled, seconds)
        except Exception as error:
            return unknown(error)

    return used


def _source(prompts: Any) -> str:
    return prompts if isinstance(prompts, str) else "in memory"


def _labels(teacher: Any) -> Any:
    """What stands for a teacher, or for several by route, in the settings."""
    if isinstance(teacher, Mapping):
        return {str(k): _label(v) for k, v in teacher.items()}
    return None if teacher is None else _label(teacher)


def _label(model: Any) -> str:
    return (
        model
        if isinstance(model, str)
        else str(getattr(getattr(model, "config", None), "_name_or_path", "") or "in memory")
    )
