"""Methods: what a paper proposes, by name or from one's own file."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from opdkit.base.address import is_address, load_address, path_of
from opdkit.base.config import convert
from opdkit.base.errors import UserError, nearest, shown
from opdkit.base.own_code import CALL_SECONDS, own_code
from opdkit.curricula import Curriculum, Plain, together
from opdkit.methods import METHODS, expression
from opdkit.objective import algebra, credits, ratio_layer
from opdkit.objective.actions import Actions
from opdkit.objective.companion import Companion
from opdkit.objective.formula import Number, Signal
from opdkit.objective.grammar import Loss, Objective, Term
from opdkit.objective.needs import INTERNAL, Needs, needs


@dataclass(frozen=True)
class Method:
    """An objective with what lies outside it: its curriculum, and whether the teacher takes part in
    decoding.
    """

    objective: Objective
    # who writes the responses, to which prompts, what is remembered
    curriculum: Curriculum = Plain()
    # share of the teacher in the distribution that the student's tokens are drawn from
    teacher_mix: float = 0.0
    # what stands beside the student and its formula does not ask for itself: copies of the student
    companions: tuple[Companion, ...] = ()
    # who its models are unless a run says otherwise, in the words of a run's `teacher`: {"teacher":
    # {"kind": "self", "weights": "ema", "rate": 0.05, "view": "peer"}}
    models: Mapping[str, Any] = field(default_factory=dict, hash=False)
    # what is to be noted on its rollouts before they are scored, in the words of a run's `annotate`
    annotate: Mapping[str, Any] = field(default_factory=dict, hash=False)
    # what its models write, where that is bins of an action, not text
    actions: Actions | None = None
    name: str = ""  # filled by `load`, as are the next three
    arguments: tuple[tuple[str, Any], ...] = ()
    summary: str = ""
    doc: str = ""
    # whether the curriculum has said whose tokens the terms are about that do not say it: it does
    # so of those that it was made with, not of another method's that are added later
    settled: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        authors = self.curriculum.authors
        if not self.settled and authors != ("student",):
            object.__setattr__(self, "objective", self.objective.by_default_of(authors))
        object.__setattr__(self, "settled", True)
        named: dict[str, Companion] = {}
        for companion in self.companions:
            name = companion.model
            if name in INTERNAL:
                raise UserError(
                    f"{companion} calls itself the model {name!r}, which is the run's own: give it "
                    "another name"
                )
            if name and named.setdefault(name, companion) != companion:
                raise UserError(
                    f"{named[name]} and {companion} are both to be read as the model {name!r}, "
                    "which can be only one of them: give one another name (model=...)"
                )

    @property
    def needs(self) -> Needs:
        """What the objective reads."""
        what = f"method {self.name or 'own'!r} fails where its formula is run once on made-up facts"
        with own_code(what, path_of(self.name), CALL_SECONDS):
            return needs(self.objective)

    @property
    def brought(self) -> frozenset[str]:
        """Models that stand beside the student, by name."""
        return frozenset(c.model for c in self.companions if c.model)

    @property
    def opened(self) -> frozenset[str]:
        """Models that a run opens for it: what the objective reads but the student itself and
        what it brings.
        """
        return self.needs.models - INTERNAL - self.brought

    def __str__(self) -> str:
        return str(self.objective)

    def __mul__(self, other: Method | Signal | Number) -> Method:
        """Every term times a number, a signal, or another method's weight (`weight_of`);
        denominators stay, as does who writes.
        """
        mine = spelled(self)
        if isinstance(other, Method):
            theirs = spelled(other)
            by = algebra.weight(other.objective, theirs)
            name = f"{expression.bracketed(mine)} * {expression.bracketed(theirs, True)}"
            doc = f"{mine}, every term times the weight of {theirs}:\n\n    {by}"
            return _composed(
                self, other, name, doc, algebra.weigh(self.objective, mine, by, theirs), True
            )
        if isinstance(other, Signal):
            return _called(
                replace(self, objective=algebra.weigh(self.objective, mine, other, str(other))),
                "own",
                f"{mine}, every term times {other}.",
            )
        if isinstance(other, (int, float)):
            name = f"{other!r} * {expression.bracketed(mine, True)}"
            known = "own" if mine == "own" else name
            return _called(
                replace(self, objective=algebra.scale(self.objective, other)),
                known,
                f"{other:g} times {mine}.",
            )
        return NotImplemented

    __rmul__ = __mul__

    def __add__(self, other: Method) -> Method:
        """The terms of both."""
        if not isinstance(other, Method):
            return NotImplemented
        name = f"{spelled(self)} + {spelled(other)}"
        return _composed(
            self,
            other,
            name,
            f"The terms of {name.replace(' + ', ' and of ')}.",
            self.objective + other.objective,
            False,
        )


# what composing fills in
COMPOSED = (
    "objective",
    "curriculum",
    "companions",
    "models",
    "annotate",
    "actions",
    "name",
    "arguments",
    "summary",
    "doc",
    "settled",
)


# what is left to do where two methods contradict each other
ALONE = "Run one of them, or give them arguments with which they agree"


def _composed(
    base: Method, other: Method, name: str, doc: str, objective: Objective, as_weight: bool
) -> Method:
    """Two methods as one.

    What else they bring must be the same; a weight may also bring nothing.
    """
    names = spelled(base), spelled(other)
    brought = together.keeper(other.curriculum, names[1]) if as_weight else other.curriculum
    for part in (f for f in fields(Method) if f.name not in COMPOSED):
        mine, theirs = getattr(base, part.name), getattr(other, part.name)
        if mine != theirs and not (as_weight and theirs == part.default):
            raise UserError(
                f"{name}: {names[0]} has {part.name}={mine}, {names[1]} {part.name}={theirs}, "
                f"and only one can hold. {ALONE}"
            )
    # who teaches is for the method that is weighed to say
    mine = base.needs.models if as_weight else frozenset()
    brought_models = {name: spec for name, spec in other.models.items() if name not in mine}
    if not as_weight:
        _refuse_another(base, other, names)
        _refuse_another(other, base, names[::-1])
    made = replace(
        base,
        objective=objective,
        curriculum=together.join(base.curriculum, brought, names),
        companions=tuple(dict.fromkeys(base.companions + other.companions)),
        models=_both(base.models, brought_models, names, "model"),
        annotate=_both(base.annotate, other.annotate, names, "annotation"),
        actions=_one(base.actions, other.actions, names),
    )
    return _called(made, "own" if "own" in names else name, doc)


def _refuse_another(bringing: Method, reading: Method, names: tuple[str, str]) -> None:
    """The error where one method says who the reference is, and another means the run's own."""
    name = "reference"
    if name in bringing.models and name not in reading.models and name in reading.needs.models:
        raise UserError(
            f"{names[0]} and {names[1]} cannot be combined: the model {name!r} of the first is "
            f"{bringing.models[name]}, that of the second the run's own, by default the student as "
            f"it began, and only one can hold. {ALONE}"
        )


