"""What a run leaves to be decided, decided: its folder, what goes by the device, paths in full."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opdkit.annotators.kinds import KINDS as ANNOTATORS
from opdkit.base.address import is_address
from opdkit.base.config import build, plain
from opdkit.base.errors import UserError
from opdkit.environments.kinds import KINDS as ENVIRONMENTS
from opdkit.methods.expression import ADDRESS
from opdkit.methods.method import Method
from opdkit.models.device import device_of
from opdkit.rewards.score import FORMS
from opdkit.run.setting_rules import AUTO, OWN_TASKS
from opdkit.run.settings import Run
from opdkit.sampling.kinds import KINDS as SAMPLERS
from opdkit.teachers.kinds import KINDS as TEACHERS
from opdkit.teachers.kinds import completed

PREFIXED = re.compile(rf"(cached|vllm|judge|verifiers|soup|{'|'.join(ANNOTATORS)}):(.+)", re.DOTALL)
MODELS = tuple(name for name, kind in TEACHERS.items() if kind.alone)
# settings that may name files, and what of the method does; with the words that name something
# else in them, even where a file of that name lies here
NAMES: dict[str, tuple[str, ...]] = {
    "student": (),
    "teacher": MODELS,
    "data": (OWN_TASKS,),
    "reward": tuple(FORMS),
    "reference": MODELS,
    "models": MODELS,
    "sampler": tuple(SAMPLERS),
    "environment": tuple(ENVIRONMENTS),
    "annotate": ("student", "teacher", "reference", "rules", "model", *ANNOTATORS),
}


def resolve(run: Run, resume: bool = False, method: Method | None = None) -> Run:
    """The run as it is recorded: `opdkit train run.yaml` does the same again, from any folder.

    `method`: one that is not the run's to load.
    """
    run = on_device(run, device_of(run.device).startswith("cuda"))
    return placed(with_models(run, method or run.method_spec.load()), resume)


def placed(run: Run, resume: bool = False) -> Run:
    """With its folder decided, and paths in full."""
    if run.output == AUTO:
        run = replace(run, output=str(_folder(run, resume)))
    return in_full(run)


def on_device(run: Run, gpu: bool) -> Run:
    """With what goes by the device: on a GPU bfloat16 products and gradient checkpointing."""
    again = gpu if run.gradient_checkpointing is None else run.gradient_checkpointing
    dtype = ("bfloat16" if gpu else "float32") if run.dtype == AUTO else run.dtype
    return replace(run, dtype=dtype, gradient_checkpointing=again)


def with_models(run: Run, method: Method) -> Run:
    """With the models that a method brings in words of a run, where the run names no others."""
    said = {"teacher": run.teacher, "reference": run.reference, **run.models}
    usual = {name: dict(spec) for name, spec in method.models.items()}
    who = f"method {method.name or 'own'!r}"
    found = {n: completed(said.get(n), usual.get(n), n, who) for n in {*said, *usual}}
    models = {n: m for n, m in found.items() if m is not None and n not in ("teacher", "reference")}
    return replace(run, teacher=found["teacher"], reference=found["reference"], models=models)


def _folder(run: Run, resume: bool) -> Path:
    """runs/METHOD-NNN: the first number that is free, or with `resume` the last that is not."""
    stem = re.sub(r"[^\w.]+", "-", _short(str(run.method_spec))).strip("-")[:60] or "run"
    taken = [
        int(path.name.rpartition("-")[2])
        for path in Path("runs").glob(f"{stem}-*")
        if re.fullmatch(r"\d{3,}", path.name.rpartition("-")[2])
        and path.name.rpartition("-")[0] == stem
    ]
    if resume and not taken:
        raise UserError(
            f"there is no run runs/{stem}-NNN here to resume: name its folder with output=DIR"
        )
    return Path("runs") / f"{stem}-{max(taken, default=0) + (0 if resume else 1):03}"


def _short(method: str) -> str:
    """A method without the folders of its files and without its arguments."""
    method = ADDRESS.sub(lambda found: found[0].rpartition(":")[2], method)
    return re.sub(r"\([^()]*\)", "", method)


def in_full(run: Run) -> Run:
    """With the paths of everything that lies on this machine in full."""
    values = plain(run)
    for name, words in NAMES.items():
        known = (*words, *run.models) if name == "annotate" else words
        values[name] = _full(values[name], known)
    if values["evaluate"] is not None:
        for name in ("data", "environment"):
            values["evaluate"][name] = _full(values["evaluate"][name], NAMES[name])
    values["method"] = _full_method(values["method"])
    values["output"] = str(run.folder.expanduser().absolute())
    return build(Run, values)


def _full(value: Any, words: Collection[str] = ()) -> Any:
    """A text that names a file here, with its path in full, but for these words; texts in mappings
    and lists as well.
    """
    if isinstance(value, Mapping):
        return {k: inner if k in _NOT_NAMES else _full(inner, words) for k, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_full(inner, words) for inner in value]
    if not isinstance(value, str) or value in words:
        return value
    if found := PREFIXED.fullmatch(value):
        parts = found[2].split(",") if found[1] == "soup" else [found[2]]
        return f"{found[1]}:{','.join(_full(part.strip(), words) for part in parts)}"
    if is_address(value):
        path, _, name = value.rpartition(":")
        return f"{_here(path)}:{name}"
    return _here(value)


# texts that are no names of files, even if such a file lies here
_NOT_NAMES = (
    "template",
    "system",
    "columns",
    "split",
    "kind",
    "dtype",
    "api_key_env",
    "view",
    "weights",
    "form",
)


def _here(name: str) -> str:
    path = Path(name).expanduser()
    try:
        return str(path.absolute()) if name and path.exists() else name
    except OSError:  # a name that no file can have
        return name


def _full_method(method: Any) -> Any:
    """An expression or a group with the paths of its files in full."""
    if isinstance(method, str):
        return ADDRESS.sub(lambda found: _full(found[0]), method)
    if isinstance(method, Mapping):
        times = [_full_method(other) for other in method.get("times") or ()]
        return {**method, "name": _full_method(method["name"]), "times": times}
    return method
