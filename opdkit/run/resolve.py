"""What a run leaves to be decided, decided: its folder, what goes by the device, paths in full."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opdkit.base.address import is_address
from opdkit.base.config import build, plain
from opdkit.base.errors import UserError
from opdkit.methods.expression import ADDRESS
from opdkit.methods.method import Method
from opdkit.models.device import device_of
from opdkit.run.setting_rules import AUTO
from opdkit.run.settings import Run
from opdkit.teachers.kinds import completed

PREFIXED = re.compile(r"(cached|vllm|judge|verifiers):(.+)", re.DOTALL)
# settings that may name files, and what of the method does
NAMES = ("student", "teacher", "data", "reward", "reference", "models", "sampler", "environment")


def resolve(run: Run, resume: bool = False, method: Method | None = None) -> Run:
    """The run as it is recorded: `opdkit train run.yaml` does the same again, from any folder.

    `method`: one that is not the run's to load.
    """
    run = on_device(run, device_of(run.device).startswith("cuda"))
    run = with_models(run, method or run.method_spec.load())
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
    found = {name: completed(said.get(name), usual.get(name)) for name in {*said, *usual}}
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
    for name in NAMES:
        values[name] = _full(values[name])
    if values["evaluate"] is not None:
        for name in ("data", "environment"):
            values["evaluate"][name] = _full(values["evaluate"][name])
    values["method"] = _full_method(values["method"])
    values["output"] = str(run.folder.expanduser().absolute())
    return build(Run, values)


def _full(value: Any) -> Any:
    """A text that names a file here, with its path in full; texts in mappings and lists as well."""
    if isinstance(value, Mapping):
        return {key: inner if key in _NOT_NAMES else _full(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_full(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if found := PREFIXED.fullmatch(value):
        return f"{found[1]}:{_full(found[2])}"
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