def _both(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], names: tuple[str, str], what: str
) -> dict[str, Any]:
    """What two methods say by name of their models or annotations; refused where they say
    different things of one.
    """
    for name in sorted(set(mine) & set(theirs)):
        if mine[name] != theirs[name]:
            raise UserError(
                f"{names[0]} and {names[1]} cannot be combined: the {what} {name!r} of the first "
                f"is {mine[name]}, that of the second {theirs[name]}, and only one can hold. "
                f"{ALONE}"
            )
    return {**mine, **theirs}


def _one(mine: Actions | None, theirs: Actions | None, names: tuple[str, str]) -> Actions | None:
    """What the models of two methods write; that of the one that says it."""
    if None not in (mine, theirs) and mine != theirs:
        raise UserError(
            f"{names[0]} and {names[1]} cannot be combined: models write {mine} in the first, "
            f"{theirs} in the second, and one student learns from both"
        )
    return mine or theirs


def _called(method: Method, name: str, doc: str) -> Method:
    return replace(method, name=name, arguments=(), summary=doc.split("\n")[0], doc=doc)


def spelled(method: Method) -> str:
    """A method as an expression that `load` reads: its name and the arguments that are not at their
    default; else "own".
    """
    if not method.arguments:
        return method.name or "own"
    parameters = inspect.signature(function_of(method.name)).parameters
    usual = {k: p.default for k, p in parameters.items()}
    # the ratio layer's are usual where the function's own objective has them
    if any(k not in usual for k, _ in method.arguments):
        bare = load(method.name, **{k: v for k, v in method.arguments if k in usual})
        usual = dict(bare.arguments) | usual
    given = {k: v for k, v in method.arguments if k not in usual or v != usual[k]}
    if any(not _plain(v) for v in given.values()):
        return "own"
    return (
        f"{method.name}({', '.join(f'{k}={v!r}' for k, v in given.items())})"
        if given
        else method.name
    )


def _plain(value: Any) -> bool:
    """Whether a value can be written in an expression."""
    return (
        all(map(_plain, value))
        if isinstance(value, tuple)
        else value is None or isinstance(value, (bool, int, float, str))
    )


def weight_of(method: str | Method | Objective | Term | Loss, **arguments: Any) -> Signal:
    """What a method multiplies its loss by, as a signal: `load("tropd").objective *
    weight_of("iw_opd")`.
    """
    made = as_method(method, **arguments)
    return algebra.weight(made.objective, spelled(made))


def as_method(method: str | Method | Objective | Term | Loss, **arguments: Any) -> Method:
    """A method from its name, its address, or any part of one."""
    if isinstance(method, str):
        return load(method, **arguments)
    if arguments:
        raise UserError(
            f"arguments {', '.join(arguments)} belong to a method given by name, not to a finished "
            "one"
        )
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
            raise UserError(
                f"{name} is not a function: name one that returns an Objective or a Method"
            )
        return found
    raise UserError(
        f"unknown method {name!r}{nearest(name, methods())} (one's own: file.py:function)"
    )


