"""Evaluation: a model's answers scored, with confidence intervals over problems."""

from opdkit.eval.evaluate import EvalResult, evaluate_model
from opdkit.eval.intervals import Interval
from opdkit.eval.stats import Estimate, avg_at_k, paired_difference, pass_at_k

__all__ = [
    "Estimate",
    "EvalResult",
    "Interval",
    "avg_at_k",
    "evaluate_model",
    "paired_difference",
    "pass_at_k",
]
