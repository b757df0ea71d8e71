"""What is refused of a teacher: facts that it cannot say."""

from __future__ import annotations

from collections.abc import Iterable

from opdkit.base.errors import UserError
from opdkit.objective.facts import Fact

REMEDY = "use a teacher in this process (teacher=MODEL), or one behind `opdkit serve-teacher`"


def refuse_facts(name: str, who: str, cannot: Iterable[Fact], remedy: str = REMEDY) -> None:
    """The error for facts that a teacher cannot supply."""
    if unsaid := sorted(fact.words() for fact in cannot):
        raise UserError(
            f"method {name!r} reads {', '.join(unsaid)}, which {who} cannot say: it returns "
            "log-probs of the sampled tokens and of the teacher's own most probable ones. "
            f"{remedy[0].upper() + remedy[1:]}, or a form of the method that reads less, such as a "
            "support on the teacher's top k"
        )