def load(name: str, /, **arguments: Any) -> Method:
    """A method by name, or `file.py:function` for one's own; its hyper-parameters are the
    function's arguments, and where it is a policy gradient those of the ratio layer
    (`objective.ratio_layer.apply_layer`).

    Also an expression of these: `tropd(k=32) * iw_opd(gamma=1)` is tropd, every term times the
    weight of iw_opd; `0.5 * opd + gkd` a sum.
    """
    if expression.is_expression(name) and name not in METHODS and not _file(name):
        if arguments:
            raise UserError(
                f"arguments of {name!r} belong inside the expression: {expression.EXAMPLE}"
            )
        return expression.evaluate(name, load)
    function = function_of(name)
    given = {k: _frozen(v) for k, v in arguments.items()}
    own, layer = _divided(function, name, given)
    with own_code(f"method {name!r} cannot be used", path_of(name), CALL_SECONDS):
        try:
            bound = inspect.signature(function).bind(**own)
            bound.apply_defaults()
            made = _method(function(*bound.args, **bound.kwargs), name)
            objective = ratio_layer.apply_layer(made.objective, **layer)
            str(objective)  # signals and losses of one's own must be dataclasses to have words
        except (TypeError, ValueError) as error:
            if is_address(name):
                raise  # with the line in the file
            raise UserError(f"method {name!r}: {error}") from error
    if not objective.terms:
        raise UserError(
            f"method {name!r} returned an objective without a term, which trains nothing: put a "
            "loss into it, as in Objective(PolicyGradient(...))"
        )
    # else it is made of methods that have been looked at
    if name not in METHODS and made.name in ("", "own"):
        credits.refuse(objective, name)
    shown = {
        k: v for k, v in ratio_layer.settings_of(objective).items() if k not in bound.arguments
    }
    doc = inspect.getdoc(function) or ""
    return replace(
        made,
        objective=objective,
        name=name,
        arguments=(*bound.arguments.items(), *shown.items()),
        summary=" ".join(doc.split("\n\n")[0].split()),
        doc=doc,
    )


def _divided(
    function: Callable[..., Any], name: str, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that are the function's own, and those of the ratio layer."""
    with own_code(f"method {name!r} cannot be used", path_of(name)):
        known = list(inspect.signature(function).parameters)
    own = {k: _typed(_hint(function, k), k, v, name) for k, v in given.items() if k in known}
    numbers = dict.fromkeys(ratio_layer.NUMBERS, float | None)
    layer = {k: _typed(numbers.get(k), k, v, name) for k, v in given.items() if k not in known}
    for argument, value in (own | layer).items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(
                f"method {name!r}: {argument}=nan is no number, and what is computed with it would "
                "be none: give one"
            )
    for argument in layer:
        if argument not in ratio_layer.SETTINGS:
            every = list(dict.fromkeys([*known, *_layer_of(function)]))
            raise UserError(
                f"method {name!r} has no argument {argument!r}{nearest(argument, every)}"
            )
    return own, layer


def _hint(function: Callable[..., Any], argument: str) -> Any:
    """What a function declares an argument to be; None where it does not say."""
    try:
        return get_type_hints(function).get(argument)
    except Exception:  # annotations of one's own that mean nothing here
        return None


def _typed(hint: Any, argument: str, value: Any, name: str) -> Any:
    """An argument as it is declared, where that is a plain type; else as it is.

    Infinity is a number where fractions are: some arguments have it for "off".
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    plain = set(kinds) <= {int, float, str, bool, NoneType}
    if not plain or (float in kinds and value in (math.inf, -math.inf)):
        return value
    made = convert(hint, value, f"method {name!r}: {argument}")
    return value if made == value else made  # 1 stays 1 where 1.0 would do


def _layer_of(function: Callable[..., Any]) -> list[str]:
    """The ratio layer's arguments where a method takes them at its defaults."""
    try:
        return list(ratio_layer.settings_of(_method(function(), "").objective))
    except (TypeError, ValueError, UserError):  # it has no defaults
        return []


def _method(made: Any, name: str) -> Method:
    """What a method's function returned, as a Method."""
    if isinstance(made, (Objective, Term, Loss)):
        return Method(Objective(made))
    if isinstance(made, Method):
        return made
    raise UserError(
        f"{name} returned {shown(made)} ({type(made).__name__}), which cannot be minimised: "
        "return an Objective or a Method"
    )


def _file(name: str) -> bool:
    """Whether a name is the address of a file that is there, whatever signs its path has."""
    path, _, function = name.rpartition(":")
    return is_address(name) and function.isidentifier() and Path(path).expanduser().is_file()


def _frozen(value: Any) -> Any:
    """Lists from YAML as tuples, as parts of a method are hashable; and 1e-3, which YAML reads as
    text, as a number.
    """
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
