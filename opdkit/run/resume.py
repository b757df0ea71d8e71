"""A resumed run is the run that was begun: checkpoints record what decides what is learnt, and
every difference is named and refused, unless it is meant. Then run.yaml tells from which step on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from opdkit.annotators import AnnotatorSettings
from opdkit.base import exact
from opdkit.base.address import is_address
from opdkit.base.config import plain, to_yaml
from opdkit.base.errors import UserError
from opdkit.environments.kinds import environment_of
from opdkit.methods import expression
from opdkit.methods.method import spelled
from opdkit.models.adapters import has_adapters
from opdkit.models.identity import (
    Identity,
    identify,
    object_digest,
    tokenizer_digest,
    tokenizer_files_digest,
)
from opdkit.run.annotate import models_by_name, writers_for
from opdkit.run.ask import Asked
from opdkit.run.open import Given
from opdkit.run.settings import Data, Run
from opdkit.teachers.views.privileged import behind
from opdkit.train import checkpoint as checkpoints
from opdkit.types import DataRow

# settings of a run that may change on the way: how long it is, what it leaves, on what it runs
FREE = (
    *("output", "steps", "max_tokens", "checkpoint", "trackers", "keep_samples", "sample_every"),
    *("term_gradients_every", "device", "micro_batch_tokens", "gradient_checkpointing"),
    *("trust_remote_code", "cluster", "shard_teachers"),
)
FREE_EVALUATE = ("data", "every", "teacher")
READ = ("source", "split", "limit", "columns")  # of Data: the rows say what comes of them
# what a checkpoint's weights are made of: no flag can change it
FIXED = ("student", "lora")
FLAG = "--allow-changes"


@dataclass(frozen=True)
class Change:
    """A setting that was another up to a step, the last one done with it."""

    step: int
    setting: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.before} in the checkpoint, {self.now} now"


# ------------------------------------------------------------------------------------ what is kept


def record_of(run: Run, given: Given, asked: Asked) -> dict[str, Any]:
    """What decides what a run learns, as plain values: settings, and digests of models, rows and
    one's own code.
    """
    settings = {name: value for name, value in plain(run).items() if name not in FREE}
    settings["optim"]["learning_rate"] = run.learning_rate
    start = given.student if _starts_matter(run, given, asked) else None
    settings |= {
        "student": _model(run.student, start),
        "teacher": _teacher(run, given),
        "teacher_dtype": run.teachers.precision(run.teacher_dtype or run.dtype),
        "reference": None
        if run.reference is None
        else plain(run.model_named("reference").recorded()),
        "models": {name: plain(run.model_named(name).recorded()) for name in run.models},
        "method": _method(run, given, asked),
        "reward": "own" if given.reward is not None else _rewards(run.reward),
        "environment": _world(run.environment),
        "sampler": _sampler(run),
        "annotate": {name: _annotator(run, name, one) for name, one in asked.annotated.items()},
        "data": _data(run.prompts, asked.rows),
        "evaluate": None,
    }
    if run.evaluate is not None:
        kept = {k: v for k, v in plain(run.evaluate).items() if k not in FREE_EVALUATE}
        settings["evaluate"] = kept | {
            "environment": _world(run.evaluate.environment),
            "data": _data(run.evaluate.prompts, asked.eval_rows or []),
        }
    if asked.stored is not None:
        shards = [entry.sha256 for entry in asked.stored.manifest.entries.values()]
        settings["cached_rollouts"] = _digested(str(asked.stored.folder), repr(shards))
    settings["tokenizer"] = _tokenizer(run, given)
    return settings


def _starts_matter(run: Run, given: Given, asked: Asked) -> bool:
    """Whether the weights that a student had at first are read after a resume too."""
    reads = any(run.model_named(name).starts_student for name in asked.method.opened)
    return reads or run.lora is not None or has_adapters(given.student)


def _digested(name: str, content: str) -> dict[str, Any]:
    return {"name": name, "digest": hashlib.sha256(content.encode()).hexdigest()}


def _tokenizer(run: Run, given: Given) -> dict[str, Any]:
    if given.tokenizer is None:
        return {"name": run.student, "digest": tokenizer_files_digest(run.student)}
    template = getattr(given.tokenizer, "chat_template", None)
    digest = hashlib.sha256(f"{tokenizer_digest(given.tokenizer)} {template}".encode())
    return {"name": "a loaded tokenizer", "digest": f"object {digest.hexdigest()}"}


def _model(name: str, loaded: Any = None) -> dict[str, Any]:
    return plain(identify(name) if loaded is None else Identity(name, object_digest(loaded)))


def _teacher(run: Run, given: Given) -> dict[str, Any]:
    if given.teacher is None:
        return plain(run.teachers.recorded())
    if isinstance(given.teacher, Mapping):
        return {
            str(name): _model(one) if isinstance(one, str) else _model(str(name), one)
            for name, one in given.teacher.items()
        }
    loaded = Identity(str(run.teacher), object_digest(given.teacher))
    return plain(behind(loaded, run.teachers.views))


def _method(run: Run, given: Given, asked: Asked) -> Any:
    if given.method is not None:
        return f"own: {given.method}"
    name = spelled(asked.method)
    text = str(run.method_spec)
    return _code(text if name == "own" else name, expression.ADDRESS.findall(text))


def _code(name: str | None, addresses: list[str] | list[str | None]) -> Any:
    """A name, with a digest of the files of one's own that it names."""
    files = [text.rpartition(":")[0] for text in addresses if text and is_address(text)]
    if not files:
        return name
    short = reduce(lambda text, file: text.replace(file, Path(file).name), files, str(name))
    return _digested(
        str(name), repr([short, *(Path(file).expanduser().read_bytes() for file in files)])
    )


