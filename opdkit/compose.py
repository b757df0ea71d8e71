"""The algebra of methods: one times the weight of another, sums, the expressions that spell them, and what is refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

from opdkit.curricula import Curriculum, Mixed, PassRates, Plain
from opdkit.curricula.base import Ask, Memory, Reference
from opdkit.errors import UserError
from opdkit.facts import per_rollout
from opdkit.losses import Clipped
from opdkit.objective import Const, Number, Objective, Operation, RolloutLoss, Signal, credit_of
from opdkit.signals import Ceiling, Exp, Floor, LogRatio, MeanOne, RowMean, ToGo
from opdkit.types import Prompt, Rollout, Sampling

# ----------------------------------------------------------------------------------------------------------- weights


AGAIN = (
    "{name} already carries the weight of {source}: twice the same mask says nothing new, twice the same weight is its square. "
    "Leave one of them out"
)


def factors(signal: Signal) -> tuple[Signal, ...]:
    """What a product multiplies, numbers left out."""
    if isinstance(signal, Operation) and signal.name == "*":
        return tuple(f for part in signal.of for f in factors(part))
    return () if isinstance(signal, Const) else (signal,)


def weight(objective: Objective, name: str) -> Signal:
    """The weight of a method: what its loss is multiplied by, which can multiply another method's loss as well.

    One term: its weight. Several: the factors that all of them have; where they have none in common but divide the rollouts
    among themselves (SCOPE: right and wrong ones), each rollout's weight in its own term.
    """
    terms = objective.terms
    every = [factors(term.weight) for term in terms]
    inside = [tuple(f for f in several if not _is_cap(f)) for several in every]
    shared = [f for f in inside[0] if all(f in others for others in inside[1:])]
    if len(terms) == 1 and shared:
        found = terms[0].weight
    elif shared:
        found = reduce(lambda a, b: a * b, shared)
    elif _apart(inside):
        found = reduce(lambda a, b: a + b, (term.weight for term in terms))
    else:
        why = "its loss is not multiplied by any signal"
        if len(terms) > 1 and any(inside):
            why = "its terms are weighted each in its own way, which chooses between losses"
        raise UserError(
            f"{name} has no weight to multiply another method by: {why}. "
            f"Weights come from methods such as iw_opd, tip, paced, drift_gating, position_opd and scope; add {name} with + instead"
        )
    if every != inside or any(isinstance(term.loss, Clipped) for term in terms):
        raise UserError(
            f"{name} gives clip, dual_clip or rollout_cap, which belong to its own loss, and only its weight is taken: give them to the "
            "method on the left, or leave them out"
        )
    return found


def _is_cap(factor: Signal) -> bool:
    """The truncated trainer/sampler weight that `rollout_cap` puts on a policy gradient."""
    moved = LogRatio("student", "sampler")
    return isinstance(factor, Ceiling) and factor.of in (Exp(moved), Exp(RowMean(moved)))


def _apart(inside: Sequence[tuple[Signal, ...]]) -> bool:
    """Whether every two terms look at different rollouts: one has a signal per rollout and the other its opposite."""

    def opposite(a: tuple[Signal, ...], b: tuple[Signal, ...]) -> bool:
        return any(~f in b and per_rollout(f) for f in a)

    pairs = [(a, b) for i, a in enumerate(inside) for b in inside[:i]]
    return bool(pairs) and all(opposite(a, b) or opposite(b, a) for a, b in pairs)


def weigh(objective: Objective, name: str, by: Signal, source: str) -> Objective:
    """Every term of `objective` times the signal `by` of `source`; denominators stay as they are."""
    for term in objective.terms:
        if isinstance(term.loss, RolloutLoss) and not per_rollout(by):
            raise UserError(
                f"{name} has a loss over whole rollouts ({term.loss}), which has no value per token that {source} could weigh: "
                "use a weight per rollout (paced, scope), or a loss over tokens"
            )
        if set(factors(by)) & set(factors(term.weight)):
            raise UserError(AGAIN.format(name=name, source=source))
    try:
        own = weight(objective, name)
    except UserError:
        own = Const(1)
    if own == by:
        raise UserError(AGAIN.format(name=name, source=source))
    return objective * by


def scale(objective: Objective, number: Number) -> Objective:
    """A multiple of every term."""
    if not 0 < number < float("inf"):
        raise UserError(
            f"a method times {number:g}: a method can be multiplied by a positive number only. 0 trains nothing, and a negative number "
            "drives the student away from what the method teaches"
        )
    return objective * number


# --------------------------------------------------------------------------------------------------------- curricula


@dataclass(frozen=True)
class Together:
    """Several curricula: the one that decides who writes does so, each remembers what it needs."""

    parts: tuple[Curriculum, ...]

    @property
    def validates(self) -> bool:
        return any(part.validates for part in self.parts)

    @property
    def writer(self) -> Curriculum:
        return next((part for part in self.parts if writes(part)), Plain())

    def source(self, step: int, total_steps: int, seed: int, memory: Memory) -> str:
        return self.writer.source(step, total_steps, seed, memory)

    def plan(
        self, prompts: Sequence[Prompt], sampling: Sampling, reference: Reference, step: int, total_steps: int, memory: Memory
    ) -> list[Ask]:
        return self.writer.plan(prompts, sampling, reference, step, total_steps, memory)

    def replay(self, count: int, step: int, seed: int, memory: Memory) -> list[Rollout]:
        return self.writer.replay(count, step, seed, memory)

    def observe(self, rollouts: Sequence[Rollout], memory: Memory) -> Memory:
        return reduce(lambda known, part: part.observe(rollouts, known), self.parts, memory)

    def validated(self, loss: float, memory: Memory) -> Memory:
        return reduce(lambda known, part: part.validated(loss, known), self.parts, memory)


def writes(curriculum: Curriculum) -> bool:
    """Whether it decides who writes the responses or to which prompts; others only remember."""
    return any(getattr(type(curriculum), n) is not getattr(Plain, n) for n in ("source", "plan", "replay"))


def join(a: Curriculum, b: Curriculum, names: tuple[str, str]) -> Curriculum:
    """Both curricula at once, where they do not contradict each other."""
    every = [part for c in (a, b) for part in (c.parts if isinstance(c, Together) else (c,))]
    parts = tuple(dict.fromkeys(part for part in every if part not in (Plain(), Mixed(1.0))))
    writers = [part for part in parts if writes(part)]
    if len(writers) > 1 or len({type(part) for part in parts}) < len(parts):
        raise UserError(
            f"{names[0]} and {names[1]} cannot be combined: each brings its own curriculum, {' and '.join(map(str, parts))}, and only one "
            "can decide. Choose arguments that switch one of them off"
        )
    other = next((part for part in writers if type(part).source is not Plain.source), None)
    if other is not None and any(isinstance(part, PassRates) for part in parts):
        raise UserError(
            f"{names[0]} and {names[1]} cannot be combined: one weighs prompts by how often the student now solves them, and with {other} "
            "not every response is the student's own of this step. Let the student write every batch (lmbda=1, schedule=None)"
        )
    made = cast(Curriculum, Together(parts))  # whether it validates depends on its parts
    return made if len(parts) > 1 else parts[0] if parts else a


def keeper(curriculum: Curriculum, name: str) -> Curriculum:
    """What a weight brings along: memory, but not a decision about who writes, which is that of the method it multiplies."""
    if curriculum != Mixed(1.0) and writes(curriculum):
        raise UserError(
            f"{name} as a weight would also bring its curriculum {curriculum}, which decides who writes the responses; that is for the "
            "method on the left to say. Use it there, or as a weight without that curriculum"
        )
    return curriculum


# --------------------------------------------------------------------------------------------- credits that are wrong


def refuse(objective: Objective, name: str) -> None:
    """Credits that point in no direction of a divergence, or forget how far the teacher is."""
    for credit in (credit_of(term.loss) for term in objective.terms):
        if not isinstance(credit, Signal):
            continue
        estimator = wrong_estimator(credit)
        if estimator:
            raise UserError(
                f"{name}: the credit {credit} holds {estimator}, an estimator of a KL other than the log-ratio. As a reward its policy "
                "gradient is that of neither direction of the KL: credit log(teacher/student), or backpropagate Estimator(...) as a loss"
            )
        if standardised(credit):
            raise UserError(
                f"{name}: the credit {credit} standardises the teacher's log-ratio by its own statistics over the step. The sign and size of "
                "log(teacher/student) then no longer say whether and how far the teacher disagrees: tokens it likes less than the average "
                "are pushed down, and the credit never shrinks as the student arrives. Take the log-ratio as it is; only rewards are "
                "standardised (Advantage), and `minillm`, whose definition includes it"
            )


OWN = ("student", "sampler", "live")  # models that are the student itself
LINEAR = (ToGo, RowMean, Floor, Ceiling)  # of an estimator they are still one


def addends(signal: Signal, by: float = 1.0) -> list[tuple[float, Signal]]:
    """A sum as (coefficient, what is added): numbers multiplied out, nothing else."""
    if isinstance(signal, Operation):
        if signal.name in ("+", "-"):
            a, b = signal.of
            return addends(a, by) + addends(b, by if signal.name == "+" else -by)
        if signal.name == "negative":
            return addends(signal.of[0], -by)
        if signal.name in ("*", "/") and isinstance(signal.of[1], Const):
            number = float(signal.of[1].number)
            return addends(signal.of[0], by * number if signal.name == "*" else by / number)
        if signal.name == "*" and isinstance(signal.of[0], Const):
            return addends(signal.of[1], by * float(signal.of[0].number))
    return [(by, signal)]


def log_ratio(signal: Signal) -> tuple[float, LogRatio] | None:
    """c and log(other/student) where a signal is c times that, written either way round."""
    c, ratio = addends(signal)[0]
    if not isinstance(ratio, LogRatio) or len(addends(signal)) > 1 or (ratio.a in OWN) == (ratio.b in OWN):
        return None
    return (-c, LogRatio(ratio.b, ratio.a)) if ratio.a in OWN else (c, ratio)


def wrong_estimator(credit: Signal, inside: bool = False) -> str:
    """k3, k2 or |log-ratio| in a credit, by name; "" where there is none. exp(d) + d, with equal signs, is both directions: allowed."""
    straight: dict[LogRatio, float] = {}
    curved: dict[LogRatio, float] = {}
    for c, part in addends(credit):
        ratio = log_ratio(part)
        power = log_ratio(part.of) if isinstance(part, Exp) else None
        if ratio:
            straight[ratio[1]] = straight.get(ratio[1], 0.0) + c * ratio[0]
        elif power and power[0] == 1:
            curved[power[1]] = curved.get(power[1], 0.0) + c
        elif isinstance(part, Operation) and part.name == "abs" and log_ratio(part.of[0]) and not inside:
            return f"|{part.of[0]}|"
        elif isinstance(part, Operation) and part.name == "*":
            found = [log_ratio(_bare(f)) for f in factors(part)]
            ratios = [r[1] for r in found if r]
            if len(ratios) > len(set(ratios)) and not inside:
                return "k2 (a squared log-ratio)"
            deeper = next((w for f in factors(part) if (w := wrong_estimator(f, inside=True))), "")
            if deeper:
                return deeper
        elif isinstance(part, LINEAR) and (deeper := wrong_estimator(part.of, inside)):
            return deeper
    return "k3" if any(c * straight.get(ratio, 0.0) < 0 for ratio, c in curved.items()) else ""


def _bare(signal: Signal) -> Signal:
    """A signal without its absolute value."""
    return signal.of[0] if isinstance(signal, Operation) and signal.name == "abs" else signal


def standardised(credit: Signal) -> bool:
    """Whether a credit divides another model's log-ratio by its own statistics over the step."""
    if getattr(credit, "standardises", False):
        return reads_other(credit)
    if isinstance(credit, MeanOne):
        return any(log_ratio(f) for _, part in addends(credit.of) for f in factors(part))
    return any(standardised(part) for part in parts_of(credit))


