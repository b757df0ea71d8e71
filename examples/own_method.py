"""A method of one's own: no registration, no fork.

opdkit check examples/own_method.py:confident_opd
opdkit train --recipe gsm8k --method examples/own_method.py:confident_opd method.temperature=0.5
"""

from opdkit.objective import Entropy, Exp, LogRatio, MeanOne, Objective, PolicyGradient


def confident_opd(temperature: float = 1.0) -> Objective:
    """OPD that listens to the teacher where the teacher is sure: weight exp(-entropy /
    temperature), mean 1 over the step.
    """
    sure = Exp(Entropy("teacher") * (-1 / temperature))
    return Objective(PolicyGradient(LogRatio("teacher", "student")) * MeanOne(sure))
