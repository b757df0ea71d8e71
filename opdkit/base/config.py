"""Strict configuration: nested dictionaries to frozen dataclasses and back, dotted
overrides, YAML.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from opdkit.base.errors import UserError, nearest, shown
from opdkit.base.files import read_text

C = TypeVar("C")
# groups that a single value may stand for, and the field it means
SHORT = {"data": "source", "teacher": "default"}
# of what a type is, in the words of YAML
EXAMPLES = {
    "int": ": give a whole number, such as 8",
    "float": ": give a number, such as 0.5 or 1e-5",
    "bool": ": write true or false",
    "str": ": give a text, in quotes where it looks like a number",
    "NoneType": ": leave it out, or write null",
}
INTEGERS = 2**63  # tensors and generators of random numbers hold integers below it


_hints = cache(get_type_hints)


def hints_of(cls: Any) -> Mapping[str, Any]:
    """The types of a class's fields."""
    return _hints(cls)


def build(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """A frozen dataclass from a nested mapping.

    Unknown keys and values of the wrong type are errors that name the key.
    """
    hints = hints_of(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(f"unknown key {where + str(key)!r}{nearest(str(key), known)}")
    made = {key: convert(hints[key], value, where + key) for key, value in values.items()}
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in made and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{where}{f.name} is missing: {cls.__name__} cannot run without it")
    try:
        built = cls(**made)
    except ValueError as error:
        raise UserError(f"{where.rstrip('.') or cls.__name__}: {error}") from error
    for key, value in made.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{where.rstrip('.') or cls.__name__}: {key}={value} must be a finite number: what "
                "is computed with it would be infinite or no number"
            )
    return built


def convert(hint: Any, value: Any, where: str) -> Any:
    """A plain value as the type a field declares."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first_that_fits(args, value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise UserError(
                f"{where} must be a group of settings ({', '.join(f.name for f in fields(hint))}), "
                f"not {shown(value)}"
            )
        return build(hint, value, where + ".")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{where} must be a list, not {shown(value)}: write [a, b]")
        inner = args[0] if len(args) == 2 and args[1] is ... else None
        if inner is None and len(value) != len(args):
            raise UserError(
                f"{where} must have {len(args)} entries, not {len(value)}: {shown(value)}"
            )
        return tuple(convert(inner or args[i], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping, not {shown(value)}: write {{a: b}}")
        return {str(k): convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value, where)
    if hint is types.NoneType:
        if value is None:
            return None
    elif (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (hint is int and isinstance(value, bool))
    ):
        if isinstance(value, int) and abs(value) >= INTEGERS:
            raise UserError(
                f"{where} must be an integer below 2^63, not {shown(value)}: larger ones have no "
                "place in a tensor"
            )
        return value
    kind = getattr(hint, "__name__", str(hint))
    example = EXAMPLES.get(kind, "")
    raise UserError(f"{where} must be {kind}, not {shown(value)}{example}")


def _number(value: float | str, where: str) -> float:
    """YAML reads 1e-5 as text."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise UserError(
            f"{where} must be a number, not {shown(value)}: write for example 1e-5"
        ) from None


def _first_that_fits(options: Sequence[Any], value: Any, where: str) -> Any:
    told: list[str] = []
    inside: UserError | None = None  # what a mapping or list that was meant as one is told
    # "1e-5" is text first where both are allowed
    for option in sorted(options, key=lambda o: o is float):
        try:
            return convert(option, value, where)
        except UserError as error:
            if is_dataclass(option) and isinstance(value, Mapping):
                raise  # it was meant as that group: its own message says more
            if (get_origin(option), type(value)) in ((dict, dict), (tuple, list)):
                inside = error
            told.append(getattr(option, "__name__", str(option)).replace("NoneType", "null"))
    if inside is not None:
        raise inside
    example = EXAMPLES.get(told[0], "") if len(told) <= 2 else ""
    raise UserError(f"{where} must be {' or '.join(told)}, not {shown(value)}{example}")


def plain(value: Any) -> Any:
    """A configuration as nested dictionaries, lists and scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def leaves(cls: Any, prefix: str = "") -> dict[str, str]:
    """Dotted path of every setting, by itself; and by its last name where that is unique (groups in
    `cls.full_names` apart).
    """
    paths: list[str] = []

    def walk(kind: Any, at: str) -> None:
        hints = hints_of(kind)
        for f in fields(kind):
            inner = next(
                (
                    h
                    for h in (hints[f.name], *get_args(hints[f.name]))
                    if is_dataclass(h) and isinstance(h, type)
                ),
                None,
            )
            paths.append(at + f.name)
            if inner is not None:
                walk(inner, f"{at}{f.name}.")

    walk(cls, prefix)
    named = [
        p for p in paths if p.split(".")[0] not in getattr(cls, "full_names", ()) or "." not in p
    ]
    names = [p.rpartition(".")[2] for p in named]
    short = {n: p for n, p in zip(names, named) if names.count(n) == 1}
    return {**short, **{p: p for p in paths}}


def override(values: dict[str, Any], cls: Any, key: str, value: Any) -> None:
    """Set one dotted key (or a last name that is unique) in a nested mapping, in place."""
    known = leaves(cls)
    words = key.split(".")
    heads = [".".join(words[:n]) for n in range(len(words), 0, -1)]
    head = next((h for h in heads if h in known and (h == key or _free(cls, known[h]))), None)
    if head is None:
        raise UserError(f"unknown key {key!r}{nearest(key, list(known))}")
    path = known[head] + key[len(head) :]
    *groups, last = path.split(".")
    inside = values
    for group in groups:
        if not isinstance(inside.get(group), dict):
            inside[group] = (
                {} if inside.get(group) is None else {SHORT.get(group, "name"): inside[group]}
            )
        inside = inside[group]
    inside[last] = value


def _free(cls: Any, path: str) -> bool:
    """Whether keys below a path are free (a mapping) rather than declared."""
    hint: Any = cls
    for name in path.split("."):
        hint = hints_of(next(h for h in (hint, *get_args(hint)) if is_dataclass(h)))[name]
    return any(get_origin(h) is dict for h in (hint, *get_args(hint)))


def parse_overrides(texts: Sequence[str]) -> list[tuple[str, Any]]:
    """`key=value` texts; values are YAML, so 3, true, null, [1, 2] and 1e-5 mean what they look
    like.
    """
    pairs = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(
                f"{text!r} is not an override: write key=value, for example "
                "optim.learning_rate=1e-5"
            )
        try:
            pairs.append((key, load_yaml(value) if value else ""))
        except UNREADABLE:
            raise UserError(
                f"{shown(text)}: the value is not valid YAML; put text with braces, brackets or "
                "colons in double quotes"
            ) from None
    return pairs


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice, and 2024-01-31 is text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice: keep one", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

# what a text that is not YAML raises: also dates out of range, integers of 5,000 digits, brackets
# 1,000 deep
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError, AttributeError)


def load_yaml(text: str) -> Any:
    """The value of a YAML text; raises one of `UNREADABLE`."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a mapping."""
    text = read_text(Path(path), "a run's YAML file")
    try:
        values = load_yaml(text)
    except UNREADABLE as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:400]
        raise UserError(
            f"{path} is not valid YAML: {why}. A run's file holds lines such as `steps: 100`; mend "
            "that place, or write the file anew"
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must hold keys and values, such as `steps: 100`, not {type(values).__name__}: "
            "give the path of a run's YAML file"
        )
    return values


def to_yaml(value: Any) -> str:
    return yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True)