def reads_other(signal: Signal) -> bool:
    """Whether a log-ratio to another model than the student is in a signal."""
    return log_ratio(signal) is not None or any(map(reads_other, parts_of(signal)))


def parts_of(signal: Signal) -> list[Signal]:
    """The signals a signal is made of."""
    fields = [x for value in vars(signal).values() for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in fields if isinstance(x, Signal)]


# -------------------------------------------------------------------------------------------------------- expressions

ADDRESS = re.compile(r"""[^\s*+(),="']+\.py:[A-Za-z_]\w*""")  # file.py:function, inside an expression
HIDDEN = "address_in_expression_"
EXAMPLE = "write for example 'tropd(k=32) * iw_opd(gamma=1)' or '0.5 * opd + gkd', in quotes on the command line"


def is_expression(text: str) -> bool:
    """Whether a text spells more than a method's name."""
    return any(sign in text for sign in "*+(")


def evaluate(text: str, leaf: Callable[..., Any]) -> Any:
    """The value of an expression: `leaf(name, **arguments)` for each method, joined by * and +. Nothing in it is executed."""
    tree, addresses = parse(text)

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Add)):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Mult):
                return left * right
            if not any(isinstance(x, (int, float)) for x in (left, right)):
                return left + right
            raise UserError(f"in {text!r} a number is added to a method: numbers multiply, as in '0.5 * opd + gkd'")
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.Name):
            return leaf(addresses.get(node.id, node.id))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.args or any(k.arg is None for k in node.keywords):
                raise UserError(f"in {text!r} the arguments of {node.func.id} must be given by name: {EXAMPLE}")
            arguments = {str(k.arg): _literal(k.value, text) for k in node.keywords}
            return leaf(addresses.get(node.func.id, node.func.id), **arguments)
        raise UserError(f"{text!r} cannot be read at {ast.unparse(node)!r}: methods are joined by * and + only; {EXAMPLE}")

    made = value(tree)
    if isinstance(made, (int, float)):
        raise UserError(f"{text!r} is a number, not a method: {EXAMPLE}")
    return made


