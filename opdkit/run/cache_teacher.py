"""Writes a cache: the student rolled out once, its rollouts scored once by the teacher, stored for
training without either.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opdkit.base.errors import UserError
from opdkit.base.files import PARTIAL
from opdkit.base.lock import LOCK, locked
from opdkit.base.progress import progress
from opdkit.data import Prompts
from opdkit.data.cache import (
    MANIFEST,
    Entry,
    Manifest,
    Origin,
    damages,
    is_cache,
    read_manifest,
    shard_name,
)
from opdkit.data.shards import Scored, write_shard
from opdkit.methods.method import Method
from opdkit.models.body import kept_rows, shared_vocabulary
from opdkit.models.device import device_of
from opdkit.models.identity import identify, tokenizer_digest
from opdkit.models.load import load_tokenizer
from opdkit.objective.companion import Companions
from opdkit.objective.facts import LogpAtFact, LogpFact, TopFact
from opdkit.objective.grammar import Objective
from opdkit.objective.losses import Divergence, PolicyGradient
from opdkit.objective.needs import Needs
from opdkit.objective.signals import LogRatio
from opdkit.run.folder import refuse_several
from opdkit.run.open import Given, Models
from opdkit.run.prompts import make_prompts, read_rows
from opdkit.run.refuse import refuse_long
from opdkit.run.resolve import on_device
from opdkit.run.settings import Run
from opdkit.sampling.draws import check_sampling
from opdkit.teachers import route
from opdkit.teachers.base import cut, heads_of
from opdkit.teachers.local import LocalTeacher
from opdkit.train.gather import gather
from opdkit.types import Rollout, Watch

MOST_NUMBERS = (1 << 31) - 1  # in one column of a shard: Arrow counts a list's entries in 32 bits
# of prompts and responses that the teacher scores at once: what is held besides a shard's own
# numbers
SCORED_TOKENS = 1 << 14


def cache_teacher(
    run: Run,
    folder: str | Path,
    *,
    top_k: int = 0,
    sft_teacher: str | None = None,
    prompts_per_shard: int = 256,
) -> Manifest:
    """Rolls `run.student` out on every prompt of `run.data`, scores each rollout once with
    `run.teacher`, and stores both in a folder.

    top_k: the teacher's most probable tokens stored at each position. sft_teacher: who wrote the
    responses that the student was fine-tuned on; a warning where it is not the teacher. Interrupted
    and called again it continues with the first shard that is not there, and rewrites those that
    are damaged; the same settings make the same bytes (on a CPU, whatever was interrupted).
    """
    refuse_several()
    _refuse_sizes(run, top_k, prompts_per_shard)
    run = on_device(run, device_of(run.device).startswith("cuda"))
    method = reading(top_k)
    _refuse(run, method)
    with locked(folder := Path(folder)):
        try:
            return _cached(run, folder, method, top_k, sft_teacher, prompts_per_shard)
        finally:
            # a start that failed: its settings are no reason to refuse others
            if is_cache(folder) and not read_manifest(folder).entries:
                (folder / MANIFEST).unlink()


def _cached(
    run: Run,
    folder: Path,
    method: Method,
    top_k: int,
    sft_teacher: str | None,
    prompts_per_shard: int,
) -> Manifest:
    """The cache in a folder that is this process's alone."""
    rows = read_rows(run.prompts, None, run.seed)
    routes = run.teachers.routes
    for row in rows if routes else ():
        route(row["teacher"], routes, f"row {row['id']}")
    tokenizer = load_tokenizer(run.student, trust_remote_code=run.trust_remote_code)
    prompts = make_prompts(run.prompts, rows, tokenizer)
    origin = _origin(run, prompts, tokenizer, top_k, prompts_per_shard, sft_teacher)
    for note in origin.notes():
        print(f"opdkit: {note}", file=sys.stderr)
    known = _claim(folder, origin)
    missing = list(range(origin.shards)) if known is None else _missing(folder, known)
    if known is not None and not missing:
        return known
    sampler, teacher, device = _opened(run, method, prompts, tokenizer)
    if known is None:  # what has been downloaded meanwhile has a digest
        known = Manifest(
            replace(origin, student=identify(run.student), teacher=run.teachers.identity())
        )
        known.write(folder)
    return _filled(
        folder,
        known,
        missing,
        prompts,
        sampler,
        lambda rollouts: _scored(rollouts, teacher, method, device),
    )


