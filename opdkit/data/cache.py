"""A folder of rollouts that a teacher has scored: written once by `opdkit cache-teacher`, read by
training in place of both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from opdkit.base import exact
from opdkit.base.errors import UserError
from opdkit.base.files import write_json
from opdkit.base.progress import progress
from opdkit.data.prompts import Prompts
from opdkit.data.shards import GROUP, Scored, Shard, file_digest
from opdkit.models.identity import Identity, has_digest
from opdkit.models.tokenizers import answer_end
from opdkit.types import NEVER_FRESH, DataRow, Prompt, Rollout, Sampling

KIND, FORMAT, MANIFEST = "opdkit cache", 1, "manifest.json"
OPEN_FILES, KEPT_GROUPS = 64, 16

# ----------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Origin:
    """What a cache was made from, and how: all that decides what is in it."""

    student: Identity  # who wrote the rollouts
    teacher: Identity  # who scored them
    tokenizer: str  # digest of the student's
    data: str  # digest of the prompts: ids, tokens and rows
    prompts: int
    sampling: Sampling
    seed: int
    top_k: int  # the teacher's most probable tokens stored at each position
    dtype: str
    teacher_dtype: str
    prompts_per_shard: int
    # who wrote the responses that the student was fine-tuned on
    sft_teacher: Identity | None = None

    @property
    def shards(self) -> int:
        return -(-self.prompts // self.prompts_per_shard)

    def notes(self) -> list[str]:
        """What is to be known of the pair of models before training on it."""
        if self.sft_teacher is None or self.sft_teacher.same(self.teacher):
            return []
        return [
            f"the student was fine-tuned on responses of {self.sft_teacher}, and {self.teacher} "
            "scored its rollouts: with two different teachers the gradient on stored rollouts is "
            "biased against that of on-policy distillation (arXiv 2604.13010)"
        ]

    def differences(self, other: Origin) -> list[str]:
        """What another cache is made from instead, setting by setting."""
        out = []
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, Identity) and isinstance(theirs, Identity):
                if mine.same(theirs):
                    continue
            elif mine == theirs:
                continue
            if isinstance(mine, Sampling):
                out += [
                    f"{n} {v} there, {getattr(theirs, n)} now"
                    for n, v in vars(mine).items()
                    if v != getattr(theirs, n)
                ]
            elif f.name in ("tokenizer", "data"):
                out.append(
                    f"another {f.name}"
                    if f.name == "tokenizer"
                    else "other prompts (their order, tokens or rows)"
                )
            else:
                out.append(f"{f.name} {mine} there, {theirs} now")
        return out


@dataclass(frozen=True)
class Entry:
    """A finished shard."""

    name: str
    sha256: str
    rollouts: int
    tokens: int  # of the responses


@dataclass(frozen=True)
class Manifest:
    """What is in a cache's folder."""

    origin: Origin
    entries: dict[str, Entry] = field(default_factory=dict)  # by name

    @property
    def complete(self) -> bool:
        return len(self.entries) == self.origin.shards

    @property
    def rollouts(self) -> int:
        return sum(e.rollouts for e in self.entries.values())

    @property
    def tokens(self) -> int:
        return sum(e.tokens for e in self.entries.values())

    def write(self, folder: Path) -> None:
        """The file, whole or not at all."""
        totals = {"complete": self.complete, "rollouts": self.rollouts, "tokens": self.tokens}
        entries = [asdict(self.entries[name]) for name in sorted(self.entries)]
        kind = {"kind": KIND, "format": FORMAT}
        try:
            write_json(
                folder / MANIFEST, {**kind, **asdict(self.origin), **totals, "shards": entries}
            )
        except OSError as error:
            raise UserError(
                f"{folder / MANIFEST} could not be written ({error.strerror or error}). Every "
                "finished shard stays; free some space, then run the same command again"
            ) from error


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def is_cache(source: Any) -> bool:
    """Whether a data source is a folder that `opdkit cache-teacher` wrote."""
    try:
        return KIND in (Path(source) / MANIFEST).read_text(encoding="utf-8")[:200]
    except (OSError, TypeError, ValueError):
        return False


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache."""
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no cache: it has no {MANIFEST}. Write one with `opdkit cache-teacher "
            f"... --out {folder}`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / MANIFEST} cannot be read ({error}): delete the folder and write it again"
        ) from error
    if not isinstance(said, dict) or said.get("kind") != KIND or said.get("format") != FORMAT:
        raise UserError(
            f"{folder} is no cache of format {FORMAT}, the one that is read here: write it again "
            "with this version's `opdkit cache-teacher`"
        )
    try:
        given = {f.name: said[f.name] for f in fields(Origin)}
        for name in ("student", "teacher", "sft_teacher"):
            given[name] = None if given[name] is None else Identity(**given[name])
        sampling = given["sampling"]
        given["sampling"] = Sampling(**{**sampling, "stop": tuple(sampling["stop"])})
        return Manifest(Origin(**given), {e["name"]: Entry(**e) for e in said["shards"]})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged ({error}): delete the folder and write it again"
        ) from error


# ------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Place:
    """Where a rollout is stored."""

    shard: str
    row: int


class Cache:
    """A verified cache.

    Prompts and places are held; rollouts and scores are read when asked for, a few row groups at a
    time.
    """

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, verified(folder)
        self.rows: list[DataRow] = []  # one per prompt, as `load_rows` gave them
        self.prompts: dict[str, np.ndarray] = {}  # prompt id -> token ids
        self.places: dict[str, Place] = {}  # rollout id
        self.groups: dict[str, list[str]] = {}  # prompt id -> ids of its rollouts
        self._shard = lru_cache(OPEN_FILES)(lambda name: Shard.open(folder / name))
        self._read = lru_cache(KEPT_GROUPS)(
            lambda name, group, columns: self._shard(name).read(columns, group)
        )
        for name in sorted(self.manifest.entries):
            for row, stored in enumerate(
                self._shard(name).read(("id", "prompt_id", "row", "prompt"))
            ):
                self._note(stored, Place(name, row))

    def _note(self, stored: dict[str, Any], place: Place) -> None:
        prompt = stored["prompt_id"]
        if prompt not in self.groups:
            self.rows.append(exact.loads(stored["row"]))
            self.prompts[prompt], self.groups[prompt] = stored["prompt"], []
        self.groups[prompt].append(stored["id"])
        self.places[stored["id"]] = place

    @property
    def origin(self) -> Origin:
        return self.manifest.origin

    def rollouts(self, prompt: Prompt) -> list[Rollout]:
        """The stored responses to a prompt."""
        self.refuse_unknown([prompt.id])
        if self.prompts[prompt.id].tolist() != prompt.tokens:
            raise UserError(
                f"prompt {prompt.id} has other tokens than the one in {self.folder}: its template, "
                "its tokenizer or the data have changed, so the stored responses answer another "
                "question. Leave data out to train on the cache's own prompts"
            )
        return [self._rollout(id, prompt) for id in self.groups[prompt.id]]

    def refuse_unknown(self, prompts: Sequence[str]) -> None:
        """Prompts that nothing is stored for."""
        absent = [id for id in prompts if id not in self.groups]
        if absent:
            raise UserError(
                f"{len(absent)} prompts of the data are not in {self.folder}, for example "
                f"{absent[0]}: it holds rollouts of {len(self.groups)} prompts of another set. "
                "Leave data out to train on these, or write a cache of this data with `opdkit "
                "cache-teacher`"
            )

    def scores(self, rollout: Rollout) -> Scored:
        """What the teacher said of a rollout, which must be one of the cache's own."""
        if rollout.id not in self.places:
            raise UserError(
                f"rollout {rollout.id} is not in {self.folder}, so its teacher never scored it: "
                "take the rollouts from the cache too (method lightning_opd, or rollouts=cache), "
                "or use a live teacher"
            )
        stored = self._stored(
            rollout.id, ("prompt", "tokens", "teacher_logp", "top_ids", "top_logp")
        )
        if (
            stored["tokens"].tolist() != rollout.tokens
            or stored["prompt"].tolist() != rollout.prompt
        ):
            raise UserError(
                f"rollout {rollout.id} has other tokens than the one that the teacher scored in "
                f"{self.folder}: stored log-probs say nothing of them. Use a live teacher, or "
                "rollouts of the cache as they are"
            )
        shape = (len(rollout.tokens), -1) if rollout.tokens else (0, self.origin.top_k)
        empty = np.zeros((len(rollout.tokens), 0))
        ids, logps = (
            stored[n].reshape(shape) if n in stored else empty for n in ("top_ids", "top_logp")
        )
        return Scored(stored["teacher_logp"], ids, logps)

    def _rollout(self, id: str, prompt: Prompt) -> Rollout:
        stored = self._stored(id, ("tokens", "finish", "text", "logp", "drawn_logp"))
        logp = stored["logp"].astype(np.float32).tolist()
        return Rollout(
            id=id,
            prompt=prompt.tokens,
            tokens=stored["tokens"].tolist(),
            trained=[True] * len(logp),
            logp=logp,
            drawn_logp=stored["drawn_logp"].astype(np.float32).tolist()
            if "drawn_logp" in stored
            else logp,
            group=prompt.group,
            question=prompt.question,
            policy_version=NEVER_FRESH,  # its recorded log-probs are rounded
            finish=stored["finish"],
            text=stored["text"],
            row=prompt.row,
        )

    def _stored(self, id: str, columns: tuple[str, ...]) -> dict[str, Any]:
        place = self.places[id]
        return self._read(place.shard, place.row // GROUP, columns)[place.row % GROUP]


def verified(folder: Path) -> Manifest:
    """The manifest of a complete cache whose every shard is as it was written."""
    manifest = read_manifest(folder)
    again = "Run the same `opdkit cache-teacher` command again"
    if not manifest.complete:
        raise UserError(
            f"{folder} is not complete: it has {len(manifest.entries)} of {manifest.origin.shards} "
            f"shards. {again}: it continues where it stopped"
        )
    for name, said in damages(folder, manifest).items():
        raise UserError(
            f"{folder / name} is damaged: {said}. {again}: it rewrites that shard and no other"
        )
    return manifest


def damages(folder: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with which finished shards; empty where all are as they were written."""
    out = {}
    with progress("Verifying", total=len(manifest.entries), unit="files") as tick:
        for number, (name, entry) in enumerate(manifest.entries.items(), 1):
            try:
                if file_digest(folder / name) != entry.sha256:
                    out[name] = "it is not what was written (its digest differs)"
            except FileNotFoundError:
                out[name] = "the file is missing"
            except OSError as error:
                out[name] = f"it cannot be read ({error.strerror or error})"
            tick(number)
    return out


def open_cache(folder: str | Path) -> Cache:
    """A cache, read and verified once however many ask for it, until one of its files changes."""
    path = Path(folder).expanduser().resolve()
    stats = sorted(
        (p.name, (s := p.stat()).st_size, s.st_mtime_ns) for p in path.glob("*") if p.is_file()
    )
    return _opened(path, tuple(stats))


@lru_cache(4)
def _opened(folder: Path, stats: tuple[tuple[str, int, int], ...]) -> Cache:
    return Cache(folder)


class CachedPrompts(Prompts):
    """The prompts of a cache: token ids as they were stored.

    How they were written as text is settled, so `settings` must be empty.
    """

    def __init__(
        self,
        cache: Cache,
        rows: Sequence[DataRow],
        tokenizer: Any,
        max_prompt_length: int | None = None,
        **settings: Any,
    ):
        refuse_tokenizer(cache, tokenizer)
        if given := [name for name, value in settings.items() if value is not None]:
            raise UserError(
                f"data.{given[0]} writes prompts as text, and those in {cache.folder} are token "
                f"ids already: leave it out, or give data.{given[0]} to `opdkit cache-teacher`"
            )
        self.cache = cache
        super().__init__(rows, tokenizer, max_prompt_length=max_prompt_length, chat=False)

    def turns(self, index: int) -> list[Prompt]:
        raise UserError(
            "a cache holds whole questions as token ids, not the messages of which turns could be "
            "made: name the data itself"
        )

    def tokens(self, row: DataRow) -> list[int]:
        return self.cache.prompts[row["id"]].tolist()

    @cached_property
    def end(self) -> int | None:
        """As in a chat: the stored prompts are of one where the tokenizer has a template."""
        return answer_end(self.tokenizer, chat=True)


def refuse_tokenizer(cache: Cache, tokenizer: Any) -> None:
    """A student whose ids mean other tokens than those that were stored."""
    if not has_digest(tokenizer, cache.origin.tokenizer):
        raise UserError(
            f"the student's tokenizer is not that of {cache.folder}: the stored token ids would "
            f"mean other text. Use a student of the same family as {cache.origin.student.name}, or "
            "write a cache with this one"
        )


def student_notes(cache: Cache, student: Identity) -> list[str]:
    """What is to be known before this student is trained on a cache."""
    notes = cache.origin.notes()
    if not cache.origin.student.same(student):
        notes.append(
            f"the rollouts in {cache.folder} were written by {cache.origin.student}, not by the "
            f"student {student}: training is off-policy from the first step. If that is not meant, "
            "start from the model that wrote them"
        )
    return notes
