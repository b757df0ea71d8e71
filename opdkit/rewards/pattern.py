"""The reward `regex:PATTERN`: what the pattern finds in the response is the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from opdkit.base.errors import UserError
from opdkit.rewards.extract import after_thinking, truth
from opdkit.rewards.quantity import quantity
from opdkit.types import Rollout


@dataclass(frozen=True)
class Pattern:
    """1.0 where group 1 of the last match (the whole match where the pattern has no group) equals
    row["answer"].

    What stands in a thought does not count, unless the pattern names it. Equal as text, white space
    around both aside, or as a number: 1,000 is 1000.0.
    """

    confined = False

    pattern: str
    compiled: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"reward 'regex:{self.pattern}' is not a regular expression: {error}. Write for "
                "example regex:answer is (\\d+)"
            ) from None
        object.__setattr__(self, "compiled", compiled)

    def __call__(self, rollout: Rollout) -> float:
        answer = truth(rollout, "regex").strip()
        # a pattern may ask for a thought itself
        text = rollout.text if "think" in self.pattern else after_thinking(rollout.text)
        found = list(self.compiled.finditer(text))
        if not found:
            return 0.0
        said = (found[-1][min(self.compiled.groups, 1)] or "").strip()
        if said == answer:
            return 1.0
        a, b = quantity(said), quantity(answer)
        return float(a is not None and b is not None and a.equals(b))