def parse(text: str) -> tuple[ast.expr, dict[str, str]]:
    """The tree of an expression, and the addresses (file.py:function) that stand behind the names it puts for them."""
    addresses: dict[str, str] = {}

    def hide(found: re.Match[str]) -> str:
        name = f"{HIDDEN}{len(addresses)}"
        addresses[name] = found[0]
        return name

    try:
        return ast.parse(ADDRESS.sub(hide, text).strip(), mode="eval").body, addresses
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{text!r} is neither the name of a method nor an expression of methods: {EXAMPLE}") from None


def _literal(node: ast.expr, text: str) -> Any:
    """An argument: a number, a text with or without quotes, true, false, None, or several in brackets."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None}.get(node.id, node.id)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_literal(x, text) for x in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UserError(f"in {text!r} the argument {ast.unparse(node)!r} is not a number, a text or a list of these") from None


def bracketed(name: str, right: bool = False) -> str:
    """The name of a method as a factor: in brackets where it is a sum, and to the right of * where it is a product."""
    try:
        tree, _ = parse(name)
    except UserError:  # a path with signs in it
        return name
    return f"({name})" if isinstance(tree, ast.BinOp) and (right or isinstance(tree.op, ast.Add)) else name


def base_of(name: str) -> str | None:
    """The method that a product of methods multiplies, as text; None where the name is no such product."""
    try:
        tree, addresses = parse(name)
    except UserError:  # a path with signs in it
        return None
    base = tree
    while isinstance(base, ast.BinOp) and isinstance(base.op, ast.Mult) and not isinstance(base.left, ast.Constant):
        base = base.left
    text = reduce(lambda t, pair: t.replace(*pair), addresses.items(), ast.unparse(base))
    return None if base is tree else text
