"""OPD, and a tenth of the KL to a moving average of the student, a model of one's own.

opdkit check examples/own_ema.py:steady
opdkit train --recipe gsm8k --method examples/own_ema.py:steady method.rate=0.05
"""

from copy import deepcopy
from dataclasses import dataclass

from torch import nn

import opdkit
import opdkit.objective as o


@dataclass(frozen=True)
class Average(o.Companion):
    rate: float
    model = "average"  # the name under which formulas read it

    def build(self, around):
        return Averaged(around, self.rate)


class Averaged(nn.Module, o.CompanionState):
    def __init__(self, around, rate):
        super().__init__()
        self.average = around.placed(deepcopy(around.model).requires_grad_(False))
        self.rate, self.source = rate, around.scorer(self.average).source

    def after_step(self, stepped):
        for mine, theirs in zip(self.average.parameters(), stepped.model.parameters()):
            mine.lerp_(theirs.detach(), self.rate)


def steady(rate: float = 0.01):
    pull = o.Divergence("reverse_kl", teacher="average") * 0.1
    opd = o.PolicyGradient(o.LogRatio("teacher", "student"))
    return opdkit.Method(opd + pull, companions=(Average(rate),))