def _rewards(given: Any) -> Any:
    """A reward, or several by name, with digests of the files of one's own."""
    if isinstance(given, Mapping):
        return {name: _rewards(one) for name, one in given.items()}
    return _code(given, [given])


def _world(given: Any) -> Any:
    """An environment's settings, with a digest of its file where it is one's own."""
    if given is None:
        return None
    world = environment_of(given)
    name = getattr(world, "name", None)
    more = {"name": _code(name, [name])} if isinstance(name, str) else {}
    return {"kind": world.kind, **plain(world), **more}


def _sampler(run: Run) -> dict[str, Any]:
    """Its kind, and the numbers that it computes in; where it is and what it takes may change."""
    settings = run.sampler_settings
    return {"kind": settings.kind, "dtype": getattr(settings, "dtype", None)}


def _annotator(run: Run, name: str, settings: AnnotatorSettings) -> dict[str, Any]:
    """Its kind and settings, with digests of one's own code and of the models in them; not where
    these are reached, which may be elsewhere by then.
    """
    code = {address: _code(address, [address]) for address in settings.code}
    models, known = writers_for(run, name, settings), models_by_name(run)  # recorded already
    writers = [
        plain(models[spec].recorded()) if spec in models and spec not in known else spec
        for spec in map(str, settings.writers)
    ]
    where = [*settings.writers, list(settings.writers)]
    kept = {k: v for k, v in plain(settings).items() if v not in where}
    return {"kind": settings.kind, **kept, "code": code, "writers": writers}


def _data(data: Data, rows: list[DataRow]) -> dict[str, Any]:
    """How rows become prompts, and two digests of them: in their order, and in any."""
    each = [
        hashlib.sha256(exact.dumps(row, _kind, sort_keys=True).encode()).digest() for row in rows
    ]
    ordered = hashlib.sha256(b"".join(each)).hexdigest()
    return {
        **{name: value for name, value in plain(data).items() if name not in READ},
        "rows": {
            "name": f"{len(rows)} rows of {data.source}",
            "digest": ordered,
            "in_any_order": hashlib.sha256(b"".join(sorted(each))).hexdigest(),
        },
    }


