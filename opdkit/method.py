"""Methods: what a paper proposes, by name or from one's own file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from opdkit.address import is_address, load_address
from opdkit.curricula import Curriculum, Plain
from opdkit.errors import UserError, nearest
from opdkit.facts import Needs, needs
from opdkit.methods import METHODS
from opdkit.objective import Loss, Objective, Term


@dataclass(frozen=True)
class Method:
    """An objective with what lies outside it: its curriculum."""

    objective: Objective
    curriculum: Curriculum = Plain()  # who writes the responses, to which prompts, what is remembered
    name: str = ""  # filled by `load`, as are the next three
    arguments: tuple[tuple[str, Any], ...] = ()
    summary: str = ""
    doc: str = ""

    @property
    def needs(self) -> Needs:
        """What the objective reads."""
        return needs(self.objective)

    def __str__(self) -> str:
        return str(self.objective)


def as_method(method: str | Method | Objective | Term | Loss, **arguments: Any) -> Method:
    """A method from its name, its address, or any part of one."""
    if isinstance(method, str):
        return load(method, **arguments)
    if arguments:
        raise UserError(f"arguments {', '.join(arguments)} belong to a method given by name, not to a finished one")
    return method if isinstance(method, Method) else Method(Objective(method), name="own")


def methods() -> list[str]:
    """Names of the built-in methods."""
    return list(METHODS)


def function_of(name: str) -> Callable[..., Method | Objective]:
    """The function behind a method's name, or behind `file.py:function`."""
    if name in METHODS:
        module, _, function = METHODS[name].partition(":")
        return getattr(import_module(module), function)
    if is_address(name):
        found = load_address(name)
        if not callable(found):
            raise UserError(f"{name} is not a function: a method is a function that returns an Objective or a Method")
        return found
    raise UserError(f"unknown method {name!r}{nearest(name, methods())} (one's own: file.py:function)")


def load(name: str, **arguments: Any) -> Method:
    """A method by name, or `file.py:function` for one's own; its hyper-parameters are the function's arguments."""
    function = function_of(name)
    signature = inspect.signature(function)
    for argument in arguments:
        if argument not in signature.parameters:
            raise UserError(f"method {name!r} has no argument {argument!r}{nearest(argument, list(signature.parameters))}")
    try:
        bound = signature.bind(**{k: _frozen(v) for k, v in arguments.items()})
        bound.apply_defaults()
        made = function(*bound.args, **bound.kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"method {name!r}: {error}") from error
    if isinstance(made, (Objective, Term, Loss)):
        made = Method(Objective(made))
    if not isinstance(made, Method):
        raise UserError(f"{name} returned {type(made).__name__}: a method is a function that returns an Objective or a Method")
    doc = inspect.getdoc(function) or ""
    return replace(made, name=name, arguments=tuple(bound.arguments.items()), summary=doc.split("\n")[0], doc=doc)


def _frozen(value: Any) -> Any:
    """Lists from YAML as tuples: parts of a method are hashable."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