def _refuse_sizes(run: Run, top_k: int, prompts_per_shard: int) -> None:
    """Sizes that are none, and files that could not hold what would be in them."""
    if top_k < 0 or prompts_per_shard < 1:
        raise UserError(
            f"top_k={top_k} must not be negative, and prompts_per_shard={prompts_per_shard} be at "
            "least 1"
        )
    sampling = run.sampling
    most = (
        prompts_per_shard
        * sampling.num_generations
        * sampling.max_completion_length
        * max(top_k, 1)
    )
    if most > MOST_NUMBERS:
        raise UserError(
            f"a file of {prompts_per_shard} prompts may hold {most:,} numbers in one column, more "
            f"than the {MOST_NUMBERS:,} that fit: lower --prompts-per-shard to "
            f"{max(prompts_per_shard * MOST_NUMBERS // most, 1)}"
        )


def _origin(
    run: Run,
    prompts: Prompts,
    tokenizer: Any,
    top_k: int,
    prompts_per_shard: int,
    sft_teacher: str | None,
) -> Origin:
    """What the cache is made from."""
    return Origin(
        student=identify(run.student),
        teacher=run.teachers.identity(),
        tokenizer=tokenizer_digest(tokenizer),
        data=_digest(prompts),
        prompts=len(prompts),
        sampling=run.sampling,
        seed=run.seed,
        top_k=top_k,
        dtype=run.dtype,
        teacher_dtype=run.teachers.precision(run.teacher_dtype or run.dtype),
        prompts_per_shard=prompts_per_shard,
        sft_teacher=None if sft_teacher is None else identify(sft_teacher),
    )


def _opened(run: Run, method: Method, prompts: Prompts, tokenizer: Any) -> tuple[Any, Any, str]:
    """Who writes and who scores, and the device that they are on."""
    device = device_of(run.device)
    models = Models(run, method, device, Given(), tokenizer)
    models.check_models()
    student: Any = LocalTeacher(run.student, run.dtype).load(models.context)
    models.end_as_teacher(student.model)
    teacher = models.others(student.model, Companions())["teacher"]
    longest = refuse_long(prompts, student.model, run.sampling, {"teacher": teacher})
    heads = [student.head, *heads_of(teacher)]
    prompts.refuse_unknown(shared_vocabulary(heads, tokenizer))
    vocab = kept_rows(heads, shared_vocabulary(heads, tokenizer))
    sampler = models.sampler(student.cut(vocab), Watch(), None, longest)
    sampler.sync(student.model, 0)
    return sampler, cut(teacher, vocab), device


def _filled(
    folder: Path,
    manifest: Manifest,
    missing: Sequence[int],
    prompts: Prompts,
    sampler: Any,
    score: Callable[[Sequence[Rollout]], list[Scored]],
) -> Manifest:
    """Writes the missing shards, one after the other; each is in the manifest as soon as it is on
    the disk.
    """
    origin, done = manifest.origin, 0
    parts = {
        number: slice(number * origin.prompts_per_shard, (number + 1) * origin.prompts_per_shard)
        for number in missing
    }
    total = (
        sum(len(range(*part.indices(len(prompts)))) for part in parts.values())
        * origin.sampling.num_generations
    )
    with progress("Caching", total=total, unit="rollouts") as tick:
        for number, part in parts.items():

            def sampled(finished: int, before: int = done) -> None:
                tick(before + finished)

            rollouts = sampler.sample(
                prompts[part], origin.sampling, seed=origin.seed, step=None, progress=sampled
            )
            scores = [s for some in _portions(rollouts) for s in score(some)]
            name = shard_name(number)
            sha256 = write_shard(folder / name, rollouts, scores, drawn=not origin.sampling.plain)
            entry = Entry(name, sha256, len(rollouts), sum(len(r.tokens) for r in rollouts))
            manifest = replace(manifest, entries={**manifest.entries, name: entry})
            manifest.write(folder)
            done += len(rollouts)
    return manifest


def reading(top_k: int) -> Method:
    """A method that reads of the teacher what is stored: the kinds of teachers are asked for it as
    for any method's needs.
    """
    objective = Objective(PolicyGradient(LogRatio("teacher", "student")))
    if top_k:
        objective += Divergence("forward_kl", k=top_k)
    return Method(objective, name="cache-teacher")


