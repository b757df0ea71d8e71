"""Is a formula right? `evaluate` an objective on plain logits, and `check` what every method must
keep; no model is needed.
"""

from opdkit.objective.alignment import Alignment
from opdkit.testing.case import AnyObjective, Case, Evaluation, TermOut, evaluate
from opdkit.testing.check import CheckFailed, Report, check
from opdkit.testing.fabricate import KEYS, fabricate

__all__ = [
    "KEYS",
    "Alignment",
    "AnyObjective",
    "Case",
    "CheckFailed",
    "Evaluation",
    "Report",
    "TermOut",
    "check",
    "evaluate",
    "fabricate",
]
