"""Credits that are wrong: estimators that are no reward, and log-ratios divided by their own
statistics.

Credits are signals, [B, T] or [B, 1] once a step is known; they are judged by how they are written.
"""

from __future__ import annotations

from opdkit.base.errors import UserError
from opdkit.objective.formula import Const, Operation, Signal, factors
from opdkit.objective.grammar import Objective, credit_of
from opdkit.objective.signals import Ceiling, Exp, Floor, LogRatio, MeanOne, RowMean, ToGo


def refuse(objective: Objective, name: str) -> None:
    """Credits that point in no direction of a divergence, or forget how far the teacher is."""
    for credit in (credit_of(term.loss) for term in objective.terms):
        if not isinstance(credit, Signal):
            continue
        estimator = wrong_estimator(credit)
        if estimator:
            raise UserError(
                f"{name}: the credit {credit} holds {estimator}, an estimator of a KL other than "
                "the log-ratio. As a reward its policy gradient is that of neither direction of "
                "the KL: credit log(teacher/student), or backpropagate Estimator(...) as a loss"
            )
        if standardised(credit):
            raise UserError(
                f"{name}: the credit {credit} standardises the teacher's log-ratio by its own "
                "statistics over the step. The sign and size of log(teacher/student) then no "
                "longer say whether and how far the teacher disagrees: tokens it likes less than "
                "the average are pushed down, and the credit never shrinks as the student arrives. "
                "Take the log-ratio as it is; only rewards are standardised (Advantage), and "
                "`minillm`, whose definition includes it"
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
    if (
        not isinstance(ratio, LogRatio)
        or len(addends(signal)) > 1
        or (ratio.a in OWN) == (ratio.b in OWN)
    ):
        return None
    return (-c, LogRatio(ratio.b, ratio.a)) if ratio.a in OWN else (c, ratio)


def wrong_estimator(credit: Signal, inside: bool = False) -> str:
    """k3, k2 or |log-ratio| in a credit, by name; "" where there is none. exp(d) + d, with equal
    signs, is both directions: allowed.
    """
    straight: dict[LogRatio, float] = {}
    curved: dict[LogRatio, float] = {}
    for c, part in addends(credit):
        ratio = log_ratio(part)
        power = log_ratio(part.of) if isinstance(part, Exp) else None
        if ratio:
            straight[ratio[1]] = straight.get(ratio[1], 0.0) + c * ratio[0]
        elif power and power[0] == 1:
            curved[power[1]] = curved.get(power[1], 0.0) + c
        elif (
            isinstance(part, Operation)
            and part.name == "abs"
            and log_ratio(part.of[0])
            and not inside
        ):
            return f"|{part.of[0]}|"
        elif isinstance(part, Operation) and part.name == "*":
            found = [log_ratio(_without_abs(f)) for f in factors(part)]
            ratios = [r[1] for r in found if r]
            if len(ratios) > len(set(ratios)) and not inside:
                return "k2 (a squared log-ratio)"
            deeper = next((w for f in factors(part) if (w := wrong_estimator(f, inside=True))), "")
            if deeper:
                return deeper
        elif isinstance(part, LINEAR) and (deeper := wrong_estimator(part.of, inside)):
            return deeper
    return "k3" if any(c * straight.get(ratio, 0.0) < 0 for ratio, c in curved.items()) else ""


def _without_abs(signal: Signal) -> Signal:
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
    fields = [
        x
        for value in vars(signal).values()
        for x in (value if isinstance(value, tuple) else (value,))
    ]
    return [x for x in fields if isinstance(x, Signal)]