def _refuse(run: Run, method: Method) -> None:
    """What cannot work, before anything is read."""
    check_sampling(run.sampling)
    for teacher in [run.teachers, *run.teachers.routes.values()]:
        if teacher.own_data is not None:
            raise UserError(
                f"the teacher {teacher.own_data} is a cache itself, which knows no rollouts but "
                "its own: name the model that is to score, with --teacher MODEL"
            )
    if is_cache(run.prompts.source):
        raise UserError(
            f"the data {run.prompts.source} is a cache: name the data set whose prompts are to be "
            "answered, with --data"
        )
    if list(run.teachers.companions("teacher")) or any(v.late for v in run.teachers.views):
        raise UserError(
            "this teacher follows the student through a run, or reads what was said of its "
            "responses there, and a cache is written by no run: use fixed weights and a view of "
            "the data's own columns, or train with the teacher itself"
        )
    run.teachers.refuse(method.name, method.needs)


def _claim(folder: Path, origin: Origin) -> Manifest | None:
    """The manifest that is to be continued; None for a new folder.

    A cache of something else, or other files, are left alone.
    """
    try:
        files = [p for p in folder.iterdir() if not p.name.startswith((PARTIAL, LOCK))]
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be written ({error.strerror}): choose another with --out"
        ) from None
    for partial in folder.glob(PARTIAL + "*"):  # left by an interruption
        partial.unlink()
    if not files:
        return None
    if not is_cache(folder):
        raise UserError(
            f"{folder} holds other files ({files[0].name} ...): choose an empty or a new folder "
            "with --out"
        )
    known = read_manifest(folder)
    if not known.entries:  # a start that was killed
        return None
    if differences := known.origin.differences(origin):
        raise UserError(
            f"{folder} holds a cache made with other settings: {'; '.join(differences)}. Rows of "
            "both would be mixed up: choose another folder with --out, or delete this one"
        )
    return known


def _missing(folder: Path, manifest: Manifest) -> list[int]:
    """Numbers of the shards that are not there or not as they were written."""
    out, damaged = [], damages(folder, manifest)
    for number in range(manifest.origin.shards):
        name = shard_name(number)
        if name in damaged:
            print(f"opdkit: {name} is written again: {damaged[name]}", file=sys.stderr)
        if name in damaged or name not in manifest.entries:
            out.append(number)
    if kept := manifest.origin.shards - len(out):
        print(
            f"opdkit: {kept} of {manifest.origin.shards} shards are there already", file=sys.stderr
        )
    return out


def _portions(rollouts: Sequence[Rollout]) -> Iterator[list[Rollout]]:
    """Rollouts in their order, as many at once as fit into SCORED_TOKENS; at least one."""
    portion: list[Rollout] = []
    longest = 0
    for rollout in rollouts:
        longest = max(longest, len(rollout.prompt) + len(rollout.tokens))
        if portion and longest * (len(portion) + 1) > SCORED_TOKENS:
            yield portion
            portion, longest = [], len(rollout.prompt) + len(rollout.tokens)
        portion.append(rollout)
    yield portion


def _scored(rollouts: Sequence[Rollout], teacher: Any, method: Method, device: str) -> list[Scored]:
    """What the teacher says of each rollout."""
    wanted = Needs(method.needs.of("teacher"))
    facts = gather(rollouts, wanted, {"teacher": teacher}, device=device).facts
    k = max((fact.depth("teacher") for fact in wanted.facts), default=0)
    out = []
    for b, rollout in enumerate(rollouts):
        n = len(rollout.tokens)
        logp = facts[LogpFact("teacher")][b, :n].float().cpu()
        ids, at = logp[:, None][:, :0], logp[:, None][:, :0]
        if k:
            ids = facts[TopFact("teacher", k)][b, :n].cpu()
            at = facts[LogpAtFact("teacher", "teacher", k)][b, :n].float().cpu()
        out.append(Scored(logp.numpy(), ids.numpy(), at.numpy()))
    return out


def _digest(prompts: Prompts) -> str:
    """sha256 over every prompt in order: id, token ids, row."""
    digest = hashlib.sha256()
    with progress("Tokenising prompts", total=len(prompts), unit="prompts") as tick:
        for number, prompt in enumerate(prompts, 1):
            digest.update(
                json.dumps(
                    [prompt.id, prompt.tokens, prompt.row], sort_keys=True, default=str
                ).encode()
            )
            tick(number)
    return digest.hexdigest()
