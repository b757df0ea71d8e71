"""A value head of one's own: a loss that is a companion too, read as a baseline.

opdkit check examples/own_value_head.py:valued
opdkit train --recipe gsm8k --method examples/own_value_head.py:valued method.rate=1e-3
"""

from dataclasses import dataclass

from torch import nn

import opdkit.objective as o


@dataclass(frozen=True)
class Regress(o.TokenLoss, o.Companion):
    """(v - reward)^2, v a linear number of the student's hidden state, with an AdamW of its own."""

    rate: float

    def build(self, around):
        head = nn.Linear(around.width("student"), 1, device=around.device, dtype=around.dtype)
        return o.Trained(head, self.rate)

    def value(self, live):  # [n]
        v = live.companion(self)(live.hidden)[:, 0]
        return (v - live.pick(o.Reward())) ** 2


def valued(rate: float = 1e-3):
    """Reward, less what was to be expected of it, on top of OPD."""
    regress = Regress(rate)
    credit = o.LogRatio("teacher", "student") + o.Reward() - o.Value(regress)
    return o.PolicyGradient(credit) + regress * 0.5