def _kind(value: Any) -> str:
    """Something in a row that has no form on paper: by its type, the same in every process."""
    return type(value).__qualname__


# --------------------------------------------------------------------------------- what is compared


def agreed(run: Run, now: dict[str, Any], checkpoint: Path | None, allow: bool) -> dict[str, Any]:
    """The record of a run that goes on from a checkpoint: its settings, and the changes on the way.

    Differences are refused, or noted where they are allowed; a checkpoint without a record is one
    of an earlier version, of which nothing is known.
    """
    stored = {} if checkpoint is None else checkpoints.recorded(checkpoint)
    if checkpoint is None or not stored:
        return {"settings": now, "changes": []}
    step = int(checkpoint.name.rpartition("-")[2])
    found = [
        Change(step, *told) for told in differences(stored["settings"], now, plain(_unset(run)))
    ]
    for change in found:
        if change.setting.split(".")[0] in FIXED:
            raise UserError(
                f"{change}: the weights in {checkpoint} are made so, and cannot be made otherwise "
                "on the way. Give what is stored, or start a new run with output=DIR, whose "
                f"student may be {run.folder}/model"
            )
    if found and not allow:
        raise UserError(
            f"{checkpoint} was written by a run with other settings, and to go on with these would "
            f"make one run of two: {'; '.join(map(str, found))}. Give the stored ones, start a new "
            f"run with output=DIR, or, where the change is meant, add {FLAG} (in Python: "
            "allow_changes=True): run.yaml then tells from which step it held"
        )
    return {"settings": now, "changes": [*stored["changes"], *map(plain, found)]}


def _unset(run: Run) -> Run:
    """A run of nothing but defaults: what a setting was before there was such a setting."""
    return Run(student=run.student, data=run.data, teacher=run.teacher)


def differences(
    before: Any, now: Any, usual: Any = None, at: str = ""
) -> list[tuple[str, str, str]]:
    """(setting, before, now) wherever two records differ.

    Arguments:
        usual: the values of settings that are absent before, as a newer version has added them.
        at: the name of what is compared.
    """
    if _is_digested(before) and _is_digested(now):
        return _other(before, now, at)
    if isinstance(before, dict) and isinstance(now, dict):
        usual = usual if isinstance(usual, dict) else {}
        found = []
        for key in {**before, **now}:
            name = f"{at}.{key}" if at else str(key)
            known = before.get(key, usual.get(key))
            found += differences(known, now.get(key), usual.get(key), name)
        return found
    return [] if _same(before, now) else [(at, _shown(before), _shown(now))]


def _same(before: Any, now: Any) -> bool:
    """As they are once written and read."""
    return exact.dumps(before, sort_keys=True) == exact.dumps(now, sort_keys=True)


def _is_digested(value: Any) -> bool:
    return isinstance(value, dict) and "digest" in value


def _other(before: dict[str, Any], now: dict[str, Any], at: str) -> list[tuple[str, str, str]]:
    """Two things of which digests are known, or names alone."""
    digests = before["digest"], now["digest"]
    comparable = None not in digests and len({str(d).startswith("object") for d in digests}) == 1
    if before["digest"] == now["digest"] if comparable else before["name"] == now["name"]:
        return []
    if before.get("in_any_order", "") == now.get("in_any_order"):
        return [(at, before["name"], "the same in another order")]
    told = now["name"] if before["name"] != now["name"] else f"another {now['name']}"
    return [(at, before["name"], told)]


def _shown(value: Any) -> str:
    if _is_digested(value):
        return str(value["name"])
    return "null" if value is None else exact.dumps(value)


# ------------------------------------------------------------------------------------- what is told


def run_yaml(run: Run, changes: list[dict[str, Any]]) -> str:
    """The resolved run; above it, what was otherwise up to which step."""
    lines = [f"# {c['setting']}: {c['before']} up to step {c['step']}\n" for c in changes]
    head = "# Resumed with changes. What differs from the settings below:\n" if lines else ""
    return head + reduce(str.__add__, lines, "") + to_yaml(run)
